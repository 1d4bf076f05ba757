"""Drop-in block-sparse modules: ``SparseLinear`` for ``nn.Linear``, ``SparseConv2d`` for ``nn.Conv2d``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern import element_mask as bits
from sparsekern import ops
from sparsekern.layout import BlockGrid, BlockLayout, as_block

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


# In-place names end in one underscore; __iadd__ and its like, __setitem__ and property setters write too.
_WRITES = re.compile(r"\w*[^_]_|__(i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)|setitem|set)__")
_READS = ("requires_grad_", "retain_grad_")


class _ReadOnlyWeight(Tensor):
    """The dense weight as :attr:`SparseModule.weight` hands it out: reads like any tensor, refuses in-place writes."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        target = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        if isinstance(target, cls) and name not in _READS and (_WRITES.fullmatch(name) or "out" in kwargs):
            raise RuntimeError(
                "sparsekern: `weight` of a sparse module is computed from `values`, so writing into it would be lost; "
                "write into `layer.values` (the stored blocks), or use sparsekern.load_dense_state_dict / "
                "`layer.load_dense_(weight)`"
            )
        result = super().__torch_function__(func, types, args, kwargs)
        alias = func == Tensor.data.__get__ or name == "detach"  # type: ignore[attr-defined]
        if isinstance(result, cls) and not alias:
            return result.as_subclass(Tensor)
        return result


class SparseModule(nn.Module):
    """What the sparse modules share: the stored blocks, their layout and their state dict.

    Attributes:
        values: Parameter [capacity, bo, bi], the stored blocks; spare slots and the padding of edge blocks stay zero.
        bias: Parameter [O] or None.
        index: int32 buffer, the packed layout; rewritten in place by topology updates.
        element_mask: uint8 buffer [capacity, ceil(bo*bi/8)] of elements that learn inside stored blocks, or None.
        masked: True computes densely on the materialised masked weight (for masks that don't pay).
        probe: while set, every backward adds to its ``.grad`` what a topology update wants to know, see
            :func:`sparsekern.sparse_linear`.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    index: Tensor
    element_mask: Tensor | None
    probe: Tensor | None = None

    def _build(
        self,
        layout: BlockLayout,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        element_mask: Tensor | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        self.grid = layout.grid
        self.masked = False
        self.probe = None  # on the instance: a graph compiled without a probe guards on where the attribute lives
        self.values = nn.Parameter(torch.zeros(layout.capacity, *layout.grid.block, **factory))  # type: ignore[arg-type]
        self.register_buffer("index", layout.index.to(self.values.device), persistent=False)
        if element_mask is not None:
            element_mask = bits.pack(element_mask).to(self.values.device)
        self.register_buffer("element_mask", element_mask)
        if bias:
            self.bias = nn.Parameter(torch.zeros(layout.grid.weight_shape[0], **factory))  # type: ignore[arg-type]
        else:
            self.register_parameter("bias", None)
        self._unloaded = False
        self._note_fresh()

    def reset_parameters(self, rescale: bool = False) -> None:
        """Initialise as the dense module does (dense fan-in), optionally times 1/sqrt(density)."""
        weight = torch.empty(self.grid.weight_shape, dtype=self.values.dtype, device=self.values.device)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.load_dense_(weight, rescale=rescale)
        if self.bias is not None:
            bound = 1 / math.sqrt(weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> BlockLayout:
        """The stored blocks, over this module's own buffer."""
        return BlockLayout(self.grid, self.index)

    @property
    def block(self) -> tuple[int, int]:
        return self.grid.block

    @property
    def mask(self) -> Tensor:
        """bool, the dense weight's shape: the elements that learn."""
        layout = self.layout
        if self.element_mask is None:
            return layout.mask()
        return layout.to_dense(bits.unpack(self.element_mask, self.block).to(torch.uint8)).bool()

    @property
    def weight(self) -> Tensor:
        """The dense weight, differentiable through ``values``. Materialised at every access; read-only."""
        return self.layout.to_dense(self.values).as_subclass(_ReadOnlyWeight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # nn.Module would register a Parameter past any property setter
            raise AttributeError(
                "sparsekern: `weight` of a sparse module is computed from `values`; use `layer.load_dense_(weight)`"
            )
        super().__setattr__(name, value)

    def load_dense_(self, weight: Tensor, *, rescale: bool = False) -> None:
        """Take the stored elements of a dense weight.

        Args:
            weight: the dense weight's shape, any dtype or device.
            rescale: multiply by 1/sqrt(density), which keeps the variance of the outputs.
        """
        with torch.no_grad():
            layout = self.layout
            stored = layout.from_dense(weight.to(device=self.values.device, dtype=self.values.dtype))
            if self.element_mask is not None:
                stored = stored * bits.unpack(self.element_mask, self.block)
            if rescale:
                stored = stored / math.sqrt(max(float(self.mask.float().mean()), 1e-12))
            self.values.copy_(stored)
        self._unloaded = False
        self._note_fresh()

    def extra_repr(self) -> str:
        bo, bi = self.block
        state = ", masked" if self.masked else ""
        return f"block={bo}x{bi}, density={self.values.shape[0] / max(self.grid.blocks, 1):.4g}{state}"

    def _check_loaded(self) -> None:
        if self._unloaded:
            raise RuntimeError(
                f"{type(self).__name__}: moved from the meta device without a layout; load a state dict first"
            )

    # -- moving, saving, loading -----------------------------------------------------------------------------------

    def _note_fresh(self) -> None:
        self._fresh_version = self.values._version

    def _started(self) -> bool:
        return self.values.grad is not None or self.values._version > self._fresh_version

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        was_meta = self.index.is_meta
        started = self._started()
        super()._apply(fn, recurse)
        if was_meta and not self.index.is_meta:
            self.index.zero_()  # to_empty leaves garbage, which a kernel would follow out of bounds
            self._unloaded = True
        if not started:
            self._note_fresh()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        view = self.layout.view
        destination[prefix + "row_ptr"] = view.row_ptr.clone()
        destination[prefix + "col"] = view.col.clone()
        if self.masked:
            destination[prefix + "masked"] = torch.ones(())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = ("row_ptr", "col", "masked")
        row_ptr, col, masked = (state_dict.get(prefix + name) for name in names)
        if prefix + "weight" in state_dict and row_ptr is None:
            error_msgs.append(
                f"{prefix[:-1]}: expected the state dict of a sparse module (values, row_ptr, col), got a dense "
                "`weight`; use sparsekern.load_dense_state_dict(model, state_dict)"
            )
            return
        if row_ptr is None or col is None:
            missing_keys.extend(prefix + name for name in names[:2] if prefix + name not in state_dict)
        else:
            try:
                self._load_layout(BlockLayout.from_rows(self.grid, row_ptr, col), state_dict.get(prefix + "values"))
            except ValueError as error:
                error_msgs.append(f"{prefix[:-1]}: {error}")
                return
            self.masked = masked is not None
        stored_mask = state_dict.get(prefix + "element_mask")
        if stored_mask is not None and self.element_mask is None:
            self.register_buffer("element_mask", torch.zeros_like(stored_mask, device=self.index.device))
        elif stored_mask is None and self.element_mask is not None and row_ptr is not None:
            self.register_buffer("element_mask", None)
        elif stored_mask is not None and self.element_mask is not None and stored_mask.shape != self.element_mask.shape:
            self.register_buffer("element_mask", torch.zeros_like(stored_mask, device=self.index.device))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [key for key in unexpected_keys if key not in {prefix + name for name in names}]
        if row_ptr is not None:
            self._unloaded = False
        self._note_fresh()

    def _load_layout(self, layout: BlockLayout, values: Tensor | None) -> None:
        if layout.capacity == self.layout.capacity:
            self.index.copy_(layout.index)
            return
        if self._started():
            raise ValueError(
                f"expected a checkpoint with {self.layout.capacity} block slots, got {layout.capacity}, and training "
                "has started, so the optimizer holds the old Parameter; load before building the optimizer"
            )
        if values is not None and tuple(values.shape) != (layout.capacity, *self.block):
            raise ValueError(f"expected values {[layout.capacity, *self.block]}, got {list(values.shape)}")
        new = torch.zeros(layout.capacity, *self.block, dtype=self.values.dtype, device=self.values.device)
        self.values = nn.Parameter(new, requires_grad=self.values.requires_grad)
        self.index = layout.index.to(self.index.device)

    def _become(
        self, dense: nn.Module, grid: BlockGrid, mask: Tensor | None, capacity: int | None, rescale: bool
    ) -> None:
        """Build from a dense module and take over what a user may have set on it: mode, hooks, requires_grad."""
        weight, bias = dense._parameters["weight"], dense._parameters.get("bias")
        assert weight is not None
        layout, element_mask = _layout_of(grid, mask, None, 0, capacity)
        self._build(layout, bias is not None, weight.device, weight.dtype, element_mask)
        if not weight.is_meta:
            self.load_dense_(weight.detach(), rescale=rescale)
        self.training = dense.training
        self.values.requires_grad_(weight.requires_grad)
        if self.bias is not None and bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)
            self.bias.requires_grad_(bias.requires_grad)
        for name in HOOKS:
            getattr(self, name).update(getattr(dense, name))

    def _give(self, dense: nn.Module) -> nn.Module:
        with torch.no_grad():
            dense.weight.copy_(self.layout.to_dense(self.values))  # type: ignore[operator, union-attr]
            if self.bias is not None:
                dense.bias.copy_(self.bias)  # type: ignore[operator, union-attr]
        dense.training = self.training
        dense.weight.requires_grad_(self.values.requires_grad)  # type: ignore[operator, union-attr]
        if self.bias is not None:
            dense.bias.requires_grad_(self.bias.requires_grad)  # type: ignore[operator, union-attr]
        for name in HOOKS:
            getattr(dense, name).update(getattr(self, name))
        return dense


def _layout_of(
    grid: BlockGrid, mask: Tensor | None, sparsity: float | None, seed: int, capacity: int | None
) -> tuple[BlockLayout, Tensor | None]:
    """Layout from a mask or a sparsity, and the element mask [capacity, bo, bi] where stored blocks have holes."""
    if mask is None:
        keep = round((1.0 - (sparsity or 0.0)) * grid.blocks)
        if not 0.0 <= (sparsity or 0.0) < 1.0:
            raise ValueError(f"sparsity: expected a fraction in [0, 1), got {sparsity}")
        generator = torch.Generator().manual_seed(seed)
        block_mask = torch.zeros(grid.blocks, dtype=torch.bool)
        block_mask[torch.randperm(grid.blocks, generator=generator)[: max(keep, 1)]] = True
        return BlockLayout.from_block_mask(grid, block_mask, capacity=capacity), None
    if sparsity is not None:
        raise ValueError("expected mask or sparsity, got both; pass one")
    grid.check_weight(mask)
    mask = (mask != 0).cpu()
    layout = BlockLayout.from_mask(mask, grid.block, groups=grid.groups, capacity=capacity)
    if torch.equal(layout.mask(), mask):
        return layout, None
    # Padding of edge blocks counts as learning: nothing reaches it, and full blocks then look full.
    outside = ~grid.to_blocks(torch.ones(grid.weight_shape, dtype=torch.bool))
    kept = torch.cat([grid.to_blocks(mask) | outside, torch.zeros(1, *grid.block, dtype=torch.bool)])
    return layout, kept[layout.slots()]


class SparseLinear(SparseModule):
    """Block-sparse ``nn.Linear``: y = x w^T + bias, computing stored blocks only.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        mask: bool [O, I], the elements to keep; or
        sparsity: fraction of blocks to leave out at random.
        block: int or (bo, bi), 1..128 each.
        seed: of the random mask.
        capacity: block slots (default: as many as blocks are stored).

    Shape: x [..., I] -> y [..., O].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
        sparsity: float | None = None,
        block: int | Sequence[int] = 32,
        seed: int = 0,
        capacity: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        grid = BlockGrid((out_features, in_features), as_block(block))
        layout, element_mask = _layout_of(grid, mask, sparsity, seed, capacity)
        self._build(layout, bias, device, dtype, element_mask)
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls,
        dense: nn.Linear,
        mask: Tensor | None = None,
        block: int | Sequence[int] = 32,
        *,
        capacity: int | None = None,
        rescale: bool = False,
    ) -> SparseLinear:
        """Sparse twin of a dense layer: its weights under ``mask`` (default: all), its bias, mode and hooks."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = dense.in_features, dense.out_features
        new._become(dense, BlockGrid((dense.out_features, dense.in_features), as_block(block)), mask, capacity, rescale)
        return new

    def to_dense(self) -> nn.Linear:
        """A plain ``nn.Linear`` of equal outputs."""
        w = self.values
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=w.device, dtype=w.dtype)
        self._give(dense)
        return dense

    def forward(self, input: Tensor) -> Tensor:
        self._check_loaded()
        if self.masked:
            return F.linear(input, _masked_weight(self), self.bias)
        return ops.sparse_linear(
            input, self.values, self.layout, self.bias, element_mask=self.element_mask, probe=self.probe
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            + super().extra_repr()
        )


def _masked_weight(module: SparseModule) -> Tensor:
    """The dense weight with gradients stopped at the elements that do not learn."""
    weight = module.layout.to_dense(module.values)
    if module.element_mask is not None:
        weight = weight * module.mask.to(weight.dtype)
    return weight if module.probe is None else ops.probed(weight, module.probe, module.layout)


class SparseConv2d(SparseModule):
    """Block-sparse ``nn.Conv2d``; blocks cover output by input channels of one filter tap.

    Args:
        in_channels ... padding_mode, device, dtype: as for ``nn.Conv2d``.
        mask: bool [O, C/g, R, S], the elements to keep; or
        sparsity: fraction of blocks to leave out at random.
        block, seed, capacity: as for :class:`SparseLinear`.

    Shape: x [N, C, H, W] or [C, H, W] -> y [N, O, P, Q] or [O, P, Q]; the memory format is kept.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
        sparsity: float | None = None,
        block: int | Sequence[int] = 32,
        seed: int = 0,
        capacity: int | None = None,
    ) -> None:
        super().__init__()
        shell = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        self._copy_geometry(shell)
        grid = BlockGrid(tuple(shell.weight.shape), as_block(block), groups)
        layout, element_mask = _layout_of(grid, mask, sparsity, seed, capacity)
        self._build(layout, bias, device, dtype, element_mask)
        self.reset_parameters()

    def _copy_geometry(self, dense: nn.Conv2d) -> None:
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        self.kernel_size, self.stride = dense.kernel_size, dense.stride
        self.padding, self.dilation, self.groups = dense.padding, dense.dilation, dense.groups
        self.padding_mode, self.transposed, self.output_padding = dense.padding_mode, False, (0, 0)
        self._reversed_padding_repeated_twice = list(dense._reversed_padding_repeated_twice)

    @classmethod
    def from_dense(
        cls,
        dense: nn.Conv2d,
        mask: Tensor | None = None,
        block: int | Sequence[int] = 32,
        *,
        capacity: int | None = None,
        rescale: bool = False,
    ) -> SparseConv2d:
        """Sparse twin of a dense layer: its weights under ``mask`` (default: all), its bias, mode and hooks."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new._copy_geometry(dense)
        grid = BlockGrid(tuple(dense.weight.shape), as_block(block), dense.groups)
        new._become(dense, grid, mask, capacity, rescale)
        return new

    def to_dense(self) -> nn.Conv2d:
        """A plain ``nn.Conv2d`` of equal outputs."""
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            self.bias is not None,
            self.padding_mode,  # type: ignore[arg-type]
            device=self.values.device,
            dtype=self.values.dtype,
        )
        self._give(dense)
        return dense

    def forward(self, input: Tensor) -> Tensor:
        self._check_loaded()
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        if self.masked:
            weight = _masked_weight(self)
            return F.conv2d(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)
        return ops.sparse_conv2d(
            input,
            self.values,
            self.layout,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            element_mask=self.element_mask,
            probe=self.probe,
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}{'' if self.bias is not None else ', bias=False'}, {super().extra_repr()}"
