"""Pruning to real sparse storage: score, mask, prune, step down the ladder, rewind.

Everything loads on first use. ``structured`` (whole filters, dense in the end) is a subpackage.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .criteria import CRITERIA, compute
    from .ladder import Level, Pruned, iterate, levels, prune_level_, remaining
    from .layers import prunable
    from .masks import SCOPES, prune_masks
    from .prune import apply_masks_, prune_
    from .rewinding import redense_, reinitialize_, rewind_

_HOME = {
    "CRITERIA": "criteria",
    "compute": "criteria",
    "Level": "ladder",
    "Pruned": "ladder",
    "iterate": "ladder",
    "levels": "ladder",
    "prune_level_": "ladder",
    "remaining": "ladder",
    "prunable": "layers",
    "SCOPES": "masks",
    "prune_masks": "masks",
    "apply_masks_": "prune",
    "prune_": "prune",
    "redense_": "rewinding",
    "reinitialize_": "rewinding",
    "rewind_": "rewinding",
}

__all__ = [
    "CRITERIA",
    "SCOPES",
    "Level",
    "Pruned",
    "apply_masks_",
    "compute",
    "iterate",
    "levels",
    "prunable",
    "prune_",
    "prune_level_",
    "prune_masks",
    "redense_",
    "reinitialize_",
    "remaining",
    "rewind_",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
