"""Prune a model in place, from dense or sparse to (more) sparse storage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import handover
from sparsekern.allocation.scores import LossFn
from sparsekern.config import Selector, SparsityConfig
from sparsekern.matching import Candidate
from sparsekern.nn import SparseModule
from sparsekern.plan import Plan
from sparsekern.sparsify import Planner, replace_module, to_dense

from .criteria import undisturbed
from .layers import INCLUDE, alive, oriented, prunable
from .masks import block_of, prune_masks


def prune_(
    model: nn.Module,
    sparsity: float | None,
    criterion: str | Mapping[str, Tensor] = "magnitude",
    *,
    scope: str = "global",
    block: int | Sequence[int] | None = None,
    per_layer: str | Mapping[str, float] | None = None,
    min_blocks: int = 1,
    names: Sequence[str] | None = None,
    include: Sequence[Selector] = INCLUDE,
    exclude: Sequence[Selector] = (),
    batches: Iterable[tuple[Any, Any]] | None = None,
    loss_fn: LossFn | None = None,
    example_input: Any = None,
    seed: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    below_break_even: str = "sparse",
) -> Plan:
    """Prune a dense or an already sparse model in place: what is dropped is no longer stored.

    Surviving weights keep their bits; so do biases, and with ``optimizer`` the state of the surviving weights. The
    weights of pruned layers are new Parameters of a smaller shape: hand the optimizer over, or build a new one.
    Processes that train together must prune alike: give all of them the same batches, then wrap again.

    Args:
        model, sparsity ... seed: see :func:`prune_masks`.
        optimizer: its parameter groups get the new Parameters, its state is cut to the surviving blocks.
        example_input: also gives MACs and break-even at the real shapes to the plan.
        below_break_even: "sparse" or "masked", see :class:`sparsekern.SparsityConfig`.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: as :func:`prune_masks`; or the optimizer holds none of the weights.
        TypeError: the model is compiled or wrapped.
    """
    masks = prune_masks(
        model,
        sparsity,
        criterion,
        scope=scope,
        block=block,
        per_layer=per_layer,
        min_blocks=min_blocks,
        names=names,
        include=include,
        exclude=exclude,
        batches=batches,
        loss_fn=loss_fn,
        example_input=example_input,
        seed=seed,
    )
    return apply_masks_(
        model, masks, block=block, example_input=example_input, optimizer=optimizer, below_break_even=below_break_even
    )


def apply_masks_(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    block: int | Sequence[int] | None = None,
    example_input: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    below_break_even: str = "sparse",
) -> Plan:
    """Store only the weights under ``masks``; layers that are not named stay as they are.

    Unlike :func:`sparsekern.sparsify_` it takes layers that are sparse already, whose masks must lie inside what
    they have. A layer whose mask keeps all of it is dense afterwards.

    Args:
        masks: ``{layer name: bool like module.weight}``.
        block, example_input, optimizer, below_break_even: see :func:`prune_`.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: unknown layers, wrong shapes, or a mask that wants weights that are gone.
        TypeError: the model is compiled or wrapped.
    """
    if below_break_even not in ("sparse", "masked"):
        raise ValueError(f"below_break_even: expected sparse or masked, got {below_break_even!r}")
    chosen = prunable(model, list(masks))
    wanted = {c.name: _checked(c, masks[c.name]) for c in chosen}
    blocks = {c.name: block_of(c, block) for c in chosen}
    swapped: list[tuple[SparseModule, nn.Module]] = []
    try:
        with undisturbed(model):
            for c in chosen:
                if isinstance(c.module, SparseModule):
                    dense = to_dense(c.module)
                    replace_module(model, c.module, dense)
                    swapped.append((c.module, dense))
        planner = _Planner(model, wanted, blocks, example_input, below_break_even)
        result = planner.plan()
        pruned = [c.module for c in chosen if c.name in planner.grids]
        if optimizer is not None and pruned and not handover.holds(optimizer, pruned):
            raise ValueError(
                "optimizer: expected one that holds the weights to prune, got one with none of them; pass the one that "
                "was built from this model"
            )
    except BaseException:
        for sparse, dense in swapped:
            replace_module(model, dense, sparse)
        raise
    if optimizer is not None:
        for sparse, dense in swapped:
            handover.to_dense(optimizer, sparse, dense)
    planner.carry_out(result, optimizer)
    return result


class _Planner(Planner):
    """Takes the block of every layer as given."""

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        blocks: Mapping[str, tuple[int, int]],
        example_input: Any,
        below_break_even: str,
    ) -> None:
        cfg = SparsityConfig(below_break_even=below_break_even)
        super().__init__(model, cfg, masks, None, example_input, None, None)
        self.blocks = blocks

    def _mask_block(self, c: Candidate, mask: Tensor) -> tuple[int, int]:
        return self.blocks[c.name]


def _checked(c: Candidate, mask: Tensor) -> Tensor:
    """The mask as the layer's dense twin takes it."""
    weight: Any = c.module.weight
    if mask.shape != weight.shape:
        raise ValueError(f"masks[{c.name!r}]: expected {list(weight.shape)}, got {list(mask.shape)}")
    back = int((oriented(c, mask != 0).cpu() & ~alive(c)).count_nonzero())
    if back:
        raise ValueError(
            f"masks[{c.name!r}]: expected only weights that are still there, got {back} that were pruned; redense_ "
            "brings them back as zeros"
        )
    return mask.t() if getattr(c.module, "transposed_origin", False) else mask
