"""Linear layers: each pass and the whole step, dense against sparse."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.problems import Problem, linear_problem
from benchmarks.shapes import Case, LinearShape
from benchmarks.timing import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_linear(linear_case: Case, measure_pass: Callable[[Case, Problem], None]) -> None:
    assert isinstance(linear_case.shape, LinearShape)
    measure_pass(linear_case, linear_problem(linear_case.shape, linear_case.block, linear_case.sparsity))
