"""What a run shows on the terminal: a bar on stderr, one line per epoch on stdout."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Silent; :class:`TerminalReporter` overrides."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def start(self, title: str, total: int, done: int) -> None:
        """A run of ``total`` steps begins after step ``done``."""

    def step(self, step: int, loss: float, accuracy: float, rate: float) -> None:
        """Now and then; ``rate`` in steps per second."""

    def line(self, text: str) -> None:
        """One line of progress."""

    def show(self, what: Any) -> None:
        """A plan or a table: anything rich prints."""

    def warn(self, text: str) -> None:
        """One line that must be seen, also when quiet."""
        print(f"warning: {text}", file=sys.stderr)


class TerminalReporter(Reporter):
    """Args: bar: draw the bar (only ever drawn on a terminal)."""

    def __init__(self, *, bar: bool = True) -> None:
        self.out = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._bar = bar and sys.stderr.isatty()
        self._task: Any = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def start(self, title: str, total: int, done: int) -> None:
        self._stop()
        if self._bar:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task(title, total=total, completed=done, state="")

    def step(self, step: int, loss: float, accuracy: float, rate: float) -> None:
        if self._progress is not None:
            state = f"loss {loss:.4f}  acc {100 * accuracy:.1f} %  {rate:.1f} it/s"
            self._progress.update(self._task, completed=step, state=state)

    def line(self, text: str) -> None:
        self.out.print(text, markup=False)

    def show(self, what: Any) -> None:
        Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(what)

    def warn(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(f"warning: {text}", markup=False)
        else:
            super().warn(text)
