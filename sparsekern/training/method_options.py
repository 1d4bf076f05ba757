"""Which options each method of dynamic sparse training takes, so that one given in vain is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsekern.training.errors import ConfigError

_DROPS = ("drop_fraction", "update_every", "stop_fraction", "drop_schedule", "drop_by")
_MOVES = (*_DROPS, "new_values", "min_per_row", "min_per_col")

TAKES: dict[str, tuple[str, ...]] = {
    "static": (),
    "set": (*_MOVES, "scope", "growth"),
    "rigl": (*_MOVES, "scope", "exact"),
    "srigl": (*_DROPS, "new_values", "exact", "ablation"),
    "snfs": (*_MOVES, "scope", "capacity"),
    "dsr": (*_MOVES, "threshold", "capacity"),
    "gradual": (
        "update_every",
        "start_fraction",
        "stop_fraction",
        "initial_sparsity",
        "compact_at",
        "sparse_below",
        "drop_by",
        "min_per_row",
        "min_per_col",
        "scope",
    ),
}
METHODS = tuple(TAKES)
METHOD_FIELDS = tuple(dict.fromkeys(name for names in TAKES.values() for name in names))

# They move blocks between layers: a layer needs free slots for what it gains.
_NEEDS_CAPACITY = ("snfs", "dsr")


def without_foreign(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """``values`` of a preset without the options that another ``method`` than the preset's does not take."""
    taken = TAKES.get(method, METHOD_FIELDS)
    return {name: value for name, value in values.items() if name not in METHOD_FIELDS or name in taken}


def check_method(method: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """:class:`ConfigError` for an option that ``method`` does not take, or one that it needs.

    Args:
        values, defaults: of every field of the configuration.
    """
    for name in METHOD_FIELDS:
        if name not in TAKES[method] and values[name] != defaults[name]:
            owners = [other for other, names in TAKES.items() if name in names]
            raise ConfigError(
                f"{name}: method {method} takes no {name} (taken by: {', '.join(owners)}), got {_text(values[name])}; "
                f"leave it at {_text(defaults[name])} or choose another method"
            )
    starts_from_file = values["init"] is not None
    if method != "static" and values["sparsity"] == 0 and not values["override"] and not starts_from_file:
        raise ConfigError(f"method: {method} needs a sparsity above 0, got 0; give --sparsity, or --method static")
    if method in _NEEDS_CAPACITY and values["capacity"] <= 1.0:
        raise ConfigError(
            f"capacity: method {method} moves blocks between layers, so expected a factor above 1, got "
            f"{values['capacity']:g}; 1.5 to 3 is usual"
        )
    if method == "gradual":
        _check_gradual(values)
    elif method != "static" and values["drop_fraction"] == 0:
        raise ConfigError(f"drop_fraction: method {method} needs a fraction above 0, got 0; or choose --method static")


def _check_gradual(values: Mapping[str, Any]) -> None:
    if values["initial_sparsity"] >= values["sparsity"]:
        raise ConfigError(
            f"initial_sparsity: expected less than sparsity ({values['sparsity']:g}), got "
            f"{values['initial_sparsity']:g}; gradual pruning goes up from the one to the other"
        )
    if values["start_fraction"] >= values["stop_fraction"]:
        raise ConfigError(
            f"start_fraction: expected less than stop_fraction ({values['stop_fraction']:g}), got "
            f"{values['start_fraction']:g}"
        )
    if values["sparse_below"] and not values["compact_at"]:
        raise ConfigError("sparse_below: takes effect where memory is freed, so it needs compact_at, got none")
    if values["budget"] != "params":
        raise ConfigError("budget: gradual pruning counts params, got macs")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{entry:g}" for entry in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
