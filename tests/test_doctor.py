"""The doctor, the lazy loader and ``python -m sparsekern``."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from sparsekern import __version__, doctor
from sparsekern.backends import native


def printed(report: doctor.Report) -> str:
    out = io.StringIO()
    doctor.show(report, Console(file=out, width=200))
    return out.getvalue()


@pytest.fixture
def fresh_native() -> Iterator[None]:
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@pytest.fixture
def without_native(fresh_native: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No core in this process; the installation's record is read from the folder returned."""
    monkeypatch.setitem(sys.modules, "sparsekern._C", None)
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    monkeypatch.delenv("SPARSEKERN_BACKEND", raising=False)
    yield tmp_path


def record(folder: Path, **entries: Any) -> None:
    (folder / "_build.json").write_text(json.dumps(entries))


def test_report_of_this_machine() -> None:
    report = doctor.collect()
    text = printed(report)
    assert list(report.facts) == ["versions", "processor", "native core", "OpenMP", "CUDA", "backends"]
    assert report.facts["versions"]["sparsekern"] == __version__
    assert report.facts["backends"]["dense"] == "available"
    assert report.healthy == (native.available() or native.build_record().get("mode") == "none")
    for section in report.facts:
        assert section in text


def test_missing_core_after_a_failed_build(without_native: Path) -> None:
    record(without_native, mode="auto", native="none", error="cmake was not found", version=__version__)
    report = doctor.collect()
    text = printed(report)
    assert not report.healthy
    assert "cmake was not found" in text and "SPARSEKERN_BUILD=cpu" in text


def test_source_tree_without_a_build(without_native: Path) -> None:
    report = doctor.collect()
    assert not report.healthy
    assert "pip install -e ." in printed(report)


def test_pure_python_on_request_is_healthy(without_native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(without_native, mode="none", native="none", error="", version=__version__)
    assert doctor.collect().healthy
    monkeypatch.setenv("SPARSEKERN_BACKEND", "cpu")
    report = doctor.collect()
    assert not report.healthy
    assert any("SPARSEKERN_BACKEND=cpu" in what for what, _ in report.problems)


def test_core_of_another_version(fresh_native: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = SimpleNamespace(build_info=lambda: {"isa": "generic"}, __file__="somewhere/_C.so")
    monkeypatch.setitem(sys.modules, "sparsekern._C", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    record(tmp_path, mode="cpu", native="cpu", version="0.0.1")
    report = doctor.collect()
    assert report.healthy
    assert any("0.0.1" in what for what, _ in report.problems)


def test_two_openmp_runtimes_are_named() -> None:
    maps = ["/torch/lib/libgomp.so.1", "/lib/libm.so", "/sk.libs/libgomp-a1b2.so.1.0", "/torch/lib/libgomp.so.1"]
    assert doctor.openmp_runtimes(maps) == ["/torch/lib/libgomp.so.1", "/sk.libs/libgomp-a1b2.so.1.0"]
    report = doctor.Report()
    doctor._openmp(report, maps)
    assert len(report.problems) == 1 and "2 OpenMP" in report.problems[0][0]


def test_missing_core_is_one_log_line_and_an_error_at_first_use(
    without_native: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sparsekern"):
        assert not native.available() and not native.available()
        with pytest.raises(native.NativeError, match="python -m sparsekern"):
            native.load()
    assert len([line for line in caplog.records if line.name == "sparsekern"]) == 1
    assert "without its native core" in native.why()


def test_core_that_does_not_load(fresh_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(native.importlib, "import_module", refuse)
    with pytest.raises(native.NativeError, match="does not load: libgomp"):
        native.load()


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparsekern", *arguments],
        env={**os.environ, "COLUMNS": "200", **environment},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_module_without_arguments_is_the_doctor() -> None:
    done = run_module(SPARSEKERN_BACKEND="nonsense")
    assert done.returncode == (0 if doctor.collect().healthy else 1), done.stderr
    assert __version__ in done.stdout and "SPARSEKERN_BACKEND=nonsense" in done.stdout


def test_module_with_arguments_is_the_command_line() -> None:
    done = run_module("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"sparsekern {__version__}"
    assert run_module("no-such-command").returncode == 2
