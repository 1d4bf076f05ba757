"""GPU facts, the roofline model, candidate tiles and tuned tables; none of it needs a GPU or Triton."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparsekern.backends import ConvGeometry, precision
from sparsekern.backends.gpu import chips, table
from sparsekern.backends.gpu.choose import choose
from sparsekern.backends.gpu.dense_model import activation_bytes, dense_fallback_seconds, dense_seconds
from sparsekern.backends.gpu.problem import Problem, conv_problem
from sparsekern.backends.triton import model, tiles
from sparsekern.backends.triton.tile import Tile, accumulator_registers, buffers, shared_bytes
from sparsekern.layout import BlockGrid

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHAPE = (8192, 4096, 4096)  # M, O, I


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path))
    table.reload()
    yield
    table.reload()


def problem(op="linear_forward", block=128, density=0.1, shape=SHAPE, dtype="bfloat16"):
    block = (block, block) if isinstance(block, int) else block
    return Problem(op, dtype, block, *shape, 1).at_density(density)


def gather(bm):
    return Tile("gather", bm, 64, 1, 8, 4)


def panel(n):
    return Tile("panel", 64, 0, n, 8, 4)


H200 = chips.get("h200")
LARGE = {128: gather(256), 64: gather(512), 32: gather(512), 16: gather(512)}


# -- the limits of an H200, worked out by hand: 790 TFLOP/s, 8 TB/s from L2, 4.3 TB/s from memory ----------------------


@pytest.mark.parametrize(("block", "product", "wgrad"), [(128, 86, 86), (64, 58, 52), (32, 30, 29), (16, 16, 15)])
def test_l2_caps_the_efficiency(block, product, wgrad):
    for op in ("linear_forward", "linear_dgrad"):
        p = problem(op, block, 1.0)
        found = p.stored_flops / 790e12 / model.roofline(p, LARGE[block], H200).l2
        assert found == pytest.approx(product / 100, abs=0.007)
    p = problem("linear_wgrad", block, 1.0)
    found = p.stored_flops / 790e12 / model.roofline(p, panel(256 // block), H200).l2
    assert found == pytest.approx(wgrad / 100, abs=0.007)
    alone = p.stored_flops / 790e12 / model.roofline(p, panel(1), H200).l2
    assert alone == pytest.approx({128: 0.65, 64: 0.32, 32: 0.16, 16: 0.08}[block], abs=0.007)


@pytest.mark.parametrize("width", [1024, 2048, 4096, 8192])
def test_memory_caps_the_speedup_at_d_over_367(width):
    p = Problem("linear_forward", "bfloat16", (128, 128), 32768, width, width, 1)
    dense = p.dense_flops / 790e12
    assert dense / model.roofline(p, LARGE[128], H200).hbm == pytest.approx(width / 367, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "block", "speedups"),
    [
        ((8192, 4096, 4096), 128, (1.7, 2.8, 4.2, 8.1, 10.1)),
        ((8192, 4096, 4096), 64, (1.2, 1.9, 2.8, 5.5, 10.1)),
        ((8192, 4096, 4096), 32, (0.6, 1.0, 1.5, 3.0, 5.8)),
        ((8192, 4096, 4096), 16, (0.3, 0.5, 0.8, 1.6, 3.1)),
        ((8192, 4096, 1024), 128, (1.7, 2.7, 3.9, 4.0, 4.0)),
        ((8192, 4096, 1024), 64, (1.1, 1.9, 2.7, 4.0, 4.0)),
        ((8192, 4096, 1024), 32, (0.6, 1.0, 1.5, 2.9, 4.0)),
    ],
)
def test_roofline_speedups(shape, block, speedups):
    for density, expected in zip((0.5, 0.3, 0.2, 0.1, 0.05), speedups):
        p = problem(block=block, density=density, shape=shape)
        dense = p.dense_flops / 790e12 + H200.launch
        found = dense / (model.roofline(p, LARGE[block], H200).seconds + H200.launch)
        assert found == pytest.approx(expected, rel=0.03, abs=0.05)


@pytest.mark.parametrize(("block", "intensities"), [(32, (64, 50, 42, 33)), (16, (64, 48, 37, 25))])
def test_unions_raise_the_work_per_byte(block, intensities):
    tile = Tile("union", 128, block, 256 // block, 8, 4)
    for density, expected in zip((0.5, 0.3, 0.2, 0.1), intensities):
        p = problem(block=block, density=density)
        assert p.stored_flops / model.work(p, tile).l2_bytes == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("block", "n", "fills"), [(128, 2, (0.97, 0.93, 0.86, 0.77)), (64, 4, (0.96, 0.90, 0.81, 0.68))]
)
def test_panels_fill_as_simulated(block, n, fills):
    for density, expected in zip((0.5, 0.2, 0.1, 0.05), fills):
        p = problem("linear_wgrad", block, density)
        assert p.stored_flops / model.work(p, panel(n)).flops == pytest.approx(expected, abs=0.02)


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", tiles.OPS[:3])
@pytest.mark.parametrize("block", [(16, 16), (32, 64), (64, 64), (128, 16), (128, 128)])
@pytest.mark.parametrize("chip", chips.names())
def test_more_blocks_never_take_less(op, block, chip):
    chip = chips.get(chip)
    times = []
    for density in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0):
        p = problem(op, block, density)
        times.append([model.seconds(p, tile, chip) for tile in tiles.candidates(p, chip.arch)])
        assert all(0 < model.efficiency(p, tile, chip) <= 1 for tile in tiles.candidates(p, chip.arch))
    for sparser, denser in itertools.pairwise(times):
        assert all(a <= b * (1 + 1e-9) for a, b in zip(sparser, denser))


def test_latencies_count_in_short_loops():
    def share(density):
        p = problem(density=density)
        return model.roofline(p, gather(256), H200).seconds / model.seconds(p, gather(256), H200)

    assert share(0.03) < share(0.05) < 0.75 < 0.85 < share(1.0) < 1.0
    small = problem(density=0.1, shape=(512, 512, 512))
    assert model.efficiency(small, gather(128), H200) < 0.1


def test_few_tokens_take_small_tiles():
    few = problem(shape=(32, 4096, 4096))
    assert choose(few, H200, fallback=False).kernel.bm == 32
    assert choose(problem(), H200).kernel.bm == 256


def test_token_chunks_fill_the_chip():
    sparse = problem("linear_wgrad", 128, 0.05, (32768, 1024, 1024))
    assert model.splits(sparse, panel(1), H200) >= 8
    assert model.seconds(sparse, panel(1), H200) < model.seconds(sparse, panel(1), H200, 1)
    assert model.splits(problem("linear_wgrad", 64, 1.0), panel(4), H200) == 1
    assert model.splits(replace(sparse, m=16), panel(1), H200) == 1
    assert model.splits(sparse, gather(128), H200) == 1


def test_partial_sums_stay_within_the_workspace():
    for width in (1024, 4096, 16384):
        p = problem("linear_wgrad", 64, 0.2, (2**20, width, width))
        for tile in tiles.candidates(p, 90):
            splits = model.splits(p, tile, H200)
            assert splits == 1 or 4 * splits * p.capacity * 64 * 64 <= model.WORKSPACE


def test_the_fallback_costs_more_than_dense():
    for op in tiles.OPS:
        p = problem(op)
        assert dense_fallback_seconds(p, H200) > dense_seconds(p, H200) + H200.launch * 0.99


# -- convolutions ------------------------------------------------------------------------------------------------------

WRN = {160: (128, 160, 32, 32), 320: (128, 320, 16, 16), 640: (128, 640, 8, 8)}  # WRN-28-10: 3x3, as many out as in


def conv(op="forward", block=64, density=0.1, x=WRN[320], out=None, kernel=3, stride=1, padding=None, groups=1):
    block = (block, block) if isinstance(block, int) else block
    grid = BlockGrid((out or x[1], x[1] // groups, kernel, kernel), block, groups)
    padding = kernel // 2 if padding is None else padding
    geometry = ConvGeometry((stride, stride), (padding,) * 4, (1, 1))
    return conv_problem(f"conv2d_{op}", "bfloat16", grid, geometry, x, max(round(density * grid.blocks), 1))


@pytest.mark.parametrize("channels", WRN)
def test_wide_layers_are_bound_by_memory_at_a_fifth_to_a_twentieth(channels):
    p = conv(x=WRN[channels])
    dense = p.dense_flops / (0.75 * 790e12)
    assert dense == pytest.approx(102e-6, rel=0.01)
    assert dense_seconds(p, H200) == pytest.approx(dense + H200.launch)
    floor = activation_bytes(p) / 4.3e12
    assert floor == pytest.approx({160: 20e-6, 320: 10e-6, 640: 5e-6}[channels], rel=0.05)
    assert model.work(p, gather(256)).hbm_bytes == pytest.approx(floor * 4.3e12 + 0.1 * p.weight * 2, rel=0.1)


def test_convolutions_count_taps_groups_and_pixels():
    p = conv(block=(32, 64), x=(8, 96, 12, 10), out=80, groups=2, stride=2)
    assert (p.m, p.source, p.taps, p.groups, p.stride_area) == (8 * 6 * 5, 8 * 12 * 10, 9, 2, 4)
    assert (p.grid, p.blocks, p.weight) == ((2, 9), 36, 80 * 48 * 9)
    assert p.density == pytest.approx(p.capacity / 36)
    assert p.walked == (4, 9)
    back = replace(p, op="conv2d_dgrad")
    assert (back.walked, back.edges, back.outputs, back.phases) == ((2, 18), (64, 32), p.source, 4)
    assert conv(x=(8, 64, 12, 12), kernel=1, stride=2).image == 8 * 6 * 6  # the other pixels are not read
    assert conv("dgrad", x=(8, 64, 12, 12), kernel=1, stride=2).image == 8 * 12 * 12  # but written
    assert conv(x=(8, 64, 2, 2), kernel=5, padding=0).m == 0


@pytest.mark.parametrize("op", ["forward", "dgrad", "wgrad", "block_scores"])
def test_pointwise_convolutions_are_linear(op):
    p = conv(op, x=(4, 64, 6, 5), out=96, kernel=1)
    assert p == Problem(op if op == "block_scores" else f"linear_{op}", "bfloat16", (64, 64), 120, 96, 64, p.capacity)
    for change in ({"stride": 2}, {"padding": 1}, {"groups": 2}):
        assert conv(op, x=(4, 64, 6, 6), out=96, kernel=1, **change).kind == "conv2d"


@pytest.mark.parametrize("op", ["forward", "dgrad", "wgrad", "block_scores"])
def test_a_full_convolution_multiplies_what_the_dense_one_does(op):
    p = conv(op, density=1.0, x=(128, 128, 16, 16), out=256)
    for tile in tiles.candidates(p, 90):
        work = model.work(p, tile)
        assert work.flops >= p.stored_flops
        assert work.flops == pytest.approx(p.dense_flops, rel=0.01 if op != "wgrad" else 0.35)  # 18 blocks in panels
        assert work.hbm_bytes >= (p.source * 128 + p.m * 256) * 2


def test_strided_dgrad_multiplies_every_tap_in_every_phase():
    plain, strided = conv("dgrad", x=(64, 128, 32, 32)), conv("dgrad", x=(64, 128, 32, 32), stride=2)
    assert (strided.m, strided.source) == (plain.m // 4, plain.m)
    one, other = (model.work(p, gather(256)) for p in (plain, strided))
    assert strided.stored_flops == plain.stored_flops / 4
    assert one.flops == pytest.approx(plain.stored_flops)
    assert other.flops == pytest.approx(4 * strided.stored_flops)
    assert other.programs == one.programs
    # A tile of dy per stored block in one phase of four, weights in all of them.
    per_block = strided.m / 256 * strided.capacity * 64 * 2
    assert other.l2_bytes == pytest.approx(per_block * (256 + 4 * 64))
    forward = model.work(conv(x=(64, 128, 32, 32), stride=2), gather(256))
    assert forward.flops == pytest.approx(strided.stored_flops)
    for tile in tiles.candidates(strided, 90):
        assert model.seconds(strided, tile, H200) > model.seconds(conv(x=(64, 128, 32, 32), stride=2), tile, H200)


@pytest.mark.parametrize("op", ["forward", "dgrad", "wgrad", "block_scores"])
def test_groups_are_convolutions_side_by_side(op):
    two = conv(op, density=0.25, x=(32, 256, 16, 16), groups=2)
    one = conv(op, density=0.25, x=(32, 128, 16, 16))
    assert (two.capacity, two.dense_flops) == (2 * one.capacity, 2 * one.dense_flops)
    for tile in tiles.candidates(two, 90):
        a, b = model.work(two, tile), model.work(one, tile)
        assert [a.programs, a.flops, a.l2_bytes] == pytest.approx([2 * b.programs, 2 * b.flops, 2 * b.l2_bytes])
        assert a.stages == pytest.approx(b.stages) and a.hbm_bytes == pytest.approx(2 * b.hbm_bytes)


@pytest.mark.parametrize("op", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("chip", chips.names())
def test_more_blocks_of_a_convolution_never_take_less(op, stride, chip):
    chip = chips.get(chip)
    for block in (16, (32, 64), 128):
        times = []
        for density in (0.02, 0.1, 0.3, 0.8, 1.0):
            p = conv(op, block, density, stride=stride)
            times.append([model.seconds(p, tile, chip) for tile in tiles.candidates(p, chip.arch)])
            assert all(0 < model.efficiency(p, tile, chip) <= 1 for tile in tiles.candidates(p, chip.arch))
        for sparser, denser in itertools.pairwise(times):
            assert all(a <= b * (1 + 1e-9) for a, b in zip(sparser, denser))


def test_pixels_are_cut_into_chunks_where_blocks_are_few():
    p = conv("wgrad", 64, 0.1, x=WRN[160])
    assert model.splits(p, panel(4), H200) > 4
    assert choose(replace(p, m=0, source=0), H200, fallback=False).seconds < 1


def test_convolutions_of_stride_1_may_load_by_descriptor():
    for op in tiles.CONV_OPS:
        p = replace(conv(), op=op)
        variants = {tile.variant for tile in tiles.candidates(p, 90)}
        assert ("tma" in variants) == (p.step in ("forward", "dgrad"))
        assert "tma" not in {tile.variant for tile in tiles.candidates(p, 80)}
        assert "tma" not in {tile.variant for tile in tiles.candidates(replace(p, stride_area=4), 90)}
    fit = next(tile for tile in tiles.candidates(conv(), 90) if tile.variant == "tma")
    assert tiles.why_not(conv(), fit, 90) is None
    assert "stride 1" in tiles.why_not(replace(conv(), stride_area=4), fit, 90)


def test_tuned_convolutions_are_told_apart_by_taps_groups_and_strides():
    p = conv(x=(64, 256, 16, 16))
    tile = Tile("gather", 64, 64, 1, 4, 4)
    table.remember("h200", p, tile, 40e-6, 100e-6)
    table.save("h200")
    table.reload()
    chosen = choose(p, H200)
    assert (chosen.kernel, chosen.source, chosen.seconds) == (tile, "tuned", pytest.approx(40e-6))
    near = conv(x=(128, 256, 16, 16))
    assert choose(near, H200).source == "tuned"
    assert choose(near, H200).seconds == pytest.approx(
        40e-6 * model.seconds(near, tile, H200) / model.seconds(p, tile, H200)
    )
    others = ({"stride": 2, "x": (64, 256, 32, 32)}, {"kernel": 5}, {"groups": 2})
    for change in others:
        assert choose(conv(**{"x": (64, 256, 16, 16), **change}), H200).source == "model"
    assert choose(conv("dgrad", x=(64, 256, 16, 16)), H200).source == "model"
    del table.tuned("h200")[table.key(p)]["source"]
    assert not list(table.lookup("h200", p))


# -- tiles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_problem_has_tiles_that_fit(arch):
    seen: dict[tuple[str, str, tuple[int, int]], list[Tile]] = {}
    for p, tile in tiles.shipped(arch):
        seen.setdefault((p.op, p.dtype, p.block), []).append(tile)
        assert tiles.why_not(p, tile, arch) is None
        assert shared_bytes(p, tile, arch) <= chips.shared_limit(arch)
        assert accumulator_registers(p, tile) <= 128
        assert buffers(p, tile, arch) >= 2
        assert tile.variant != "tma" or arch >= 90
    assert len(seen) == 8 * 4 * 16
    assert all(1 <= len(listed) <= 9 and len(set(listed)) == len(listed) for listed in seen.values())
    assert any(t.variant == "union" for t in seen["linear_forward", "bfloat16", (16, 16)])
    assert any(t.variant == "union" for t in seen["linear_dgrad", "float16", (16, 32)])
    assert not any(t.variant == "union" for t in seen["linear_dgrad", "float16", (16, 64)])


def test_stages_bring_in_both_operands():
    p = problem(block=(64, 32))
    assert shared_bytes(p, Tile("gather", 128, 64, 1, 4, 3)) == 3 * (128 + 64) * 64 * 2
    assert shared_bytes(replace(p, op="linear_dgrad"), Tile("gather", 128, 64, 1, 4, 3)) == 3 * (128 + 32) * 64 * 2
    assert shared_bytes(replace(p, op="linear_wgrad"), Tile("panel", 64, 0, 4, 4, 3)) == 3 * (4 * 32 + 64) * 64 * 2
    assert shared_bytes(replace(p, op="block_scores"), Tile("scores", 64, 0, 256, 8, 2)) == 2 * (128 + 256) * 64 * 2
    assert accumulator_registers(problem(block=16), Tile("union", 128, 16, 8, 4, 4)) == 128
    union = Tile("union", 128, 32, 4, 4, 7)
    assert [buffers(problem(block=32), union, arch) for arch in (80, 90)] == [3, 4]
    three, few = Tile("gather", 128, 64, 1, 4, 3), Tile("gather", 32, 64, 1, 4, 3)
    assert shared_bytes(p, three, 80) == 2 * (128 + 64) * 64 * 2  # mma.sync: one buffer less
    assert shared_bytes(p, three, 90) == shared_bytes(p, three)
    assert shared_bytes(p, few, 90) == 2 * (32 + 64) * 64 * 2  # too few rows for a warpgroup


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"variant": "panel"}, "variant"),
        ({"bm": 48}, "bm"),
        ({"bk": 48}, "bk"),
        ({"bk": 8}, "bk"),
        ({"panel": 2}, "panel"),
        ({"variant": "tma"}, "sm_90"),
        ({"variant": "union"}, "union"),
        ({"stages": 0}, "stage"),
        ({"stages": 6, "bm": 256}, "shared memory"),
        ({"warps": 1}, "registers"),
    ],
)
def test_unfit_tiles_say_why(change, reason):
    fit = Tile("gather", 128, 64, 1, 4, 3)
    assert tiles.why_not(problem(), fit, 80) is None
    assert reason in tiles.why_not(problem(), replace(fit, **change), 80)


def test_no_tiles_outside_the_kernels_blocks():
    for p in (problem(block=8), problem(dtype="float64"), problem("conv3d_forward")):
        assert tiles.candidates(p, 90) == ()
    eight = problem(block=8)
    assert choose(eight, H200).kernel is None
    with pytest.raises(ValueError, match="no triton or cuda kernel for block"):
        choose(eight, H200, fallback=False)


@pytest.mark.parametrize("op", tiles.OPS[:3])
@pytest.mark.parametrize("chip", chips.names())
def test_dense_runs_where_it_is_faster(op, chip):
    chip = chips.get(chip)
    half = choose(problem(op, 16, 0.5), chip)
    assert half.kernel is None
    assert half.taken_seconds == half.fallback_seconds < half.seconds
    forced = choose(problem(op, 16, 0.5), chip, fallback=False)
    assert forced.kernel is not None and forced.taken_seconds == half.seconds
    sparse = choose(problem(op, 128, 0.1), chip)
    assert sparse.kernel is not None and sparse.source == "model"
    assert sparse.taken_seconds == sparse.seconds < sparse.dense_seconds / 3


def test_empty_calls_have_a_choice():
    for change in ({"m": 0}, {"capacity": 0}):
        for op in tiles.OPS:
            p = replace(problem(op), **change)
            chosen = choose(p, H200, fallback=False)
            assert 0 < chosen.seconds < 1
            assert model.splits(p, chosen.kernel, H200) >= 1


def test_choices_are_remembered():
    p = problem()
    assert choose(p, H200) is choose(replace(p), H200)


# -- tuned tables ------------------------------------------------------------------------------------------------------

SLOW = Tile("gather", 32, 64, 1, 4, 4)


def test_tables_ship_without_entries():
    assert table.shipped() == {}


@pytest.mark.parametrize(("m", "bucket"), [(0, 1), (1, 1), (3, 4), (8192, 8192), (6000, 8192), (5000, 4096)])
def test_tokens_fall_into_powers_of_two(m, bucket):
    assert table.token_bucket(m) == bucket


@pytest.mark.parametrize(("density", "bucket"), [(1.0, 0.5), (0.38, 0.3), (0.39, 0.5), (0.08, 0.1), (0.001, 0.02)])
def test_densities_fall_into_buckets(density, bucket):
    assert table.density_bucket(density) == bucket


def test_tuned_tiles_survive_a_process():
    p = problem()
    table.remember("h200", p, SLOW, 40e-6, 350e-6, {"Tile(...)": "OutOfResources"})
    for _ in range(2):
        chosen = choose(p, H200)
        assert (chosen.kernel, chosen.source) == (SLOW, "tuned")
        assert (chosen.seconds, chosen.dense_seconds) == pytest.approx((40e-6, 350e-6))
        path = table.save("h200")
        assert "OutOfResources" in path.read_text()
        table.reload()
    assert choose(p, chips.get("h100")).source == "model"
    path.write_text("{ torn")
    table.reload()
    assert choose(p, H200).source == "model"


def test_another_process_keeps_its_entries():
    table.remember("h200", problem(), SLOW, 1e-4, 1e-3)
    table.save("h200")
    table.reload()
    table.tuned("h200")
    theirs = chips.read_cache("h200")["tiles"]
    entry = next(iter(theirs.values()))
    chips.write_cache("h200", tiles={**theirs, "theirs": entry})
    table.remember("h200", problem(block=64), SLOW, 1e-4, 1e-3)
    assert len(json.loads(table.save("h200").read_text())["tiles"]) == 3


def test_a_measured_dense_op_can_win():
    p = problem()
    table.remember("h200", p, SLOW, 500e-6, 350e-6)
    chosen = choose(p, H200)
    assert (chosen.kernel, chosen.source) == (None, "tuned")
    assert choose(p, H200, fallback=False).kernel == SLOW


def test_entries_answer_for_their_neighbours():
    p = problem()
    table.remember("h200", p, SLOW, 40e-6, 350e-6)
    near = replace(p, m=16384)
    chosen = choose(near, H200)
    assert (chosen.kernel, chosen.source) == (SLOW, "tuned")
    ratio = model.seconds(near, SLOW, H200) / model.seconds(p, SLOW, H200)
    assert chosen.seconds == pytest.approx(40e-6 * ratio)
    assert chosen.dense_seconds == pytest.approx(350e-6 * dense_seconds(near, H200) / dense_seconds(p, H200))
    for far in (
        replace(p, m=256),
        problem(shape=(8192, 512, 4096)),
        problem(block=64),
        problem("linear_dgrad"),
        problem(dtype="float16"),
    ):
        assert choose(far, H200).source == "model"


def test_the_same_features_come_before_a_nearer_shape():
    wanted, other = Tile("gather", 128, 64, 1, 4, 3), Tile("gather", 256, 64, 1, 8, 4)
    table.remember("h200", problem(shape=(8192, 4096, 4000)), other, 1e-4, 1e-3)
    table.remember("h200", problem(shape=(2048, 4096, 4096)), wanted, 1e-4, 1e-3)
    assert choose(problem(), H200).kernel == wanted
    table.remember("h200", problem(), SLOW, 1e-4, 1e-3)
    assert choose(problem(), H200).kernel == SLOW


def test_a_tile_that_no_longer_fits_is_passed_over():
    p = problem()
    table.remember("a100", p, Tile("tma", 128, 64, 1, 4, 3), 1e-5, 1e-3)
    assert choose(p, chips.get("a100")).source == "model"
    for damage in ({"bm": "x"}, {"seconds": 0.0}, {"m": None}):
        table.remember("a100", p, SLOW, 1e-5, 1e-3)
        table.tuned("a100")[table.key(p)].update(damage)
        assert not list(table.lookup("a100", p))
    del table.tuned("a100")[table.key(p)]["warps"]
    assert not list(table.lookup("a100", p))


def test_exported_entries_can_be_shipped(tmp_path, monkeypatch):
    p = problem()
    table.remember("h200", p, SLOW, 40e-6, 350e-6, {"Tile(...)": "reason"})
    content = json.loads(table.export(tmp_path / "triton.json", ("h200",)).read_text())
    assert content["version"] == table.VERSION
    assert "skipped" not in content["gpus"]["h200"][table.key(p)]
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "elsewhere"))
    table.reload()
    monkeypatch.setattr(table, "_shipped", content["gpus"])
    chosen = choose(p, H200)
    assert (chosen.kernel, chosen.source) == (SLOW, "table")
    table.remember("h200", p, gather(256), 30e-6, 350e-6)
    assert choose(p, H200).source == "tuned"


# -- chips -------------------------------------------------------------------------------------------------------------


def test_every_figure_says_where_it_comes_from():
    content = chips.shipped()
    labels = {"datasheet", "measured", "assumed"}
    for name in (*chips.names(), *(f"sm{arch}" for arch in content["architectures"])):
        chip = chips.get(name)
        assert {source for _, source in chip.sources} <= labels
        assert {figure for figure, _ in chip.sources} >= set(chips.NUMBERS)
        for dtype in tiles.DTYPES:
            assert chip.rate(dtype) > 0 and 0 < chip.share(dtype) <= 1
    assert H200.rate("bfloat16") == 790e12 and H200.source("dense_flops.bfloat16") == "measured"
    assert H200.source("l2_bandwidth") == "assumed"
    assert chips.get("h100").hbm_bandwidth == 3.0e12
    with pytest.raises(ValueError, match="expected one of h200"):
        chips.get("h300")


def test_measured_figures_change_predictions():
    p = problem(block=32, density=0.1)
    before = choose(p, chips.get("h200"))
    chips.remember("h200", l2_bandwidth=4e12, hbm_bandwidth=None, dense_tflops={"bfloat16": 700.0})
    chip = chips.get("h200")
    assert (chip.l2_bandwidth, chip.rate("bfloat16"), chip.hbm_bandwidth) == (4e12, 700e12, 4.3e12)
    assert chip.source("l2_bandwidth") == chip.source("dense_flops.bfloat16") == "measured"
    assert chip.source("dense_flops.float16") == "assumed"
    after = choose(p, chip)
    assert after.seconds > before.seconds and after.dense_seconds > before.dense_seconds
    table.remember("h200", p, SLOW, 1e-5, 1e-3)
    table.save("h200")
    assert chips.get("h200").l2_bandwidth == 4e12
    chips.forget()
    assert chips.get("h200").l2_bandwidth == 4e12
    assert chips.get("h100").l2_bandwidth == 8e12


@pytest.mark.parametrize("figures", [{"l2": 1.0}, {"l2_bandwidth": 0.0}, {"l2_bandwidth": "8e12"}])
def test_odd_figures_are_refused(figures):
    with pytest.raises(ValueError, match="expected"):
        chips.remember("h200", **figures)
    assert not chips.cache_file("h200").exists()


def device_properties(monkeypatch, name, major, minor, **more):
    found = SimpleNamespace(
        name=name, major=major, minor=minor, multi_processor_count=40, L2_cache_size=4 << 20, **more
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    chips.forget()
    return found


def test_known_gpus_are_recognised(monkeypatch):
    found = device_properties(monkeypatch, "NVIDIA H100 80GB HBM3", 9, 0)
    found.multi_processor_count = 132
    assert chips.current("cuda").name == "h100"
    chips.forget()


def test_unknown_gpus_follow_from_their_architecture(monkeypatch):
    device_properties(
        monkeypatch, "NVIDIA L4", 8, 9, clock_rate=2_040_000, memory_clock_rate=6_251_000, memory_bus_width=192,
        shared_memory_per_block_optin=101376,
    )  # fmt: skip
    chip = chips.current("cuda")
    assert (chip.name, chip.arch, chip.sms) == ("nvidia-l4", 89, 40)
    assert chip.hbm_bandwidth == pytest.approx(0.27e12, rel=0.01)
    assert chip.rate("bfloat16") == pytest.approx(0.8 * 40 * 2.04e9 * 1024)
    assert chip.source("dense_flops.bfloat16") == "assumed"
    assert choose(problem(shape=(8192, 1024, 1024)), chip).kernel is not None
    chips.remember("nvidia-l4", hbm_bandwidth=0.2e12)
    assert chips.current("cuda").hbm_bandwidth == 0.2e12
    device_properties(monkeypatch, "NVIDIA Future", 13, 0)
    assert chips.current("cuda").arch == 130
    chips.forget()


def test_other_devices_get_a_stand_in():
    assert chips.current("cpu").name == H200.name


# -- dtypes and imports ------------------------------------------------------------------------------------------------


def test_fp32_follows_torchs_own_switch():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    assert precision(torch.bfloat16) == "bfloat16"
    try:
        if hasattr(matmul, "fp32_precision"):
            for setting, expected in (("ieee", "float32"), ("tf32", "tf32")):
                matmul.fp32_precision = setting
                assert precision(torch.float32) == expected
        else:
            matmul.allow_tf32 = True
            assert precision(torch.float32) == "tf32"
    finally:
        setattr(matmul, "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32", before)


def test_nothing_here_needs_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from sparsekern.backends.gpu import chips, table\n"
        "from sparsekern.backends.gpu.choose import choose\n"
        "from sparsekern.backends.gpu.problem import Problem\n"
        "from sparsekern.backends.triton import model, tiles\n"
        "from sparsekern import tuning\n"
        "p = Problem('linear_forward', 'bfloat16', (64, 64), 4096, 1024, 1024, 26)\n"
        "assert choose(p, chips.get('h200')).kernel"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="older switch")
def test_convolutions_follow_their_own_switch():
    """PyTorch lets cuDNN use TF32 by default, and matrix products not."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        matmul.fp32_precision, conv.fp32_precision = "ieee", "tf32"
        assert (precision(torch.float32), precision(torch.float32, "conv2d")) == ("float32", "tf32")
        matmul.fp32_precision, conv.fp32_precision = "tf32", "ieee"
        assert (precision(torch.float32), precision(torch.float32, "conv2d")) == ("tf32", "float32")
    finally:
        matmul.fp32_precision, conv.fp32_precision = before
