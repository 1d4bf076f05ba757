"""Compile every kernel's device code with another CUDA's run-time compiler, and check it as ``gate`` does.

No package of CUDA 12.8 brings nvcc, but one brings a compiler of device code that needs neither a GPU nor a driver.
``make test-nvrtc`` gets it and runs this after ``gate``, whose logs name the kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.cuda_build import ptxas
from tests.cuda_build.build import ROOT

CUDA_SOURCES = ROOT / "csrc" / "cuda"
# What the kernels' headers include for their host code, which becomes device code here that nobody calls: a run-time
# compiler knows no other, and has no standard library.
STAND_IN = """
#ifndef SK_STAND_IN
#define SK_STAND_IN
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define INT32_MAX INT_MAX
#define INT64_MAX 9223372036854775807LL
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
typedef unsigned long long uint64_t; typedef unsigned long long uintptr_t; typedef long long intptr_t;
namespace std {
using ::int64_t;
using size_t = decltype(sizeof(0));
struct string {
    string(const char *) {}
    friend string operator+(const string &a, const string &) { return a; }
};
template <class T> string to_string(T) { return ""; }
struct invalid_argument { invalid_argument(const string &) {} };
struct runtime_error { runtime_error(const string &) {} };
template <class T> const T &min(const T &a, const T &b) { return b < a ? b : a; }
template <class T> const T &max(const T &a, const T &b) { return a < b ? b : a; }
template <class A, class B> struct is_same { static constexpr bool value = false; };
template <class A> struct is_same<A, A> { static constexpr bool value = true; };
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <bool C, class A, class B> struct conditional { using type = A; };
template <class A, class B> struct conditional<false, A, B> { using type = B; };
template <bool C, class A, class B> using conditional_t = typename conditional<C, A, B>::type;
}
#endif
"""
LAUNCH = """
#pragma once
#include "primitives.cuh"
#include "problem.h"
namespace sparsekern { namespace cuda {
struct Grid { int64_t x, y, z; };
template <class Args>
void launch(const char *, void (*)(Args), const Grid &, int, int64_t, const Stream &, const Args &) {}
} }
"""
HEADERS = {
    **dict.fromkeys(
        (
            "algorithm",
            "climits",
            "cstddef",
            "cstdint",
            "limits",
            "stdexcept",
            "string",
            "type_traits",
            "utility",
            "vector",
        ),
        STAND_IN,
    ),
    "launch.cuh": LAUNCH,
}
OPTIONS = (
    "--std=c++17",
    f"-I{CUDA_SOURCES}",
    "--ptxas-options=-v",
    "--device-as-default-execution-space",
    "-Dthrow=(void)",
)


class Nvrtc:
    """The run-time compiler in one library."""

    def __init__(self, library: str) -> None:
        self.library = ctypes.CDLL(library)
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def check(self, status: int, what: str) -> None:
        if status:
            raise RuntimeError(f"{what}: {self.library.nvrtcGetErrorString(status).decode()}")

    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.check(self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        return f"{major.value}.{minor.value}"

    def compile(self, source: str, names: Sequence[str], options: Sequence[str]) -> tuple[bool, str]:
        """Whether ``source`` compiles with the templates ``names`` instantiated, and the compiler's log."""
        library, program = self.library, ctypes.c_void_p()
        headers = (ctypes.c_char_p * len(HEADERS))(*(text.encode() for text in HEADERS.values()))
        included = (ctypes.c_char_p * len(HEADERS))(*(name.encode() for name in HEADERS))
        status = library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernels.cu", len(HEADERS), headers, included
        )
        self.check(status, "nvrtcCreateProgram")
        for name in names:
            self.check(library.nvrtcAddNameExpression(program, name.encode()), name)
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), flags)
        size = ctypes.c_size_t()
        self.check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "nvrtcGetProgramLogSize")
        log = ctypes.create_string_buffer(size.value)
        self.check(library.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
        self.check(library.nvrtcDestroyProgram(ctypes.byref(program)), "nvrtcDestroyProgram")
        return status == 0, log.value.decode()


def kernel_names(logs: Path) -> dict[str, list[str]]:
    """{source: full names of its kernels} from the logs of a build by ``gate``."""
    found = {}
    for log in sorted(logs.glob("*.cu.log")):
        symbols = sorted({kernel.symbol for kernel in ptxas.parse(log.name, log.read_text())})
        done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
        found[log.name.removesuffix(".log")] = [ptxas.template_id(name) for name in done.stdout.splitlines()]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a kernel does not compile or spills."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_build.nvrtc", description=__doc__)
    parser.add_argument("library", help="libnvrtc.so")
    parser.add_argument("--arch", nargs="+", default=("80", "90a"), help="as 80")
    parser.add_argument("--logs", type=Path, default=ROOT / "build/cuda-gate/ptxas", help="of gate")
    chosen = parser.parse_args(arguments)
    names = kernel_names(chosen.logs)
    if not names:
        print(f"no logs in {chosen.logs}; run first: python -m tests.cuda_build.gate", file=sys.stderr)
        return 1
    nvrtc = Nvrtc(chosen.library)
    wrong, total = [], 0
    for source, kernels in names.items():
        for arch in chosen.arch:
            start = time.monotonic()
            compiled, log = nvrtc.compile(f'#include "{source}"\n', kernels, [*OPTIONS, f"-arch=sm_{arch}"])
            found = ptxas.parse(source, log) if compiled else []
            total += len(found)
            if not compiled:
                wrong.append(f"sm_{arch} {source}:\n{log}")
            elif len(found) != len(kernels):
                wrong.append(f"sm_{arch} {source}: {len(found)} of {len(kernels)} kernels compiled")
            for kernel in found:
                if kernel.spill_stores or kernel.spill_loads or kernel.stack:
                    name = ptxas.demangle([kernel.symbol])[kernel.symbol]
                    spilled = f"{kernel.spill_stores} + {kernel.spill_loads} bytes of registers spilled"
                    wrong.append(f"sm_{arch} {name}: {spilled}, {kernel.stack} bytes of stack")
            print(f"{source} sm_{arch}: {len(found)} kernels, {time.monotonic() - start:.0f} s", flush=True)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"NVRTC {nvrtc.version()}: {total} kernels, {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
