"""Named presets: the training recipes of the papers, as YAML files beside this module."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from sparsekern.training.config import TrainConfig, suggest
from sparsekern.training.errors import ConfigError

VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """One preset.

    Attributes:
        about: what it trains, one line.
        source: the paper, and what of it is not stated there.
        config: values of :class:`TrainConfig`.
    """

    name: str
    about: str
    source: str
    config: dict[str, Any]


def names() -> list[str]:
    """Recipes that are installed."""
    folder = resources.files(__name__)
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load(name: str) -> Recipe:
    """Read the recipe ``name``; :class:`ConfigError` for an unknown one."""
    if name not in names():
        raise ConfigError(suggest("recipe", name, names()))
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    if content.get("version") != VERSION:
        raise ConfigError(f"recipe {name}: expected version {VERSION}, got {content.get('version')}")
    TrainConfig.from_dict(content["config"], source=f"recipe {name}")
    return Recipe(name, content["about"], content["source"], content["config"])


def recipes_command() -> None:
    """List the recipes and their values."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for name in names():
        recipe = load(name)
        values = ", ".join(f"{key}={value}" for key, value in recipe.config.items())
        console.print(Text(name, style="bold"))
        for line in (recipe.about, recipe.source, values):
            console.print(Text(f"  {line}"))
