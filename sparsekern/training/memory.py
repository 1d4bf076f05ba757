"""Training memory of a finished run: ``python -m sparsekern.training.memory RUN_FOLDER`` prints JSON.

Peak resident memory is a property of a process, so each net gets its own. What is counted is the growth of resident
memory from just before the model exists to the peak of three training steps: weights, gradients, optimizer state,
activations and kernel scratch, without the interpreter and libraries. The peak of building the model is excluded.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.training.config import TrainConfig
from sparsekern.training.network import build_dense, load_state, resolve_device
from sparsekern.training.optim import make_optimizer
from sparsekern.training.step import Step
from sparsekern.training.weights import load_net


def measure_memory(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Run :func:`training_memory` of ``folder`` in a process of its own; ``{"error": line}`` if that fails."""
    command = [sys.executable, "-m", "sparsekern.training.memory", os.fspath(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_ALLOCATOR}, check=False)
    try:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit status {done.returncode}"}
    return result


# glibc otherwise raises its mmap threshold as buffers are freed and keeps them, which hides what is in use.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def training_memory(folder: str | os.PathLike[str], steps: int = 3) -> dict[str, Any]:
    """Bytes in training of the net in ``folder``, in this process.

    Returns:
        ``peak``: growth of peak resident memory (or of CUDA's peak allocation), None where the system cannot say;
        ``weights``, ``gradients``, ``optimizer``, ``saved``: counted bytes of parameters and buffers, their gradients,
        optimizer state, and tensors kept for the backward pass.
    """
    net = load_net(folder)
    config, shape, classes, channels = net.config, net.in_shape, net.num_classes, net.channels
    del net
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    x = torch.randn(config.batch_size, *shape)
    y = torch.randint(classes, (config.batch_size,))
    _warm_up(config, device)
    before = _resident(device)
    model = build_dense(config, shape, classes, device, channels=channels)
    net = load_net(folder)
    load_state(model, net.state, sparse=net.sparse)
    del net
    optimizer = make_optimizer(model, config)
    step = Step(model.train(), optimizer, config)
    x, y = step.to_device(x, y)
    _reset_peak(device)
    for _ in range(steps):
        step(x, y)
    peak = _peak(device)
    saved, gradients = _saved_and_gradients(step, x, y)
    return {
        "peak": peak - before if peak is not None and before is not None else None,
        "weights": sum(_bytes(t) for t in [*model.parameters(), *model.buffers()]),
        "gradients": gradients,
        "optimizer": sum(_bytes(t) for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)),
        "saved": saved,
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _saved_and_gradients(step: Step, x: Tensor, y: Tensor) -> tuple[int, int]:
    """Bytes that autograd keeps between forward and backward (each storage once, parameters excluded), and of grads."""
    own = {p.untyped_storage().data_ptr() for p in [*step.model.parameters(), *step.model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(step.logits(x), y)
    loss.backward()
    return sum(kept.values()), sum(_bytes(p.grad) for p in step.model.parameters() if p.grad is not None)


def _warm_up(config: TrainConfig, device: torch.device) -> None:
    """Two steps of a tiny net: thread pools, libraries and modules imported on first use belong to no net."""
    tiny = dataclasses.replace(config, compile=False)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    step = Step(net.to(device), make_optimizer(net, tiny), tiny)
    for _ in range(2):
        step(*step.to_device(torch.randn(32, 3, 8, 8), torch.randint(10, (32,))))
    import sparsekern as sk

    sk.backends()


def _status(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _trim() -> None:
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass


def _resident(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _trim()
    return _status("VmRSS")


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


if __name__ == "__main__":
    print(json.dumps(training_memory(sys.argv[1])))
