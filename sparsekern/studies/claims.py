"""Claims: which process works on which cell of a study.

A claim is an exclusive lock on a file, which the system gives up when its process ends, however it ends: a killed
worker leaves nothing behind that would have to be recognised as stale. The file says who holds it, for people.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def claim(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold ``path`` within the block; yields False, holding nothing, where another process has it.

    Args:
        wait: until the other process lets go.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Never removed: a process that locks a file which another has just unlinked would believe to be alone.
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield True
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def holder(path: Path) -> int | None:
    """Process that holds ``path``, None if no living one does."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.read(handle, 32).decode().strip()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(handle)
    return None
