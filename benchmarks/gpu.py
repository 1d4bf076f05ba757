"""Everything that a GPU is needed for, in one command: ``python -m benchmarks.gpu`` (``make gpu``).

Compares the primitives of the CUDA kernels with their emulation and builds the kernels, tests them and Triton's, probes
the machine's limits, tunes, measures against dense and against other libraries, and writes the results with a table of
targets met and missed. Needs no network. Runs in slices: it goes on where the last run in
the same folder stopped, each piece is a process of its own, and ``--budget-s`` ends a slice in time.

    python -m benchmarks.gpu --fetch-wheels wheels       on a machine with network: packages for the one without
    python -m benchmarks.gpu --wheels wheels             on the GPU
    python -m benchmarks.gpu --budget-s 540 --archive gpu.tar.gz    a slice of 9 minutes that takes its past along
    python -m benchmarks.gpu --plan                      how a run divides into such slices
    python -m benchmarks.gpu --dry-run                   every step on Triton's interpreter, on a CPU
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cuda_build, files, runner, toolkit, wheels
from benchmarks.chunks import Chunk, Settings, plan
from benchmarks.device import one_line
from benchmarks.runner import Budget, State, StateError

ROOT = Path(__file__).resolve().parent.parent
SITE = ".site"  # packages from --wheels, inside the output folder

TRAINING = "training"  # checkpoints of the nets trained there
_NOT_KEPT = (SITE, ".gitignore", "cache", "logs", TRAINING, ".*.part*")  # of the output folder, in the repository


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default: benchmarks/results/<GPU>)")
    parser.add_argument("--budget-s", type=float, help="start no chunk that would end later than this")
    parser.add_argument("--only", help="chunks to run, commas between; a trailing * stands for the rest of a name")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs in the folder did")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="skip finished chunks (the default)"
    )
    parser.add_argument("--list", action="store_true", help="show the plan and what is done, run nothing")
    parser.add_argument(
        "--plan",
        nargs="?",
        type=float,
        const=540.0,
        metavar="SECONDS",
        help="show slices of so many (540), run nothing",
    )
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU with tiny sizes")
    parser.add_argument("--data", help="folder of CIFAR-10, or several with commas between, to train on")
    parser.add_argument("--tests", help="arguments of pytest for one chunk of tests, instead of the usual ones")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for this run (default: .whl if there)")
    parser.add_argument("--fetch-wheels", type=Path, metavar="DIR", help="download those wheels into DIR, and stop")
    parser.add_argument(
        "--native", action=argparse.BooleanOptionalAction, default=True, help="build the package's native core first"
    )
    parser.add_argument("--archive", type=Path, help="tar.gz of the output folder: read first if it is there, kept up")
    return parser.parse_args(arguments)


def settings_of(want: argparse.Namespace) -> Settings:
    """What the backend here can do."""
    import torch

    from sparsekern.backends import NAMES, OpDesc, get

    device = "cpu" if want.dry_run else "cuda"
    tests = tuple(want.tests.split()) if want.tests else ()
    common: dict[str, Any] = {
        "workers": min(8, (os.cpu_count() or 1) // 2),
        "xdist": importlib.util.find_spec("xdist") is not None,
        "data": ",".join(str(Path(part).resolve()) for part in want.data.split(",")) if want.data else "",
        "tests": tests,
    }
    if want.plan is not None and not torch.cuda.is_available() and not want.dry_run:
        return Settings(device, **common)  # as on a machine that has a GPU
    if "triton" not in NAMES:
        return Settings(device, triton=False, conv2d="there is no Triton backend", **common)

    def refusal(op: str) -> str:
        try:
            return get("triton").unsupported(OpDesc(op, device, torch.bfloat16, (32, 32))) or ""
        except Exception as error:
            return one_line(error)

    linear = refusal("linear")
    if linear:
        print(f"the Triton backend is not used: {linear}")
    return Settings(device, triton=not linear, conv2d=linear or refusal("conv2d"), **common)


def chosen(chunks: list[Chunk], only: str | None) -> list[Chunk]:
    """Chunks that ``--only`` names; raises SystemExit for a name that is none."""
    if not only:
        return chunks
    patterns = [re.escape(name).replace(r"\*", ".*") for name in only.split(",")]
    for pattern, name in zip(patterns, only.split(","), strict=True):
        if not any(re.fullmatch(pattern, chunk.name) for chunk in chunks):
            raise SystemExit(f"--only {name}: expected some of {', '.join(chunk.name for chunk in chunks)}")
    return [chunk for chunk in chunks if any(re.fullmatch(pattern, chunk.name) for pattern in patterns)]


def environment(out: Path, rehearsal: bool) -> dict[str, str]:
    """What every chunk sees: this checkout and the carried wheels first, caches inside the output folder."""
    path = [str(ROOT), str(out / SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "SPARSEKERN_CACHE": str(out / "cache")}
    env |= {"PYTHONUNBUFFERED": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    env.pop("SPARSEKERN_BACKEND", None)
    env.pop("TRITON_INTERPRET", None)
    return {**env, "TRITON_INTERPRET": "1"} if rehearsal else env


def build_native(env: dict[str, str], rehearsal: bool) -> str:
    """Install the package with its native core; what came of it in one line. A rehearsal leaves it as it is.

    CUDA kernels are built for this GPU alone, where there is an nvcc; the chunk that builds them says why not. An
    extension that has them and was carried here stays where nothing could build them anew.
    """
    if rehearsal:
        return "left as it is: a rehearsal"
    try:
        toolkit.nvcc()
    except toolkit.Missing:
        if not cuda_build.missing():
            return "left as it is: it has CUDA kernels for this GPU, and there is no nvcc"
    failed = cuda_build.install("auto", 400, env)
    return f"not built: {failed}" if failed else "built"


def prepare(out: Path, want: argparse.Namespace, env: dict[str, str]) -> None:
    """Wheels, native core and the facts of the machine, into ``machine.json``; what is done is not done again."""
    known: dict[str, Any] = (not want.fresh and files.read_json(out / "machine.json")) or {}
    folder = want.wheels or (ROOT / ".whl" if (ROOT / ".whl").is_dir() else None)
    if folder is not None:
        known["wheels"] = wheels.install(folder, out / SITE)
        print("wheels:", "; ".join(f"{name} {what}" for name, what in known["wheels"].items()))
    if not list((ROOT / "sparsekern").glob("_C*.so")) or "native" not in known:
        known["native"] = build_native(env, want.dry_run) if want.native else "not built: --no-native"
        print("native core:", known["native"])
    asked = "import json; from benchmarks import machine as m; print(json.dumps([m.machine_info(), m.gpu_state()]))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"the package does not import here:\n{done.stderr[-2000:]}")
    info, state = json.loads(done.stdout.strip().splitlines()[-1])
    files.write_json(out / "machine.json", {**known, **info, "gpu_state": state})


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-") or "gpu"


def default_out(rehearsal: bool) -> Path:
    import torch

    if rehearsal:
        return ROOT / "runs" / "gpu-rehearsal"
    if not torch.cuda.is_available():
        return ROOT / "runs" / "gpu-plan"
    return ROOT / "benchmarks" / "results" / slug(torch.cuda.get_device_name(0))


def unpack(archive: Path, out: Path) -> None:
    if archive.exists() and not (out / "state.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as content:
            content.extractall(out, filter="data")


def pack(archive: Path, out: Path) -> None:
    """The output folder without installed packages and checkpoints, replaced in one step."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(f".{archive.name}.part")
    with tarfile.open(part, "w:gz") as content:
        for path in sorted(out.iterdir()):
            if path.name not in (SITE, TRAINING) and ".part" not in path.name:
                content.add(path, path.name)
    os.replace(part, archive)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all well, 1 some chunk failed, 2 wrong use or no GPU."""
    want = options(arguments)
    start = time.monotonic()
    if want.fetch_wheels:
        outcome = wheels.fetch(want.fetch_wheels)
        print("\n".join(f"{name}: {what}" for name, what in outcome.items()))
        return int(any(what.startswith("not") for what in outcome.values()))
    import torch

    if not want.dry_run and want.plan is None and not torch.cuda.is_available():
        print("benchmarks.gpu: expected a CUDA device, found none; --dry-run rehearses without one", file=sys.stderr)
        return 2
    if want.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    out = (want.out or default_out(want.dry_run)).resolve()
    if want.plan is not None:
        chunks = chosen(plan(settings_of(want)), want.only)
        print(runner.describe_slices(chunks, State(out, rehearsal=want.dry_run, fresh=want.fresh), want.plan))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / ".gitignore", "".join(f"/{name}\n" for name in _NOT_KEPT))
    if want.archive:
        unpack(want.archive, out)
    chunks = chosen(plan(settings_of(want)), want.only)
    if want.fresh:
        for name in ("machine.json", *(chunk.result for chunk in chunks if chunk.result)):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / TRAINING, ignore_errors=True)
    try:
        state = State(out, rehearsal=want.dry_run, fresh=want.fresh)
    except StateError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    if want.list:
        print(runner.describe(chunks, state))
        return 0
    return measure(out, chunks, state, want, start)


def measure(out: Path, chunks: list[Chunk], state: State, want: argparse.Namespace, start: float) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an interrupt: children are ended, the archive is kept
    budget = Budget(want.budget_s)
    budget.start = start
    env = environment(out, want.dry_run)
    os.chdir(ROOT)

    def keep() -> None:
        if want.archive:
            pack(want.archive, out)

    try:
        prepare(out, want, env)
        late = runner.run_all(chunks, out, state, budget, env, again=not want.resume, after=keep)
        done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_summary", str(out)], env=env, text=True)
    finally:
        keep()
    if late:
        print(f"no time left for: {', '.join(chunk.name for chunk in late)}; run the same command again to go on")
    failed = runner.failures(chunks, state)
    if failed:
        print(f"failed: {', '.join(failed)}; see {out / 'README.md'}")
    print(f"{time.monotonic() - start:.0f} s; results: {out / 'README.md'}")
    return int(bool(failed) or done.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
