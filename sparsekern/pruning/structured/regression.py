"""Channel selection by LASSO, and the next layer fitted to what it wrote before.

Source: He, Zhang and Sun 2017 (arXiv:1707.06168), section 3.1: channels by eq. 3, weights by eq. 4.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from sparsekern.pruning.structured.thinet import least_squares

SMALLEST = 1e-4  # of the largest penalty, which removes everything
STEPS = 100  # of the path


def normal_equations(patches: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products of the channels' contributions ``Z_c = patches[:, c] @ weight[:, c].T`` and of the target.

    Args:
        patches: float64 [n, channels, k].
        weight: [out, channels, k].
        target: [n, out].

    Returns:
        ``(<Z_c, Z_d>, <Z_c, target>)``, float64 [channels, channels] and [channels].
    """
    _, channels, k = patches.shape
    inputs, weights = patches.flatten(1), weight.double().flatten(1)
    # Without the contributions themselves, which are as many numbers as samples x outputs x channels.
    products = (inputs.T @ inputs) * (weights.T @ weights)
    gram = products.view(channels, k, channels, k).sum((1, 3))
    cross = ((inputs.T @ target.double()) * weights.T).view(channels, k * len(weights)).sum(1)
    return gram.cpu(), cross.cpu()


def lasso_channels(gram: Tensor, cross: Tensor, keep: int) -> list[int]:
    """The ``keep`` channels that the LASSO keeps as its penalty falls.

    The penalty falls along a geometric path. Where it lets in several channels at once, those of the largest
    coefficients enter.

    Args:
        gram: [channels, channels], from :func:`normal_equations`.
        cross: [channels].

    Returns:
        Kept channels, ascending.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lasso_path

    # A square root of the Gram matrix poses the same problem with as many rows as channels.
    values, vectors = torch.linalg.eigh(gram)
    roots = values.clamp(min=0).sqrt()
    design = roots[:, None] * vectors.T
    inverse = torch.where(roots > roots.max() * 1e-9, 1 / roots.clamp(min=torch.finfo(roots.dtype).tiny), 0)
    y = inverse * (vectors.T @ cross)
    if not y.any():
        return list(range(keep))
    largest = float((design.T @ y).abs().max()) / len(y)
    penalties = largest * torch.logspace(0, math.log10(SMALLEST), STEPS, dtype=torch.float64)
    with warnings.catch_warnings():
        # Only the order in which channels enter matters, not the last digits of coefficients.
        warnings.simplefilter("ignore", ConvergenceWarning)
        _, path, _ = lasso_path(design.numpy(), y.numpy(), alphas=penalties.numpy(), max_iter=5000)
    chosen: list[int] = []
    for coefficients in torch.from_numpy(path).abs().T:
        active = coefficients.nonzero().flatten()
        if len(active) > keep:
            more = [i for i in coefficients.argsort(descending=True, stable=True).tolist() if i not in chosen]
            chosen += more[: keep - len(chosen)]
            break
        chosen = active.tolist()
    if len(chosen) < keep:  # the path ended: the rest adds nothing, in this order
        rest = gram.diagonal().argsort(descending=True, stable=True).tolist()
        chosen += [i for i in rest if i not in chosen][: keep - len(chosen)]
    return sorted(chosen)


def reconstruct(patches: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Weights that map what is left of the inputs to ``target`` best; float64 [out, channels, k].

    Where the samples leave a choice, the one nearest to ``weight``.

    Args:
        patches: float64 [n, channels, k], kept channels only.
        weight: [out, channels, k], what the layer has now.
        target: [n, out], outputs of the original layer without its bias.
    """
    inputs, now = patches.flatten(1).cpu(), weight.double().flatten(1).T.cpu()
    change = least_squares(inputs, target.double().cpu() - inputs @ now)
    return (now + change).T.unflatten(1, patches.shape[1:])
