"""What ``ptxas -v`` and the PTX say of each kernel, and what is wrong with it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

REGISTERS_PER_SM = 65536  # of every GPU from compute capability 8.0 on
THREADS_PER_SM = 2048  # 1536 on 8.6, 8.9 and 12.0
REGISTER_UNIT = 8  # registers per thread are handed out in eights


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture.

    Attributes:
        source: file it was compiled from.
        name: demangled, without sparsekern::cuda and arguments: ``stationary::kernel<Bf16, false, 64, 16>``.
        symbol: mangled name.
        arch: "80", "90a", ...
        stack, spill_stores, spill_loads: bytes of local memory per thread, and of instructions that reach it.
        static_shared: bytes; the kernels take theirs dynamically.
        threads, blocks: launch bounds; 0 where there are none.
    """

    source: str
    name: str
    symbol: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int
    threads: int = 0
    blocks: int = 0

    @property
    def most_registers(self) -> int:
        """What the launch bounds leave a thread."""
        if not self.threads:
            return 255
        share = REGISTERS_PER_SM // (self.threads * max(self.blocks, 1))
        return min(255, share // REGISTER_UNIT * REGISTER_UNIT)

    @property
    def per_sm(self) -> int:
        """Thread blocks of the largest allowed size that registers and threads let one multiprocessor hold."""
        if not self.threads:
            return 0
        registers = -(-self.registers // REGISTER_UNIT) * REGISTER_UNIT
        return min(REGISTERS_PER_SM // (registers * self.threads), THREADS_PER_SM // self.threads)


def problems(kernel: Kernel) -> tuple[str, ...]:
    """What is wrong with a compiled kernel; empty if nothing is."""
    found = []
    if kernel.spill_stores or kernel.spill_loads:
        found.append(f"{kernel.spill_stores} + {kernel.spill_loads} bytes of registers spilled (stored + loaded)")
    elif kernel.stack:
        found.append(f"{kernel.stack} bytes of stack: an array is indexed by a value unknown to the compiler")
    if not kernel.threads:
        found.append("no launch bounds: any number of threads must fit, which costs registers")
    if kernel.registers > kernel.most_registers:
        found.append(f"{kernel.registers} registers, the launch bounds leave {kernel.most_registers}")
    if kernel.static_shared:
        found.append(f"{kernel.static_shared} bytes of static shared memory, which the plans do not count")
    return tuple(found)


_ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\w+)'"
    r"(?P<body>(?:(?!Compiling entry function).)*?)"
    r"Used (?P<registers>\d+) registers(?P<used>[^\n]*)",
    re.DOTALL,
)


def parse(source: str, log: str) -> list[Kernel]:
    """The kernels in the log of one source's compilation with ``-Xptxas -v``."""
    found = []
    for match in _ENTRY.finditer(log):
        # A kernel that calls functions has their properties listed as well; its own come under its name.
        body = match["body"].partition(f"Function properties for {match['symbol']}\n")[2]
        frame = re.match(r"[^\n\d]*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", body)
        if frame is None:
            raise ValueError(f"{source}: ptxas says nothing of the stack of {match['symbol']}")
        shared = re.search(r"(\d+) bytes smem", match["used"])
        stack, stores, loads = map(int, frame.groups())
        found.append(
            Kernel(
                source=source,
                name=match["symbol"],
                symbol=match["symbol"],
                arch=match["arch"],
                registers=int(match["registers"]),
                stack=stack,
                spill_stores=stores,
                spill_loads=loads,
                static_shared=int(shared[1]) if shared else 0,
            )
        )
    return found


def launch_bounds(binary: bytes) -> dict[str, tuple[int, int]]:
    """{symbol: (threads, blocks)} from the uncompressed PTX in an object file."""
    found = {}
    for match in re.finditer(rb"\.entry (\w+)\([^)]*\)\s*((?:\.\w+[^\n{]*\n)*)", binary):
        threads = re.search(rb"\.(?:maxntid|reqntid) (\d+)(?:, (\d+))?(?:, (\d+))?", match[2])
        blocks = re.search(rb"\.minnctapersm (\d+)", match[2])
        size = 0
        if threads:
            size = 1
            for edge in threads.groups():
                size *= int(edge or 1)
        found[match[1].decode()] = (size, int(blocks[1]) if blocks else 0)
    return found


def complete(kernel: Kernel, names: dict[str, str], bounds: dict[str, tuple[int, int]]) -> Kernel:
    """With its readable name and launch bounds."""
    threads, blocks = bounds.get(kernel.symbol, (0, 0))
    return replace(kernel, name=names[kernel.symbol], threads=threads, blocks=blocks)


def demangle(symbols: Sequence[str]) -> dict[str, str]:
    """{symbol: short name}."""
    if not symbols:
        return {}
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return {symbol: short_name(full) for symbol, full in zip(symbols, done.stdout.splitlines())}


def template_id(full: str) -> str:
    """``void a::kernel<a::Bf16, (bool)1>(Args)`` -> ``a::kernel<a::Bf16, (bool)1>``."""
    name, depth = full.removeprefix("void "), 0
    for i, letter in enumerate(name):
        if letter == "(" and depth == 0 and not name.startswith("(anonymous namespace)", i):
            return name[:i]
        depth += {"<": 1, ">": -1}.get(letter, 0)
    return name


def short_name(full: str) -> str:
    """``void sparsekern::cuda::a::kernel<sparsekern::cuda::Bf16, (bool)1, 64>(Args)`` ->
    ``a::kernel<Bf16, true, 64>``."""
    name = template_id(full).replace("sparsekern::cuda::", "").replace("(anonymous namespace)::", "")
    return name.replace("(bool)1", "true").replace("(bool)0", "false").replace("(int)", "").replace(" >", ">")


HEADINGS = ("kernel", "sm", "registers", "of", "threads", "per SM", "spilled", "stack")


def cells(kernel: Kernel) -> tuple[str, ...]:
    """A row of the table, in the order of :data:`HEADINGS`."""
    return (
        f"`{kernel.name}`",
        kernel.arch,
        str(kernel.registers),
        str(kernel.most_registers),
        str(kernel.threads),
        str(kernel.per_sm),
        str(kernel.spill_stores + kernel.spill_loads),
        str(kernel.stack),
    )


def table(kernels: Iterable[Kernel]) -> str:
    """All kernels as a Markdown table."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    return "\n".join([*lines, *("| " + " | ".join(cells(kernel)) + " |" for kernel in kernels)])
