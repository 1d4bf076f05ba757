"""The comparison of what primitives do on a GPU with what they do in the emulation."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "emulation"
SPEC = importlib.util.spec_from_file_location("compare_primitives", FOLDER / "compare_primitives.py")
assert SPEC is not None and SPEC.loader is not None
compare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare)


@pytest.fixture
def recorded():
    return json.loads((FOLDER / "primitives.json").read_text())


def lists(results):
    return [name for name in results if name not in ("source", "note")]


def test_equal_files_agree(recorded, capsys):
    assert compare.main([str(FOLDER / "primitives.json")]) == 0
    assert "agree" in capsys.readouterr().out


def test_every_list_is_compared(recorded, tmp_path, capsys):
    for name in lists(recorded):
        changed = {**recorded, name: [recorded[name][0] ^ 0x00400000, *recorded[name][1:]]}
        found = compare.differences(changed, recorded)
        assert len(found) == 1 and found[0].startswith(f"{name}: 1 of {len(recorded[name])} differ"), name
        missing = {key: value for key, value in recorded.items() if key != name}
        assert compare.differences(missing, recorded)[0].startswith(f"{name}: expected the same list")
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(changed))
    assert compare.main([str(path)]) == 1
    assert "differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "one", "other", "same"),
    [
        ("words_x", 0x7FC00000, 0x7FFFFFFF, False),
        ("float_x", 0x7FC00000, 0x7FFFFFFF, True),  # NaNs
        ("float_x", 0x7F800000, 0x7FC00000, False),  # infinity and NaN
        ("float_x", 0x00000000, 0x80000000, False),  # zeros of either sign
        ("pairs_x", 0x7FFF3C00, 0x7FC03C00, True),
        ("pairs_x", 0x7FFF3C00, 0x7FC03C01, False),
        ("near_x", 0x42800000, 0x42800002, True),  # 64 and 64 + 2**-16
        ("near_x", 0x42800000, 0x42800010, False),  # and 64 + 2**-13
        ("near_x", 0x7FC00000, 0x7FC00000, False),  # these sums are numbers
    ],
)
def test_kinds_of_equality(name, one, other, same):
    assert bool(compare.differences({name: [one]}, {name: [other]})) != same
