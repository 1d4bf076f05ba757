"""Topology updates in a data-parallel run of two processes (gloo). Both are started once and do everything."""

from __future__ import annotations

import contextlib
import datetime
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import sparsekern as sk
from sparsekern import topology
from sparsekern.nn import SparseModule

from .topology_reference import OPTIMIZERS, Reference, batch, block_masks, network

STEPS, BLOCK, CAPACITY, WORLD = 14, 8, 1.6, 2
EVERY: dict[str, Any] = {"update_every": 4, "stop_fraction": 1.0}  # after steps 4, 8 and 12
RUNS: dict[str, dict[str, Any]] = {
    "static": {},
    "set": EVERY,
    "set gradient": EVERY | {"drop_by": "gradient"},
    "set global": EVERY | {"scope": "global", "growth": "unexplored"},
    "rigl": EVERY,
    "rigl accumulated": EVERY,
    "rigl exact": EVERY | {"exact": True},
    "srigl": EVERY,
    "snfs": EVERY,
    "dsr": EVERY | {"threshold": 0.03},
    "gradual": {"update_every": 4, "targets": {"0": 2, "2": 4, "6": 1}, "end": 0.9},
}
# Norms of gradient blocks do not add up over ranks: one process has to go through the shards one after the other.
OF_NORMS = ("rigl", "rigl accumulated", "srigl")
TIMEOUT = datetime.timedelta(seconds=60)


def build(dtype: torch.dtype = torch.float64, masks_seed: int = 5) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = network(dtype)
    cfg = sk.SparsityConfig(block=BLOCK, below_break_even="sparse", capacity=CAPACITY)
    sk.sparsify_(net, cfg, masks=block_masks(net, BLOCK, seed=masks_seed))
    return net, OPTIMIZERS["sgd"](net.parameters())


def scheduler(net: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> topology.TopologyScheduler:
    return sk.TopologyScheduler(net, optimizer, topology.method(name.split()[0], **RUNS[name]), STEPS, seed=3)


def sparse_modules(net: nn.Module) -> dict[str, SparseModule]:
    return {name: module for name, module in net.named_modules() if isinstance(module, SparseModule)}


def picture(net: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (mask, dense weight)}."""
    modules = sparse_modules(net).items()
    return {name: (module.mask, module.layout.to_dense(module.values.detach()).clone()) for name, module in modules}


# -- what the two processes do -----------------------------------------------------------------------------------------


def train(name: str, rank: int) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """A run on this rank's half of every batch; a picture after every step."""
    net, optimizer = build()
    model = DistributedDataParallel(net)
    topo = scheduler(model, optimizer, name)
    pictures = []
    parts = 2 if name == "rigl accumulated" else 1
    for step in range(STEPS):
        x, y = (t.chunk(WORLD)[rank].chunk(parts) for t in batch(step))
        for part in range(parts):
            with model.no_sync() if part < parts - 1 else contextlib.nullcontext():
                (nn.functional.cross_entropy(model(x[part]), y[part]) / parts).backward()
        optimizer.step()
        topo.step()
        optimizer.zero_grad()
        pictures.append(picture(net))
    return pictures


def overflow(rank: int) -> dict[str, Any]:
    """The loss of rank 1 alone overflows in the step that is due: both ranks postpone the update."""
    net, optimizer = build(torch.float32)
    model = DistributedDataParallel(net)
    topo = scheduler(model, optimizer, "rigl")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    updates = []
    for step in range(7):
        x, y = (t.chunk(WORLD)[rank] for t in batch(step, torch.float32))
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * torch.inf if rank == 1 and step == 3 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        record = topo.step()
        optimizer.zero_grad()
        if record is not None:
            updates.append(record.step)
    return {"updates": updates, "picture": picture(net)}


def tampered(rank: int) -> dict[str, Any]:
    """Rank 1 writes another layout. A forward through DDP, a new wrapper and the error leave every layout alone."""
    net, optimizer = build()
    model = DistributedDataParallel(net)
    topo = scheduler(model, optimizer, "set")
    layout = sparse_modules(net)["2"].layout
    if rank == 1:
        layout.update_(layout.block_mask().flip(0, 1, 2, 3))
    written = layout.index.clone()
    message = ""
    for step in range(4):
        x, y = (t.chunk(WORLD)[rank] for t in batch(step))
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        try:
            topo.step()
        except RuntimeError as error:
            message = f"after step {step + 1}: {error}"
        optimizer.zero_grad()
    DistributedDataParallel(net)
    return {"message": message, "kept": torch.equal(layout.index, written), "index": written}


def different_masks(rank: int) -> str:
    net, optimizer = build(masks_seed=5 + rank)
    try:
        scheduler(DistributedDataParallel(net), optimizer, "static")
    except RuntimeError as error:
        return str(error)
    return ""


def compacting(rank: int) -> str:
    net, optimizer = build()
    try:
        sk.TopologyScheduler(net, optimizer, topology.GradualMagnitude(sparsity=0.9, compact_at=(0.5,)), STEPS)
    except ValueError as error:
        return str(error)
    return ""


def work(rank: int, folder: str) -> None:
    """One process: everything above, its results in a file."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=TIMEOUT
    )
    results: dict[str, Any] = {}
    try:
        for check in (overflow, tampered, different_masks, compacting):
            results[check.__name__] = check(rank)
        for name in RUNS:
            results[name] = train(name, rank)
    except Exception:  # the other rank may wait for this one now: nothing further can work
        results["error"] = traceback.format_exc()
    torch.save(results, f"{folder}/rank-{rank}.pt")
    distributed.destroy_process_group()


# -- what is expected of them ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """Results of both processes."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    folder = tmp_path_factory.mktemp("ddp")
    processes = torch.multiprocessing.start_processes(
        work, args=(str(folder),), nprocs=WORLD, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + 300
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < deadline, "the two processes did not finish in 300 s"
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
            process.join()
    results = [torch.load(Path(folder) / f"rank-{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for rank, result in enumerate(results):
        assert "error" not in result, f"rank {rank}: {result['error']}"
    yield results


def one_process(name: str) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """The run on whole batches, without torch.distributed."""
    net, optimizer = build()
    topo = scheduler(net, optimizer, name)
    for step in range(STEPS):
        x, y = batch(step)
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        topo.step()
        optimizer.zero_grad()
        yield picture(net)
    assert topo.updates == (0 if name == "static" else 3) or name == "gradual"


def masked_dense(name: str) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """The masked-dense run that goes through the ranks' shards one after the other, each counting half."""
    net = network()
    masks = block_masks(net, BLOCK)
    parts = WORLD * (2 if name == "rigl accumulated" else 1)
    ref = Reference(net, masks, BLOCK, name.split()[0], RUNS[name], STEPS, 3)
    ref.attach(OPTIMIZERS["sgd"](net.parameters()))
    for step in range(STEPS):
        for x, y in zip(*(t.chunk(parts) for t in batch(step))):
            (nn.functional.cross_entropy(net(x), y) / parts).backward()
        ref.optimizer.step()
        ref.step()
        ref.optimizer.zero_grad()
        yield {key: (ly.module.mask, ly.module.dense.weight.detach()) for key, ly in ref.layers.items()}
    assert ref.updates == 3


@pytest.mark.parametrize("name", RUNS)
def test_equals_one_process(ranks, name):
    """After every step the same blocks on both ranks and in one process, and the same weights within rounding."""
    expected = masked_dense(name) if name in OF_NORMS else one_process(name)
    first, second = (result[name] for result in ranks)
    steps = 0
    for step, (one, two, alone) in enumerate(zip(first, second, expected, strict=True)):
        for layer, (mask, weight) in alone.items():
            where = f"step {step + 1}, layer {layer}"
            assert torch.equal(one[layer][0], two[layer][0]), f"{where}: masks of the ranks differ"
            assert torch.equal(one[layer][1], two[layer][1]), f"{where}: weights of the ranks differ"
            assert torch.equal(one[layer][0], mask), f"{where}: masks differ from those of one process"
            error = (one[layer][1] - weight).abs().max()
            assert error <= 1e-10 * weight.abs().max(), f"{where}: weights off by {error:.2e}"
        steps += 1
    assert steps == STEPS
    moved = any(not torch.equal(first[0][layer][0], first[-1][layer][0]) for layer in first[0])
    assert moved == (name != "static")


def test_the_rule_of_norms_is_another_one(ranks):
    """Otherwise the comparison of RigL with the sum of norms would show nothing."""
    masks = [ranks[0][name][-1] for name in ("rigl", "rigl exact")]
    assert any(not torch.equal(masks[0][layer][0], masks[1][layer][0]) for layer in masks[0])


def test_overflow_on_one_rank(ranks):
    one, two = (result["overflow"] for result in ranks)
    assert one["updates"] == two["updates"] == [5]  # due after 4, the fifth batch is the fourth step
    for layer, (mask, weight) in one["picture"].items():
        assert torch.equal(mask, two["picture"][layer][0]) and torch.equal(weight, two["picture"][layer][1])
        assert weight.isfinite().all()


def test_tampered_layout_is_an_error_on_every_rank(ranks):
    for result in ranks:
        assert result["tampered"]["message"].startswith(
            "after step 4: topology: expected equal layouts on all ranks before the update after step 4, got layouts "
            "that differ from rank 0's (rank 1: 2)"
        )
        assert result["tampered"]["kept"], "a layout was overwritten"
    assert not torch.equal(ranks[0]["tampered"]["index"], ranks[1]["tampered"]["index"])


def test_different_masks_are_an_error_on_every_rank(ranks):
    for result in ranks:
        assert "expected equal layouts on all ranks at the start" in result["different_masks"]
        assert "rank 1: 0, 2, 6" in result["different_masks"]
        assert "sparsify with the same seed on every rank" in result["different_masks"]


def test_compaction_is_refused(ranks):
    for result in ranks:
        assert "compact_at replaces Parameters, which data-parallel wrappers do not follow" in result["compacting"]
