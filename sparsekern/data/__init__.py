"""Image sets in memory, batches that resume bit-exactly, label noise.

Example::

    bundle = load("cifar10", "/data", val=5000)
    train, val = bundle.batches("train", 128), bundle.batches("val", 512)
    for x, y in train: ...
"""

from sparsekern.data.augment import Augment
from sparsekern.data.batches import Batches
from sparsekern.data.bundle import DataBundle
from sparsekern.data.errors import DataError
from sparsekern.data.load import load, names
from sparsekern.data.noise import LabelNoise, add_label_noise
from sparsekern.data.split import ArraySplit, Split

__all__ = [
    "ArraySplit",
    "Augment",
    "Batches",
    "DataBundle",
    "DataError",
    "LabelNoise",
    "Split",
    "add_label_noise",
    "load",
    "names",
]
