"""Studies: many training runs that answer one question, in one folder, and the tables and plots made of them.

    from sparsekern.studies import DstStudy, open_study, run_study, write_outputs
    study = open_study("runs/dst", DstStudy(base={"data": "digits"}, methods=("static", "set"), ...))
    run_study(study, "runs/dst")
    write_outputs("runs/dst")

A study can be killed at any time and run again: finished cells are kept. Several processes may work on one folder.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekern.studies.dst import Cell, DstStudy
    from sparsekern.studies.folder import open_study
    from sparsekern.studies.outputs import write_outputs
    from sparsekern.studies.runner import run_study
    from sparsekern.studies.summary import Summary, summarise

# Resolved on first use, so that the command line prints its help without torch.
_HOME = {
    "Cell": "dst",
    "DstStudy": "dst",
    "open_study": "folder",
    "run_study": "runner",
    "Summary": "summary",
    "summarise": "summary",
    "write_outputs": "outputs",
}

__all__ = ["Cell", "DstStudy", "Summary", "open_study", "run_study", "summarise", "write_outputs"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsekern.studies' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sparsekern.studies.{_HOME[name]}"), name)
