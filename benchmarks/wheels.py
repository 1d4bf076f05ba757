"""Packages for a machine without network: fetched as wheels here, installed from a folder there."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

NAMES = ("pytest-benchmark", "blksprs", "stanford-stk")
PYTHON = "3.12"
# Never fetched as needs of others: the machine has them, and they are large.
_THERE = {"torch", "triton", "numpy", "pytest"}
_PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]


def needs(wheel: Path) -> list[str]:
    """Names that a wheel requires outside of extras, without those that every machine here has."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    found = []
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = re.match(r"[A-Za-z0-9._-]+", line)
        if requirement and "extra" not in line.partition(";")[2]:
            found.append(re.sub(r"[-_.]+", "-", requirement.group()).lower())
    return [name for name in found if name not in _THERE]


def fetch(folder: Path, names: tuple[str, ...] = NAMES) -> dict[str, str]:
    """Download wheels for Linux on x86-64 and what they need, without torch and Triton; build pure ones from source.

    Returns:
        {name: "fetched", "built" or why not}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcome: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop(0)
        if name in outcome:
            continue
        before = set(folder.glob("*.whl"))
        outcome[name] = _fetch_one(folder, name)
        for wheel in set(folder.glob("*.whl")) - before:
            waiting += needs(wheel)
    return outcome


def _fetch_one(folder: Path, name: str) -> str:
    platforms = [part for platform in _PLATFORMS for part in ("--platform", platform)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    if _pip("download", *options, "--dest", str(folder), name).returncode == 0:
        return "fetched"
    built = _pip("wheel", "--no-deps", "--wheel-dir", str(folder), name)
    if built.returncode == 0:
        foreign = [w for w in folder.glob(f"{name.replace('-', '_')}-*.whl") if not w.name.endswith("-any.whl")]
        for wheel in foreign:
            wheel.unlink()
        return "not fetched: its wheel fits only this machine" if foreign else "built"
    lines = built.stderr.strip().splitlines()
    return f"not fetched: {lines[-1] if lines else 'pip failed'}"


def install(folder: Path, target: Path) -> dict[str, str]:
    """Install every wheel of ``folder`` into ``target``, one by one so that a bad one costs only itself.

    Returns:
        {file name: "installed" or why not}.
    """
    shutil.rmtree(target, ignore_errors=True)
    outcome = {}
    for wheel in sorted(folder.glob("*.whl")):
        done = _pip(
            "install", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(target), str(wheel)
        )
        lines = done.stderr.strip().splitlines()
        outcome[wheel.name] = "installed" if done.returncode == 0 else f"not installed: {lines[-1] if lines else ''}"
    return outcome


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    return subprocess.run(command, capture_output=True, text=True)
