"""Families of GPU kernels: Triton's and those in CUDA C++, behind one interface.

A kernel of a family is named by how it is cut, a ``Tile`` (Triton) or a ``Plan`` (CUDA C++).
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from sparsekern.backends import ConvGeometry, OpDesc, get
from sparsekern.backends.cuda.plan import Plan
from sparsekern.backends.gpu.chips import Chip
from sparsekern.backends.gpu.problem import Problem
from sparsekern.backends.triton.tile import Tile
from sparsekern.layout import BlockGrid

Kernel = Tile | Plan


class Family(Protocol):
    """The functions of a family's module. ``geometry`` is None for a linear layer; images are channels_last."""

    def unsupported(self, desc: OpDesc) -> str | None:
        """Why this family can't do ``desc``, or None."""

    def candidates(self, problem: Problem, chip: Chip) -> tuple[Any, ...]:
        """Kernels worth trying for ``problem``."""

    def why_not(self, problem: Problem, kernel: Any, chip: Chip) -> str | None:
        """Why ``kernel`` can't run ``problem`` on this GPU, or None."""

    def seconds(self, problem: Problem, kernel: Any, chip: Chip) -> float:
        """Predicted time of one call."""

    def forward(
        self,
        x: Tensor,
        values: Tensor,
        index: Tensor,
        bias: Tensor | None,
        grid: BlockGrid,
        geometry: ConvGeometry | None,
        kernel: Any,
    ) -> Tensor:
        """y of x."""

    def dgrad(
        self,
        dy: Tensor,
        values: Tensor,
        index: Tensor,
        input_shape: tuple[int, ...],
        grid: BlockGrid,
        geometry: ConvGeometry | None,
        kernel: Any,
    ) -> Tensor:
        """dx of dy."""

    def wgrad(
        self,
        dy: Tensor,
        x: Tensor,
        index: Tensor,
        element_mask: Tensor | None,
        with_bias: bool,
        grid: BlockGrid,
        geometry: ConvGeometry | None,
        kernel: Any,
    ) -> tuple[Tensor, Tensor]:
        """dvalues and dbias of dy and x."""


def name_of(kernel: Kernel) -> str:
    """The family's name among ``backends.GPU``."""
    return "triton" if isinstance(kernel, Tile) else "cuda"


def family_of(kernel: Kernel) -> Family:
    """The module that runs ``kernel``."""
    module: Family = get(name_of(kernel))
    return module
