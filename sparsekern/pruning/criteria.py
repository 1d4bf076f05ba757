"""Saliency of every weight of a model, dense or sparse already."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import allocation
from sparsekern.allocation.scores import CRITERIA, LossFn
from sparsekern.nn import SparseModule
from sparsekern.sparsify import densify_

from .layers import prunable

__all__ = ["CRITERIA", "compute"]


def compute(
    model: nn.Module,
    criterion: str,
    *,
    names: Sequence[str] | None = None,
    batches: Iterable[tuple[Any, Any]] | None = None,
    loss_fn: LossFn | None = None,
    example_input: Any = None,
    sparsity: float | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score every weight of the named layers; larger is kept, weights that are pruned already have ``-inf``.

    A model with sparse layers is scored as its dense equal, zeros where nothing is stored. All work is done on copies:
    parameters, buffers, gradients, training flags and random streams of ``model`` stay as they are.

    * ``random``: uniform numbers, a stream of its own for every layer.
    * ``magnitude``: ``|w|``.
    * ``gradient``: ``|w * dL/dw|``, the gradients summed with their signs over the batches; eval mode, for trained
      models (the criterion of He et al. 2022, one batch there).
    * ``snip`` (Lee et al. 2019): the same in train mode, for models at initialisation.
    * ``grasp`` (Wang et al. 2020), ``synflow`` (Tanaka et al. 2020), ``lamp`` (Lee et al. 2021).

    :func:`sparsekern.allocation.compute_scores` has the details of each.

    Args:
        criterion: one of :data:`CRITERIA`.
        names: layers to score; by default those of :func:`prunable`.
        batches: (x, y) pairs for gradient, snip and grasp; each of them is used, so pass a few.
        loss_fn: ``loss_fn(output, y)`` to a scalar; cross-entropy on logits by default.
        example_input: for synflow, an input that gives shapes; by default that of the first batch.
        sparsity: for synflow, the sparsity its rounds end at.
        seed: of random, and of dropout and shuffling while gradients are taken.

    Returns:
        ``{name: score}`` with the shape and device of each module's ``weight``, at least float32.

    Raises:
        ValueError: unknown criterion or layer, or an argument that the criterion needs is missing.
    """
    chosen = prunable(model, names)
    scored = [c.name for c in chosen]
    if any(isinstance(module, SparseModule) for module in model.modules()):
        with undisturbed(model):
            dense = densify_(copy.deepcopy(model))
    else:
        dense = model
    scores = allocation.compute_scores(
        dense,
        scored,
        criterion,
        batches=batches,
        loss_fn=loss_fn,
        example_input=example_input,
        sparsity=sparsity,
        seed=seed,
    )
    for c in chosen:
        if isinstance(c.module, SparseModule):
            score = scores[c.name]
            # Of a Conv1D, whose dense weight is [I, O].
            score = score.t() if getattr(c.module, "transposed_origin", False) else score
            scores[c.name] = score.masked_fill(~c.module.mask, -torch.inf)
    return scores


def undisturbed(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which new modules may draw their initial weights without touching the user's random streams."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(d.index for d in devices))
