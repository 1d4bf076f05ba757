"""The host emulation that tests the CUDA kernels: its packed indices are the package's, and it notices faults.

The kernels' own tests are C++ (tests/emulation). Here faults are put into copies of the kernels, one at a time, and the
emulation must complain about each: a missing barrier or wait, one dimension taken for another, a wrong place in a
fragment.
"""

from __future__ import annotations

import subprocess
from collections import Counter

import pytest
import torch

from sparsekern.layout import BlockGrid, BlockLayout, IndexView, index_view

from . import cuda_mutations
from .cuda_mutations import COMPILER, FAMILIES, ROOT, Mutants, Mutation, sample

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


def survivors(family, folder, *, chosen=None, **how) -> Counter[str]:
    """Names of the mutations that are not noticed, with how often each occurs."""
    mutants = Mutants(family, folder, **how)
    assert mutants.run(0) == "", "the kernels fail as they are"
    assert mutants.mutations, "expected something to mutate"
    mutations: list[Mutation] = chosen(mutants.mutations) if chosen else mutants.mutations
    return Counter(mutation.name for mutation in mutants.survivors(mutations))


@pytest.mark.parametrize("family", FAMILIES)
def test_faults_are_noticed(family, tmp_path):
    assert not survivors(family, tmp_path, chosen=sample)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_fault_is_noticed(family, tmp_path):
    assert not survivors(family, tmp_path)


@pytest.mark.slow
def test_fragment_maps_matter(tmp_path):
    """A wrong map in the emulated multiply or matrix instruction shows: the kernels' own maps are the right ones."""
    (tmp_path / "stationary").mkdir(), (tmp_path / "wgrad").mkdir()
    left = survivors("stationary", tmp_path / "stationary", what="maps")
    left &= survivors("wgrad", tmp_path / "wgrad", what="maps")
    # Where the emulation names a thread in a complaint or reads out of bounds, which is a complaint already; and a
    # product of vectors, which switches leave as it is.
    exempt = ("warp [*] 32", "warp * 32 [+] l", "from [!=] nullptr", "from != nullptr", "a[row][k] [*] b[k]")
    assert not [name for name in left if not any(text in name for text in exempt)]


def test_a_mutation_is_the_source_with_one_change():
    text = """
    // barrier(); in a comment
    static_assert(a.h < 3, "a.h");
    if (x) barrier(); else y = a.stride_h * 2 + b[a.w];
    cp_async_wait<N - 2>();
    a.h = 1;
    """
    faults = cuda_mutations.Source("k.cuh", text, 1, set())
    faults.synchronization()
    faults.names()
    assert [m.name for m in faults.mutations] == [
        "k.cuh:4 barrier removed: barrier()",
        "k.cuh:5 wait removed: cp_async_wait<N - 2>()",
        "k.cuh:5 wait for fewer: cp_async_wait<N - 2>()",
        "k.cuh:4 taken for stride_w: a.stride_h",
        "k.cuh:4 taken for h: a.w",
    ]
    line = faults.instrumented().splitlines()[3]
    assert line.strip() == (
        "if (x) if (sktest::mutated(1)) {} else barrier(); "
        "else y = (sktest::mutated(4) ? a.stride_w : a.stride_h) * 2 + b[(sktest::mutated(5) ? a.h : a.w)];"
    )
    survey = cuda_mutations.Source("k.cuh", text, 1, {("k.cuh", 4, "operator *")})
    survey.operators()
    survey.conditions()
    assert [m.kind for m in survey.mutations] == ["operator +", "never", "always"]
    assert "2 +sktest::Operator<'+'>{1}+ b[a.w]" in survey.instrumented()
    assert "if (sktest::mutated(3) || (!sktest::mutated(2) && (x))) barrier();" in survey.instrumented()
