"""Metadata, build, import. The slow half installs into clean environments and needs a package index."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sparsekern

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "cmake"))
from nvcc import find_nvcc  # noqa: E402

if sys.version_info >= (3, 11):
    import tomllib

    PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
else:
    tomllib = None

needs_toml = pytest.mark.skipif(tomllib is None, reason="tomllib needs Python 3.11")


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_.-]", text, maxsplit=1)[0].lower() for text in requirements}


def test_version_has_one_source() -> None:
    text = (ROOT / "sparsekern" / "_version.py").read_text()
    assert text == f'__version__ = "{sparsekern.__version__}"\n'
    assert re.fullmatch(r"\d+\.\d+\.\d+", sparsekern.__version__)  # CMakeLists.txt reads it by this pattern
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt"):
        assert sparsekern.__version__ not in (ROOT / name).read_text(), f"{name} repeats the version"


@needs_toml
def test_building_needs_no_torch() -> None:
    assert names(PYPROJECT["build-system"]["requires"]) == {"setuptools", "cmake", "ninja", "pybind11"}
    assert "import torch" not in (ROOT / "setup.py").read_text()
    for source in (ROOT / "csrc").rglob("*"):
        if source.is_file():
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text()), source


@needs_toml
def test_runtime_covers_the_command_line() -> None:
    required = names(PYPROJECT["project"]["dependencies"])
    assert {"torch", "numpy", "typer", "rich", "pyyaml", "matplotlib", "scikit-learn"} <= required
    assert "triton" not in required  # there is none for every platform
    assert {"triton", "plots", "data", "bench", "test", "dev", "all"} <= set(
        PYPROJECT["project"]["optional-dependencies"]
    )
    assert PYPROJECT["project"]["scripts"] == {"sparsekern": "sparsekern.cli:main"}


@needs_toml
def test_every_data_file_is_packaged() -> None:
    """Each file of the package that is not Python matches a package-data pattern."""
    package = ROOT / "sparsekern"
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["sparsekern"]
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    assert package / "py.typed" in packaged
    built = {".py", ".pyc", ".so"}
    for path in package.rglob("*"):
        if path.is_file() and path.suffix not in built and path.name != "_build.json":
            assert path in packaged, f"{path.relative_to(ROOT)} matches no pattern of package-data"


def test_every_folder_of_modules_is_a_package() -> None:
    """setuptools leaves out a folder without __init__.py."""
    for folder in {path.parent for path in (ROOT / "sparsekern").rglob("*.py")}:
        assert (folder / "__init__.py").exists(), f"{folder.relative_to(ROOT)} has no __init__.py"


def test_installed_metadata() -> None:
    try:
        distribution = importlib.metadata.distribution("sparsekern")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a source tree that is not installed")
    assert distribution.version == sparsekern.__version__
    assert distribution.metadata["License-Expression"] == "Apache-2.0"


def test_import_stays_light() -> None:
    """What `import sparsekern` adds to `import torch`: no plotting, no data, no compiler, no GPU context."""
    script = """
import json, sys
import torch
before = set(sys.modules)
import sparsekern
added = set(sys.modules) - before
print(json.dumps([sorted(added), torch.cuda.is_initialized()]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    modules, cuda = json.loads(done.stdout)
    packages = {name.partition(".")[0] for name in modules}
    heavy = {"matplotlib", "sklearn", "scipy", "pandas", "triton", "transformers", "PIL", "typer", "yaml", "tqdm"}
    assert heavy.isdisjoint(packages), f"import sparsekern imports {heavy & packages}"
    assert "sparsekern._C" not in modules
    assert len(modules) < 400, f"import sparsekern imports {len(modules)} modules"
    assert not cuda


def test_unknown_build_mode_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "SPARSEKERN_BUILD": "gpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "expected auto, cpu, cuda, none, got gpu" in done.stderr


# -- clean environments ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree without build products."""
    target = tmp_path_factory.mktemp("source") / "tree"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "runs", "*.so", "_build.json", "*.egg-info", ".*_cache"
    )
    shutil.copytree(ROOT, target, ignore=left_out)
    return target


def pip(*arguments: str, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def wheel(source: Path, folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    """Builds a wheel under build isolation, without PyTorch."""
    done = pip("wheel", "-v", "--no-deps", "-w", str(folder), str(source), **environment)
    return done, list(folder.glob("*.whl"))


def build_record(path: Path) -> dict[str, object]:
    with zipfile.ZipFile(path) as archive:
        record = json.loads(archive.read("sparsekern/_build.json"))
    assert isinstance(record, dict)
    return record


@pytest.mark.slow
def test_wheel_has_core_and_data(source: Path, tmp_path: Path) -> None:
    done, wheels = wheel(source, tmp_path, SPARSEKERN_BUILD="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "built: CPU kernels" in done.stdout + done.stderr
    content = set(zipfile.ZipFile(wheels[0]).namelist())
    assert any(re.fullmatch(r"sparsekern/_C\..*\.so", name) for name in content)
    for path in (source / "sparsekern").rglob("*"):
        if path.suffix in (".py", ".json", ".yaml", ".typed"):
            assert path.relative_to(source).as_posix() in content
    assert not any(name.startswith(("tests/", "csrc/", "benchmarks/")) for name in content)
    assert build_record(wheels[0])["native"] == "cpu"


@pytest.mark.slow
def test_mode_none_builds_a_pure_wheel(source: Path, tmp_path: Path) -> None:
    done, wheels = wheel(source, tmp_path, SPARSEKERN_BUILD="none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert wheels[0].name.endswith("-py3-none-any.whl")
    assert build_record(wheels[0])["mode"] == "none"


@pytest.mark.slow
def test_mode_auto_goes_on_without_a_compiler(source: Path, tmp_path: Path) -> None:
    broken = {"CXX": str(tmp_path / "no-such-compiler"), "CMAKE_ARGS": "--fresh"}
    done, wheels = wheel(source, tmp_path, SPARSEKERN_BUILD="auto", **broken)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("sparsekern: WARNING: no cpu kernels") == 1
    assert build_record(wheels[0])["native"] == "none"
    assert build_record(wheels[0])["error"]
    shutil.rmtree(tmp_path)
    failed, none = wheel(source, tmp_path, SPARSEKERN_BUILD="cpu", **broken)
    assert failed.returncode != 0 and not none
    assert "SPARSEKERN_BUILD=cpu: this step failed" in failed.stdout + failed.stderr


NO_NVCC = "/no/such/nvcc"


@pytest.mark.slow
def test_mode_cuda_fails_loudly_without_nvcc(source: Path, tmp_path: Path) -> None:
    done, wheels = wheel(source, tmp_path, SPARSEKERN_BUILD="cuda", CUDACXX=NO_NVCC)
    assert done.returncode != 0 and not wheels
    assert (
        f"SPARSEKERN_BUILD=cuda: CUDACXX={NO_NVCC} is no program; install the CUDA toolkit" in done.stdout + done.stderr
    )


@pytest.mark.slow
def test_mode_auto_says_that_nvcc_is_missing(source: Path, tmp_path: Path) -> None:
    done, wheels = wheel(source, tmp_path, SPARSEKERN_BUILD="auto", CUDACXX=NO_NVCC)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert f"sparsekern: no CUDA kernels: CUDACXX={NO_NVCC} is no program" in output
    assert "sparsekern: built: CPU kernels" in output
    assert build_record(wheels[0])["native"] == "cpu" and not build_record(wheels[0])["error"]


@pytest.mark.slow
def test_mode_auto_goes_on_without_cuda_kernels_that_do_not_compile(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    done, wheels = wheel(source, tmp_path, SPARSEKERN_BUILD="auto", CUDACXX=str(broken))
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("sparsekern: WARNING: no cuda kernels, going on without") == 1
    assert build_record(wheels[0])["native"] == "cpu" and build_record(wheels[0])["error"]


@pytest.mark.slow
def test_cuda_kernels_are_built_installed_and_shown(source: Path, tmp_path: Path) -> None:
    if missing := find_nvcc()[1]:
        pytest.skip(missing)
    done, wheels = wheel(source, tmp_path, SPARSEKERN_BUILD="auto", TORCH_CUDA_ARCH_LIST="9.0a")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert re.search(r"built: CPU and CUDA kernels .*cuda_archs 9\.0a.*_C [\d.]+ MB, of which CUDA [\d.]+ MB", output)
    record = build_record(wheels[0])
    assert record["native"] == "cuda" and record["cuda_archs"] == "9.0a"
    assert 1e6 < int(str(record["cuda_bytes"])) < int(str(record["bytes"])) < 64e6

    installed = tmp_path / "installed"
    assert pip("install", "--no-deps", "--target", str(installed), str(wheels[0])).returncode == 0
    doctor = subprocess.run(
        [sys.executable, "-m", "sparsekern"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert str(installed) in doctor.stdout
    assert re.search(r"kernels +for 9\.0a, by nvcc \d+\.\d+\.\d+, [\d.]+ MB", doctor.stdout), doctor.stdout


@pytest.mark.slow
def test_sdist_installs_into_a_clean_environment(source: Path, tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    torch_version = importlib.metadata.version("torch").partition("+")[0]
    done = pip("install", f"torch=={torch_version}", str(sdist), python=python, SPARSEKERN_BUILD="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    doctor = subprocess.run([python, "-m", "sparsekern"], cwd=tmp_path, capture_output=True, text=True)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    script = Path(python).with_name("sparsekern")
    assert subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True).returncode == 0
