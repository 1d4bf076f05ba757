"""Scores of single weights from a dense model. Allocation uses only the ratios that they give to the layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsekern.masks import layer_generator

from .targets import SCORE_SCHEMES, check_sparsity

LossFn = Callable[[Any, Any], Tensor]

CRITERIA = ("random", "gradient", *SCORE_SCHEMES)
"""What :func:`compute_scores` knows: the allocation schemes, and two criteria that serve pruning alone."""


def compute_scores(
    model: nn.Module,
    names: Sequence[str],
    scheme: str,
    *,
    batches: Iterable[tuple[Any, Any]] | None = None,
    loss_fn: LossFn | None = None,
    example_input: Any = None,
    sparsity: float | None = None,
    rounds: int = 100,
    temperature: float = 200.0,
    reinit: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score every weight of the named layers of a dense model; larger is kept.

    All work is done on a deep copy and inside a forked random state: parameters, buffers, gradients, training flags
    and random streams of ``model`` stay as they are.

    * ``random``: uniform numbers within [0, 1), a stream of its own for every layer.
    * ``magnitude``: ``|w|``.
    * ``gradient``: ``|w * dL/dw|`` as for snip, but in eval mode: for trained models, whose running statistics mean
      something and which are pruned as they will be used.
    * ``lamp`` (Lee et al. 2021): ``w_i^2`` over the sum of all squares of the layer that are not smaller.
    * ``snip`` (Lee et al. 2019): ``|w * dL/dw|``, gradients summed over the batches; train mode.
    * ``grasp`` (Wang et al. 2020): ``w * Hg`` with logits divided by ``temperature``; g is the gradient summed over the
      batches, Hg the sum of the batches' Hessian products with it. The paper removes the largest ``-w * Hg``: same
      order, sign turned. Train mode. The published code splits one sample into two batches.
    * ``synflow`` (Tanaka et al. 2020): ``|w * dR/dw|`` with R the sum of the outputs for an input of ones through
      absolute weights and buffers, in float64 and eval mode, pruned to ``d^(k / rounds)`` in round k. Scores are
      those of the last round; weights that fell earlier have 0. LayerNorm and softmax break its conservation law.

    Args:
        model: the dense model.
        names: modules whose ``weight`` is scored.
        scheme: one of :data:`CRITERIA`.
        batches: for snip, gradient and grasp, iterable of ``(x, y)``; every one of them is used, so pass a few and not
            a whole loader. x is a tensor, a tuple of positional or a dict of keyword arguments.
        loss_fn: ``loss_fn(output, y)`` to a scalar for the same. Default: cross-entropy on logits (right for
            log-probabilities as well), for integer class targets only.
        example_input: for synflow, an input that gives shapes; by default that of the first batch.
        sparsity: for synflow, the sparsity at which its rounds end, within [0, 1).
        rounds: synflow rounds.
        temperature: divisor of the logits for grasp.
        reinit: draw the scored weights anew from ``xavier_normal_`` first, as the published snip and grasp ratios do.
        seed: seeds ``random``, ``reinit``, the batches' own shuffling and dropout.

    Returns:
        ``{name: score}`` with the shape and device of each weight, at least float32; float64 for synflow and random.

    Raises:
        ValueError: unknown scheme or layer, or an argument that the scheme needs is missing (named).
    """
    if scheme not in CRITERIA:
        raise ValueError(f"scheme: expected one of {', '.join(CRITERIA)}, got {scheme!r}")
    dense = _weights(model, names)
    if scheme == "random":
        return {name: uniform_scores(seed, name, w.shape).to(w.device) for name, w in dense.items()}
    if scheme in ("snip", "gradient", "grasp") and batches is None:
        raise ValueError(f"batches: {scheme} needs data, got None; pass a few (x, y) pairs")
    if scheme == "synflow":
        if example_input is None and batches is None:
            raise ValueError("example_input: synflow needs an input's shape, got None; pass an example input")
        if sparsity is None:
            raise ValueError("sparsity: synflow prunes towards a target, got None; pass the wanted sparsity")
        check_sparsity(sparsity)
        if rounds < 1:
            raise ValueError(f"rounds: expected 1 and more, got {rounds}")
    with _sandbox(model, names, seed) as (twin, weights):
        if reinit:
            with torch.no_grad():
                for w in weights.values():
                    nn.init.xavier_normal_(w)
        if scheme == "magnitude":
            return {name: w.detach().abs().to(_at_least_float32(w)) for name, w in weights.items()}
        if scheme == "lamp":
            return {name: lamp(w.detach().double().square()).to(_at_least_float32(w)) for name, w in weights.items()}
        device = next(iter(weights.values())).device
        if scheme == "synflow":
            if example_input is None:
                example_input = _pairs(batches, first=True)[0][0]
            assert sparsity is not None
            return _synflow(twin, weights, _to(example_input, device), 1.0 - sparsity, rounds)
        data = [(_to(x, device), _to(y, device)) for x, y in _pairs(batches)]
        twin.train(scheme != "gradient")
        if scheme in ("snip", "gradient"):
            return _snip(twin, weights, data, loss_fn or _cross_entropy, seed)
        return _grasp(twin, weights, data, loss_fn or _cross_entropy, temperature, seed)


def _weights(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    if not names:
        raise ValueError("names: expected at least one layer, got none")
    modules = dict(model.named_modules())
    for name in names:
        if not isinstance(getattr(modules.get(name), "weight", None), nn.Parameter):
            raise ValueError(f"names: expected modules whose weight is a Parameter, got {name!r}")
    return {name: modules[name].get_parameter("weight") for name in names}


@contextmanager
def _sandbox(model: nn.Module, names: Sequence[str], seed: int) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """A deep copy whose only trainable tensors are the scored weights, and random streams of its own."""
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.grad = None
        p.requires_grad_(False)
    weights = _weights(twin, names)
    for w in weights.values():
        w.requires_grad_(True)
    cuda = sorted({p.device.index for p in twin.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), torch.enable_grad():
        torch.manual_seed(seed)
        yield twin, weights


def _pairs(batches: Iterable[tuple[Any, Any]] | None, first: bool = False) -> list[tuple[Any, Any]]:
    out = []
    for batch in batches or ():
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"batches: expected (x, y) pairs, got {type(batch).__name__}; wrap the loader")
        out.append((batch[0], batch[1]))
        if first:
            break
    if not out:
        raise ValueError("batches: expected at least one (x, y) pair, got none; an iterator can be used up only once")
    return out


def _to(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Mapping):
        return {key: _to(v, device) for key, v in x.items()}
    if isinstance(x, (tuple, list)):
        return tuple(_to(v, device) for v in x)
    return x


def _call(model: nn.Module, x: Any) -> Any:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def _tensor(output: Any, scheme: str) -> Tensor:
    """The output itself, or the first floating tensor of a tuple or mapping."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    for part in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(part, Tensor) and part.is_floating_point():
            return part
    raise ValueError(f"model: {scheme} expected a floating output tensor, got {type(output).__name__}; wrap it")


def _cross_entropy(output: Any, y: Any) -> Tensor:
    if not isinstance(output, Tensor) or not isinstance(y, Tensor) or y.is_floating_point() or output.dim() < 2:
        got = f"{type(output).__name__} and {y.dtype if isinstance(y, Tensor) else type(y).__name__}"
        raise ValueError(
            f"loss_fn: the default cross-entropy expected logits [N, classes, ...] and integer targets, got {got}; "
            "pass loss_fn(output, y)"
        )
    return F.cross_entropy(output, y)


def uniform_scores(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """float64 [*shape] on the CPU, uniform within [0, 1): the same in every process for the same seed and name.

    Not the stream that draws the layer's random mask: pruning a random mask at random must not follow its order.
    """
    # float32 has 2^24 values, fewer than large layers have weights.
    return torch.rand(tuple(shape), dtype=torch.float64, generator=layer_generator(seed, f"score:{name}"))


def lamp(square: Tensor) -> Tensor:
    """Each of ``square`` (float64, any shape, not negative) over the sum of all that are not smaller; 0 where it is 0.

    Of equal ones, which to count as smaller is open: the first of them takes the whole group, and so on down to one.
    """
    flat = square.flatten()
    ascending, order = flat.sort(stable=True)
    not_smaller = ascending.flip(0).cumsum(0).flip(0)
    score = torch.zeros_like(flat)
    score[order] = torch.where(ascending > 0, ascending / not_smaller, 0.0)
    return score.view(square.shape)


def _at_least_float32(w: Tensor) -> torch.dtype:
    return torch.promote_types(w.dtype, torch.float32)


def _snip(
    model: nn.Module, weights: Mapping[str, Tensor], data: list[tuple[Any, Any]], loss_fn: LossFn, seed: int
) -> dict[str, Tensor]:
    total = [torch.zeros_like(w) for w in weights.values()]
    for i, (x, y) in enumerate(data):
        torch.manual_seed(seed + i)
        loss = loss_fn(_call(model, x), y)
        grads = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        total = [t + g for t, g in zip(total, grads, strict=True)]
    saliency = [(w.detach() * g).abs().to(_at_least_float32(w)) for w, g in zip(weights.values(), total, strict=True)]
    return dict(zip(weights, saliency, strict=True))


def _grasp(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    data: list[tuple[Any, Any]],
    loss_fn: LossFn,
    temperature: float,
    seed: int,
) -> dict[str, Tensor]:
    params = list(weights.values())

    def gradient(i: int, graph: bool) -> tuple[Tensor, ...]:
        x, y = data[i]
        torch.manual_seed(seed + i)  # the same dropout in both passes: g and H belong to one function
        output = _call(model, x)
        if not isinstance(output, Tensor):
            raise ValueError(f"model: grasp expected a tensor of logits, got {type(output).__name__}; wrap the model")
        loss = loss_fn(output / temperature, y)
        return torch.autograd.grad(loss, params, create_graph=graph, materialize_grads=True)

    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        total = [torch.zeros_like(w) for w in params]
        for i in range(len(data)):
            total = [t + g for t, g in zip(total, gradient(i, False), strict=True)]
        hg = [torch.zeros_like(w) for w in params]
        for i in range(len(data)):
            z = torch.stack([(g * t).sum() for g, t in zip(gradient(i, True), total, strict=True)]).sum()
            if z.requires_grad:
                products = torch.autograd.grad(z, params, materialize_grads=True)
                hg = [h + p for h, p in zip(hg, products, strict=True)]
    return {name: (w.detach() * h).to(_at_least_float32(w)) for (name, w), h in zip(weights.items(), hg, strict=True)}


def _synflow(
    model: nn.Module, weights: Mapping[str, Tensor], example: Any, density: float, rounds: int
) -> dict[str, Tensor]:
    model.double().eval()
    # .double() moves parameters to new storage but keeps the Parameter objects, so `weights` stays valid.
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.abs_()
    x = _ones(example)
    params = list(weights.values())
    masks = [torch.ones_like(w, dtype=torch.bool) for w in params]
    whole = sum(w.numel() for w in params)
    scores: list[Tensor] = []
    for k in range(1, rounds + 1):
        flow = _tensor(_call(model, x), "synflow").sum()
        grads = torch.autograd.grad(flow, params, materialize_grads=True)
        scores = [(w.detach() * g).abs() for w, g in zip(params, grads, strict=True)]
        flat = torch.cat([s.flatten() for s in scores])
        if not bool(torch.isfinite(flat).all()) or not bool((flat > 0).any()):
            raise ValueError(
                f"model: the synaptic flow of synflow became zero or infinite in round {k}; use another allocation "
                "(normalisation layers and very deep nets do this)"
            )
        keep = max(round(whole * density ** (k / rounds)), 1)
        threshold = flat.kthvalue(whole - keep + 1).values
        with torch.no_grad():
            for i, (w, s) in enumerate(zip(params, scores, strict=True)):
                masks[i] = masks[i] & (s >= threshold)
                w.mul_(masks[i])
    return dict(zip(weights, scores, strict=True))


def _ones(x: Any) -> Any:
    """Ones in the place of each floating tensor, batch of one; integer inputs (token ids) stay, first row only."""
    if isinstance(x, Tensor):
        x = x[:1]
        return torch.ones_like(x, dtype=torch.float64) if x.is_floating_point() else x
    if isinstance(x, Mapping):
        return {key: _ones(v) for key, v in x.items()}
    return tuple(_ones(v) for v in x) if isinstance(x, tuple) else x
