"""What the ranks of a data-parallel run tell each other: sums of scores, and whether their layouts agree."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# A process group, True for the default one, None for a run of one process.
Group = Any


def find(process_group: Any) -> Group:
    """The group to talk in: the one given, else the default one where ``torch.distributed`` runs on several ranks."""
    if process_group is not None:
        return process_group
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return True if torch.distributed.get_world_size() > 1 else None


def _handle(group: Group) -> Any:
    return None if group is True else group


def sum_(tensor: Tensor, group: Group) -> Tensor:
    """``tensor`` summed over the ranks, in place."""
    if group is not None:
        torch.distributed.all_reduce(tensor, group=_handle(group))
    return tensor


def check_equal(digests: Iterable[tuple[str, str]], device: torch.device, group: Group, when: str) -> None:
    """Compare the layouts of all ranks by a hash.

    Args:
        digests: (layer, digest of its layout).
        device: where the group communicates.

    Raises:
        RuntimeError: on every rank, naming the ranks and layers that differ from the first rank's.
    """
    if group is None:
        return
    named = list(digests)
    names = [name for name, _ in named]
    mine = torch.stack([_word(digest) for _, digest in named]).to(device)
    handle = _handle(group)
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(handle))]
    torch.distributed.all_gather(everyone, mine, group=handle)
    differing = {
        rank: [name for name, same in zip(names, (other == everyone[0]).tolist(), strict=True) if not same]
        for rank, other in enumerate(everyone)
        if not torch.equal(other, everyone[0])
    }
    if differing:
        found = "; ".join(f"rank {rank}: {', '.join(layers[:4])}" for rank, layers in differing.items())
        raise RuntimeError(
            f"topology: expected equal layouts on all ranks {when}, got layouts that differ from rank 0's ({found}); "
            "sparsify with the same seed on every rank, load the same checkpoint, and let only the scheduler write "
            "layouts"
        )


def _word(digest: str) -> Tensor:
    """int64 []: the first 63 bits of a hash."""
    head = hashlib.sha256(digest.encode()).digest()[:8]
    return torch.tensor(int.from_bytes(head, "little") >> 1, dtype=torch.int64)
