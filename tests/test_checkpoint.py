"""Checkpoints: atomic, two kept, damaged ones named, nothing executed on load; resuming is exact to the bit."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekern.cli import main
from sparsekern.training import CheckpointError, ConfigError, Interrupted, TrainConfig, train
from sparsekern.training.checkpoint import (
    checkpoint_files,
    load_checkpoint,
    load_newest,
    rng_state,
    save_checkpoint,
    set_rng_state,
    write_atomic,
)
from sparsekern.training.metrics import MetricsLog, read_metrics
from sparsekern.training.progress import Reporter

SPARSE_MLP = TrainConfig(
    model="mlp-64-64", block=8, below_break_even="sparse", steps=40, batch_size=100, log_every=1, checkpoint_every=7,
    augment="flip", optimizer="adamw", schedule="cosine", threads=1,
)  # fmt: skip


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_checkpoint(folder / "model.pt")["model"]
    return state


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def without_times(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "step_ms")} for line in read_metrics(path)]


class At(Reporter):
    """Does something after one step (needs log_every=1)."""

    def __init__(self, step: int, signal_number: int) -> None:
        self.at, self.signal_number, self.warnings = step, signal_number, list[str]()

    def step(self, step: int, loss: float, accuracy: float, rate: float) -> None:
        if step == self.at:
            os.kill(os.getpid(), self.signal_number)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


# -- files -------------------------------------------------------------------------------------------------------------


def test_keeps_the_last_two(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, step, {"x": torch.ones(2)})
    assert [p.name for p in checkpoint_files(tmp_path)] == ["step-000000015.pt", "step-000000010.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000010.pt", "step-000000015.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "step-000000001.pt"
    write_atomic(path, {"format": 1, "step": 1})
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        write_atomic(path, {"format": 1, "cannot": lambda: None})
    assert load_checkpoint(path)["step"] == 1


def test_truncated_newest_falls_back_with_a_warning(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.arange(1000)})
    newest = checkpoint_files(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[:-500])
    warnings: list[str] = []
    state = load_newest(tmp_path, warnings.append)
    assert state is not None and state["step"] == 1
    assert len(warnings) == 1 and "step-000000002.pt is truncated" in warnings[0]


def test_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"x": torch.zeros(1000)})
    data = bytearray(path.read_bytes())
    data[data.index(bytes(400)) + 200] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="CRC"):
        load_checkpoint(path)


def test_nothing_readable_is_one_error(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {}).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="--overwrite") as caught:
        load_newest(tmp_path, lambda text: None)
    assert "\n" not in str(caught.value)
    assert load_newest(tmp_path / "absent", lambda text: None) is None


class Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path, target = tmp_path / "step-000000001.pt", tmp_path / "executed"
    torch.save({"format": 1, "x": Malicious(str(target))}, path)
    with pytest.raises(CheckpointError, match="refused"):
        load_checkpoint(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the attack itself works
    assert target.exists()


def test_rng_state_survives(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"rng": rng_state()})
    expected = random.random(), np.random.rand(), torch.rand(3)
    set_rng_state(load_checkpoint(path)["rng"])
    assert (random.random(), np.random.rand()) == expected[:2]
    assert torch.equal(torch.rand(3), expected[2])


def test_metrics_are_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("interval", step=1, loss=float("nan"))
    offset = log.sync()
    log.write("interval", step=2)
    log.close()
    with open(path, "ab") as file:
        file.write(b'{"kind": "inter')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    log = MetricsLog(path, offset)
    log.write("interval", step=3)
    log.close()
    assert [(line["step"], line.get("loss")) for line in read_metrics(path)] == [(1, None), (3, None)]


# -- resuming ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from tests.test_checkpoint import At
from sparsekern.training import TrainConfig, train
train(TrainConfig.from_dict({config!r}), {out!r}, reporter=At(25, signal.SIGKILL))
"""


def test_kill_9_in_mid_epoch_and_resume_is_bit_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(SPARSE_MLP, tmp_path / "whole")
    assert whole.layers["sparse"] == 2
    root = str(Path(__file__).resolve().parents[1])
    code = KILLED.format(path=[root], config=SPARSE_MLP.to_dict(), out=str(tmp_path / "killed"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed" / "result.json").exists()
    # 15 steps an epoch: step 21 lies within the second, and lines up to step 25 were written after it.
    assert checkpoint_files(tmp_path / "killed" / "checkpoints")[0].name == "step-000000021.pt"
    assert read_metrics(tmp_path / "killed" / "metrics.jsonl")[-1]["step"] >= 24
    assert main(["train", "--out", str(tmp_path / "killed"), "--resume", "--quiet"]) == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    expected = without_times(tmp_path / "whole" / "metrics.jsonl")
    assert without_times(tmp_path / "killed" / "metrics.jsonl") == expected
    assert [line["step"] for line in expected if line["kind"] == "interval"] == list(range(1, 41))
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(model="resnet20", width=0.5, block=4, below_break_even="sparse", steps=9, subset=64, batch_size=10,
                    log_every=1, augment="crop", threads=1),
        TrainConfig(model="mlp-40-30", block="16x8", sparsity=0.5, below_break_even="masked", steps=9, batch_size=300,
                    log_every=1, optimizer="sgd", nesterov=True, val_split=0.1, label_noise=0.2, threads=1),
        TrainConfig(model="vit-tiny-p4", width=0.1, sparsity=0, steps=5, subset=50, batch_size=25, log_every=1,
                    threads=1),
    ],
    ids=["conv", "masked", "dense-vit"],
)  # fmt: skip
def test_interrupt_saves_and_resume_is_bit_exact(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted, match=r"stopped at step 4 of .*--resume"):
        train(config, tmp_path / "stopped", reporter=At(4, signal.SIGINT))
    result = train(config, tmp_path / "stopped", resume=True)
    assert result.resumed_from == 4
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    assert without_times(tmp_path / "whole" / "metrics.jsonl") == without_times(tmp_path / "stopped" / "metrics.jsonl")


def test_resume_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    config = TrainConfig(
        model="mlp-16", sparsity=0, steps=9, subset=60, batch_size=20, log_every=1, augment="flip", threads=1
    )
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "stopped", reporter=At(6, signal.SIGINT))
    train(config, tmp_path / "stopped", resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    assert without_times(tmp_path / "whole" / "metrics.jsonl") == without_times(tmp_path / "stopped" / "metrics.jsonl")


def test_resume_survives_a_truncated_newest_checkpoint(tmp_path: Path) -> None:
    config = TrainConfig(
        model="mlp-16", sparsity=0, steps=12, subset=60, batch_size=20, checkpoint_every=2, log_every=1, threads=1
    )
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", reporter=At(7, signal.SIGTERM))
    newest, older = checkpoint_files(tmp_path / "run" / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:300])
    reporter = At(-1, 0)
    result = train(config, tmp_path / "run", resume=True, reporter=reporter)
    assert result.resumed_from == 6 and len(reporter.warnings) == 1
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    older.unlink(missing_ok=True)


def test_resume_with_another_configuration_names_the_keys(tmp_path: Path) -> None:
    config = TrainConfig(model="mlp-16", sparsity=0, threads=1, steps=4, subset=40, batch_size=20, log_every=1)
    with pytest.raises(Interrupted):
        train(config, tmp_path, reporter=At(2, signal.SIGINT))
    changed = TrainConfig.from_dict({**config.to_dict(), "lr": 0.3, "seed": 7, "checkpoint_every": 1})
    with pytest.raises(ConfigError, match=r"lr \(saved 0.0, now 0.3\), seed \(saved 0, now 7\)") as caught:
        train(changed, tmp_path, resume=True)
    assert "checkpoint_every" not in str(caught.value)
    # Operational values may change.
    assert train(TrainConfig.from_dict({**config.to_dict(), "checkpoint_every": 1}), tmp_path, resume=True).steps == 4


def test_a_finished_run_is_returned(tmp_path: Path) -> None:
    config = TrainConfig(model="mlp-16", sparsity=0, threads=1, steps=3, subset=40, batch_size=20)
    first = train(config, tmp_path)
    before = (tmp_path / "model.pt").stat().st_mtime_ns
    again = train(config, tmp_path, resume=True)
    assert again.test_acc == first.test_acc and again.steps == 3
    assert (tmp_path / "model.pt").stat().st_mtime_ns == before


def test_a_folder_in_use_is_not_touched(tmp_path: Path) -> None:
    config = TrainConfig(model="mlp-16", sparsity=0, threads=1, steps=3, subset=40, batch_size=20)
    train(config, tmp_path)
    with pytest.raises(ConfigError, match="--resume, replace it with --overwrite"):
        train(config, tmp_path)
    (tmp_path / "mine.txt").write_text("keep")
    train(config, tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "keep"
    # Both epochs and their last lines once: the earlier run's lines are gone.
    assert [line["kind"] for line in read_metrics(tmp_path / "metrics.jsonl")] == ["interval", "epoch"] * 2
