"""Swap dense layers for block-sparse ones, in place: ``plan`` says what would happen, ``sparsify_`` does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import allocation, cost, handover, matching, tracing
from sparsekern.backends import GPU, ConvGeometry, OpDesc, choice
from sparsekern.backends import candidates as backend_candidates
from sparsekern.config import SparsityConfig
from sparsekern.layout import BlockGrid, BlockLayout, as_block
from sparsekern.masks import from_prune, make_block_masks
from sparsekern.matching import Candidate
from sparsekern.nn import HOOKS, SparseConv2d, SparseLinear, SparseModule
from sparsekern.plan import LayerPlan, Plan

Block = int | tuple[int, int] | str


def plan(
    model: nn.Module,
    cfg: SparsityConfig | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    block: Block | None = None,
    example_input: Any = None,
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
) -> Plan:
    """What :func:`sparsify_` would do; the model is not changed.

    Args and errors are those of :func:`sparsify_`.
    """
    return Planner(model, cfg, masks, block, example_input, batches, loss_fn).plan()


def sparsify_(
    model: nn.Module,
    cfg: SparsityConfig | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    block: Block | None = None,
    example_input: Any = None,
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Plan:
    """Make a model sparse in place: ``nn.Linear`` and ``nn.Conv2d`` become block-sparse modules.

    Args:
        cfg: what and how much (default: ``SparsityConfig()``, unless masks are given or the model was pruned with
            ``torch.nn.utils.prune``, whose masks are then taken over).
        masks: {layer name: bool tensor of the weight's shape}; replaces the allocation. Layers not named stay dense.
        block: replaces ``cfg.block``.
        example_input: what ``model`` is called with; gives MACs and break-even at the real shapes.
        batches: iterable of (input, target) for snip and grasp.
        loss_fn: ``loss_fn(output, target)``, cross-entropy by default.
        optimizer: its parameter groups (and state) get the new Parameters.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: nothing matched, or an argument that the configuration needs is missing.
        TypeError: the model is compiled or wrapped (DDP, FSDP).
    """
    matching.check_unwrapped(model)
    planner = Planner(model, cfg, masks, block, example_input, batches, loss_fn)
    result = planner.plan()
    planner.carry_out(result, optimizer)
    return result


class Planner:
    """One planning run: matching, shapes, allocation, break-even, and the swap."""

    def __init__(
        self,
        model: nn.Module,
        cfg: SparsityConfig | None,
        masks: Mapping[str, Tensor] | None,
        block: Block | None,
        example_input: Any,
        batches: Iterable[Any] | None,
        loss_fn: Callable[[Any, Any], Tensor] | None,
    ) -> None:
        self.model = model
        self.pruned = {} if masks is not None or cfg is not None else from_prune(model)
        if masks is None and self.pruned:
            masks = self.pruned
        self.cfg = cfg if cfg is not None else SparsityConfig()
        if block is not None:
            self.cfg = replace(self.cfg, block=block)
        self.masks = None if masks is None else {name: mask != 0 for name, mask in masks.items()}
        self.example_input, self.batches, self.loss_fn = example_input, batches, loss_fn
        self.notes: list[str] = []
        self.grids: dict[str, BlockGrid] = {}
        self.counts: dict[str, int] = {}
        self.drawn: dict[str, Tensor] = {}  # element masks

    # -- plan ------------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        matching.check_unwrapped(self.model)
        self.candidates = self._candidates()
        chosen = [c for c in self.candidates if not c.reason]
        if not chosen:
            why = "; ".join(f"{c.name}: {c.reason}" for c in self.candidates[:8]) or "the model has no Linear or Conv2d"
            raise ValueError(f"sparsify_: expected at least one layer to match, got none ({why})")
        self._trace()
        layers = {c.name: self._blank(c) for c in self.candidates}
        if self.masks is not None:
            self._plan_masks(chosen, layers)
        else:
            self._plan_allocation(chosen, layers)
        weights = sum(layer.params_dense for layer in layers.values())
        total = sum(p.numel() for p in self.model.parameters())
        return Plan(list(layers.values()), other_params=max(total - weights, 0), notes=self.notes)

    def _candidates(self) -> list[Candidate]:
        cfg = self.cfg
        named = [name for name, _ in self.model.named_modules()]
        if self.masks is not None:
            unknown = [name for name in self.masks if name not in named]
            if unknown:
                raise ValueError(f"masks: expected names of layers, got {unknown[0]!r}; the model has {named[1:6]}...")
            explicit = list(self.masks)
        else:
            explicit = [n for n in named if (matching.override_of(n, cfg.overrides) or 0.0) > 0.0]
            if isinstance(cfg.allocation, Mapping):
                explicit += list(cfg.allocation)
        found = matching.find(self.model, cfg.include, cfg.exclude, explicit)
        for c in found:
            if self.masks is not None and c.name not in self.masks:
                c.reason = c.reason or "no mask given"
            elif c.name in self.pruned:
                c.reason = ""
            elif self.masks is not None and c.reason:
                raise ValueError(f"masks[{c.name!r}]: this layer can't become sparse: {c.reason}")
            elif self.masks is None and matching.override_of(c.name, cfg.overrides) == 0.0:
                c.reason = c.reason or "override 0.0"
            elif isinstance(cfg.allocation, Mapping) and self.masks is None and not c.reason:
                if c.name not in cfg.allocation and matching.override_of(c.name, cfg.overrides) is None:
                    c.reason = "not in the allocation"
        if isinstance(cfg.allocation, Mapping):
            for name in cfg.allocation:
                if name not in {c.name for c in found}:
                    raise ValueError(f"allocation: expected names of Linear or Conv2d layers, got {name!r}")
        return found

    def _trace(self) -> None:
        self.calls: dict[str, tracing.LayerCall] = {}
        self.batch = 1
        if self.example_input is None:
            if self.masks is None and self.cfg.budget == "macs":
                raise ValueError('budget="macs": expected example_input (the MACs follow from it), got none; pass one')
            self.notes.append("no example_input: break-even assumes large batches, MACs unknown")
            return
        self.batch = tracing.example_batch(self.example_input)
        self.calls = tracing.trace(self.model, {c.name: c.module for c in self.candidates}, self.example_input)

    def _blank(self, c: Candidate) -> LayerPlan:
        size = math.prod(c.weight_shape)
        call = self.calls.get(c.name)
        macs = None if call is None else tracing.macs_per_example(call, c.weight_shape, self.batch)
        if call is None and self.example_input is not None:
            macs = 0
        layer = LayerPlan(c.name, c.kind, c.weight_shape, reason=c.reason, params_dense=size, params=size)
        layer.macs_dense = layer.macs = macs
        if isinstance(c.module, SparseModule):
            layer.state = "masked" if c.module.masked else "sparse"
            layer.block, layer.nnz, layer.blocks = c.module.block, c.module.layout.nnz, c.module.grid.blocks
            self._set_counts(layer, int(c.module.mask.sum()))
        return layer

    def _set_counts(self, layer: LayerPlan, kept: int) -> None:
        layer.params, layer.density = kept, kept / layer.params_dense
        if layer.macs_dense is not None:
            layer.macs = round(layer.macs_dense * layer.density)

    def case_of(self, c: Candidate) -> cost.Case:
        module, call = c.module, self.calls.get(c.name)
        conv = None
        if isinstance(module, nn.Conv2d):
            geometry = f"s{module.stride} p{module.padding} d{module.dilation}"
            conv = _geometry(module)
            sh, sw = conv.stride
            if call is not None:
                x, y = call.x_shape, call.y_shape
                x = x if len(x) == 4 else (1, *x)
                positions = math.prod(y) // c.weight_shape[0]
            else:
                n, h, w = cost.ASSUMED_IMAGE
                x, positions = (n, c.weight_shape[1] * c.groups, h * sh, w * sw), n * h * w
        else:
            geometry = ""
            rows = math.prod(call.x_shape[:-1]) if call is not None else cost.ASSUMED_ROWS
            x, positions = (rows, c.weight_shape[1]), rows
        weight = next(module.parameters())
        return cost.Case(
            c.kind,
            c.weight_shape,
            c.groups,
            x,
            positions,
            geometry,
            call is not None and call.channels_last,
            str(_compute_dtype(weight)).removeprefix("torch."),
            weight.device.type,
            conv,
        )

    def _block_for(self, c: Candidate, density: float) -> tuple[int, int]:
        block = self.cfg.block
        if block == "auto":
            return cost.choose_block(self.case_of(c), density)
        assert not isinstance(block, str)
        return as_block(block)

    def _plan_allocation(self, chosen: list[Candidate], layers: dict[str, LayerPlan]) -> None:
        cfg = self.cfg
        densities = self._densities(chosen)
        targets = {}
        for c in chosen:
            layers[c.name].target_density = densities[c.name]
            if densities[c.name] >= 1.0:
                layers[c.name].reason = "the allocation keeps all of it"
                continue
            block = self._block_for(c, densities[c.name])
            self.grids[c.name] = BlockGrid(c.weight_shape, block, c.groups)
            targets[c.name] = densities[c.name]
        self.counts = allocation.block_counts(targets, self.grids) if self.grids else {}
        for c in chosen:
            if c.name in self.grids:
                self._decide(c, layers[c.name], self.grids[c.name], self.counts[c.name], cfg.below_break_even)
        self._draw_masks(layers)

    def _draw_masks(self, layers: dict[str, LayerPlan]) -> None:
        """Draw the block masks; edge blocks hold less than a full block, so exact counts need the masks themselves.

        A layer's mask depends on its name and the seed alone, not on what became of the other layers.
        """
        live = {name: grid for name, grid in self.grids.items() if layers[name].state != "dense"}
        counts = {name: self.counts[name] for name in live}
        block_masks = make_block_masks(live, counts, pattern=self.cfg.pattern, seed=self.cfg.seed) if live else {}
        for name, block_mask in block_masks.items():
            layout = BlockLayout.from_block_mask(self.grids[name], block_mask)
            self.drawn[name] = layout.mask()
            self._set_counts(layers[name], int(self.drawn[name].sum()))

    def _densities(self, chosen: list[Candidate]) -> dict[str, float]:
        cfg = self.cfg
        fixed: dict[str, float] = {}
        for c in chosen:
            override = matching.override_of(c.name, cfg.overrides)
            if override is not None:
                fixed[c.name] = 1.0 - override
        shapes = {c.name: c.weight_shape for c in chosen if c.name not in fixed}
        if not shapes:
            return fixed
        macs = None
        if cfg.budget == "macs":
            missing = [name for name in shapes if name not in self.calls]
            if missing:
                raise ValueError(f'budget="macs": the example input never reaches {missing[0]}; exclude it')
            macs = {n: float(tracing.macs_per_example(self.calls[n], s, self.batch)) for n, s in shapes.items()}
        if isinstance(cfg.allocation, str) and cfg.allocation in allocation.SCORE_SCHEMES:
            scores = allocation.compute_scores(
                self.model,
                list(shapes),
                cfg.allocation,
                batches=self.batches,
                loss_fn=self.loss_fn,
                example_input=self.example_input,
                sparsity=cfg.sparsity,
                seed=cfg.seed,
            )
            # Its guard against layer collapse is one weight; block_counts lifts that to one block.
            found = allocation.densities_from_scores(scores, cfg.sparsity, costs=macs)
        else:
            convs = [c.name for c in self.candidates if c.kind == "conv2d"]
            scheme: str | Mapping[str, float] = cfg.allocation
            if isinstance(scheme, Mapping):
                scheme = {name: scheme[name] for name in shapes}
            found = allocation.allocate(
                shapes,
                cfg.sparsity,
                scheme,
                macs=macs,
                stem=convs[0] if convs and convs[0] in shapes else None,
                head=self.candidates[-1].name if self.candidates[-1].name in shapes else None,
            )
        return {**found, **fixed}

    def _plan_masks(self, chosen: list[Candidate], layers: dict[str, LayerPlan]) -> None:
        assert self.masks is not None
        for c in chosen:
            layer, mask = layers[c.name], self.masks[c.name].cpu()
            if matching.is_conv1d(c.module) and tuple(mask.shape) == c.weight_shape[::-1]:
                mask = mask.t()
            if tuple(mask.shape) != c.weight_shape:
                raise ValueError(f"masks[{c.name!r}]: expected {list(c.weight_shape)}, got {list(mask.shape)}")
            kept = int(mask.count_nonzero())
            if kept == mask.numel():
                layer.reason = "the mask keeps all of it"
                continue
            block = self._mask_block(c, mask)
            grid = BlockGrid(c.weight_shape, block, c.groups)
            layout = BlockLayout.from_mask(mask, block, groups=c.groups)
            inside = int(layout.mask().sum())
            layer.fill = kept / inside if inside else 1.0
            layer.target_density = kept / mask.numel()
            fallback = "sparse" if self.cfg.below_break_even == "sparse" else "masked"
            self._decide(c, layer, grid, layout.nnz, fallback)
            self._set_counts(layer, kept)
            self.grids[c.name], self.drawn[c.name] = grid, mask

    def _mask_block(self, c: Candidate, mask: Tensor) -> tuple[int, int]:
        """For a foreign mask, "auto" is the block whose stored blocks, holes included, are predicted fastest."""
        if self.cfg.block != "auto":
            return self._block_for(c, 0.0)
        case, best = self.case_of(c), ((1, 1), -1.0)
        for size in (1, *cost.auto_blocks(case)):
            nnz = BlockLayout.from_mask(mask, size, groups=c.groups).nnz
            speed = cost.predict(case, (size, size), max(nnz, 1))[0]
            if speed > best[1] * 1.02:
                best = ((size, size), speed)
        return best[0]

    def _decide(self, c: Candidate, layer: LayerPlan, grid: BlockGrid, nnz: int, below: str) -> None:
        case = self.case_of(c)
        layer.block, layer.nnz, layer.blocks = grid.block, nnz, grid.blocks
        layer.speedup, layer.source = cost.predict(case, grid.block, max(nnz, 1))
        pays = cost.pays(layer.speedup, layer.source)
        layer.state = "sparse" if pays else below
        kernel = choice(c.kind, case.device, getattr(torch, case.dtype), grid.block)
        if pays or layer.state == "sparse":
            layer.backend, layer.reason = kernel, kernel if pays else f"{kernel}; below break-even, forced"
        elif layer.state == "masked":
            layer.backend = "dense"
            layer.reason = f"below break-even ({layer.source}): dense compute on the masked weight"
            layer.speedup = None
        else:
            layer.reason = (
                f"below break-even ({layer.source}: {layer.speedup:.2f}x at density {layer.target_density:.3f}, "
                f"block {grid.block[0]}x{grid.block[1]})"
            )

    # -- swap ------------------------------------------------------------------------------------------------------

    def carry_out(self, result: Plan, optimizer: torch.optim.Optimizer | None) -> None:
        modules = {c.name: c.module for c in self.candidates}
        swapped: list[tuple[nn.Module, SparseModule]] = []
        if self.pruned:
            _remove_prune(self.model, list(self.pruned))
        for layer in result.layers:
            if layer.name not in self.grids or layer.state == "dense":
                continue
            dense = modules[layer.name]
            sparse = self._build(layer, dense)
            sparse.masked = layer.state == "masked"
            replace_module(self.model, dense, sparse)
            swapped.append((dense, sparse))
        if optimizer is not None and swapped:
            if not handover.holds(optimizer, (dense for dense, _ in swapped)):
                raise ValueError(
                    "optimizer: expected one that holds the model's weights, got one with none of them; pass the one "
                    "that was built from this model"
                )
            for dense, sparse in swapped:
                handover.to_stored(optimizer, dense, sparse)
        ignore_in_ddp(self.model)

    def _build(self, layer: LayerPlan, dense: nn.Module) -> SparseModule:
        grid, mask = self.grids[layer.name], self.drawn[layer.name]
        capacity = min(math.ceil(layer.nnz * self.cfg.capacity), grid.blocks)
        return to_sparse(dense, mask, grid.block, capacity=capacity, rescale=self.cfg.rescale)


def to_sparse(
    dense: nn.Module, mask: Tensor, block: Sequence[int], *, capacity: int | None = None, rescale: bool = False
) -> SparseModule:
    """Sparse twin of an ``nn.Linear``, ``nn.Conv2d`` or Transformers ``Conv1D``, sharing its bias Parameter."""
    sparse: SparseModule
    if isinstance(dense, nn.Conv2d):
        sparse = SparseConv2d.from_dense(dense, mask, tuple(block), capacity=capacity, rescale=rescale)
    else:
        linear = _as_linear(dense)
        sparse = SparseLinear.from_dense(linear, mask, tuple(block), capacity=capacity, rescale=rescale)
        if linear is not dense:
            sparse.transposed_origin = True  # type: ignore[assignment]
    bias = dense._parameters.get("bias")
    if bias is not None:
        sparse.bias = bias  # the same Parameter: an optimizer that holds it keeps its state
    return sparse


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """What a layer of this weight computes in: autocast's dtype where that is on, as it converts all but float64."""
    device = weight.device.type
    if device == "meta" or weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def _as_linear(module: nn.Module) -> nn.Linear:
    if isinstance(module, nn.Linear):
        return module
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = bias
    linear.training = module.training
    for name in HOOKS:
        getattr(linear, name).update(getattr(module, name))
    return linear


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is a child (a shared module may be several modules' child)."""
    if model is old:
        raise ValueError(
            "sparsify_: expected a model that contains layers, got a single layer; use SparseLinear.from_dense or "
            "SparseConv2d.from_dense"
        )
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def ignore_in_ddp(model: nn.Module) -> None:
    """Keep layout buffers out of DDP's broadcast, which would silently overwrite a rank that has diverged."""
    names = {f"{name}.index" for name, module in model.named_modules() if isinstance(module, SparseModule)}
    old = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    model._ddp_params_and_buffers_to_ignore = sorted(old | names)  # type: ignore[assignment]


def _remove_prune(model: nn.Module, names: list[str]) -> None:
    from torch.nn.utils import prune

    modules = dict(model.named_modules())
    for name in names:
        prune.remove(modules[name], "weight")


def densify_(model: nn.Module) -> nn.Module:
    """Replace every sparse module by its dense original in place (same function, zeros where nothing was stored)."""
    for module in list(model.modules()):
        if isinstance(module, SparseModule):
            replace_module(model, module, to_dense(module))
    model.__dict__.pop("_ddp_params_and_buffers_to_ignore", None)
    return model


def to_dense(module: SparseModule) -> nn.Module:
    """The dense original of one sparse module, sharing its bias Parameter."""
    dense: nn.Module = module.to_dense()  # type: ignore[operator]
    if getattr(module, "transposed_origin", False):
        from transformers.pytorch_utils import Conv1D

        conv1d = Conv1D(module.out_features, module.in_features)
        conv1d.weight = nn.Parameter(dense.weight.detach().t().contiguous())  # type: ignore[union-attr, operator]
        conv1d.training = dense.training
        dense = conv1d
    if module.bias is not None:
        dense.bias = module.bias
    return dense


def masks(model: nn.Module) -> dict[str, Tensor]:
    """{layer name: bool tensor of the weight's shape} of every sparse module."""
    return {name: module.mask for name, module in model.named_modules() if isinstance(module, SparseModule)}


def _geometry(conv: nn.Conv2d | SparseConv2d) -> ConvGeometry:
    """Of a convolution; its padding as numbers, also where it is given as text."""
    (sh, sw), (dh, dw) = conv.stride, conv.dilation
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    return ConvGeometry((sh, sw), (top, bottom, left, right), (dh, dw))


def _standing(candidate: str, chosen: str) -> str:
    """What becomes of a backend that could run a layer."""
    if candidate == chosen:
        return "chosen"
    if candidate in GPU and chosen in GPU:
        return f"possible, where it was measured to be faster than {chosen}"
    return "possible, not preferred"


def explain(model: nn.Module, example_input: Any = None) -> str:
    """What runs each sparse layer, which backends were considered and why each was kept or dropped.

    Args:
        model: with sparse layers.
        example_input: as the model takes it; with it, GPU layers also tell the kernel of each pass at these shapes, or
            that the pass is dense, and the times that decided.
    """
    lines = []
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SparseModule)}
    calls = tracing.trace(model, dict(sparse), example_input) if example_input is not None else {}
    for name, module in model.named_modules():
        if not isinstance(module, SparseModule):
            continue
        op = "linear" if isinstance(module, SparseLinear) else "conv2d"
        w = module.values
        if module.masked:
            lines.append(f"{name}: {op} masked: dense compute on the materialised weight (the mask does not pay)")
            continue
        desc = OpDesc(op, w.device.type, w.dtype, module.block)
        chosen = choice(op, w.device.type, w.dtype, module.block)
        bo, bi = module.block
        lines.append(f"{name}: {op} block {bo}x{bi} {w.dtype} on {w.device.type} -> {chosen}")
        for candidate, reason in backend_candidates(desc):
            lines.append(f"    {candidate}: {reason or _standing(candidate, chosen)}")
        if name in calls and chosen in GPU:
            from sparsekern.backends.gpu import passes

            geometry = _geometry(module) if isinstance(module, SparseConv2d) else None
            layout = module.layout
            told = passes.explain(w.dtype, w.device, layout.grid, layout.capacity, calls[name].x_shape, geometry)
            lines += [f"        {line}" for line in told]
    return "\n".join(lines) or "no sparse layers"
