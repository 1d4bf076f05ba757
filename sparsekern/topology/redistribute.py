"""Block counts that move between layers: integer arithmetic with caps, exact totals, no retries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from sparsekern.topology.layer import Layer


def redistribute(
    total: int, shares: Mapping[str, float], caps: Mapping[str, int], least: Mapping[str, int] | None = None
) -> dict[str, int]:
    """``total`` as whole parts in proportion to ``shares``, none above its cap.

    What a cap cuts off goes to the others in proportion again, until the parts add up (at most one round per layer).
    Fractions go by the largest remainder, ties by order. Where only layers of share 0 have room left, they take the
    rest in proportion to their room.

    Args:
        total: within ``sum(least)`` .. ``sum(caps)``.
        shares: 0 and more, of any sum.
        caps: largest part of each.
        least: given first, before the shares count; default 0.

    Returns:
        A part for each key of ``shares``, in their order.

    Raises:
        ValueError: a total that the caps cannot hold or that ``least`` exceeds, or a share that is no finite number
            of 0 or more.
    """
    first = {name: (least or {}).get(name, 0) for name in shares}
    room = {name: caps[name] - first[name] for name in shares}
    rest = total - sum(first.values())
    if min(room.values(), default=0) < 0 or not 0 <= rest <= sum(room.values()):
        raise ValueError(
            f"redistribute: expected a total of {sum(first.values())}..{sum(caps[name] for name in shares)} blocks, "
            f"got {total}"
        )
    if bad := {name: share for name, share in shares.items() if not (math.isfinite(share) and share >= 0)}:
        raise ValueError(f"redistribute: expected finite shares of 0 or more, got {bad}")
    parts = {name: Fraction(0) for name in shares}
    weights = {name: Fraction(share) for name, share in shares.items() if share > 0 and room[name]}
    while rest:
        if not weights:
            weights = {name: Fraction(room[name]) for name in shares if room[name] > parts[name]}
        level = rest / sum(weights.values(), Fraction(0))
        full = [name for name, weight in weights.items() if weight * level >= room[name]]
        for name in full:
            parts[name] = Fraction(room[name])
            rest -= room[name]
            del weights[name]
        if not full:
            parts |= {name: weight * level for name, weight in weights.items()}
            break
    counts = {name: math.floor(part) for name, part in parts.items()}
    by_remainder = sorted(parts, key=lambda name: counts[name] - parts[name])
    for name in by_remainder[: total - sum(first.values()) - sum(counts.values())]:
        counts[name] += 1
    return {name: first[name] + count for name, count in counts.items()}


def room(layer: Layer, dropped: int) -> int:
    """Blocks that a layer can grow after it dropped some: free places of the grid, just-dropped ones not, and slots."""
    return min(layer.free, layer.capacity - layer.nnz + dropped)


def affordable(drops: Mapping[str, int], layers: Mapping[str, Layer]) -> dict[str, int]:
    """``drops`` lowered until all layers together have room for as many new blocks.

    Only layers that drop more than they have free places give way, in proportion to the excess.
    """
    lacking = sum(drops.values()) - sum(room(layers[name], count) for name, count in drops.items())
    excess = {name: max(0, count - layers[name].free) for name, count in drops.items()}
    cut = redistribute(max(0, lacking), excess, excess)
    return {name: count - cut[name] for name, count in drops.items()}


def check_same_block(who: str, layers: Mapping[str, Layer]) -> None:
    """Raise ``ValueError`` unless all layers have blocks of one size, so that counts of blocks compare."""
    sizes: dict[tuple[int, int], str] = {}
    for name, layer in layers.items():
        sizes.setdefault(layer.grid.block, name)
    if len(sizes) > 1:
        found = ", ".join(f"{bo}x{bi} ({name})" for (bo, bi), name in sizes.items())
        raise ValueError(
            f"{who}: expected the same block size in every sparse layer, since blocks of all layers compare, got "
            f"{found}; sparsify with SparsityConfig(block=...) instead of 'auto'"
        )


def check_room(who: str, layers: Mapping[str, Layer]) -> None:
    """Raise ``ValueError`` where no layer can take a block of another."""
    check_same_block(who, layers)
    if len(layers) > 1 and not any(layer.capacity > layer.nnz for layer in layers.values()):
        raise ValueError(
            f"{who}: expected spare slots for blocks that change layers, got layers that are all full; sparsify with "
            "SparsityConfig(capacity=1.5)"
        )
