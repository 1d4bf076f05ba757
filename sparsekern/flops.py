"""FLOP formulas of the operators for ``torch.utils.flop_counter``: stored blocks only.

That module imports Triton where it is installed, which takes five times as long as the rest of this package, so the
formulas are registered at the moment somebody else imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def linear(x: Shape, values: Shape, *args: Any, **kwargs: Any) -> int:
    """Forward of x [..., I], or dgrad of dy [..., O], with values [capacity, bo, bi]."""
    return 2 * math.prod(x[:-1]) * math.prod(values)


def linear_wgrad(dy: Shape, x: Shape, index: Shape, capacity: int, bo: int, bi: int, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(dy[:-1]) * capacity * bo * bi


def block_scores(dy: Shape, x: Shape, *args: Any, **kwargs: Any) -> int:
    """The whole dense gradient, absent blocks and stored ones."""
    return 2 * math.prod(dy) * x[-1]


def conv2d(x: Shape, values: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * out_shape[0] * out_shape[2] * out_shape[3] * math.prod(values)


def conv2d_dgrad(dy: Shape, values: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * dy[0] * dy[2] * dy[3] * math.prod(values)


def conv2d_wgrad(dy: Shape, x: Shape, index: Shape, capacity: int, bo: int, bi: int, *args: Any, **kwargs: Any) -> int:
    return 2 * dy[0] * dy[2] * dy[3] * capacity * bo * bi


def conv2d_block_scores(
    dy: Shape, x: Shape, index: Shape, bo: int, bi: int, kernel_size: Shape, stride: Shape, *args: Any, **kwargs: Any
) -> int:
    groups = args[2]  # after padding and dilation
    return 2 * math.prod(dy) * x[1] // groups * math.prod(kernel_size)


def linear_dense_wgrad(dy: Shape, x: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(dy) * x[-1]


def conv2d_dense_wgrad(
    dy: Shape, x: Shape, kernel_size: Shape, stride: Shape, padding: Shape, dilation: Shape, groups: int, **kwargs: Any
) -> int:
    return 2 * math.prod(dy) * x[1] // groups * math.prod(kernel_size)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.sparsekern
    register_flop_formula([ops.linear, ops.linear_dgrad])(linear)
    for formula in (
        linear_wgrad, block_scores, linear_dense_wgrad,
        conv2d, conv2d_dgrad, conv2d_wgrad, conv2d_block_scores, conv2d_dense_wgrad,
    ):  # fmt: skip
        register_flop_formula(getattr(ops, formula.__name__))(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Steps aside at the first import of the counter, and registers right after it."""

    def find_spec(
        self, name: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_when_asked() -> None:
    """Register now if the counter is imported, else when it is."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenImported())
