"""The 8x8 digits that scikit-learn carries along."""

from __future__ import annotations

import torch

from sparsekern.data.errors import DataError
from sparsekern.data.split import ArraySplit, Split, pick

TEST_SIZE = 360


def load_digits() -> dict[str, Split]:
    """Train (1437) and test (360, stratified; always the same ones), float32 [N, 1, 8, 8] in 0..1."""
    try:
        from sklearn import datasets
    except ImportError:
        raise DataError("digits: expected scikit-learn, found none; pip install 'sparsekern[data]'") from None
    raw = datasets.load_digits()
    images = torch.from_numpy(raw.images).to(torch.float32).unsqueeze(1) / 16
    labels = torch.from_numpy(raw.target).to(torch.int64)
    everything = ArraySplit(images, labels, 10, source="digits")
    test = pick(labels, TEST_SIZE, how="stratified", seed=0, num_classes=10)
    train = torch.ones(len(labels), dtype=torch.bool)
    train[test] = False
    return {"train": everything.select(train.nonzero().flatten()), "test": everything.select(test)}
