"""Works through the cells of a study, alone or beside other processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from sparsekern.studies.claims import claim
from sparsekern.studies.dst import Cell, DstStudy
from sparsekern.studies.folder import StudyFolder, write_text
from sparsekern.training.errors import Interrupted

Say = Callable[[str], None]


def run_study(study: DstStudy, out: str | os.PathLike[str], *, say: Say = print) -> dict[str, str]:
    """Train every cell that is neither finished nor failed nor in the hands of another process.

    A cell whose process was killed continues at its last checkpoint. One that fails is recorded in ``failed/``, and
    the others go on.

    Args:
        say: gets a line per cell.

    Returns:
        By name, the state of each cell as :class:`StudyFolder` has it.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the running cell has a checkpoint.
        DataError: data missing or damaged, which would fail every cell.
    """
    folder, cells = StudyFolder(out), study.cells()
    for number, cell in enumerate(cells, 1):
        if not _settled(folder, cell):
            with claim(folder.claim_file(cell)) as mine:
                # Another process may have settled it since the look above.
                if mine and not _settled(folder, cell):
                    say(f"[{number}/{len(cells)}] {cell.name}: {_run(study, folder, cell)}")
    return {cell.name: folder.state(cell) for cell in cells}


def forget_failures(study: DstStudy, out: str | os.PathLike[str]) -> None:
    """Let the next run try the failed cells again."""
    for cell in study.cells():
        StudyFolder(out).failure_file(cell).unlink(missing_ok=True)


def _settled(folder: StudyFolder, cell: Cell) -> bool:
    return folder.done(cell) or folder.failure_file(cell).is_file()


def _run(study: DstStudy, folder: StudyFolder, cell: Cell) -> str:
    """Train one cell; what to say of it."""
    from sparsekern.data import DataError
    from sparsekern.training.loop import has_checkpoint, train

    run = folder.run(cell)
    try:
        resume = has_checkpoint(run)
        result = train(study.config(cell), run, resume=resume, overwrite=not resume, label=cell.name)
    except (Interrupted, DataError):
        raise
    except Exception as error:
        record = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        write_text(folder.failure_file(cell), json.dumps(record, indent=1) + "\n")
        return f"failed: {record['error']}"
    accuracy = "-" if result.test_acc is None else f"{100 * result.test_acc:.2f} %"
    explored = "" if result.exploration_rate is None else f", R_s {result.exploration_rate:.3f}"
    return f"test accuracy {accuracy}{explored}, {result.seconds:.0f} s"


def run_workers(out: Path, workers: int) -> int:
    """Let ``workers`` processes work on the study in ``out``; signals are passed on to them.

    Returns:
        The exit status of the first worker that did not end with 0, or 0.
    """
    command = [sys.executable, "-m", "sparsekern", "study", "dst", "--out", str(out), "--no-outputs"]
    # Out of reach of the terminal's Ctrl-C: a worker that gets two signals stops without a checkpoint.
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(workers)]
    stopped_by: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        stopped_by.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in signals}
    try:
        statuses = [process.wait() for process in processes]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped_by:
        raise Interrupted(f"stopped {workers} workers", out, stopped_by[0])
    return next((status for status in statuses if status), 0)
