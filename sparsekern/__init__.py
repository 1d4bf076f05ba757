"""Block-sparse training layers for PyTorch: randomly pruned networks that are actually faster."""

from __future__ import annotations

import torch  # noqa: F401  first: its OpenMP runtime must be the one the native core finds

from sparsekern._version import __version__
from sparsekern.allocation import allocate
from sparsekern.backends import backends
from sparsekern.config import SparsityConfig
from sparsekern.layout import BlockGrid, BlockLayout
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.ops import sparse_conv2d, sparse_linear
from sparsekern.plan import LayerPlan, Plan
from sparsekern.sparsify import densify_, explain, masks, plan, sparsify_
from sparsekern.state import dense_state_dict, load_dense_state_dict, restore_
from sparsekern.topology import DSR, SET, SNFS, GradualMagnitude, RigL, SRigL, Static, TopologyScheduler
from sparsekern.tuning import tune

__all__ = [
    "DSR",
    "SET",
    "SNFS",
    "BlockGrid",
    "BlockLayout",
    "GradualMagnitude",
    "LayerPlan",
    "Plan",
    "RigL",
    "SRigL",
    "SparseConv2d",
    "SparseLinear",
    "SparsityConfig",
    "Static",
    "TopologyScheduler",
    "__version__",
    "allocate",
    "backends",
    "dense_state_dict",
    "densify_",
    "explain",
    "load_dense_state_dict",
    "masks",
    "plan",
    "restore_",
    "sparse_conv2d",
    "sparse_linear",
    "sparsify_",
    "tune",
]
