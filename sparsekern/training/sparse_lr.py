"""Learning rate of sparse nets: ``eta(s) = eta(0) exp(1.969 s^2 + 0.2905 s)`` at sparsity ``s``.

The fit of Dietrich et al. 2021 (arXiv:2108.06277) to the best rates of sparse BERT under Adam, static and dynamic,
unstructured and in blocks of 16.
"""

from __future__ import annotations

import math

from torch import nn

QUADRATIC, LINEAR = 1.969, 0.2905


def sparse_lr_factor(sparsity: float) -> float:
    """Factor on the dense learning rate at ``sparsity``; :class:`ValueError` outside [0, 1].

    >>> round(sparse_lr_factor(0.9), 1)
    6.4
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity: expected a fraction within [0, 1], got {sparsity}")
    return math.exp(QUADRATIC * sparsity**2 + LINEAR * sparsity)


def realised_sparsity(model: nn.Module) -> float:
    """Fraction of weights that the sparse layers of ``model`` do not store, all such layers together; 0 without any."""
    from sparsekern.nn import SparseModule

    kept = total = 0
    for module in model.modules():
        if isinstance(module, SparseModule):
            kept += int(module.mask.count_nonzero())
            total += math.prod(module.grid.weight_shape)
    return 1.0 - kept / total if total else 0.0
