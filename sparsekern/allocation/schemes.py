"""Layer-wise density schemes: how a global budget is spread over the layers.

Each scheme is a one-parameter family of layer densities. A scheme function gets, per layer, the weight's shape
and its cost (weights for a parameter budget, MACs for a MAC budget) and returns the member of the family with
``sum(d_l * cost_l) == d * sum(cost_l)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """What a scheme gets to see.

    Attributes:
        shapes: ``{name: weight shape}``, [O, I] or [O, C/g, R, S], in forward order.
        costs: ``{name: cost of the dense layer}``, all positive.
        density: wanted ``sum(d_l * cost_l) / sum(cost_l)``, above 0 and below 1.
        stem: layer that uniform+ leaves dense, or None.
        head: last layer, for uniform+ and erk+, or None.
        head_density: density of the head under erk+.
    """

    shapes: Mapping[str, Shape]
    costs: Mapping[str, float]
    density: float
    stem: str | None
    head: str | None
    head_density: float

    @property
    def budget(self) -> float:
        return self.density * math.fsum(self.costs.values())

    def sizes(self) -> dict[str, int]:
        return {name: math.prod(shape) for name, shape in self.shapes.items()}


def proportional(raw: Mapping[str, float], costs: Mapping[str, float], budget: float) -> tuple[dict[str, float], float]:
    """Densities ``min(1, eps * raw_l)`` of total cost ``budget``, and eps.

    The dense-set iteration of ERK (Evci et al. 2020): while the largest ``eps * raw_l`` exceeds 1, every layer
    tied at that maximum becomes dense and eps is solved again over the others. The result is the only one of
    this form, so the order in which layers turn dense does not matter.
    """
    free = dict(raw)
    rest = budget
    while free:
        eps = rest / math.fsum(costs[name] * p for name, p in free.items())
        top = max(free.values())
        if eps * top <= 1.0:
            return {name: eps * free[name] if name in free else 1.0 for name in raw}, eps
        tied = [name for name, p in free.items() if p == top]
        rest -= math.fsum(costs[name] for name in tied)
        for name in tied:
            del free[name]
    return dict.fromkeys(raw, 1.0), math.inf


def er_raw(shape: Shape) -> float:
    """``(n_in + n_out) / (n_in * n_out)`` over the first two dims of a PyTorch weight."""
    return (shape[0] + shape[1]) / (shape[0] * shape[1])


def erk_raw(shape: Shape) -> float:
    """``sum(shape) / prod(shape)``: the kernel's dims are part of the sum."""
    return sum(shape) / math.prod(shape)


def uniform(problem: Problem) -> dict[str, float]:
    """``d_l = d``."""
    return dict.fromkeys(problem.shapes, problem.density)


def uniform_plus(problem: Problem) -> dict[str, float]:
    """Uniform+ (Gale et al. 2019, as corrected by Lee et al. 2021): stem dense, head at 20 % and more.

    Everything else shares what is left, so that the global density holds exactly.
    """
    costs, stem, head = problem.costs, problem.stem, problem.head
    fixed = {} if stem is None else {stem: 1.0}
    floor = 0.2
    common = _share(costs, problem.budget, fixed)
    if head is not None and head not in fixed and common < floor:
        fixed[head] = floor
        common = _share(costs, problem.budget, fixed)
    if not common > 0.0:  # NaN where no layer is left to share
        least = math.fsum(costs[name] * d for name, d in fixed.items()) / math.fsum(costs.values())
        raise ValueError(
            f"uniform+: expected a density above {least:.4g} (first convolution dense, last layer at 20 %), "
            f"got {problem.density:.4g}; lower the sparsity or choose another scheme"
        )
    return {name: fixed.get(name, common) for name in costs}


def er(problem: Problem) -> dict[str, float]:
    """Erdos-Renyi (Mocanu et al. 2018) with densities capped at 1."""
    raw = {name: er_raw(shape) for name, shape in problem.shapes.items()}
    return proportional(raw, problem.costs, problem.budget)[0]


def erk(problem: Problem) -> dict[str, float]:
    """Erdos-Renyi-Kernel (Evci et al. 2020)."""
    raw = {name: erk_raw(shape) for name, shape in problem.shapes.items()}
    return proportional(raw, problem.costs, problem.budget)[0]


def erk_plus(problem: Problem) -> dict[str, float]:
    """ERK with the head at a density of its own (Liu et al. 2022). A large head can eat most of the budget."""
    if problem.head is None:
        return erk(problem)
    rest = {name: cost for name, cost in problem.costs.items() if name != problem.head}
    budget = problem.budget - problem.head_density * problem.costs[problem.head]
    if not 0.0 < budget <= math.fsum(rest.values()):
        raise ValueError(
            f"erk+: a head {problem.head!r} at density {problem.head_density:.4g} does not fit a global density of "
            f"{problem.density:.4g}; change head_density or the sparsity"
        )
    raw = {name: erk_raw(problem.shapes[name]) for name in rest}
    densities = proportional(raw, rest, budget)[0]
    return {name: densities.get(name, problem.head_density) for name in problem.shapes}


def igq(problem: Problem) -> dict[str, float]:
    """Ideal gas quotas, ``d_l = 1 / (F * N_l + 1)`` (Vysogorets and Kempe 2023), F by bisection."""
    sizes, costs, budget = problem.sizes(), problem.costs, problem.budget

    def total(f: float) -> float:
        return math.fsum(costs[name] / (f * n + 1.0) for name, n in sizes.items())

    low, high = 0.0, 1.0 / max(sizes.values())
    while total(high) > budget:
        low, high = high, 2.0 * high
    while (middle := 0.5 * (low + high)) not in (low, high):
        low, high = (middle, high) if total(middle) > budget else (low, middle)
    return {name: 1.0 / (high * n + 1.0) for name, n in sizes.items()}


def balanced(problem: Problem) -> dict[str, float]:
    """The same number of weights in every layer (Gadhikar et al. 2023): ``d_l = min(1, X / N_l)``.

    What a layer smaller than X cannot hold goes to the others in equal parts, so that the global density holds;
    the published code drops it.
    """
    raw = {name: 1.0 / n for name, n in problem.sizes().items()}
    return proportional(raw, problem.costs, problem.budget)[0]


def _share(costs: Mapping[str, float], budget: float, fixed: Mapping[str, float]) -> float:
    """Density of the layers that are not fixed; NaN without such layers."""
    free = math.fsum(cost for name, cost in costs.items() if name not in fixed)
    spent = math.fsum(costs[name] * d for name, d in fixed.items())
    return (budget - spent) / free if free else math.nan


SCHEMES: dict[str, Callable[[Problem], dict[str, float]]] = {
    "uniform": uniform,
    "uniform+": uniform_plus,
    "er": er,
    "erk": erk,
    "erk+": erk_plus,
    "igq": igq,
    "balanced": balanced,
}
