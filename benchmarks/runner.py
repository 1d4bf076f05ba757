"""Runs chunks one after the other, remembers which are done, and keeps a budget of seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import files
from benchmarks.chunks import LOGS, RESULT, Chunk

OK, FAILED, TIMEOUT, CUT, SKIPPED, RUNNING = "ok", "failed", "timeout", "cut", "skipped", "running"
BAD = (FAILED, TIMEOUT)
TAIL_LINES = 40
GRACE_S = 20.0  # after the interrupt at a timeout: pytest writes the rows it has
LEAST_S = 20.0  # a chunk is not started with less left
_NO_TESTS = 5  # exit status of pytest


class StateError(Exception):
    """The output folder holds another kind of run; the message says which and what to do."""


class State:
    """What became of each chunk, in ``state.json``; written after every change.

    Args:
        out: the output folder.
        rehearsal: of this run. A folder never mixes rehearsed and measured results.
        fresh: forget what is there.
    """

    def __init__(self, out: Path, *, rehearsal: bool, fresh: bool = False) -> None:
        self.path = out / "state.json"
        found = None if fresh else files.read_json(self.path)
        if found is not None and found.get("rehearsal") != rehearsal:
            kind = "a rehearsal" if found.get("rehearsal") else "measurements"
            raise StateError(f"{out}: holds {kind}; give another --out, or --fresh to start over")
        self.rehearsal = rehearsal
        self.chunks: dict[str, dict[str, Any]] = dict(found["chunks"]) if found is not None else {}

    def set(self, chunk: Chunk, **facts: Any) -> None:
        self.chunks[chunk.name] = {"digest": chunk.digest, **facts}
        files.write_json(self.path, {"rehearsal": self.rehearsal, "chunks": self.chunks})

    def status(self, chunk: Chunk) -> str | None:
        """None for a chunk not run yet, cut off by the budget or with the run, or changed since."""
        found = self.chunks.get(chunk.name)
        if found is None or found["digest"] != chunk.digest or found["status"] in (RUNNING, CUT):
            return None
        return str(found["status"])


def order(chunks: Sequence[Chunk], state: State, *, again: bool = False) -> list[Chunk]:
    """What is left to do: chunks never run in their order, then those that failed; ``again`` means all."""
    if again:
        return list(chunks)
    new = [chunk for chunk in chunks if state.status(chunk) in (None, SKIPPED)]
    return new + [chunk for chunk in chunks if state.status(chunk) in BAD]


@dataclass
class Budget:
    """Seconds that a run may take; None is without end. ``reserve_s`` is kept for the report."""

    seconds: float | None
    reserve_s: float = 25.0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def left(self) -> float | None:
        return None if self.seconds is None else self.seconds - self.reserve_s - (self.clock() - self.start)

    def allows(self, chunk: Chunk) -> bool:
        return self.left is None or self.left >= max(LEAST_S, chunk.estimate_s)

    def timeout(self, chunk: Chunk) -> float:
        return chunk.timeout_s if self.left is None else min(chunk.timeout_s, max(LEAST_S, self.left - GRACE_S))


def run_all(
    chunks: Sequence[Chunk],
    out: Path,
    state: State,
    budget: Budget,
    env: Mapping[str, str],
    *,
    again: bool = False,
    after: Callable[[], None] = lambda: None,
) -> list[Chunk]:
    """Run what is left to do; a failure never stops the rest.

    Args:
        env: the environment that the chunks' own variables are laid over.
        after: called after every chunk.

    Returns:
        The chunks for which no time was left.
    """
    late = []
    for chunk in order(chunks, state, again=again):
        if skip := chunk.skip or _unmet(chunk, state):
            state.set(chunk, status=SKIPPED, note=skip)
            print(f"{chunk.name:22} skipped: {skip}", flush=True)
            continue
        if not budget.allows(chunk):
            late.append(chunk)
            continue
        print(f"{chunk.name:22} ...", end=" ", flush=True)
        state.set(chunk, status=RUNNING)
        facts = run_one(chunk, out, env, budget.timeout(chunk))
        state.set(chunk, **facts)
        print(f"{facts['status']} in {facts['seconds']:.0f} s: {facts['note']}", flush=True)
        after()
    return late


def _unmet(chunk: Chunk, state: State) -> str:
    """Why a chunk that needs another one can't run, or "". A chunk that was never run forbids nothing: with ``--only``
    the need may be met by hand."""
    found = state.chunks.get(chunk.needs, {})
    bad = found.get("status") in BAD
    return f"{chunk.needs} {found['status']}: {found.get('note', '')}" if bad else ""


def run_one(chunk: Chunk, out: Path, env: Mapping[str, str], timeout_s: float) -> dict[str, Any]:
    """One subprocess with its own process group, its output in ``logs/``; a result replaces an older one whole."""
    result, log = out / chunk.result, out / "logs" / f"{chunk.name}.log"
    part = out / f".{chunk.name}.part.json"
    log.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    own = {RESULT: str(part), LOGS: str(out / "logs" / chunk.name)}
    command = [sys.executable, *(own.get(word, word.replace(RESULT, str(part))) for word in chunk.command)]
    settings = {**env, **{name: value for name, value in chunk.env.items() if value is not None}}
    settings = {name: value for name, value in settings.items() if chunk.env.get(name, "") is not None}
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=settings,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            # Under nohup or a shell's `&` interrupts are ignored, and so would be the one that ends a chunk in time.
            preexec_fn=_heed_interrupts,
        )
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    if code is None:
        status = TIMEOUT if timeout_s >= chunk.timeout_s else CUT
    else:
        status = OK if code == 0 or (code == _NO_TESTS and chunk.empty_ok) else FAILED
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    note = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    if chunk.result:
        if files.read_json(part) is not None:
            os.replace(part, result)
        elif status == OK:
            status, note = FAILED, "wrote no result"
        part.unlink(missing_ok=True)
    facts: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1), "code": code}
    facts["note"] = note[:200] if code is not None else f"over {timeout_s:.0f} s; {note[:160]}"
    if status in BAD:
        facts["tail"] = lines[-TAIL_LINES:]
    return facts


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt what still runs of the chunk's process group, wait, then kill it."""
    if process.poll() is None:
        _signal(process, signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def failures(chunks: Sequence[Chunk], state: State) -> list[str]:
    """Names of the chunks that failed or ran out of time."""
    return [chunk.name for chunk in chunks if state.status(chunk) in BAD]


def describe(chunks: Sequence[Chunk], state: State) -> str:
    """The plan as a table for a terminal."""
    lines = [f"{'chunk':22} {'status':9} {'about s':>7}  command"]
    for chunk in chunks:
        status = f"skip: {chunk.skip}" if chunk.skip else state.status(chunk) or "-"
        env = " ".join(f"{name}={value}" for name, value in chunk.env.items() if value is not None)
        lines.append(f"{chunk.name:22} {status:9} {chunk.estimate_s:7.0f}  {env} python {' '.join(chunk.command)}")
    return "\n".join(lines)


PREPARE_S = 80.0  # of a slice: starting, installing packages, building the native core, the report


def slices(chunks: Sequence[Chunk], state: State, seconds: float) -> list[list[Chunk]]:
    """What is left to do, cut into runs of at most ``seconds`` each, by the estimates, as ``run_all`` would."""
    left = [chunk for chunk in order(chunks, state) if not chunk.skip]
    out: list[list[Chunk]] = []
    while left:
        room, now, late = seconds - PREPARE_S, list[Chunk](), list[Chunk]()
        for chunk in left:
            fits = chunk.estimate_s <= room
            (now if fits else late).append(chunk)
            room -= chunk.estimate_s * fits
        out.append(now or late[:1])  # one that is longer than a slice has one of its own
        left = late if now else late[1:]
    return out


def describe_slices(chunks: Sequence[Chunk], state: State, seconds: float) -> str:
    """The slices with their estimates and the running sum, for a terminal."""
    lines, total = [], 0.0
    for number, members in enumerate(slices(chunks, state, seconds), 1):
        spent = PREPARE_S + sum(chunk.estimate_s for chunk in members)
        total += spent
        lines.append(f"slice {number}: about {spent:.0f} s, {total / 60:.0f} min in all")
        lines += [f"    {chunk.name:20} {chunk.estimate_s:5.0f} s" for chunk in members]
    skipped = [f"{chunk.name} ({chunk.skip})" for chunk in chunks if chunk.skip]
    lines += [f"skipped: {', '.join(skipped)}"] if skipped else []
    return "\n".join(lines) or "nothing is left to do"
