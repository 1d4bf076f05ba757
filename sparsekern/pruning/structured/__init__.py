"""Structured pruning: whole channels and blocks go, a smaller dense network is left.

The methods that "Rethinking the Value of Network Pruning" compares (Liu et al. 2019, arXiv:1810.05270).
"""

from sparsekern.pruning.structured.channels import Channels, replay_

__all__ = ["Channels", "replay_"]
