"""Models of the sparse-training literature, in plain PyTorch.

Every network ends in a linear layer named ``head``; every convolutional one begins with a convolution named
``stem``. ``width`` multiplies all hidden widths in steps of one channel, which is what a narrower dense net of
equal MACs needs (:func:`match_macs`).
"""

from sparsekern.models.count import count_macs, count_params
from sparsekern.models.match import match_macs
from sparsekern.models.registry import build, names

__all__ = ["build", "count_macs", "count_params", "match_macs", "names"]
