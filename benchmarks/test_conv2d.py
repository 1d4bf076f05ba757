"""Convolutions in both memory formats: each pass and the whole step, dense against sparse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.problems import Problem, conv_problem
from benchmarks.shapes import Case, ConvShape
from benchmarks.timing import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_conv2d(
    conv2d_case: Case, measure_pass: Callable[[Case, Problem], None], device: str, dtype: torch.dtype
) -> None:
    case = conv2d_case
    assert isinstance(case.shape, ConvShape)
    measure_pass(case, conv_problem(case.shape, case.memory_format, case.block, case.sparsity, device, dtype))
