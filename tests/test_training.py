"""Configuration, schedules, parameter groups, the loop, timing and the comparison of three nets."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.data import DataError
from sparsekern.training import (
    ConfigError,
    DivergedError,
    Interrupted,
    TrainConfig,
    compare,
    load_model,
    read_result,
    schedule,
    time_steps,
    train,
)
from sparsekern.training import comparison as comparison_module
from sparsekern.training.comparison import markdown_table, rich_table
from sparsekern.training.config import load_yaml, save_yaml
from sparsekern.training.memory import training_memory
from sparsekern.training.metrics import read_metrics
from sparsekern.training.optim import make_optimizer, parameter_groups
from sparsekern.training.progress import Reporter
from sparsekern.training.step import Step
from sparsekern.training.task import load_task

TINY = TrainConfig(model="mlp-32", sparsity=0, epochs=2, subset=200, batch_size=50, threads=1)
SPARSE = TrainConfig(
    model="mlp-64-64", block=8, below_break_even="sparse", epochs=2, subset=200, batch_size=50, threads=1
)


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "many"}, "epochs: expected a whole number, got 'many'"),
        ({"epochs": 2.5}, "epochs: expected a whole number, got 2.5"),
        ({"lr": "nan"}, "lr: expected a number, got 'nan'"),
        ({"lr": -1}, "lr: expected a value at least 0, got -1"),
        ({"sparsity": 1.0}, "sparsity: expected a value at least 0 and below 1, got 1"),
        ({"amp": "yes"}, "amp: expected true or false, got 'yes'"),
        ({"optimizer": "adam"}, "did you mean adamw"),
        ({"augment": "crop,rotate"}, "augment: expected one of crop, flip, got 'rotate'"),
        ({"milestones": [0.5, 2]}, "milestones: expected a value at least 0 and at most 1, got 2"),
        ({"block": "16x"}, "block: expected auto"),
        ({"block": 256}, "block: expected sizes within 1..128, got 256"),
        ({"override": ["head"]}, "override: expected GLOB=SPARSITY, got 'head'"),
        ({"override": {"head": 1.0}}, "override head: expected a value"),
        ({"epochs": 0}, "epochs: expected 1 or more"),
        ({"optimizer": "adamw", "nesterov": True}, "nesterov: needs optimizer sgd"),
        ({"device": "gpu"}, "device: expected auto, cpu or"),
        ({"width": 0}, "width: expected a factor above 0"),
        ({"threds": 1}, "unknown key 'threds'; did you mean threads"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_values_take_the_forms_of_yaml_and_of_the_command_line() -> None:
    config = TrainConfig(
        epochs="3", lr="0.5", augment="crop, flip", milestones=["0.25,0.5"], block=(16, 32), override=["a.*=0.5", "b=0"]
    )  # type: ignore[arg-type]
    assert (config.epochs, config.lr, config.augment, config.milestones) == (3, 0.5, ("crop", "flip"), (0.25, 0.5))
    assert config.block == "16x32" and config.block_value == (16, 32)
    assert config.override == {"a.*": 0.5, "b": 0.0}
    assert TrainConfig(block=16).block_value == 16 and TrainConfig().block_value == "auto"  # type: ignore[arg-type]


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = TrainConfig(augment=("crop",), override={"head": 0.5}, block="16x8", lr=3e-4, data_dir="/data")
    save_yaml(config, tmp_path / "c.yaml")
    again = TrainConfig(**load_yaml(tmp_path / "c.yaml"))
    assert again == config and again.digest() == config.digest() and again.differences(config) == []
    other = dataclasses.replace(config, seed=1, data_dir="/elsewhere")
    assert config.differences(other) == ["seed"] and other.digest() != config.digest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: [1", "not valid YAML"),
        ("- epochs", "expected a mapping"),
        ("epoch: 3", "unknown key 'epoch'; did you mean epochs"),
    ],
)
def test_a_bad_file_is_named_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_may_spell_options_as_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("batch-size: 7\n")
    assert load_yaml(tmp_path / "c.yaml") == {"batch_size": 7}


# -- schedules and optimizers ------------------------------------------------------------------------------------------


def test_schedules_by_formula() -> None:
    total, warmup = 100, 10
    step = schedule("step", total, milestones=(0.5, 0.75), gamma=0.1)
    assert [step(s) for s in (0, 49, 50, 74, 75, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = schedule("cosine", total, warmup=warmup)
    linear = schedule("linear", total, warmup=warmup)
    constant = schedule("constant", total, warmup=warmup)
    for s in range(total):
        ramp = (s + 1) / warmup
        along = (s - warmup) / (total - warmup)
        assert cosine(s) == pytest.approx(ramp if s < warmup else (1 + math.cos(math.pi * along)) / 2)
        assert linear(s) == pytest.approx(ramp if s < warmup else 1 - along)
        assert constant(s) == pytest.approx(min(1.0, ramp))
    with pytest.raises(ValueError, match="expected one of step, cosine"):
        schedule("exponential", total)


def test_the_rate_in_the_metrics_follows_the_schedule(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, schedule="cosine", lr=0.2, warmup=0.5, log_every=1)
    train(config, tmp_path)
    rates = [line["lr"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "interval"]
    factor = schedule("cosine", 8, warmup=2)
    assert rates == pytest.approx([0.2 * factor(s) for s in range(8)])


def test_norms_and_biases_are_not_decayed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), sk.SparseLinear(64, 32, sparsity=0.5))
    decayed, free = parameter_groups(model, 0.1)
    assert [p.ndim for p in decayed["params"]] == [4, 3] and decayed["weight_decay"] == 0.1
    assert [p.ndim for p in free["params"]] == [1, 1, 1, 1] and free["weight_decay"] == 0.0
    (everything,) = parameter_groups(model, 0.1, decay_norm_bias=True)
    assert len(everything["params"]) == 6


def test_optimizers_take_the_configured_values() -> None:
    model = nn.Linear(4, 4)
    sgd = make_optimizer(model, TrainConfig(lr=0.3, momentum=0.5, nesterov=True))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.3, 0.5, True)
    adamw = make_optimizer(model, TrainConfig(optimizer="adamw", momentum=0.8))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["lr"], adamw.defaults["betas"]) == (1e-3, (0.8, 0.999))


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_a_step_is_the_step_of_the_textbook() -> None:
    config = TrainConfig(lr=0.1, momentum=0.0, weight_decay=0.0, label_smoothing=0.1)
    model = nn.Linear(6, 3)
    weight, bias = (p.detach().clone() for p in model.parameters())
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    out = Step(model, make_optimizer(model, config), config)(x, y)
    target = torch.full((5, 3), 0.1 / 3).scatter(1, y[:, None], 0.9 + 0.1 / 3)
    logits = x @ weight.t() + bias
    error = (logits.softmax(1) - target) / 5
    torch.testing.assert_close(out.logits, logits)
    torch.testing.assert_close(out.loss, -(target * logits.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(model.weight.detach(), weight - 0.1 * error.t() @ x)
    torch.testing.assert_close(model.bias.detach(), bias - 0.1 * error.sum(0))
    assert model.weight.grad is None
    # No topology: nothing is spent on it.
    assert min(out.seconds[:3]) > 0 and out.seconds[3] == 0 and out.update is None


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_run_learns_and_leaves_its_folder(sparse: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(
        SPARSE if sparse else TINY, epochs=6, subset=0, rescale=sparse, sparsity=0.8 if sparse else 0.0
    )
    result = train(config, tmp_path / "run")
    assert result.test_acc is not None and result.test_acc > 0.7
    names = {p.name for p in (tmp_path / "run").iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "curves.png", "result.json", "model.pt", "checkpoints"}
    assert names == expected | ({"plan.json"} if sparse else set())
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    epochs = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1]["test_acc"] == result.test_acc and epochs[0]["train_loss"] > epochs[-1]["train_loss"]
    saved = read_result(tmp_path / "run")
    assert saved is not None and saved.to_dict() == result.to_dict()
    # The saved model is the trained one, sparse layers included.
    model = load_model(tmp_path / "run")
    assert (
        sum(isinstance(m, sk.SparseLinear) for m in model.modules()) == (2 if sparse else 0) == result.layers["sparse"]
    )
    correct = total = 0
    for x, y in load_task(config).test:
        correct, total = correct + int((model(x).argmax(1) == y).sum()), total + len(y)
    assert correct / total == result.test_acc


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = train(TINY), train(TINY)
    assert list(tmp_path.iterdir()) == []
    assert first.model is not None and second.model is not None
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = train(dataclasses.replace(TINY, seed=1))
    assert other.test_loss != first.test_loss


def test_a_sparse_run_counts_stored_weights_only() -> None:
    sparse, dense = train(SPARSE), train(dataclasses.replace(SPARSE, sparsity=0))
    assert sparse.model is not None
    stored = sum(int(m.mask.sum()) for m in sparse.model.modules() if isinstance(m, sk.SparseLinear))
    rest = 64 + 64 + 10 * 64 + 10
    assert sparse.params == stored + rest and sparse.macs == stored + 640
    assert dense.params == 2 * 64 * 64 + rest and dense.macs == 2 * 64 * 64 + 640


def test_tests_as_often_as_asked(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, epochs=5, eval_every=2, test_subset=100)
    assert len(load_task(config).test.split) == 100
    result = train(config, tmp_path)
    epochs = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "epoch"]
    assert ["test_acc" in line for line in epochs] == [False, True, False, True, True]
    assert result.test_acc == epochs[-1]["test_acc"]


def test_validation_and_the_best_epoch(tmp_path: Path) -> None:
    result = train(dataclasses.replace(TINY, subset=0, val_split=0.2, epochs=3), tmp_path)
    epochs = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "epoch"]
    best = max(epochs, key=lambda line: line["val_acc"])  # the first of equals, as in the loop
    assert (result.best_val_acc, result.test_acc_at_best_val) == (best["val_acc"], best["test_acc"])
    assert result.val_acc == epochs[-1]["val_acc"]


@pytest.mark.parametrize(
    "changes",
    [
        {"amp": True},
        {"model": "resnet20", "width": 0.25, "channels_last": True, "steps": 2, "augment": "crop,flip"},
        {"optimizer": "adamw", "clip_norm": 0.1, "label_smoothing": 0.1, "label_noise": 0.3},
        {"sparsity": 0.5, "allocation": "snip", "block": 4, "below_break_even": "sparse", "steps": 2},
        {"sparsity": 0.5, "budget": "macs", "block": 4, "override": {"layers.0": 0.25}, "below_break_even": "masked"},
    ],
    ids=["amp", "channels-last", "adamw", "snip", "macs-override"],
)
def test_options_train(changes: dict[str, Any]) -> None:
    result = train(dataclasses.replace(TINY, **changes))
    assert result.train_loss is not None and math.isfinite(result.train_loss)


def test_a_diverging_loss_is_one_error() -> None:
    with pytest.raises(DivergedError, match="lower the learning rate"):
        train(dataclasses.replace(TINY, lr=1e30, weight_decay=0, log_every=1))


def test_mistakes_leave_no_folder(tmp_path: Path) -> None:
    for changes in ({"model": "mpl"}, {"subset": 10**6}, {"data": "mnist", "data_dir": str(tmp_path / "absent")}):
        with pytest.raises((ConfigError, DataError)):
            train(dataclasses.replace(TINY, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- timing, memory, comparison ----------------------------------------------------------------------------------------


def test_timing_leaves_the_weights_alone() -> None:
    torch.manual_seed(0)
    nets = {name: (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), TINY) for name in ("a", "b")}
    before = [p.clone() for model, _ in nets.values() for p in model.parameters()]
    batches = [(torch.randn(20, 1, 8, 8), torch.randint(10, (20,))) for _ in range(2)]
    times = time_steps(nets, batches, rounds=4, round_seconds=0.001)
    after = [p for model, _ in nets.values() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert times["a"].speedup == 1.0 and times["b"].speedup > 0
    for time in times.values():
        assert time.rounds == 4 and time.steps >= 1 and time.low <= time.total <= time.high
        assert 0 < max(time.forward, time.backward, time.optimizer) <= time.high
    with pytest.raises(ValueError, match="3 or more"):
        time_steps(nets, batches, rounds=2)


def test_memory_counts_what_training_keeps(tmp_path: Path) -> None:
    train(dataclasses.replace(SPARSE, optimizer="adamw"), tmp_path / "sparse")
    counted = training_memory(tmp_path / "sparse")
    result = read_result(tmp_path / "sparse")
    assert result is not None
    assert counted["gradients"] == 4 * result.params
    assert 2 * counted["gradients"] <= counted["optimizer"] <= 2 * counted["gradients"] + 100  # step counters
    # Saved for backward: inputs of three layers, at the very least.
    assert counted["saved"] >= 4 * 50 * (64 + 64 + 64)
    assert counted["peak"] is None or counted["peak"] > 0


class StopIn(Reporter):
    """Raises in the middle of the net ``label``."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.lines: list[str] = []

    def start(self, title: str, total: int, done: int) -> None:
        if title == self.label:
            raise Interrupted("test", None, 2)

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_comparison_resumes_and_ends_with_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process: tests/test_cli.py measures in processes of their own.
    monkeypatch.setattr(comparison_module, "measure_memory", training_memory)
    with pytest.raises(Interrupted, match=f"--out {tmp_path} --resume"):
        compare(SPARSE, tmp_path, reporter=StopIn("small"), rounds=3)
    stamp = (tmp_path / "dense" / "model.pt").stat().st_mtime_ns
    reporter = StopIn("")
    comparison = compare(SPARSE, tmp_path, resume=True, reporter=reporter, rounds=3)
    assert "dense: already finished" in reporter.lines
    assert (tmp_path / "dense" / "model.pt").stat().st_mtime_ns == stamp
    dense, small, sparse = (comparison.results[name] for name in ("dense", "small", "sparse"))
    assert small.macs == pytest.approx(sparse.macs, rel=0.05) and sparse.macs < dense.macs / 4
    assert sparse.layers == {"sparse": 2, "dense": 1, "masked": 0} and small.layers["dense"] == 3
    assert small.config.width == comparison.width < 1
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert saved["nets"]["sparse"]["time"]["rounds"] == 3
    assert saved["nets"]["dense"]["memory"]["weights"] == 4 * dense.params
    table = (tmp_path / "table.md").read_text()
    assert table == markdown_table(comparison)
    for row in ("test accuracy", "MACs per sample", "backward", "speedup", "peak training memory", "2/0/1"):
        assert row in table
    assert (tmp_path / "curves.png").exists()
    from rich.console import Console

    console = Console(width=100, file=io.StringIO())
    with console.capture() as shown_by:
        console.print(rich_table(comparison))
    shown = shown_by.get()
    assert "training step [ms]" in shown and f"{sparse.params:,}" in shown
    again = compare(SPARSE, tmp_path, resume=True)
    assert again.to_dict() == comparison.to_dict()
    with pytest.raises(ConfigError, match="seed"):
        compare(dataclasses.replace(SPARSE, seed=5), tmp_path, resume=True)


def test_comparison_needs_sparsity(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sparsity above 0"):
        compare(TINY, tmp_path)
