"""Dynamic sparse training the slow way: dense weights times a mask, and every rule written down again in numpy.

Nothing here uses the package's layouts, selection or schedules; of its topology code only the random streams are
shared, so that both sides draw the same numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.topology.streams import Stream

PRIMES = (4294967291, 4294967279, 4294967231, 4294967197, 4294967189, 4294967161, 4294967143, 4294967111)


# -- masked dense layers -----------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A dense layer that computes with ``weight * mask``, and keeps the dense gradient of that product."""

    def __init__(self, dense: nn.Linear | nn.Conv2d, mask: Tensor) -> None:
        super().__init__()
        self.dense = dense
        self.register_buffer("mask", mask)
        self.gradients: list[Tensor] = []  # of every backward since the last optimizer step
        with torch.no_grad():
            dense.weight *= mask

    def forward(self, x: Tensor) -> Tensor:
        weight = self.dense.weight * self.mask
        if torch.is_grad_enabled():
            weight.register_hook(lambda gradient: self.gradients.append(gradient.detach().clone()))
        if isinstance(self.dense, nn.Linear):
            return F.linear(x, weight, self.dense.bias)
        d = self.dense
        return F.conv2d(x, weight, d.bias, d.stride, d.padding, d.dilation, d.groups)


class Layer:
    """One masked layer in blocks.

    Attributes:
        element: int [blocks, bo, bi], where each element of each block lies in the flat weight; -1 for padding. Blocks
            are counted by group, block row, tap, block column.
        row, column: int [blocks], block row and block column over all groups.
        kept: bool [blocks].
    """

    def __init__(self, name: str, module: Masked, block: tuple[int, int], capacity: int | None = None) -> None:
        self.name, self.module = name, module
        dense = module.dense
        groups = dense.groups if isinstance(dense, nn.Conv2d) else 1
        out, inp, *kernel = dense.weight.shape
        taps = math.prod(kernel)
        out //= groups
        bo, bi = block
        rows, columns = math.ceil(out / bo), math.ceil(inp / bi)
        element, row, column = [], [], []
        for g, r, t, c in itertools.product(range(groups), range(rows), range(taps), range(columns)):
            places = np.full((bo, bi), -1)
            for i, j in itertools.product(range(min(bo, out - r * bo)), range(min(bi, inp - c * bi))):
                places[i, j] = ((g * out + r * bo + i) * inp + c * bi + j) * taps + t
            element.append(places)
            row.append(g * rows + r)
            column.append(g * columns + c)
        self.element, self.row, self.column = np.stack(element), np.array(row), np.array(column)
        self.inside = (self.element >= 0).sum((1, 2))
        self.kept = self.blocks_of(module.mask).astype(bool).any((1, 2))
        self.explored, self.reliable = self.kept.copy(), np.zeros_like(self.kept)
        self.capacity = self.nnz if capacity is None else capacity

    @property
    def nnz(self) -> int:
        return int(self.kept.sum())

    @property
    def free(self) -> int:
        return int((~self.kept).sum())

    def blocks_of(self, weight: Tensor) -> np.ndarray:
        """Blocks [blocks, bo, bi] of a tensor of the weight's shape, in float64, zero-padded."""
        flat = np.append(weight.detach().double().numpy().ravel(), 0.0)
        return flat[self.element]

    def weights(self) -> np.ndarray:
        return self.blocks_of(self.module.dense.weight)

    def gradient(self) -> np.ndarray:
        """Dense gradient of the step, [blocks, bo, bi]: the sum over micro-batches."""
        return sum(self.blocks_of(gradient) for gradient in self.module.gradients)  # type: ignore[return-value]

    def norms(self, exact: bool) -> np.ndarray:
        """Growth scores [blocks]: norms of the step's gradient blocks, summed over micro-batches."""
        if exact:
            return frobenius(self.gradient())
        return sum(frobenius(self.blocks_of(gradient)) for gradient in self.module.gradients)  # type: ignore[return-value]

    def set_mask(self, kept: np.ndarray) -> None:
        """Take the blocks ``kept``, count what was explored."""
        self.explored |= kept
        self.reliable |= kept & self.kept
        self.kept = kept
        mask = np.zeros(self.module.mask.numel() + 1, dtype=bool)
        mask[self.element[kept]] = True
        self.module.mask.copy_(torch.from_numpy(mask[:-1]).view_as(self.module.mask))


def frobenius(blocks: np.ndarray) -> np.ndarray:
    return np.sqrt((blocks**2).sum((1, 2)))


# -- choosing ----------------------------------------------------------------------------------------------------------


def lowest(scores: np.ndarray, count: int, stream: Stream) -> np.ndarray:
    """bool [n]: the ``count`` lowest; of t entries tied at the threshold, those whose (number * prime + shift) mod t is
    smallest. NaN is higher than anything."""
    prime, shift = PRIMES[stream.integer(len(PRIMES))], stream.integer(2**31)
    chosen = np.zeros(len(scores), dtype=bool)
    if count <= 0:
        return chosen
    threshold = np.sort(scores)[count - 1]  # numpy sorts NaN last
    if np.isnan(threshold):
        tied = np.flatnonzero(np.isnan(scores))
        chosen[~np.isnan(scores)] = True
    else:
        tied = np.flatnonzero(scores == threshold)
        chosen[scores < threshold] = True
    left = count - int(chosen.sum())
    for number, place in enumerate(tied):
        if (number * prime + shift) % len(tied) < left:
            chosen[place] = True
    assert chosen.sum() == count
    return chosen


def highest(scores: np.ndarray, count: int, stream: Stream) -> np.ndarray:
    """As :func:`lowest`; NaN is lower than anything."""
    return lowest(np.where(np.isnan(scores), np.inf, -scores), count, stream)


def best_of_each(key: np.ndarray, scores: np.ndarray, counts: Mapping[int, int]) -> np.ndarray:
    """bool [n]: of the entries with key k the ``counts[k]`` of the highest scores, ties by index; NaN never."""
    chosen = np.zeros(len(scores), dtype=bool)
    for k, count in counts.items():
        places = [i for i in np.flatnonzero(key == k) if not np.isnan(scores[i])]
        places.sort(key=lambda i: -scores[i])  # stable
        chosen[places[:count]] = True
    return chosen


def pick(candidates: np.ndarray, count: int, stream: Stream) -> np.ndarray:
    """int [count]: a random subset of the places where ``candidates`` is true."""
    places = np.flatnonzero(candidates)
    return places[stream.subset(len(places), count)]


def share(fraction: float, blocks: int) -> int:
    """``ceil(fraction * blocks)``, in whole numbers where the product is one."""
    product = fraction * blocks
    whole = round(product)
    return min(blocks, whole if abs(product - whole) < 1e-9 else math.ceil(product))


# -- the run -----------------------------------------------------------------------------------------------------------

DEFAULTS = {
    "drop_fraction": 0.3, "update_every": 100, "stop_fraction": 0.75, "drop_schedule": "cosine", "drop_by": "l1",
    "scope": "layer", "min_per_row": 0, "min_per_col": 0, "exact": False, "growth": "random", "momentum": 0.9,
    "threshold": 1e-3, "begin": 0.0, "end": 0.75, "ablation": 0.3,
}  # fmt: skip


class Reference:
    """A masked-dense network under a topology method; ``step()`` after every ``optimizer.step()``.

    Args:
        net: a dense network; the layers named in ``masks`` become :class:`Masked` in place.
        masks: {layer: bool mask of whole blocks, the weight's shape}.
        block: edges.
        method: lower-case name; ``options`` as the method's class takes them.
        capacities: {layer: blocks that the layer may hold}, for methods that move blocks between layers.
    """

    def __init__(
        self,
        net: nn.Module,
        masks: Mapping[str, Tensor],
        block: int,
        method: str,
        options: Mapping[str, Any],
        total_steps: int,
        seed: int = 0,
        capacities: Mapping[str, int] | None = None,
    ) -> None:
        self.net, self.method, self.total_steps, self.seed = net, method, total_steps, seed
        self.options = {**DEFAULTS, **options}
        self.layers: dict[str, Layer] = {}
        for name, mask in masks.items():
            masked = Masked(net.get_submodule(name), mask.clone())  # type: ignore[arg-type]
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, masked)
            self.layers[name] = Layer(name, masked, (block, block), (capacities or {}).get(name))
        self.steps = self.updates = 0
        self.fraction = 0.0
        self.momenta: dict[str, Any] = {}
        self.initial = {name: layer.nnz for name, layer in self.layers.items()}
        self.thresholds: list[tuple[int, int]] = []  # of DSR: blocks below the threshold, and its target
        self.last: dict[str, tuple[int, int]] | None = None

    def attach(self, optimizer: torch.optim.Optimizer) -> Reference:
        self.optimizer = optimizer
        return self

    def stream(self, layer: str, purpose: str) -> Stream:
        return Stream(self.seed, layer, self.updates, purpose)

    def step(self) -> None:
        self.steps += 1
        self.last = None
        if self.method == "snfs":
            for name, layer in self.layers.items():
                self.momenta[name] = self.options["momentum"] * self.momenta.get(name, 0.0) + layer.gradient()
        if self.due():
            self.apply(CHANGES[self.method](self))
        for layer in self.layers.values():
            layer.module.gradients.clear()

    def due(self) -> bool:
        """Whether an update follows now; sets ``fraction``, of blocks to drop or of pruning still to be done."""
        o, step, total = self.options, self.steps, self.total_steps
        if self.method == "static":
            return False
        if self.method == "gradual":
            first, last = round(o["begin"] * total), round(o["end"] * total)
            self.fraction = ((last - step) / (last - first)) ** 3
            return first < step <= last and (step == last or step % o["update_every"] == 0)
        stop = o["stop_fraction"] * total
        self.fraction = decayed(o["drop_schedule"], o["drop_fraction"], min(1.0, step / stop))
        return step < stop and step % o["update_every"] == 0

    def apply(self, changes: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """``changes``: {layer: blocks dropped, blocks grown}, bool [blocks] each."""
        self.last = {}
        for name, (dropped, grown) in changes.items():
            layer = self.layers[name]
            assert not (dropped & ~layer.kept).any() and not (grown & layer.kept).any()
            layer.set_mask((layer.kept & ~dropped) | grown)
            if dropped.any() or grown.any():
                self.last[name] = int(dropped.sum()), int(grown.sum())
            assert layer.nnz <= layer.capacity
        self.updates += 1
        self.mask_everything()

    def mask_everything(self) -> None:
        """Weights, gradients and optimizer state are zero outside the masks."""
        for layer in self.layers.values():
            weight, mask = layer.module.dense.weight, layer.module.mask
            with torch.no_grad():
                weight *= mask
                if weight.grad is not None:
                    weight.grad *= mask
                for item in self.optimizer.state[weight].values():
                    if isinstance(item, Tensor) and item.shape == weight.shape:
                        item *= mask

    def explored(self, which: str = "explored", names: Iterable[str] | None = None) -> float:
        layers = [self.layers[name] for name in (self.layers if names is None else names)]
        seen = sum(int(layer.inside[getattr(layer, which)].sum()) for layer in layers)
        return seen / sum(int(layer.inside.sum()) for layer in layers)


def decayed(schedule: str, start: float, t: float) -> float:
    return {
        "cosine": start * (1 + math.cos(math.pi * t)) / 2,
        "linear": start * (1 - t),
        "constant": start,
    }[schedule]


# -- drop and grow: SET, RigL ------------------------------------------------------------------------------------------


def drop_and_grow(ref: Reference) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    drops = global_drops(ref) if ref.options["scope"] == "global" else layer_drops(ref)
    return {
        name: (dropped, grow(ref, ref.layers[name], dropped, int(dropped.sum()))) for name, dropped in drops.items()
    }


def drop_scores(ref: Reference, layer: Layer) -> np.ndarray:
    """[blocks], NaN where nothing is kept; blocks that the minima per row and column protect rank above all others."""
    weights, o = layer.weights(), ref.options
    flat = weights.reshape(len(weights), -1)
    by: dict[str, Callable[[], np.ndarray]] = {
        "l1": lambda: np.abs(flat).mean(1),
        "signed": lambda: np.abs(flat).mean(1),
        "l2": lambda: np.sqrt((flat**2).mean(1)),
        "linf": lambda: np.abs(flat).max(1),
        "gradient": lambda: np.abs(flat * layer.gradient().reshape(flat.shape)).mean(1),
        "random": lambda: of_kept(layer, ref.stream(layer.name, "drop").uniform(layer.nnz).numpy()),
    }
    scores = np.where(layer.kept, by[o["drop_by"]](), np.nan)
    protected, above = np.zeros(len(scores), dtype=bool), 2.0**20
    for key, least in ((layer.row, o["min_per_row"]), (layer.column, o["min_per_col"])):
        protected |= best_of_each(key, scores + above * protected, dict.fromkeys(key.tolist(), least))
    return scores + above * protected


def of_kept(layer: Layer, scores: np.ndarray) -> np.ndarray:
    """[blocks] from scores [nnz] of the kept blocks in their order."""
    out = np.full(len(layer.kept), np.nan)
    out[layer.kept] = scores
    return out


def lowest_kept(layer: Layer, scores: np.ndarray, count: int, stream: Stream) -> np.ndarray:
    """bool [blocks]: ``count`` kept blocks of the lowest ``scores`` [blocks]."""
    dropped = np.zeros(len(layer.kept), dtype=bool)
    dropped[layer.kept] = lowest(scores[layer.kept], count, stream)
    return dropped


def layer_drops(ref: Reference) -> dict[str, np.ndarray]:
    drops = {}
    for name, layer in ref.layers.items():
        scores, stream = drop_scores(ref, layer), ref.stream(name, "drop ties")
        if ref.options["drop_by"] == "signed":
            negative = layer.kept & (layer.weights().reshape(-1) < 0)
            sides = [(negative, share(ref.fraction, int(negative.sum())))]
            sides.append((layer.kept & ~negative, share(ref.fraction, layer.nnz - int(negative.sum()))))
            # Where free places are too few, fewer negative ones go.
            excess = max(0, sum(count for _, count in sides) - layer.free)
            sides[0] = negative, max(0, sides[0][1] - excess)
            sides[1] = sides[1][0], min(sides[1][1], layer.free)
            dropped = np.zeros(len(layer.kept), dtype=bool)
            for side, count in sides:
                dropped |= lowest_kept(layer, np.where(side, scores, np.nan), count, stream)
        else:
            dropped = lowest_kept(layer, scores, min(share(ref.fraction, layer.nnz), layer.free), stream)
        drops[name] = dropped
    return drops


def global_drops(ref: Reference) -> dict[str, np.ndarray]:
    """One threshold over all layers. Each keeps its best block, and drops no more than it has free places."""
    scores = {}
    for name, layer in ref.layers.items():
        own = drop_scores(ref, layer)
        own[best_of_each(np.zeros(len(own)), own, {0: 1})] = np.inf
        scores[name] = own
    total = share(ref.fraction, sum(layer.nnz for layer in ref.layers.values()))
    everything = np.concatenate([scores[name][layer.kept] for name, layer in ref.layers.items()])
    chosen = lowest(everything, total, ref.stream("", "drop ties"))
    drops = {}
    for name, layer in ref.layers.items():
        own, chosen = chosen[: layer.nnz], chosen[layer.nnz :]
        count = min(int(own.sum()), layer.free, layer.nnz - 1)
        drops[name] = lowest_kept(layer, scores[name], count, ref.stream(name, "drop ties"))
    return drops


def grow(ref: Reference, layer: Layer, dropped: np.ndarray, count: int) -> np.ndarray:
    """bool [blocks]: ``count`` new blocks; what was just dropped does not return."""
    o, random = ref.options, ref.method in ("set", "dsr")
    grown = np.zeros_like(layer.kept)
    if count == 0:
        return grown
    stream = ref.stream(layer.name, "grow")
    minima = o["min_per_row"] or o["min_per_col"]
    if ref.method == "set" and o["growth"] == "unexplored":
        fresh = ~layer.explored
        first = pick(fresh, min(count, int(fresh.sum())), stream)
        grown[first] = True
        grown[pick(layer.explored & ~layer.kept, count - len(first), stream)] = True
    elif random and not minima:
        grown[pick(~layer.kept, count, stream)] = True
    else:
        scores = stream.uniform(len(layer.kept)).double().numpy() if random else growth_scores(ref, layer)
        scores = np.where(layer.kept, np.nan, scores)
        have = layer.kept & ~dropped
        best = scores.copy()
        for row in range(layer.row.max() + 1):
            while have[layer.row == row].sum() < o["min_per_row"]:
                places = [i for i in np.flatnonzero((layer.row == row) & ~have) if not layer.kept[i]]
                if not places:
                    break
                lacks = {i: have[layer.column == layer.column[i]].sum() < o["min_per_col"] for i in places}
                place = max(places, key=lambda i: best[i] + 2.0**20 * lacks[i])
                have[place], scores[place] = True, np.inf
        for column in range(layer.column.max() + 1):
            while have[layer.column == column].sum() < o["min_per_col"]:
                places = [i for i in np.flatnonzero((layer.column == column) & ~have) if not layer.kept[i]]
                if not places:
                    break
                place = max(places, key=lambda i: best[i])
                have[place], scores[place] = True, np.inf
        grown = highest(scores, count, ref.stream(layer.name, "ties"))
    return grown


def growth_scores(ref: Reference, layer: Layer) -> np.ndarray:
    """[blocks]: norms of gradient blocks, or L1 norms of the momentum's."""
    if ref.method == "snfs":
        return np.abs(ref.momenta[layer.name]).sum((1, 2))
    return layer.norms(ref.options["exact"])


# -- blocks that change layers: SNFS, DSR ------------------------------------------------------------------------------


def divide(
    total: int, shares: Mapping[str, float], caps: Mapping[str, int], least: Mapping[str, int] | None = None
) -> dict[str, int]:
    """``total`` in proportion to ``shares`` after ``least``, none above its cap: caps bind in the order of cap over
    share. Layers of share 0 take what is then left, in proportion to their caps. Exact fractions; the largest
    remainders round up, the first of equal ones first."""
    first = {name: (least or {}).get(name, 0) for name in shares}
    caps = {name: caps[name] - first[name] for name in shares}
    total -= sum(first.values())
    parts = {name: Fraction(0) for name in shares}
    left = Fraction(total)
    for zero in (False, True):
        exact = {
            name: Fraction(caps[name] if zero else share) for name, share in shares.items() if (share == 0) == zero
        }
        order = sorted((name for name in exact if exact[name]), key=lambda name: Fraction(caps[name]) / exact[name])
        for number, name in enumerate(order):
            level = left / sum(exact[other] for other in order[number:])
            parts[name] = min(Fraction(caps[name]), level * exact[name])
            left -= parts[name]
    assert left == 0
    whole = {name: int(part) for name, part in parts.items()}
    for name in sorted(parts, key=lambda name: whole[name] - parts[name])[: total - sum(whole.values())]:
        whole[name] += 1
    return {name: first[name] + count for name, count in whole.items()}


def redistributed(
    ref: Reference, drops: Mapping[str, np.ndarray], shares: Mapping[str, float]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What all layers drop, grown again in proportion to ``shares`` as far as free places and slots allow."""
    gone = {name: int(dropped.sum()) for name, dropped in drops.items()}
    caps = {n: min(layer.free, layer.capacity - layer.nnz + gone[n]) for n, layer in ref.layers.items()}
    emptied = {name: int(gone[name] == layer.nnz > 0) for name, layer in ref.layers.items()}
    counts = divide(sum(gone.values()), shares, caps, emptied)
    return {name: (drops[name], grow(ref, layer, drops[name], counts[name])) for name, layer in ref.layers.items()}


def sparse_momentum(ref: Reference) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """SNFS: shares are the mean momentum of the weights that are kept now."""
    if ref.options["scope"] == "global":
        drops = global_drops(ref)
    else:
        drops, asked = {}, ref.fraction
        for name, layer in ref.layers.items():
            sparsity = layer.free / len(layer.kept)
            ref.fraction = min(asked, sparsity) if sparsity < 0.2 else asked
            drops[name] = layer_drops(ref)[name]
        ref.fraction = asked
    shares = {}
    for name, layer in ref.layers.items():
        stored = (layer.element >= 0) & layer.kept[:, None, None]
        shares[name] = float(np.abs(ref.momenta[name])[stored].mean()) if stored.any() else 0.0
    return redistributed(ref, drops, shares)


def reparameterize(ref: Reference) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """DSR: one threshold over all layers, which doubles or halves towards the target."""
    threshold = ref.options["threshold"]
    scores = {}
    for name, layer in ref.layers.items():
        scores[name] = drop_scores(ref, layer)
        scores[name][best_of_each(np.zeros(len(layer.kept)), scores[name], {0: 1})] = np.inf
    low = {name: int((own[ref.layers[name].kept] < threshold).sum()) for name, own in scores.items()}
    target = share(ref.fraction, sum(layer.nnz for layer in ref.layers.values()))
    found = sum(low.values())
    ref.options["threshold"] *= 0.5 if found > 1.1 * target else 2.0 if found < 0.9 * target else 1.0
    ref.thresholds.append((found, target))
    if found > 2 * target:
        everything = np.concatenate([own[ref.layers[name].kept] for name, own in scores.items()])
        chosen = lowest(everything, 2 * target, ref.stream("", "drop ties"))
        for name, layer in ref.layers.items():
            low[name], chosen = int(chosen[: layer.nnz].sum()), chosen[layer.nnz :]
    # The layers together need room for what they drop; those that drop more than they have free places give way.
    room = sum(min(layer.free, layer.capacity - layer.nnz + low[name]) for name, layer in ref.layers.items())
    excess = {name: max(0, low[name] - layer.free) for name, layer in ref.layers.items()}
    for name, cut in divide(max(0, sum(low.values()) - room), excess, excess).items():
        low[name] -= cut
    drops = {
        name: lowest_kept(layer, scores[name], low[name], ref.stream(name, "drop ties"))
        for name, layer in ref.layers.items()
    }
    return redistributed(ref, drops, {name: layer.nnz - low[name] for name, layer in ref.layers.items()})


# -- constant fan-in: SRigL --------------------------------------------------------------------------------------------


def constant_fan_in(ref: Reference) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    changes = {}
    for name, layer in ref.layers.items():
        dropped = layer_drops(ref)[name]
        if dropped.any():
            last = name == list(ref.layers)[-1]
            changes[name] = rows_of_equal_length(ref, layer, dropped, 0.0 if last else ref.options["ablation"])
    return changes


def rows_of_equal_length(
    ref: Reference, layer: Layer, dropped: np.ndarray, ablation: float
) -> tuple[np.ndarray, np.ndarray]:
    rows = int(layer.row.max()) + 1
    width = len(layer.row) // rows
    kept = layer.kept & ~dropped
    gradient = np.where(layer.kept, np.nan, growth_scores(ref, layer))
    salient = kept | highest(gradient, int(dropped.sum()), ref.stream(layer.name, "ties"))
    saliency = np.bincount(layer.row[salient], minlength=rows)
    holding = len(set(layer.row[layer.kept]))
    enough = max(1, int(ablation * max(1, layer.nnz // holding))) if ablation else 0
    count = max(int((saliency >= enough).sum()), math.ceil(layer.nnz / width))
    luck = ref.stream(layer.name, "rows").uniform(rows).double().numpy() / 2
    by_saliency = sorted(range(rows), key=lambda row: -(saliency[row] + luck[row]))
    active = by_saliency[:count]
    least = layer.nnz // count
    holds = np.bincount(layer.row[kept], minlength=rows)
    # One more for those that hold more already, then for the most salient.
    fan = {row: least for row in active}
    for row in sorted(active, key=lambda row: holds[row] <= least)[: layer.nnz % count]:
        fan[row] += 1
    scores = drop_scores(ref, layer)
    luck = ref.stream(layer.name, "grow").uniform(len(layer.row)).double().numpy()
    after = np.zeros_like(layer.kept)
    for row in range(rows):
        wanted = fan.get(row, 0)
        own = np.flatnonzero(layer.row == row)
        stored = sorted(own[layer.kept[own]], key=lambda k: (kept[k], scores[k], k), reverse=True)
        free = sorted(own[~layer.kept[own]], key=lambda k: (-gradient[k], luck[k]))
        stay = max(min(int(kept[own].sum()), wanted), wanted - len(free))
        after[stored[:stay]] = True
        after[free[: wanted - stay]] = True
    assert after.sum() == layer.nnz
    return layer.kept & ~after, after & ~layer.kept


# -- fewer and fewer: gradual pruning ----------------------------------------------------------------------------------


def prune(ref: Reference) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each layer, or all together, to final + round((initial - final) * what is left to be done)."""
    final, layers = ref.options["targets"], ref.layers
    if ref.options["scope"] == "layer":
        counts = {n: final[n] + round((ref.initial[n] - final[n]) * ref.fraction) for n in layers}
        drops = {
            name: lowest_kept(layer, drop_scores(ref, layer), layer.nnz - counts[name], ref.stream(name, "drop ties"))
            for name, layer in layers.items()
        }
    else:
        first, last = sum(ref.initial.values()), sum(final.values())
        whole = sum(layer.nnz for layer in layers.values()) - last - round((first - last) * ref.fraction)
        scores = []
        for layer in layers.values():
            own = drop_scores(ref, layer)
            own[best_of_each(np.zeros(len(own)), own, {0: 1})] = np.inf
            scores.append(own[layer.kept])
        chosen = lowest(np.concatenate(scores), whole, ref.stream("", "drop ties"))
        drops = {}
        for name, layer in layers.items():
            drops[name] = of_kept(layer, chosen[: layer.nnz]) == 1
            chosen = chosen[layer.nnz :]
    return {name: (dropped, np.zeros_like(dropped)) for name, dropped in drops.items()}


CHANGES: dict[str, Callable[[Reference], dict[str, tuple[np.ndarray, np.ndarray]]]] = {
    "set": drop_and_grow, "rigl": drop_and_grow, "snfs": sparse_momentum, "dsr": reparameterize,
    "srigl": constant_fan_in, "gradual": prune,
}  # fmt: skip


# -- a small problem ---------------------------------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A strided convolution, one with groups, a linear layer, a dense head; no size is a multiple of 8."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(5, 14, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(14, 18, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(18, 37),
        nn.ReLU(),
        nn.Linear(37, 4),
    ).to(dtype)


def block_masks(net: nn.Module, block: int, density: float = 0.3, seed: int = 5) -> dict[str, Tensor]:
    """Masks of whole blocks for all layers but the head, of a count that does not depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name in ("0", "2", "6"):
        layer = net.get_submodule(name)
        groups = getattr(layer, "groups", 1)
        out, inp, *taps = layer.weight.shape
        # Blocks of output channels start anew in every group.
        rows = [g * 1000 + o // block for g in range(groups) for o in range(out // groups)]
        columns = [i // block for i in range(inp)]
        row_ids = torch.tensor([sorted(set(rows)).index(row) for row in rows])
        scores = torch.rand(len(set(rows)), len(set(columns)), *taps, generator=generator)
        drawn = scores <= scores.flatten().kthvalue(max(1, round(density * scores.numel()))).values
        masks[name] = drawn[row_ids][:, torch.tensor(columns)]
    return masks


def batch(step: int, dtype: torch.dtype = torch.float64, size: int = 8) -> tuple[Tensor, Tensor]:
    """Random images, and labels that depend on them."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 5, 7, 7, generator=generator, dtype=torch.float64)
    y = (x.mean((1, 2, 3)) * 20).long().remainder(4)
    return x.to(dtype), y


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05),
}
