"""Dynamic sparse training: where the stored blocks of a network lie, and how they move.

topo = sk.TopologyScheduler(model, optimizer, sk.SET(), total_steps=n)
loss.backward(); optimizer.step(); topo.step(); optimizer.zero_grad()
"""

from __future__ import annotations

from typing import Any

from sparsekern.topology.dsr import DSR
from sparsekern.topology.follow import follow
from sparsekern.topology.gradual import GradualMagnitude
from sparsekern.topology.method import Change, Method, Update
from sparsekern.topology.rigl import RigL
from sparsekern.topology.scheduler import TopologyScheduler, UpdateRecord
from sparsekern.topology.set import SET, Static
from sparsekern.topology.slots import remap_
from sparsekern.topology.snfs import SNFS
from sparsekern.topology.srigl import SRigL

METHODS: dict[str, type[Method]] = {
    "static": Static, "set": SET, "rigl": RigL, "srigl": SRigL, "snfs": SNFS, "dsr": DSR, "gradual": GradualMagnitude,
}  # fmt: skip


def method(name: str, **options: Any) -> Method:
    """The method ``name`` (a key of :data:`METHODS`) with ``options``.

    Raises:
        ValueError: an unknown name, or an option out of range.
        TypeError: an option that the method does not have.
    """
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name](**options)


__all__ = [
    "DSR", "METHODS", "SET", "SNFS", "Change", "GradualMagnitude", "Method", "RigL", "SRigL", "Static",
    "TopologyScheduler", "Update", "UpdateRecord", "follow", "method", "remap_",
]  # fmt: skip
