"""The host emulation that tests the CUDA kernels: its packed indices are the package's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sparsekern.layout import BlockGrid, BlockLayout, IndexView, index_view

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def test_support(tmp_path_factory):
    """Path of the compiled tests/emulation/test_support.cpp."""
    program = tmp_path_factory.mktemp("emulation") / "test_support"
    sources = ROOT / "tests/emulation/test_support.cpp"
    includes = [f"-I{ROOT / path}" for path in ("tests/emulation", "csrc/cuda")]
    subprocess.run([COMPILER, "-std=c++17", "-O0", "-DSK_EMULATE", *includes, sources, "-o", program], check=True)
    return program


def test_packed_index_is_the_layouts(test_support):
    seen = set()
    for seed in range(60):
        run = subprocess.run([test_support, "--index", str(seed)], check=True, capture_output=True, text=True)
        sizes, mask, packed = ([int(word) for word in line.split()] for line in run.stdout.splitlines())
        groups, out, in_per_group, r, s, bo, bi, capacity = sizes
        grid = BlockGrid((out, in_per_group, r, s), (bo, bi), groups)
        block_mask = torch.tensor(mask, dtype=torch.bool).reshape(grid.shape)
        layout = BlockLayout.from_block_mask(grid, block_mask, capacity=capacity)
        mine = index_view(grid, torch.tensor(packed, dtype=torch.int32))
        for name in IndexView.__dataclass_fields__:
            assert torch.equal(getattr(mine, name), getattr(layout.view, name)), f"seed {seed}: {name}"
        seen.add((bo, bi, groups, layout.nnz == 0))
    assert len({(bo, bi) for bo, bi, _, _ in seen}) == 16, "expected every pair of block edges"
    assert {groups for _, _, groups, _ in seen} == {1, 2, 3}
    assert {empty for *_, empty in seen} == {True, False}
