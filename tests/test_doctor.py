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


# -- the CUDA kernels: a made-up core on made-up machines --------------------------------------------------------------

H200, A100, RTX2080 = ("H200", (9, 0)), ("A100", (8, 0)), ("RTX 2080", (7, 5))


@pytest.fixture
def cuda_report(fresh_native: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``cuda_report(devices, driver, **build_record)`` -> (report, the section on CUDA)."""

    def collect(
        devices: list[tuple[str, tuple[int, int]]], driver: tuple[int, int] = (13, 0), **entries: Any
    ) -> tuple[doctor.Report, dict[str, str]]:
        fake = SimpleNamespace(build_info=lambda: {"cuda_archs": entries.get("cuda_archs", "")}, __file__="_C.so")
        monkeypatch.setitem(sys.modules, "sparsekern._C", fake)  # type: ignore[arg-type]
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        record(tmp_path, version=__version__, **entries)
        native._load.cache_clear()
        report = doctor.Report()
        return report, doctor._cuda(report, devices, driver)

    return collect


BUILT = {"mode": "cuda", "native": "cuda", "cuda_compiler": "13.0.88", "cuda_bytes": 11_900_000}


def test_cuda_kernels_that_match_the_gpu(cuda_report: Any) -> None:
    report, facts = cuda_report([H200, A100], cuda_archs="8.0 9.0a 10.0+PTX", **BUILT)
    assert facts["kernels"] == "for 8.0 9.0a 10.0+PTX, by nvcc 13.0.88, 11.9 MB"
    assert facts["device 0"] == "H200, compute capability 9.0"
    assert facts["device 0 runs"] == "sm_90a" and facts["device 1 runs"] == "sm_80"
    assert facts["driver"] == "serves CUDA up to 13.0"
    assert not report.problems


def test_cuda_kernels_without_a_gpu_are_no_problem(cuda_report: Any) -> None:
    report, facts = cuda_report([], (0, 0), cuda_archs="8.0", **BUILT)
    assert facts["kernels"].startswith("for 8.0") and facts["devices"].startswith("none")
    assert not report.problems


def test_cuda_kernels_for_another_gpu(cuda_report: Any) -> None:
    report, facts = cuda_report([A100, H200], cuda_archs="9.0a", **BUILT)
    assert facts["device 0 runs"] == "none of them" and facts["device 1 runs"] == "sm_90a"
    ((what, fix),) = report.problems
    assert "A100 (8.0) cannot run" in what and "H200" not in what
    assert fix.startswith('TORCH_CUDA_ARCH_LIST="8.0 9.0" SPARSEKERN_BUILD=cuda pip install')


def test_a_gpu_too_old_for_the_cuda_kernels(cuda_report: Any) -> None:
    report, _ = cuda_report([RTX2080], cuda_archs="8.0+PTX", **BUILT)
    ((_, fix),) = report.problems
    assert fix.startswith("none: they need compute capability 8.0")


def test_ptx_for_a_later_gpu(cuda_report: Any) -> None:
    report, facts = cuda_report([("RTX 5090", (12, 0))], cuda_archs="8.0 9.0a 10.0+PTX", **BUILT)
    assert facts["device 0 runs"] == "compute_100 (PTX that the driver compiles at first use)"
    assert not report.problems


def test_cuda_newer_than_the_driver(cuda_report: Any) -> None:
    assert not cuda_report([H200], (13, 1), cuda_archs="9.0a", **BUILT)[0].problems
    report, _ = cuda_report([H200], (12, 8), cuda_archs="9.0a", **BUILT)
    ((what, fix),) = report.problems
    assert what == "the CUDA kernels were built by nvcc 13.0.88, the driver serves CUDA up to 12.8"
    assert "update the driver, or build them with CUDA 12" in fix


def test_no_cuda_kernels(cuda_report: Any) -> None:
    report, facts = cuda_report([H200], mode="cpu", native="cpu", error="")
    assert "not built" in facts["kernels"] and "SPARSEKERN_BUILD=cuda" in facts["kernels"]
    assert not report.problems
    assert cuda_report([], mode="cpu", native="cpu", error="")[1]["kernels"] == "not built"


def test_cuda_kernels_whose_build_failed(cuda_report: Any) -> None:
    report, _ = cuda_report([], mode="auto", native="cpu", error="this step failed: cmake --build")
    ((what, fix),) = report.problems
    assert "this step failed" in what and "SPARSEKERN_BUILD=cuda" in fix


@pytest.mark.parametrize(
    "archs, capability, image",
    [
        ("8.0 8.6 9.0a", (8, 0), "sm_80"),
        ("8.0 8.6 9.0a", (8, 9), "sm_86"),  # machine code of an earlier minor version
        ("8.6", (8, 0), ""),
        ("8.0", (9, 0), ""),
        ("9.0a", (9, 0), "sm_90a"),
        ("10.0a", (10, 3), ""),  # for its own version alone
        ("10.0", (10, 3), "sm_100"),
        ("9.0a 9.0+PTX", (9, 0), "sm_90a"),
        ("9.0a 9.0+PTX", (10, 0), "compute_90"),
        ("9.0a+PTX", (10, 0), ""),
        ("8.0+PTX 9.0", (12, 0), "compute_80"),
        ("8.0+PTX", (7, 5), ""),
        ("", (9, 0), ""),
    ],
)
def test_which_code_a_gpu_runs(archs: str, capability: tuple[int, int], image: str) -> None:
    assert native.cuda_image(archs, capability) == image


# -- the rest ---------------------------------------------------------------------------------------------------------


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
