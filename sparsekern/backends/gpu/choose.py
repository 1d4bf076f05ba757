"""Which kernel runs a pass on a GPU: the one place that decides, for both families of kernels.

What was measured decides first: an entry of the user's cache (``sk.tune``), else of the shipped table. Without one the
model takes the best candidate of the first family that has any, so that Triton's kernels run where Triton is installed:
a prediction alone never prefers one family to another. The dense op is taken whenever it is faster.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from sparsekern.backends import GPU, get
from sparsekern.backends.gpu import dense_model, table
from sparsekern.backends.gpu.chips import Chip
from sparsekern.backends.gpu.families import Kernel, family_of, name_of
from sparsekern.backends.gpu.problem import Problem

# A kernel of a later family replaces one of the first only where it was measured to be this much faster: two families
# are two sources of errors, and medians of one run differ by a few percent.
MARGIN = 1.05


@dataclass(frozen=True)
class Choice:
    """What runs a problem.

    Attributes:
        kernel: None where cuBLAS or cuDNN on the materialised weight is faster.
        source: "tuned" (the user's cache), "table" (shipped) or "model".
        seconds: of the best kernel, whether it is taken or not; infinite if there is none.
        dense_seconds: of the dense op, for a layer that is dense.
        fallback_seconds: of the dense op and the way from and to stored blocks.
    """

    kernel: Kernel | None
    source: str
    seconds: float
    dense_seconds: float
    fallback_seconds: float

    @property
    def taken_seconds(self) -> float:
        """Of what runs."""
        return self.fallback_seconds if self.kernel is None else self.seconds

    @property
    def backend(self) -> str:
        """Name of what runs."""
        return "dense" if self.kernel is None else name_of(self.kernel)


def winner(seconds: Mapping[Kernel, float]) -> Kernel | None:
    """The measured kernel to remember: the fastest of the first family, unless one of another beats it by MARGIN."""
    best: Kernel | None = None
    for family in GPU:
        own = {kernel: time for kernel, time in seconds.items() if name_of(kernel) == family}
        fastest = min(own, key=own.__getitem__, default=None)
        if fastest is not None and (best is None or own[fastest] * MARGIN <= seconds[best]):
            best = fastest
    return best


def choose(problem: Problem, chip: Chip, families: tuple[str, ...] = GPU, fallback: bool = True) -> Choice:
    """What runs ``problem`` on ``chip``: a tuned entry, else the shipped table, else the model's best candidate.

    An entry measured at another shape lends its kernel; its times are scaled by what the model says of both shapes.

    Args:
        families: that may run, in order of preference (``backends.families``).
        fallback: take the dense op where it is faster, the cost of materialising the weight included; False (a forced
            backend) takes the best kernel all the same.

    Raises:
        ValueError: if no kernel can run the problem and ``fallback`` is False.
    """
    return _choose(problem, chip, families, fallback, table.generation())


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, chip: Chip, families: tuple[str, ...], fallback: bool, generation: int) -> Choice:
    dense = dense_model.dense_seconds(problem, chip)
    materialise = dense_model.dense_fallback_seconds(problem, chip) - dense
    kernel, seconds, source = _best(problem, chip, families), float("inf"), "model"
    if kernel is not None:
        seconds = family_of(kernel).seconds(problem, kernel, chip)
    for found in table.lookup(chip.name, problem):
        family = family_of(found.kernel)
        if name_of(found.kernel) in families and family.why_not(problem, found.kernel, chip) is None:
            own = found.problem
            kernel, source = found.kernel, found.source
            seconds = found.seconds * family.seconds(problem, kernel, chip) / family.seconds(own, kernel, chip)
            dense = found.dense_seconds * dense / dense_model.dense_seconds(own, chip)
            break
    if kernel is None and not fallback:
        names = " or ".join(families)
        raise ValueError(f"{problem.op}: no {names} kernel for block {problem.block} in {problem.dtype} on {chip.name}")
    if fallback and dense + materialise < seconds:
        kernel = None
    return Choice(kernel, source, seconds, dense, dense + materialise)


def _best(problem: Problem, chip: Chip, families: tuple[str, ...]) -> Kernel | None:
    for name in families:
        family = get(name)
        listed: tuple[Kernel, ...] = family.candidates(problem, chip)
        if listed:
            return min(listed, key=lambda kernel: family.seconds(problem, kernel, chip))
    return None
