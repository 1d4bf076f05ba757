"""Which layers of a model can become sparse, and why the others stay dense."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sparsekern.config import Selector
from sparsekern.nn import SparseModule

_WRAPPERS = {"OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"}
STEM_CHANNELS = 8
HEAD_NAMES = ("head", "lm_head", "classifier")


@dataclass
class Candidate:
    """A Linear or Conv2d of the model.

    Attributes:
        kind: "linear" or "conv2d".
        weight_shape: ``(O, I)`` or ``(O, C/g, R, S)``, whatever order the module stores.
        reason: why it stays dense, "" if it may become sparse.
        explicit: the user named the layer in ``overrides`` or ``masks``.
    """

    name: str
    module: nn.Module
    kind: str
    weight_shape: tuple[int, ...]
    groups: int = 1
    reason: str = ""
    explicit: bool = False


def check_unwrapped(model: nn.Module) -> None:
    """Raise ``TypeError`` for a compiled, DDP- or FSDP-wrapped model."""
    for module in model.modules():
        wrapped = _WRAPPERS & {base.__name__ for base in type(module).__mro__}
        if wrapped or getattr(module, "_compiled_call_impl", None) is not None:
            raise TypeError(
                f"sparsify_: expected a plain module, got one under {', '.join(sorted(wrapped)) or 'torch.compile'}; "
                "sparsify first, then compile or wrap"
            )


def is_conv1d(module: nn.Module) -> bool:
    """Transformers' ``Conv1D``: a linear layer whose weight is stored [I, O]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def matches(selector: Selector, name: str, module: nn.Module) -> bool:
    """Types match exactly, strings are globs over the name, callables decide."""
    if isinstance(selector, type):
        return type(module) is selector or (selector is nn.Linear and is_conv1d(module))
    if isinstance(selector, str):
        return fnmatch.fnmatchcase(name, selector)
    return bool(selector(name, module))


def override_of(name: str, overrides: Mapping[str, float]) -> float | None:
    """The sparsity that ``overrides`` sets for this name: exact names first, then the first matching glob."""
    if name in overrides:
        return overrides[name]
    return next((value for glob, value in overrides.items() if fnmatch.fnmatchcase(name, glob)), None)


def find(
    model: nn.Module,
    include: Sequence[Selector],
    exclude: Sequence[Selector],
    explicit: Sequence[str] = (),
) -> list[Candidate]:
    """Every Linear and Conv2d of the model in order, with the reason why it stays dense.

    Args:
        explicit: names the user asked for; the default exclusions (stem, classifier) do not apply to them.
    """
    candidates = [c for name, module in model.named_modules() if (c := _candidate(name, module)) is not None]
    shared = _shared_parameters(model)
    head = _classifier(candidates)
    wanted = set(explicit)
    for c in candidates:
        c.explicit = c.name in wanted
        c.reason = _reason(c, include, exclude, shared, head)
    return candidates


def _candidate(name: str, module: nn.Module) -> Candidate | None:
    if isinstance(module, SparseModule):
        kind = "linear" if len(module.grid.weight_shape) == 2 else "conv2d"
        return Candidate(name, module, kind, module.grid.weight_shape, module.grid.groups)
    if is_conv1d(module):
        rows, columns = module.weight.shape  # type: ignore[union-attr, operator, misc]
        return Candidate(name, module, "linear", (int(columns), int(rows)))
    weight = module._parameters.get("weight")
    shape = tuple(weight.shape) if weight is not None else ()
    if isinstance(module, nn.Linear):
        return Candidate(name, module, "linear", shape or (module.out_features, module.in_features))
    if isinstance(module, nn.Conv2d):
        default = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        return Candidate(name, module, "conv2d", shape or default, module.groups)
    return None


def _shared_parameters(model: nn.Module) -> set[int]:
    """ids of Parameters that more than one module holds (tied weights)."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _classifier(candidates: list[Candidate]) -> str | None:
    """The last layer, taken for the classifier or LM head when it is a linear layer and not the only candidate."""
    linear = [c for c in candidates if c.kind == "linear"]
    return linear[-1].name if linear and len(candidates) > 1 and candidates[-1] is linear[-1] else None


def _reason(
    c: Candidate, include: Sequence[Selector], exclude: Sequence[Selector], shared: set[int], head: str | None
) -> str:
    module = c.module
    if isinstance(module, SparseModule):
        return "already sparse"
    if type(module) not in (nn.Linear, nn.Conv2d) and not is_conv1d(module):
        return f"subclass {type(module).__name__}"
    weight = module._parameters.get("weight")
    if weight is None:
        return "reparametrised weight (prune, weight_norm, ...)"
    if id(weight) in shared:
        return "tied weight"
    if weight.dim() != len(c.weight_shape) or not weight.is_floating_point():
        return f"weight is {weight.dtype}"
    if c.kind == "conv2d" and c.groups > 1 and c.weight_shape[1] == 1:
        return "depthwise convolution"
    for selector in exclude:
        if matches(selector, c.name, module):
            return "excluded"
    if c.explicit:
        return ""
    if not any(matches(selector, c.name, module) for selector in include):
        return "not included"
    if c.kind == "conv2d" and c.weight_shape[1] * c.groups < STEM_CHANNELS:
        return f"stem convolution ({c.weight_shape[1] * c.groups} input channels)"
    if c.name == head or (c.kind == "linear" and c.name.rpartition(".")[2] in HEAD_NAMES):
        return "classifier (name it in overrides to sparsify)"
    return ""
