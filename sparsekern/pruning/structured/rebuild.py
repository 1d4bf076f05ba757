"""A pruned architecture with fresh weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sparsekern import models
from sparsekern.pruning.structured.channels import Channels, replay_


def rebuild(
    model: str | Callable[[], nn.Module],
    channels: Channels | Mapping[str, Any] | str | os.PathLike[str],
    **options: Any,
) -> nn.Module:
    """Build a network anew with the channels of a pruned one, to train it from scratch or to load its weights.

    The weights are as large as those of a network built small (:func:`replay_`): what Scratch-E and Scratch-B train.

    Args:
        model: a name of ``sparsekern.models`` or a function that returns the large network.
        channels: a record, its dictionary, or the path of its JSON file.
        options: of ``sparsekern.models.build``.

    Raises:
        ValueError: unknown model, or a record of another one.
    """
    built = models.build(model, **options) if isinstance(model, str) else model()
    return replay_(built, channels)
