"""Linear layers: each pass and the whole step, dense against sparse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.problems import Problem, linear_problem
from benchmarks.shapes import Case, LinearShape
from benchmarks.timing import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_linear(
    linear_case: Case, measure_pass: Callable[[Case, Problem], None], device: str, dtype: torch.dtype
) -> None:
    case = linear_case
    assert isinstance(case.shape, LinearShape)
    measure_pass(case, linear_problem(case.shape, case.block, case.sparsity, device, dtype))
