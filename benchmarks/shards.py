"""Pytest in several processes without pytest-xdist: ``python -m benchmarks.shards 8 LOGS -- -q tests/test_x.py``.

Every process runs its share (``SPARSEKERN_TEST_SHARD``) and writes to a file of its own, for kernels are compiled on
the CPU, one after the other in a process. Ends with one line for all; exit status 1 if any test or process failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

VARIABLE = "SPARSEKERN_TEST_SHARD"
TAIL_LINES = 25
LEAVE_S = 10.0  # after an interrupt, for all
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|deselected)\b")
_NO_TESTS = 5  # exit status of pytest


def counts(output: str) -> Counter[str]:
    """``{"passed": 3, ...}`` of pytest's last line, ``error`` in the singular."""
    last = next((line for line in reversed(output.splitlines()) if _COUNT.search(line)), "")
    return Counter({name.removesuffix("s") if name == "errors" else name: int(n) for n, name in _COUNT.findall(last)})


def run(shards: int, logs: Path, arguments: list[str]) -> int:
    """Run all shards at once; prints the end of each that failed, then the sums. Returns the exit status."""
    logs.mkdir(parents=True, exist_ok=True)
    paths = [logs / f"shard-{i}.log" for i in range(1, shards + 1)]
    start = time.monotonic()
    processes = []
    for i, path in enumerate(paths, 1):
        env = {**os.environ, VARIABLE: f"{i}/{shards}"}
        with path.open("w", encoding="utf-8") as output:
            command = [sys.executable, "-m", "pytest", *arguments]
            processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env))
    cut = False
    try:
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:  # the group was interrupted: each pytest sums up what it has
        cut = True
        deadline = time.monotonic() + LEAVE_S
        codes = [_ended(process, deadline) for process in processes]
    total: Counter[str] = Counter()
    for path, code in zip(paths, codes, strict=True):
        text = path.read_text(encoding="utf-8", errors="replace")
        total += counts(text)
        if code not in (0, _NO_TESTS):
            print(f"-- {path.stem}, exit status {code}:", *text.splitlines()[-TAIL_LINES:], sep="\n")
    bad = sum(code not in (0, _NO_TESTS) for code in codes)
    found = ", ".join(f"{count} {name}" for name, count in total.items()) or "no tests"
    print(f"{found} in {shards} processes, {bad} of them failed, {time.monotonic() - start:.0f} s", flush=True)
    if all(code == _NO_TESTS for code in codes):
        return _NO_TESTS
    return int(bad > 0 or cut)


def _ended(process: subprocess.Popen[bytes], deadline: float) -> int:
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main() -> int:
    shards, logs, dashes, *arguments = sys.argv[1:]
    if dashes != "--" or not shards.isdigit() or int(shards) < 1:
        raise SystemExit(__doc__)
    return run(int(shards), Path(logs), arguments)


if __name__ == "__main__":
    sys.exit(main())
