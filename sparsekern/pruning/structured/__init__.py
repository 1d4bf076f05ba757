"""Structured pruning: whole channels and blocks go, a smaller dense network is left.

The methods that "Rethinking the Value of Network Pruning" compares (Liu et al. 2019, arXiv:1810.05270), which finds
that the small network trained from scratch is as good::

    from sparsekern.pruning import structured
    report = structured.prune_(model, example, method="l1-filters", target="vgg16-a")
    print(report)
    report.channels.save("channels.json")
    scratch = structured.rebuild("vgg16", "channels.json", num_classes=10)

Torch-Pruning finds which channels hang together and removes them (``pip install 'sparsekern[structured]'``);
:func:`replay_` and :func:`rebuild` work without it.
"""

from sparsekern.pruning.structured.channels import Channels, replay_
from sparsekern.pruning.structured.graph import ChannelGraph, Group
from sparsekern.pruning.structured.prune import METHODS, prune_
from sparsekern.pruning.structured.rebuild import rebuild
from sparsekern.pruning.structured.report import Report
from sparsekern.pruning.structured.slimming import slimming_penalty_
from sparsekern.pruning.structured.soft import SoftFilters
from sparsekern.pruning.structured.sss import BlockScales
from sparsekern.pruning.structured.targets import TARGETS, Target, targets

__all__ = [
    "METHODS",
    "TARGETS",
    "BlockScales",
    "ChannelGraph",
    "Channels",
    "Group",
    "Report",
    "SoftFilters",
    "Target",
    "prune_",
    "rebuild",
    "replay_",
    "slimming_penalty_",
    "targets",
]
