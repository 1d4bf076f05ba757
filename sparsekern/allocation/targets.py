"""Target densities of all layers from their weight shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .schemes import SCHEMES, Problem

SCORE_SCHEMES = ("snip", "grasp", "synflow", "lamp", "magnitude")


def allocate(
    shapes: Mapping[str, Sequence[int]],
    sparsity: float,
    scheme: str | Mapping[str, float] = "erk",
    block: int | Sequence[int] = 1,
    macs: Mapping[str, float] | None = None,
    *,
    stem: str | None = "auto",
    head: str | None = "auto",
    head_density: float = 1.0,
) -> dict[str, float]:
    """Target density of every layer, from weight shapes alone.

    ``sum(d_l * N_l) == (1 - sparsity) * sum(N_l)`` holds to rounding for every scheme, and ``0 < d_l <= 1``.

    Args:
        shapes: ``{name: weight shape}`` of the layers to sparsify, [O, I] or [O, C/g, R, S], in forward order.
            Layers that stay dense are left out and are no part of the budget.
        sparsity: fraction of weights to remove, within [0, 1). With ``macs`` it is the fraction of MACs.
        scheme: one of :data:`SCHEMES`, or ``{name: sparsity}`` with an entry for each layer (exact names; ``sparsity``
            and ``macs`` then play no part).
        block: block size, checked only. Targets follow the weight's own dims (er and erk too), whatever the block;
            :func:`block_counts` turns them into whole blocks.
        macs: ``{name: MACs of the dense layer}``. The scheme's family stays the same, its one parameter is solved for
            ``sum(d_l * macs_l) == (1 - sparsity) * sum(macs_l)``.
        stem: layer that uniform+ keeps dense; "auto" is the first 4-D weight (an MLP has none), None no layer. Pass
            None where the real stem is not among ``shapes``.
        head: last layer, for uniform+ (20 % and more) and erk+; "auto" is the last entry, None no layer.
        head_density: density of the head under erk+.

    Returns:
        ``{name: density}`` in the order of ``shapes``.

    Raises:
        ValueError: empty or malformed shapes, sparsity out of range, unknown scheme or layer names, or a budget that
            the scheme cannot meet.

    Sources: RigL (Evci et al. 2020) for er and erk; LAMP (Lee et al. 2021) for uniform+; "The unreasonable
    effectiveness of random pruning" (Liu et al. 2022) for erk+; "Connectivity matters" (Vysogorets and Kempe 2023)
    for igq; "Why random pruning is all we need to start sparse" (Gadhikar et al. 2023) for balanced.
    """
    sizes = {name: _check_shape(name, shape) for name, shape in shapes.items()}
    if not sizes:
        raise ValueError("shapes: expected at least one layer, got none; check what is included and excluded")
    _check_block(block)
    if isinstance(scheme, Mapping):
        return _explicit(sizes, scheme)
    if scheme not in SCHEMES:
        if scheme in SCORE_SCHEMES:
            raise ValueError(
                f"scheme: {scheme!r} scores the weights of a model; use compute_scores and densities_from_scores"
            )
        raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, or {{name: sparsity}}, got {scheme!r}")
    check_sparsity(sparsity)
    costs = {name: float(math.prod(shape)) for name, shape in sizes.items()} if macs is None else _costs(sizes, macs)
    if stem == "auto":
        stem = next((name for name, shape in sizes.items() if len(shape) == 4), None)
    if head == "auto":
        head = next(reversed(sizes))
    for what, name in (("stem", stem), ("head", head)):
        if name is not None and name not in sizes:
            raise ValueError(f"{what}: expected one of the layers, 'auto' or None, got {name!r}")
    if not 0.0 < head_density <= 1.0:
        raise ValueError(f"head_density: expected a number within (0, 1], got {head_density!r}")
    if sparsity == 0:
        return dict.fromkeys(sizes, 1.0)
    problem = Problem(sizes, costs, 1.0 - sparsity, stem, head, head_density)
    return {name: min(1.0, d) for name, d in SCHEMES[scheme](problem).items()}


def check_sparsity(sparsity: float, what: str = "sparsity") -> None:
    """Raise ``ValueError`` unless ``sparsity`` is a number within [0, 1)."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"{what}: expected a fraction removed within [0, 1), got {sparsity!r}")


def _check_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    dims = tuple(int(n) for n in shape)
    if len(dims) not in (2, 4) or min(dims) < 1:
        raise ValueError(f"shapes: expected [O, I] or [O, C/g, R, S] with sizes of 1 and more for {name!r}, got {dims}")
    return dims


def _check_block(block: int | Sequence[int]) -> None:
    # layout.as_block says the same, but importing it would load torch.
    pair = (block, block) if isinstance(block, int) else tuple(block)
    if len(pair) != 2 or not all(isinstance(b, int) and b >= 1 for b in pair):
        raise ValueError(f"block: expected an int or (bo, bi) of 1 and more, got {block!r}")


def _explicit(sizes: Mapping[str, tuple[int, ...]], sparsities: Mapping[str, float]) -> dict[str, float]:
    if missing := [name for name in sizes if name not in sparsities]:
        raise ValueError(f"scheme: no sparsity for {missing}; give one for each layer (0.0 keeps it dense)")
    if unknown := [name for name in sparsities if name not in sizes]:
        raise ValueError(f"scheme: sparsities for unknown layers {unknown}; expected exact names out of {list(sizes)}")
    for name, sparsity in sparsities.items():
        check_sparsity(sparsity, f"scheme[{name!r}]")
    return {name: 1.0 - sparsities[name] for name in sizes}


def _costs(sizes: Mapping[str, tuple[int, ...]], macs: Mapping[str, float]) -> dict[str, float]:
    if missing := [name for name in sizes if name not in macs]:
        raise ValueError(f"macs: no entry for {missing}; give the MACs of each layer")
    costs = {name: float(macs[name]) for name in sizes}
    if bad := {name: cost for name, cost in costs.items() if not 0.0 < cost < math.inf}:
        raise ValueError(f"macs: expected positive numbers, got {bad}; drop layers that never run from shapes")
    return costs
