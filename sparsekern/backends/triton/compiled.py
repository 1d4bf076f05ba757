"""What Triton and ptxas make of a recorded call, without a GPU: instructions, copies, registers, spills, shared memory.

Results are kept as small JSON files under a key of kernel source, arguments, options, architecture and Triton version.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsekern.backends import user_cache
from sparsekern.backends.triton.recorded import Call

_VERSION = 2  # of what is read out of a compilation


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel; counts are of instructions in the PTX, not of executions.

    Attributes:
        error: why it did not compile; everything else is then 0.
        registers: of one thread.
        spilled: bytes that ptxas stores and loads because registers ran out.
        serialized: ptxas found that wgmma instructions wait for one another.
        shared: bytes of one program.
        wgmma, mma, tcgen05: tensor-core instructions (``wgmma.mma_async``, ``mma.sync``, ``tcgen05.mma``).
        fma: plain fp32 multiply-adds.
        copies16, copies8, copies4: asynchronous copies to shared memory by bytes of one thread.
        boxes: copies by descriptor into shared memory.
        loads: ordinary loads from global memory.
    """

    error: str = ""
    registers: int = 0
    spilled: int = 0
    serialized: bool = False
    shared: int = 0
    wgmma: int = 0
    mma: int = 0
    tcgen05: int = 0
    fma: int = 0
    copies16: int = 0
    copies8: int = 0
    copies4: int = 0
    boxes: int = 0
    loads: int = 0


def key(call: Call) -> str:
    """Equal for calls that compile to the same machine code by the same Triton."""
    import triton

    parts = (_VERSION, triton.__version__, call.target.arch, call.source.hash(), call.compile_options.hash())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def compile_all(calls: Sequence[Call], cache: Path, jobs: int) -> Iterator[tuple[str, Compiled]]:
    """(key, result) of each distinct call, as they are done; ``jobs`` processes."""
    global _pending
    _pending = {key(call): call for call in calls}
    missing = []
    for name in _pending:
        found = _read(cache / f"{name}.json")
        if found is None:
            missing.append(name)
        else:
            yield name, found
    # Forked: the calls hold compiler objects that can't be sent to another process.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context) as pool:
        for name, result in zip(missing, pool.map(_compile_pending, missing)):
            if not result.error:
                user_cache.write(cache / f"{name}.json", asdict(result))
            yield name, result


_pending: dict[str, Call] = {}


def _compile_pending(name: str) -> Compiled:
    return compile_one(_pending[name])


def compile_one(call: Call) -> Compiled:
    """Compile to machine code, in a cache folder of its own so that ptxas runs and reports."""
    import triton
    from triton import knobs

    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.nvidia.scope(), knobs.cache.scope():
        knobs.nvidia.dump_ptxas_log = True
        knobs.cache.dir = folder
        try:
            with contextlib.redirect_stdout(log):
                kernel = triton.compile(call.source, target=call.target, options=call.compile_options.__dict__)
        except Exception as e:  # whatever stage of the compiler it is: the gate reports it
            return Compiled(error=f"{type(e).__name__}: {str(e).strip()[:500]}")
        return read(kernel.asm["ptx"], log.getvalue(), kernel.metadata.shared)


def read(ptx: str, log: str, shared: int) -> Compiled:
    """What the PTX and the report of ``ptxas -v`` say."""
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        return Compiled(error=f"no report of ptxas: {log.strip()[:500]}")
    copies = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\S* *\[[^]]*\], *\[[^]]*\], *(\w+)", ptx)]
    return Compiled(
        registers=int(registers[1]),
        spilled=sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        serialized="wgmma.mma_async instructions are serialized" in log,
        shared=int(shared),
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"(?<!wg)mma\.sync", ptx)),
        tcgen05=len(re.findall(r"tcgen05\.mma", ptx)),
        fma=len(re.findall(r"\bfma\.rn\.(?:ftz\.)?f32", ptx)),
        copies16=copies.count(16),
        copies8=copies.count(8),
        copies4=copies.count(4),
        boxes=len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        loads=len(re.findall(r"\bld\.global", ptx)),
    )


def _read(path: Path) -> Compiled | None:
    try:
        return Compiled(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def jobs_here() -> int:
    """Processes that this machine has cores for."""
    return len(os.sched_getaffinity(0))
