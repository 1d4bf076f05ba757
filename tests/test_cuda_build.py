"""The checks on compiled CUDA kernels, the search for nvcc, and what the build says of itself; nothing is compiled."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tests.cuda_build import build, gate, nvrtc, ptxas

ROOT = Path(__file__).parent.parent
FORWARD = "_ZN10sparsekern4cuda14scratch_kernelINS0_4Bf16ELb0ELi64EEEvNS0_1AE"
DGRAD = "_ZN10sparsekern4cuda14scratch_kernelINS0_4Bf16ELb1ELi32EEEvNS0_1AE"
# nvcc 13.0; the last kernel calls a function, whose properties come first.
LOG = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{FORWARD}' for 'sm_80'
ptxas info    : Function properties for {FORWARD}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 127 registers, used 1 barriers, 360 bytes cmem[0]
ptxas info    : Compile time = 7.553 ms
ptxas info    : Compiling entry function '{DGRAD}' for 'sm_90a'
ptxas info    : Function properties for _Z6helperi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for {DGRAD}
    136 bytes stack frame, 224 bytes spill stores, 228 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 136 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compile time = 2.234 ms
"""
NVRTC_LOG = f"""ptxas info    : Compiling entry function '{FORWARD}' for 'sm_80'
ptxas info    : Function properties for {FORWARD}
ptxas         .     0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 14 registers, used 1 barriers, 360 bytes cmem[0]
"""
PTX = f"""\0\x7fELF .visible .entry {FORWARD}(
\t.param .align 8 .b8 {FORWARD}_param_0[8]
)
.maxntid 512
.minnctapersm 1
{{
.entry {DGRAD}(
\t.param .align 8 .b8 {DGRAD}_param_0[8]
)
{{
"""
GOOD = ptxas.Kernel("a.cu", "k<Bf16>", "_k", "80", 128, 0, 0, 0, 0, threads=512, blocks=1)


def test_log_of_ptxas() -> None:
    forward, dgrad = ptxas.parse("a.cu", LOG)
    assert (forward.symbol, forward.arch, forward.registers) == (FORWARD, "80", 127)
    assert (forward.stack, forward.spill_stores, forward.spill_loads, forward.static_shared) == (0, 0, 0, 0)
    assert (dgrad.symbol, dgrad.arch, dgrad.registers) == (DGRAD, "90a", 255)
    assert (dgrad.stack, dgrad.spill_stores, dgrad.spill_loads, dgrad.static_shared) == (136, 224, 228, 1024)
    (other,) = ptxas.parse("a.cu", NVRTC_LOG)
    assert (other.registers, other.spill_stores, other.spill_loads) == (14, 4, 8)


def test_log_without_the_figures_is_an_error() -> None:
    with pytest.raises(ValueError, match="ptxas says nothing of the stack"):
        ptxas.parse("a.cu", LOG.replace("bytes stack frame", "bytes of stack"))


def test_launch_bounds_come_from_the_ptx() -> None:
    assert ptxas.launch_bounds(PTX.encode()) == {FORWARD: (512, 1), DGRAD: (0, 0)}
    assert ptxas.launch_bounds(PTX.replace("512", "32, 4, 2").encode())[FORWARD] == (256, 1)


def test_names_are_readable() -> None:
    assert (
        ptxas.short_name("void sparsekern::cuda::a::k<sparsekern::cuda::Bf16, (bool)1, 64>(A)")
        == "a::k<Bf16, true, 64>"
    )
    nested = "void sparsekern::cuda::w<sparsekern::cuda::T<sparsekern::cuda::Tf32, 16> >(sparsekern::cuda::Args<int>)"
    assert ptxas.short_name(nested) == "w<T<Tf32, 16>>"
    assert ptxas.template_id(nested) == "sparsekern::cuda::w<sparsekern::cuda::T<sparsekern::cuda::Tf32, 16> >"
    if shutil.which("c++filt"):
        assert ptxas.demangle([FORWARD])[FORWARD] == "scratch_kernel<Bf16, false, 64>"


@pytest.mark.parametrize(
    "change, word",
    [
        ({"spill_stores": 4}, "spilled"),
        ({"spill_loads": 4}, "spilled"),
        ({"stack": 8}, "stack"),
        ({"threads": 0}, "no launch bounds"),
        ({"registers": 136}, "the launch bounds leave 128"),
        ({"blocks": 2}, "the launch bounds leave 64"),
        ({"static_shared": 16}, "static shared memory"),
    ],
)
def test_each_check_fails_where_it_should(change: dict[str, int], word: str) -> None:
    assert ptxas.problems(GOOD) == ()
    (found,) = ptxas.problems(replace(GOOD, **change))
    assert word in found


def test_thread_blocks_per_multiprocessor() -> None:
    assert GOOD.per_sm == 1
    assert replace(GOOD, registers=64).per_sm == 2
    assert replace(GOOD, registers=57, threads=256).per_sm == 4  # 57 count as 64
    assert replace(GOOD, registers=16).per_sm == 4  # by threads


def test_a_kernel_missing_for_one_architecture_is_found() -> None:
    both = [GOOD, replace(GOOD, arch="90a")]
    assert gate.differences(both) == []
    assert gate.differences([*both, replace(GOOD, name="other")]) == ["sm_90a other: missing in a.cu"]


def test_report_has_every_kernel() -> None:
    content = json.loads(gate.as_json([GOOD, replace(GOOD, arch="90a", stack=8)], "13.0.88"))
    assert content["nvcc"] == "13.0.88"
    assert [kernel["arch"] for kernel in content["kernels"]] == ["80", "90a"]
    assert "problems" not in content["kernels"][0] and "stack" in content["kernels"][1]["problems"][0]
    assert "| `k<Bf16>` | 80 | 128 | 128 | 512 | 1 | 0 | 0 |" in gate.markdown([GOOD], "13.0.88")


def test_output_of_a_build_is_kept_by_source(tmp_path: Path) -> None:
    lines = [
        "[1/3] Building CUDA object CMakeFiles/sk_cuda.dir/csrc/cuda/wgrad_bf16.cu.o",
        "first",
        "[2/3] Building CXX object CMakeFiles/sk_cuda.dir/csrc/cuda/wgrad.cpp.o",
        "a warning of another compiler",
        "[3/3] Building CUDA object CMakeFiles/sk_cuda.dir/csrc/cuda/streamed_tf32.cu.o",
        "second",
        "third",
    ]
    script = [sys.executable, "-c", f"print({chr(10).join(lines)!r})"]
    build.run_build(script, tmp_path, dict(os.environ))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "wgrad_bf16.cu.log": "first\n",
        "streamed_tf32.cu.log": "second\nthird\n",
    }
    with pytest.raises(build.BuildError, match="third"):
        build.run_build([*script[:2], script[2] + "; raise SystemExit(1)"], tmp_path, dict(os.environ))


def test_run_time_compiler_knows_every_standard_header() -> None:
    """A header that the kernels include and NVRTC is not given would stop that check."""
    for path in (ROOT / "csrc" / "cuda").glob("*"):
        if path.suffix in (".cu", ".cuh", ".h") and not path.name.startswith("bindings"):
            included = {
                line.split("<")[1].split(">")[0] for line in path.read_text().splitlines() if "#include <" in line
            }
            assert included <= set(nvrtc.HEADERS), f"{path.name}: add {included - set(nvrtc.HEADERS)} to nvrtc.HEADERS"


# -- the search for nvcc --------------------------------------------------------------------------------------------


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """cmake/nvcc.py on a machine that has no CUDA."""
    spec = importlib.util.spec_from_file_location("nvcc_under_test", ROOT / "cmake" / "nvcc.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(module, "TOOLKIT", str(tmp_path / "toolkit"))
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(module.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    return module


def program(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_nvcc_is_searched_from_the_most_to_the_least_explicit(
    search: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert search.find_nvcc()[0] == "" and "nvcc was not found in CUDACXX, CUDA_HOME" in search.find_nvcc()[1]
    places = ["user/nvidia/cu12/bin/nvcc", "site/nvidia/cu13/bin/nvcc", "toolkit/bin/nvcc", "bin/nvcc"]
    for place in places:
        made = program(tmp_path / place)
        assert search.find_nvcc() == (made, "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert search.find_nvcc()[0] == str(tmp_path / "bin/nvcc")  # CUDA_HOME may be a toolkit without a compiler
    made = program(tmp_path / "home/bin/nvcc")
    assert search.find_nvcc() == (made, "")
    monkeypatch.setenv("CUDACXX", "/no/such/nvcc")
    assert search.find_nvcc() == ("", "CUDACXX=/no/such/nvcc is no program")


# -- setup.py -------------------------------------------------------------------------------------------------------


@pytest.fixture
def setup_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py without its call of setup()."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("SPARSEKERN_BUILD", raising=False)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    spec = importlib.util.spec_from_file_location("setup_under_test", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_jobs_fit_cores_and_memory(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    assert sources == 9

    def machine(cores: int, gib: float) -> None:
        monkeypatch.setattr(setup_module.os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(setup_module, "available_gib", lambda: gib)

    machine(cores=4, gib=64.0)
    assert setup_module.job_count(cuda=False) == (4, 1) == setup_module.job_count(cuda=True)
    machine(cores=4, gib=2.5)
    assert setup_module.job_count(cuda=True) == (2, 1)
    machine(cores=4, gib=0.1)
    assert setup_module.job_count(cuda=True) == (1, 1)
    machine(cores=64, gib=256.0)
    assert setup_module.job_count(cuda=False) == (64, 1)
    assert setup_module.job_count(cuda=True) == (sources, 64 // sources)  # no more sources: architectures side by side
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup_module.job_count(cuda=True) == (3, 1)


def test_size_of_device_code(setup_module: ModuleType, tmp_path: Path) -> None:
    names = b"\0.text\0.nv_fatbin\0"
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 0x28, 64 + len(names))
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 0)
    sections = [(0, 64, len(names)), (1, 0, 11), (7, 0, 4321)]
    table = b"".join(struct.pack("<IIQQQQ", name, 0, 0, 0, at, size).ljust(64, b"\0") for name, at, size in sections)
    path = tmp_path / "_C.so"
    path.write_bytes(bytes(header) + names + table)
    assert setup_module.section_bytes(path, ".nv_fatbin") == 4321
    assert setup_module.section_bytes(path, ".text") == 11
    assert setup_module.section_bytes(path, ".data") == 0
    path.write_bytes(b"not ELF")
    assert setup_module.section_bytes(path, ".nv_fatbin") == 0


def test_sizes_agree_with_binutils(setup_module: ModuleType) -> None:
    built = next((ROOT / "sparsekern").glob("_C.*.so"), None)
    if built is None or not shutil.which("size"):
        pytest.skip("needs a built core and binutils")
    listed = subprocess.run(["size", "-A", built], capture_output=True, text=True, check=True).stdout
    text = next(int(line.split()[1]) for line in listed.splitlines() if line.startswith(".text "))
    assert setup_module.section_bytes(built, ".text") == text


def test_build_says_what_it_built(setup_module: ModuleType) -> None:
    record = {"native": "cuda", "compiler": "GNU 12.2.0", "cuda_compiler": "13.0.88", "cuda_archs": "8.0 9.0a"}
    record |= {"isas": ["generic", "avx2"], "bytes": 14_200_000, "cuda_bytes": 11_900_000}
    assert setup_module.summary(record) == (
        "CPU and CUDA kernels (compiler GNU 12.2.0; cuda_compiler 13.0.88; cuda_archs 8.0 9.0a; "
        "instruction sets generic, avx2; _C 14.2 MB, of which CUDA 11.9 MB)"
    )
    assert setup_module.summary({"native": "none"}) == "pure Python, no native core"
    assert "CUDA" not in setup_module.summary({"native": "cpu", "bytes": 900_000, "cuda_bytes": 0})


def test_attempts_by_mode(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(mode: str, missing: str) -> list[str]:
        monkeypatch.setattr(setup_module, "MODE", mode)
        monkeypatch.setattr(setup_module, "cuda_missing", lambda: missing)
        return setup_module.attempts()

    assert tried("auto", "") == ["cuda", "cpu", "none"]
    assert tried("auto", "nvcc was not found") == ["cpu", "none"]
    assert tried("cuda", "") == ["cuda"]
    assert tried("cpu", "") == ["cpu"]
    with pytest.raises(SystemExit, match="SPARSEKERN_BUILD=cuda: nvcc was not found"):
        tried("cuda", "nvcc was not found")
