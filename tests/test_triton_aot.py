"""The gate that compiles shipped tiles without a GPU: what it records, what it reads, what it finds wrong.

``make test-aot`` compiles every tile; here a few, in a process of their own: this one has Triton's interpreter on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sparsekern.layout import BlockGrid

from .support import random_layout

pytest.importorskip("triton")

from sparsekern.backends.gpu import chips
from sparsekern.backends.gpu.problem import Problem
from sparsekern.backends.triton import aot, tiles
from sparsekern.backends.triton.compiled import Compiled, read
from sparsekern.backends.triton.launch import block_scores, linear, linear_wgrad
from sparsekern.backends.triton.tile import Tile

M, FEATURES = 256, 256
BLOCKS = [(16, 16), (64, 128)]
OPS = ("linear_forward", "linear_dgrad", "linear_wgrad", "block_scores")
ENV = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def compiler(*arguments, **how):
    """A Python process without the interpreter."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=ENV, **how)


def compared_tiles(arch):
    """One tile of each variant, op and block, in bfloat16 and float32."""
    seen = set()
    for problem, tile in tiles.shipped(arch):
        group = (problem.op, problem.dtype, problem.block, tile.variant)
        if problem.op not in OPS or problem.dtype not in ("bfloat16", "float32") or problem.block not in BLOCKS:
            continue
        if group not in seen:
            seen.add(group)
            yield replace(problem, m=M, out_features=FEATURES, in_features=FEATURES), tile


RECORD = """
import json, sys
from sparsekern.backends.gpu.problem import Problem
from sparsekern.backends.triton.tile import Tile
from sparsekern.backends.triton.recorded import calls
for line in sys.stdin:
    problem, tile = json.loads(line)
    problem["block"] = tuple(problem["block"])
    recorded = calls(Problem(**problem), Tile(**tile), 90)
    print(json.dumps([[c.kernel, c.arguments, c.constants, c.options] for c in recorded]))
"""

POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


def launched(problem, tile, monkeypatch):
    """What the launches hand to the kernels for real tensors: [(kernel, {argument: value})]."""
    from triton.runtime.interpreter import InterpretedFunction

    found = []

    def record(self, *args, grid, warmup, **kwargs):
        found.append((self.fn.__name__, {**dict(zip(self.arg_names, args)), **kwargs}))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    dtype = getattr(torch, problem.dtype)
    grid = BlockGrid((problem.out_features, problem.in_features), problem.block)
    layout = random_layout(grid, 0.5)
    x, dy = torch.randn(M, FEATURES, dtype=dtype), torch.randn(M, FEATURES, dtype=dtype)
    values, bias = torch.randn(layout.capacity, *problem.block, dtype=dtype), torch.randn(FEATURES, dtype=dtype)
    if problem.op == "linear_forward":
        linear.forward(x, values, layout.index, bias, grid, tile)
    elif problem.op == "linear_dgrad":
        linear.dgrad(dy, values, layout.index, grid, tile)
    elif problem.op == "linear_wgrad":
        for splits in (1, 2):
            linear_wgrad.wgrad(dy, x, layout.index, None, True, grid, tile, splits)
    else:
        block_scores.scores(dy, x, grid, tile)
    return found, layout.capacity


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_recorded_calls_are_those_of_the_launches(monkeypatch):
    """Kernels, constants, dtypes and options as real tensors get them."""
    cases = []
    for problem, tile in compared_tiles(90):
        real, capacity = launched(problem, tile, monkeypatch)
        cases.append((replace(problem, capacity=capacity), tile, real))
    assert {tile.variant for _, tile, _ in cases} == {"gather", "tma", "union", "panel", "scores"}
    lines = "\n".join(json.dumps([vars(problem), vars(tile)]) for problem, tile, _ in cases)
    done = compiler("-c", RECORD, input=lines)
    assert done.returncode == 0, done.stderr
    for (problem, tile, real), line in zip(cases, done.stdout.splitlines(), strict=True):
        recorded = json.loads(line)
        assert [kernel for kernel, *_ in recorded] == [kernel for kernel, _ in real], (problem, tile)
        for (kernel, arguments, constants, options), (_, values) in zip(recorded, real):
            assert set(arguments) | set(options) == set(values), kernel
            for name, value in values.items():
                where = f"{kernel} {name} {problem} {tile}"
                if name in options:
                    assert options[name] == value, where
                elif arguments[name] == "constexpr":
                    assert constants[name] == value, where
                elif isinstance(value, torch.Tensor):
                    assert arguments[name] == POINTERS[value.dtype], where
                elif isinstance(value, int):
                    assert arguments[name] == "i32", where
                else:
                    box = f"[{', '.join(map(str, value.block_shape))}]"
                    assert arguments[name] == f"tensordesc<{POINTERS[value.base.dtype][1:]}{box}>", where


def test_interpreted_kernels_are_refused():
    code = "from sparsekern.backends.triton import aot; aot.main(['--arch', '90', '--block', '16x16'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**ENV, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 1 and "interpreter" in done.stderr


def test_compiles_for_gpus_that_are_not_here(tmp_path):
    """A table for three architectures; a second run reads what the first one kept."""
    arguments = ["-m", "sparsekern.backends.triton.aot", "--op", "linear_forward", "--dtype", "bfloat16"]
    arguments += ["--block", "64x64", "--sample-tiles", "--cache", str(tmp_path / "cache")]
    arguments += ["--json", str(tmp_path / "table.json"), "--markdown", str(tmp_path / "table.md")]
    done = compiler(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    units = {(row["arch"], row["tile"]["variant"]): row["multiplies"] for row in table["kernels"]}
    assert units == {
        (80, "gather"): "mma.sync",
        (90, "gather"): "wgmma",
        (90, "tma"): "wgmma",
        (100, "gather"): "tcgen05",
        (100, "tma"): "tcgen05",
    }
    for row in table["kernels"]:
        assert 0 < row["registers"] <= 255 and "spilled" not in row and row["per_sm"] >= 1
        assert row["boxes" if row["tile"]["variant"] == "tma" else "copies16"] > 0
        assert 0 < row["predicted_efficiency"] <= 1
    assert (tmp_path / "table.md").read_text().count("\n| linear_forward |") == len(units)
    for kept in (tmp_path / "cache").iterdir():
        kept.write_text(json.dumps({**json.loads(kept.read_text()), "spilled": 80}))
    done = compiler(*arguments)
    assert done.returncode == 1
    assert done.stdout.count("80 bytes of registers spilled") == len(units)


def test_sample_has_every_variant_dtype_class_and_op():
    """Of what is shipped; without compiling, and without Triton's compiler."""
    for arch in aot.ARCHS:
        everything = list(tiles.shipped(arch))
        part = list(aot.sampled(everything))
        assert {(p.op, t.variant) for p, t in part} == {(p.op, t.variant) for p, t in everything}
        assert {p.dtype for p, _ in part} == {"bfloat16", "tf32", "float32"}
        assert {p.block for p, _ in part} == {(16, 16), (128, 128), (16, 128), (128, 16)}
        assert len(part) < len(everything) / 4


PTX = """
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;
	@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r9;
	cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x8, 0x8;
	cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x4, 0x4;
	@%p2 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd3, {%r4, %r5}], [%r6];
	cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd3, {%r4, %r5}], [%r6];
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r1}, %rd4, %rd5, p, 1, 1, 0, 1;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	@%p3 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, p;
	fma.rn.f32 	%r1, %r2, %r3, %r4;
	ld.global.b32 { %r1 }, [ %rd1 + 0 ];
"""
LOG = """ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
ptxas info    : Function properties for kernel
    24 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""


def test_reads_ptx_and_the_report_of_ptxas():
    assert read(PTX, LOG, 1024) == Compiled(
        registers=168, spilled=44, serialized=True, shared=1024, wgmma=1, mma=1, tcgen05=1, fma=1,
        copies16=2, copies8=1, copies4=1, boxes=1, loads=1,
    )  # fmt: skip
    assert "no report" in read(PTX, "ptxas fatal", 0).error


PROBLEM = Problem("linear_forward", "bfloat16", (64, 64), 4096, 4096, 4096, 400)
GATHER = Tile("gather", 128, 64, 1, 4, 4)
GOOD = Compiled(registers=128, shared=98304, wgmma=8, copies16=48, copies4=2)


def wrong(compiled, problem=PROBLEM, tile=GATHER, arch=90, kernel="linear_gather_kernel"):
    return aot.problems(aot.Row(problem, tile, arch, kernel, compiled))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": "CompilationError: at 7:4"}, "at 7:4"),
        ({"spilled": 36}, "36 bytes of registers spilled"),
        ({"spilled": 4, "registers": 255}, "4 bytes of registers spilled"),
        ({"serialized": True}, "wait for one another"),
        ({"shared": 232449}, "the limit is 232448"),
        ({"shared": 98304 + 4097}, "counted 102400"),
        ({"wgmma": 0, "mma": 8}, "multiplies by mma.sync, expected wgmma"),
        ({"mma": 8}, "multiplies by wgmma+mma.sync, expected wgmma"),
        ({"wgmma": 0}, "multiplies by none"),
        ({"copies16": 0}, "less than a stage"),
        ({"copies4": 128}, "128 copies of 4 bytes"),
    ],
)
def test_each_check_fires(change, message):
    assert wrong(GOOD) == wrong(replace(GOOD, spilled=32)) == ()
    assert any(message in line for line in wrong(replace(GOOD, **change)))


def test_expectations_follow_architecture_dtype_and_rows():
    few = replace(GATHER, bm=32)
    assert aot.expected_unit(PROBLEM, GATHER, 80) == "mma.sync"
    assert aot.expected_unit(PROBLEM, few, 90) == aot.expected_unit(PROBLEM, few, 100) == "mma.sync"
    assert aot.expected_unit(PROBLEM, GATHER, 100) == "tcgen05"
    plain = replace(PROBLEM, dtype="float32")
    assert wrong(replace(GOOD, wgmma=0, fma=64), plain) == ()
    assert wrong(GOOD, plain) == ("multiplies by wgmma, expected fma",)
    # TF32 operands that wgmma wants transposed come by 4 bytes; those of the forward pass need not.
    tf32 = replace(PROBLEM, dtype="tf32")
    half = replace(GATHER, bk=32)
    assert wrong(replace(GOOD, copies4=64), replace(tf32, op="linear_dgrad"), half) == ()
    assert wrong(replace(GOOD, copies4=64), tf32, half) != ()
    assert wrong(replace(GOOD, copies16=0), PROBLEM, replace(GATHER, variant="tma")) == ("no copies by descriptor",)


def test_programs_of_a_multiprocessor():
    """Registers come in units of 8 a thread; 1 KB of shared memory goes to the driver."""
    chip = chips.get("h200")
    row = aot.Row(PROBLEM, GATHER, 90, "linear_gather_kernel", replace(GOOD, registers=121, shared=16384))
    assert row.resident == chip.registers // (128 * 128) == 4
    assert replace(row, compiled=GOOD).resident == chip.shared_per_sm // (98304 + 1024) == 2
