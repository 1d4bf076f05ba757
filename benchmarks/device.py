"""What a row on a GPU holds beside its device time: replay of a CUDA graph, wall time, peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import Timer, sample

WALL_ROUNDS = 7
GRAPH_ROUNDS = 20


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160] if text else ''}"


def wall_seconds(call: Callable[[], object], rounds: int = WALL_ROUNDS) -> float:
    """Median seconds from the call to the end of its work on the device, host work included, caches warm."""
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """``call`` as a CUDA graph; what comes back replays it.

    Raises:
        RuntimeError: the call can't be captured (it waits for the device, say).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def graph_seconds(call: Callable[[], object], timer: Timer, rounds: int = GRAPH_ROUNDS) -> float:
    """Median device seconds of replaying ``call`` captured in a CUDA graph, L2 cold."""
    replay = captured(call)
    return statistics.median(sample(timer, replay, 1) for _ in range(rounds))


def synchronize(device: str) -> None:
    """Wait for the work handed to a device."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], object]) -> int:
    """Most device memory held at once during the call beyond what was held before it; outputs count."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    del out
    return torch.cuda.max_memory_allocated() - before


def beside(name: str, call: Callable[[], object], timer: Timer, disabled: bool = False) -> dict[str, Any]:
    """The figures of one contender under keys that begin with its name; a failed capture is told, not raised."""
    if disabled or not torch.cuda.is_available():
        return {}
    out: dict[str, Any] = {f"{name}_wall_s": wall_seconds(call), f"{name}_peak_bytes": peak_bytes(call)}
    try:
        out[f"{name}_graph_s"] = graph_seconds(call, timer)
    except Exception as error:
        out[f"{name}_graph_failed"] = one_line(error)
        torch.cuda.synchronize()
    return out
