"""Faults put into copies of the CUDA kernels, to see that the emulation's tests notice each of them.

One executable per family of kernels holds all mutations behind switches (tests/emulation/mutation.h), so that a
mutation costs one run, not one build::

    python -m tests.cuda_mutations stationary                # barriers, waits, swapped dimensions and edges, ...
    python -m tests.cuda_mutations stationary --what survey  # every operator and condition

It prints the mutations that survive. Of a survey some always do: an expression that only decides speed, or a constant.
"""

from __future__ import annotations

import argparse
import bisect
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "csrc/cuda"
EMULATION = ROOT / "tests/emulation"
FAMILIES = ("stationary", "streamed", "wgrad")
TIMEOUT = 20.0  # seconds of one run, which takes two on an idle core; some faults never end
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

# Of names that stand for different things of one type: the one is taken for the other.
PAIRS = [
    ("stride_h", "stride_w"),
    ("dilation_h", "dilation_w"),
    ("pad_top", "pad_left"),
    ("tile_h", "tile_w"),
    ("height", "width"),
    ("y", "x"),
    ("y0", "x0"),
    ("phase_y", "phase_x"),
    ("tiles_y", "tiles_x"),
    ("tiles_h", "tiles_w"),
    ("source_h", "source_w"),
    ("result_h", "result_w"),
    ("channels", "features"),
    ("y_", "x_"),
    ("bo", "bi"),
    ("h", "w"),
    ("p", "q"),
    ("r", "s"),
    ("rows", "cols"),
    ("row_ptr", "t_ptr"),
    ("col", "t_row"),
    ("row_order", "t_order"),
    ("union_ptr", "t_union_ptr"),
    ("union_list", "t_union_list"),
    ("out_per_group()", "in_per_group()"),
    ("rows()", "cols()"),
]
PARTNER = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])} | {"t_perm": "row"}
OPERATORS = {"<<": "l", ">>": "r", "<=": "L", ">=": "G", "==": "=", "!=": "!"} | {c: c for c in "+-*/%&|^<>"}


MAPS = "fragments.h"  # where elements lie in fragments, of the emulation
# Included for a part that has no mutations.
UNUSED = {"stationary": set(), "streamed": {"box.cuh"}, "wgrad": {"box.cuh"}}
# Only how large a problem may be: these tests have none that is too large.
LIMITS = re.compile(r"const int64_t (?:height = images|span = \(height) .*;\n")

# Faults that are none: a barrier that only keeps the compiler from moving loads across it.
HARMLESS = re.compile(r"if \(i % \d == \d\) warp_barrier\(\);")


@dataclass(frozen=True)
class Mutation:
    """A fault that a switch turns on; numbers from 1."""

    number: int
    file: str
    line: int
    kind: str
    what: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line} {self.kind}: {self.what}"


def blank(text: str) -> str:
    """Comments, strings and directives as spaces: what is left is code at the same places."""
    token = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:[^\n\\]|\\.|\\\n)*', re.S | re.M)
    return token.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)


def closing(code: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at ``opening``."""
    depth = 0
    for i in range(opening, len(code)):
        depth += {"(": 1, ")": -1}.get(code[i], 0)
        if depth == 0:
            return i
    raise ValueError("unbalanced parentheses")


def constants(code: str) -> list[tuple[int, int]]:
    """Spans that are evaluated when compiled: a switch has no effect there."""
    spans = [found.span() for found in re.finditer(r"\bconstexpr\b[^;{(=]*=[^;]*;", code)]
    for found in re.finditer(r"\b(?:static_assert|if constexpr|SK_KERNEL|alignas) ?\(", code):
        spans.append((found.start(), closing(code, found.end() - 1)))
    spans += [found.span() for found in re.finditer(r"\w<[^<>;(){}=]*>", code)]
    spans += [found.span() for found in re.finditer(r"\benum\b[^;]*;", code)]
    return spans


def refusals(code: str) -> list[tuple[int, int]]:
    """Spans that look for bad arguments only: these tests have none."""
    spans = [(found.start(), code.index("\n}", found.end())) for found in re.finditer(r"\bvoid check_\w+\(", code)]
    spans += [found.span() for found in LIMITS.finditer(code)]
    for found in re.finditer(r"\b(?:expect|refuse)\(", code):
        spans.append((found.start(), closing(code, found.end() - 1)))
    return spans


class Source:
    """A source file into which switches are put."""

    def __init__(self, file: str, text: str, first: int, barred: set[tuple[str, int, str]]) -> None:
        self.file, self.text, self.code, self.barred = file, text, blank(text), barred
        self.fixed = constants(self.code) + refusals(self.code)
        self.lines = [0] + [found.end() for found in re.finditer("\n", text)]
        self.mutations: list[Mutation] = []
        self.first = first
        self.inserts: list[tuple[int, int, str]] = []  # place, order at one place, text

    def mutation(self, kind: str, start: int, what: str) -> int | None:
        """Number of a new mutation at ``start``; None where a switch would do nothing or not compile."""
        if any(a <= start < b for a, b in self.fixed):
            return None
        line = bisect.bisect_right(self.lines, start)
        if (self.file, line, kind) in self.barred or HARMLESS.search(self.text.splitlines()[line - 1]):
            return None
        number = self.first + len(self.mutations)
        self.mutations.append(Mutation(number, self.file, line, kind, " ".join(what.split())))
        return number

    def around(self, start: int, end: int, before: str, after: str) -> None:
        """Wrap ``text[start:end]``; of nested pieces the longer one is wrapped outside."""
        self.inserts.append((start, len(self.text) - end, before))
        self.inserts.append((end, -len(self.text) - start, after))

    def instrumented(self) -> str:
        text, parts, at = self.text, [], 0
        for place, _, insert in sorted(self.inserts):
            parts += [text[at:place], insert]
            at = place
        return "".join(parts) + text[at:]

    # -- kinds of mutations

    def synchronization(self) -> None:
        for call, kind in (("barrier", "barrier"), ("warp_barrier", "warp barrier"), ("cp_async_commit", "commit")):
            for found in re.finditer(rf"(?<!\w){call}\(\)(?=;)", self.code):
                if number := self.mutation(f"{kind} removed", found.start(), found.group()):
                    self.around(*found.span(), f"if (sktest::mutated({number})) {{}} else ", "")
        for found in re.finditer(r"\bcp_async_wait<([^;]*)>\(\)(?=;)", self.code):
            pending = found[1]
            removed = self.mutation("wait removed", found.start(), found.group())
            fewer = self.mutation("wait for fewer", found.start(), found.group())
            switch = f"if (sktest::mutated({removed})) {{}} else if (sktest::mutated({fewer})) "
            self.around(*found.span(), f"{switch}cp_async_wait<({pending}) + 1>(); else ", "")

    def names(self) -> None:
        names = "|".join(re.escape(name) for name in sorted(PARTNER, key=len, reverse=True))
        owner = r"(?<![\w.>+&-])((?:\w+(?:\.|->))+|(?=[yx]_))"
        for found in re.finditer(rf"{owner}({names})(?![\w(])(?!\s*[-+*/|&^]?=[^=])(?!\+\+|--)", self.code):
            partner = PARTNER[found[2]]
            if number := self.mutation(f"taken for {partner}", found.start(), found.group()):
                self.around(*found.span(), f"(sktest::mutated({number}) ? {found[1]}{partner} : ", ")")

    def operators(self) -> None:
        for found in re.finditer(r"(?<=[\w\])])\s+(<<|>>|<=|>=|==|!=|[-+*/%&|^<>])(?=\s)", self.code):
            start, end = found.span(1)
            context = self.text[max(0, start - 24) : start] + "[" + found[1] + "]" + self.text[end : end + 24]
            if number := self.mutation(f"operator {found[1]}", start, context):
                self.around(end, end, f"sktest::Operator<'{OPERATORS[found[1]]}'>{{{number}}}{found[1]}", "")

    def maps(self) -> None:
        """Places of elements in fragments, in the emulation's multiply and matrix instructions."""
        for found in re.finditer(r"\[[^\[\]]*\b(?:group|member|inner|outer|row)\b[^\[\]]*\]", self.code):
            place = found.group()[1:-1]
            if number := self.mutation("map", found.start(), place):
                self.around(
                    found.start() + 1, found.end() - 1, f"(sktest::mutated({number}) ? (", f") ^ 1 : ({place}))"
                )

    def conditions(self) -> None:
        for found in re.finditer(r"\bif \(", self.code):
            start, end = found.end(), closing(self.code, found.end() - 1)
            condition = self.text[start:end]
            if re.search(r"[^=!<>]=[^=]", condition):
                continue
            if (never := self.mutation("never", start, condition)) and (
                always := self.mutation("always", start, condition)
            ):
                switch = f"sktest::mutated({always}) || (!sktest::mutated({never}) && ("
                self.around(start, end, switch, "))")


class Mutants:
    """An executable of one family with mutations built in.

    Args:
        family: stationary, streamed or wgrad.
        folder: for copies of the sources and the executable; one per object.
        what: "faults" of synchronization and names and, of one family, of places within fragments; "survey", every
            operator and condition of the kernels; "maps", every operator in the emulation's multiply and matrix
            instructions, which kernels must disagree with.
    """

    def __init__(self, family: str, folder: Path, *, what: str = "faults") -> None:
        self.family, self.what = family, what
        self.program = folder / "mutants"
        self.copies = folder / "sources"
        self.copies.mkdir()
        for path in [*KERNELS.iterdir(), *EMULATION.glob("*.h"), *EMULATION.glob("mutants_*.cpp")]:
            shutil.copy(path, self.copies)
        files = [] if what == "maps" else self._included()
        # One family notices every wrong place: its kernels use both kinds of matrix loads.
        if what == "maps" or (what == "faults" and family == "stationary"):
            files.append(MAPS)
        self.originals = {file: (self.copies / file).read_text() for file in files}
        # A name whose partner another struct lacks does not compile: what the compiler refuses is left out.
        barred: set[tuple[str, int, str]] = set()
        while refused := self._build(barred):
            barred |= refused

    def _included(self) -> list[str]:
        """Names of the files that the family's kernels are written in: its own and what they include."""
        skip = {"primitives.cuh", "launch.cuh", "problem.h"} | UNUSED[self.family]
        names, todo = set(), {f"{self.family}.cpp", f"{self.family}.cuh"}
        while todo:
            name = todo.pop()
            names.add(name)
            included = re.findall(r'^#include "([\w.]+)"', (self.copies / name).read_text(), re.M)
            todo |= set(included) - names - skip
        return sorted(names)

    def _build(self, barred: set[tuple[str, int, str]]) -> set[tuple[str, int, str]]:
        """File, line and kind of the mutations that do not compile; none when the executable is there."""
        self.mutations: list[Mutation] = []
        for file, text in self.originals.items():
            source = Source(file, text, len(self.mutations) + 1, barred)
            if self.what == "faults" and file == MAPS:
                source.maps()
            elif self.what == "faults":
                source.synchronization()
                source.names()
            else:
                source.operators()
                source.conditions()
            (self.copies / file).write_text(source.instrumented())
            self.mutations += source.mutations
        flags = ["-std=c++17", "-O1", "-w", "-fsanitize=address", "-Wno-narrowing", "-fmax-errors=0", "-DSK_EMULATE"]
        flags += [f"-I{self.copies}", "-include", str(self.copies / "mutation.h")]
        command = [str(COMPILER), *flags, str(self.copies / f"mutants_{self.family}.cpp"), "-o", str(self.program)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode == 0:
            return set()
        errors = re.findall(r"([\w.]+):(\d+):\d+: error: (.*)", built.stderr)
        at_fault = {
            (a.file, a.line, a.kind)
            for file, line, message in errors
            for a in self.mutations
            if (a.file, a.line) == (file, int(line)) and a.kind.startswith(("taken for", "operator"))
            if a.kind.rpartition(" ")[2].strip("()") in message or "no member" not in message
        }
        if not at_fault:
            raise RuntimeError(f"{' '.join(command)}\n{built.stderr[:4000]}")
        return at_fault

    def run(self, number: int) -> str:
        """How the mutation shows: the first complaint, "" where there is none. 0: no mutation."""
        environment = os.environ | {"SK_MUTATION": str(number)}
        limit = TIMEOUT if number else 10 * TIMEOUT
        try:
            done = subprocess.run([self.program], env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return "timed out"
        if done.returncode == 0:
            return ""
        return done.stdout.partition("\n")[0] or f"exit status {done.returncode}"

    def survivors(self, chosen: list[Mutation], *, jobs: int = 1, verbose: bool = False) -> list[Mutation]:
        """Those of ``chosen`` that show in nothing."""
        out = []
        with ThreadPoolExecutor(jobs) as pool:
            for mutation, complaint in zip(chosen, pool.map(lambda a: self.run(a.number), chosen), strict=True):
                if not complaint:
                    out.append(mutation)
                if verbose or not complaint:
                    print(f"{mutation.name}\n    {complaint or 'SURVIVES'}", flush=True)
        return out


def sample(mutations: list[Mutation]) -> list[Mutation]:
    """Every fault of synchronization, the first of each kind of swapped names, one wrong place per line of the maps."""
    seen: set[str] = set()
    out = []
    for mutation in mutations:
        kind = f"{mutation.kind} {mutation.line}" if mutation.kind == "map" else mutation.kind
        if kind not in seen or not kind.startswith(("taken for", "map")):
            out.append(mutation)
        seen.add(kind)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--what", choices=("faults", "survey", "maps"), default="faults")
    parser.add_argument("--sample", action="store_true", help="those of the suite that is not slow")
    parser.add_argument("--only", default="", help="part of a mutation's name")
    parser.add_argument("--verbose", action="store_true", help="print how each one shows")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        mutants = Mutants(given.family, Path(folder), what=given.what)
        built = time.monotonic()
        if complaint := mutants.run(0):
            print(f"without a mutation: {complaint}")
            return 2
        chosen = [mutation for mutation in mutants.mutations if given.only in mutation.name]
        chosen = sample(chosen) if given.sample else chosen
        print(f"built in {built - start:.1f} s, one run in {time.monotonic() - built:.2f} s, {len(chosen)} mutations")
        survivors = mutants.survivors(chosen, jobs=given.jobs, verbose=given.verbose)
        print(f"{len(chosen) - len(survivors)} noticed, {len(survivors)} survive, {time.monotonic() - start:.0f} s")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
