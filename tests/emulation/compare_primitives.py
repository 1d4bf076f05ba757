"""Compares what the primitives gave on a GPU with what they give in the emulation.

    python compare_primitives.py GPU.json [EMULATION.json]

Both files come from primitives_gpu.cu. Exits with 1 and the differences where there are any.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path

EMULATION = Path(__file__).with_name("primitives.json")


def fp32(word: int) -> float:
    return struct.unpack("<f", struct.pack("<I", word))[0]


def same_word(a: int, b: int) -> bool:
    return a == b


def same_float(a: int, b: int) -> bool:
    """Equal bits, or both NaN."""
    return a == b or (math.isnan(fp32(a)) and math.isnan(fp32(b)))


def same_pair(a: int, b: int) -> bool:
    """Two 16-bit numbers with equal bits; the pairs of a NaN hold 0x7fff or another quiet NaN on both sides."""

    def nan(half: int) -> bool:
        return half & 0x7FFF in (0x7FFF, 0x7FC0, 0x7E00)

    return all(x == y or (nan(x) and nan(y)) for x, y in ((a & 0xFFFF, b & 0xFFFF), (a >> 16, b >> 16)))


def near(a: int, b: int) -> bool:
    """Sums below 128 in fp32, in any order of additions, each of which may truncate (up to 2**-17 a time)."""
    return abs(fp32(a) - fp32(b)) <= 2.0**-15


SAME: dict[str, Callable[[int, int], bool]] = {
    "words": same_word,
    "float": same_float,
    "pairs": same_pair,
    "near": near,
}


def differences(one: dict, other: dict) -> list[str]:
    found = []
    lists = {name for name in one.keys() | other.keys() if name not in ("source", "note")}
    for name in sorted(lists):
        a, b = one.get(name), other.get(name)
        if a is None or b is None or len(a) != len(b):
            found.append(f"{name}: expected the same list in both files, got lengths {a and len(a)} and {b and len(b)}")
            continue
        same = SAME[name.split("_")[0]]
        wrong = [i for i in range(len(a)) if not same(a[i], b[i])]
        if wrong:
            first = wrong[0]
            found.append(f"{name}: {len(wrong)} of {len(a)} differ, first [{first}]: {a[first]:#x} and {b[first]:#x}")
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) not in (1, 2):
        print(__doc__)
        return 2
    one = json.loads(Path(arguments[0]).read_text())
    other = json.loads(Path(arguments[1] if len(arguments) == 2 else EMULATION).read_text())
    found = differences(one, other)
    print(f"{one['source']} and {other['source']}: {'differ' if found else 'agree'}")
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
