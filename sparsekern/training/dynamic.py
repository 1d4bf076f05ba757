"""Dynamic sparse training in a run: the topology scheduler of a configuration, and what is reported of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from sparsekern.training.config import TrainConfig
from sparsekern.training.errors import ConfigError
from sparsekern.training.method_options import TAKES

if TYPE_CHECKING:
    from sparsekern.topology import TopologyScheduler


def build_topology(
    model: nn.Module, plan: dict[str, Any] | None, optimizer: Optimizer, config: TrainConfig, total: int
) -> TopologyScheduler | None:
    """The scheduler of ``config``, None where blocks stay where they are.

    Args:
        plan: of the network; gradual pruning ends with the blocks that it names.
        total: steps of the run.
    """
    if config.method == "static":
        return None
    from sparsekern.topology import TopologyScheduler, method

    if plan is None or plan["totals"]["sparse"] + plan["totals"]["masked"] == 0:
        raise ConfigError(
            f"method: {config.method} needs sparse layers, got a net without any (see the plan for the reasons); with "
            "below_break_even sparse or masked, layers that would not run faster are sparse too"
        )
    try:
        return TopologyScheduler(
            model, optimizer, method(config.method, **method_options(config, plan)), total, seed=config.seed
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None


def method_options(config: TrainConfig, plan: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the method's class."""
    values = {name: getattr(config, name) for name in TAKES[config.method]}
    for name in ("capacity", "initial_sparsity"):  # what the network was built with
        values.pop(name, None)
    if config.method == "snfs":
        values["momentum"] = config.momentum
    if config.method == "gradual":
        values["begin"], values["end"] = values.pop("start_fraction"), values.pop("stop_fraction")
        values["targets"] = {layer["name"]: layer["nnz"] for layer in plan["layers"] if layer["state"] != "dense"}
        values["always_masked"] = tuple(layer["name"] for layer in plan["layers"] if layer["state"] == "masked")
    return values


def will_update(topology: TopologyScheduler) -> bool:
    """Whether the run has a single update of the topology."""
    return any(topology.method.due(step, topology.total_steps) for step in range(1, topology.total_steps + 1))


def densities(topology: TopologyScheduler) -> dict[str, float]:
    """Stored blocks over all blocks of every layer now."""
    return {name: layer.nnz / layer.grid.blocks for name, layer in topology.layers.items()}


def exploration(topology: TopologyScheduler | None, model: nn.Module) -> dict[str, Any]:
    """R_s, the fraction of weights that were stored at some time (Liu et al. 2021, arXiv:2102.02887).

    Returns:
        ``exploration_rate`` of all sparse layers together (None without any), ``exploration`` per layer and
        ``reliably_explored`` (None where blocks do not move: R_s is then the density).
    """
    if topology is not None:
        return {
            "exploration_rate": topology.exploration_rate(),
            "exploration": topology.exploration_rates(),
            "reliably_explored": topology.reliably_explored(),
        }
    from sparsekern.nn import SparseModule

    masks = {name: module.mask for name, module in model.named_modules() if isinstance(module, SparseModule)}
    kept = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    total = sum(mask.numel() for mask in masks.values())
    return {
        "exploration_rate": sum(kept.values()) / total if total else None,
        "exploration": {name: count / masks[name].numel() for name, count in kept.items()},
        "reliably_explored": None,
    }
