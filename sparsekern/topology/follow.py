"""Averaged copies of a model follow its blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsekern.nn import SparseModule
from sparsekern.topology.scheduler import TopologyScheduler
from sparsekern.topology.slots import remap_


def follow(topo: TopologyScheduler, averaged: nn.Module) -> None:
    """Keep ``averaged``, a copy such as an EMA or SWA model, on the layouts of the model that ``topo`` schedules.

    Averages of blocks that stay are kept; those of grown blocks start at the model's values.

    Args:
        averaged: a deep copy of the model, or ``torch.optim.swa_utils.AveragedModel`` of it.

    Raises:
        ValueError: a sparse layer of the model has no twin in ``averaged``.
    """
    inner = averaged.module if isinstance(averaged, torch.optim.swa_utils.AveragedModel) else averaged
    modules = dict(inner.named_modules())
    twins: dict[str, SparseModule] = {}
    for name in topo.layers:
        twin = modules.get(name)
        if not isinstance(twin, SparseModule):
            raise ValueError(f"averaged: expected a sparse layer {name!r} as in the model; copy the model first")
        twins[name] = twin

    def remap(slot_maps: Mapping[str, Tensor]) -> None:
        for name, slot_map in slot_maps.items():
            twin, layer = twins[name], topo.layers[name]
            remap_(twin.values.data, slot_map.to(twin.values.device))
            if layer.capacity < slot_map.numel():  # compacted
                twin.values = nn.Parameter(twin.values.detach()[: layer.capacity].clone(), twin.values.requires_grad)
                twin.index = layer.layout.index.to(twin.index.device, copy=True)
            else:
                twin.index.copy_(layer.layout.index)
            grown = (slot_map < 0)[: layer.capacity, None, None].to(twin.values.device)
            with torch.no_grad():  # spare slots are zero in both
                twin.values.copy_(torch.where(grown, layer.values.to(twin.values), twin.values))

    topo.on_update(remap)
