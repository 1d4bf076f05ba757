"""Dynamic sparse training in the loop: killed runs resume to the bit, metrics tell R_s, options are checked."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import cost
from sparsekern.cli import main
from sparsekern.training import Callback, ConfigError, Interrupted, TrainConfig, load_model, sparse_lr_factor, train
from sparsekern.training.checkpoint import checkpoint_files, load_checkpoint
from sparsekern.training.curves import plot_curves
from sparsekern.training.metrics import read_metrics
from sparsekern.training.network import build_network
from sparsekern.training.progress import Reporter
from sparsekern.training.step import Step
from sparsekern.training.task import load_task
from tests.test_checkpoint import At, assert_same, weights, without_times

BASE = TrainConfig(
    model="mlp-64-64", block=8, below_break_even="sparse", sparsity=0.7, steps=45, batch_size=100, log_every=1,
    checkpoint_every=7, update_every=5, stop_fraction=0.9, schedule="cosine", threads=1, method="set",
)  # fmt: skip

# Updates follow every fifth step, checkpoints every seventh: a run killed after step 26 goes back to step 21.
METHODS = {
    "set": {},
    "rigl": {"method": "rigl", "optimizer": "adamw"},
    "rigl-exact": {"method": "rigl", "exact": True, "clip_norm": 1.0},
    "srigl": {"method": "srigl", "pattern": "fan_in"},
    "snfs": {"method": "snfs", "capacity": 2.0},
    "dsr": {"method": "dsr", "capacity": 2.0, "threshold": 0.1, "optimizer": "adamw"},
    # Freed after the updates of step 10, of 25 between checkpoint and kill, and of 35 after the kill.
    "gradual": {
        "method": "gradual",
        "compact_at": (0.5, 0.9, 0.99),
        "sparse_below": 0.4,
        "clip_norm": 1.0,
        "sparse_lr": True,
    },
}


def config_of(name: str, **changes: Any) -> TrainConfig:
    return dataclasses.replace(BASE, **{**METHODS[name], **changes})


def last_checkpoint(folder: Path) -> dict[str, Any]:
    return load_checkpoint(checkpoint_files(folder / "checkpoints")[0])


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested containers as {path: leaf}."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        return {name: value}
    return {key: leaf for k, entry in items for key, leaf in flat(entry, f"{name}.{k}").items()}


def assert_ended_alike(whole: Path, resumed: Path) -> None:
    """Weights, layouts, optimizer state, explored blocks, result and metrics agree to the bit."""
    assert_same(weights(whole), weights(resumed))
    a, b = last_checkpoint(whole), last_checkpoint(resumed)
    for part in ("optimizer", "topology"):
        mine, other = flat(a[part]), flat(b[part])
        assert mine.keys() == other.keys()
        for key, leaf in mine.items():
            same = torch.equal(leaf, other[key]) if isinstance(leaf, Tensor) else leaf == other[key]
            assert same, f"{part}{key}"
    for name in digests(whole):
        assert digests(whole)[name] == digests(resumed)[name]
    assert without_times(whole / "metrics.jsonl") == without_times(resumed / "metrics.jsonl")
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, resumed)]
    for key in ("exploration_rate", "exploration", "reliably_explored", "updates", "params", "macs", "test_acc"):
        assert results[0][key] == results[1][key], key


def digests(folder: Path) -> dict[str, str]:
    model = load_model(folder)
    return {name: m.layout.digest() for name, m in model.named_modules() if isinstance(m, sk.SparseLinear)}


# -- resuming ----------------------------------------------------------------------------------------------------------

# One process imports everything, then a fork of it trains each net and kills itself in the middle.
KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}]
from tests.test_checkpoint import At
from sparsekern.training import TrainConfig, train
train(TrainConfig.from_dict({{**{runs!r}[0][0], "steps": 6}}))  # imports what is imported on first use
for config, out in {runs!r}:
    child = os.fork()
    if child == 0:
        train(TrainConfig.from_dict(config), out, reporter=At(26, signal.SIGKILL))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, out
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every method that was killed after step 26."""
    folder = tmp_path_factory.mktemp("killed")
    root = str(Path(__file__).resolve().parents[1])
    runs = [(config_of(name).to_dict(), str(folder / name)) for name in METHODS]
    code = KILLED.format(root=root, runs=runs)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_kill_9_and_resume_is_bit_exact(name: str, killed: Path, tmp_path: Path) -> None:
    result = train(config_of(name), tmp_path)
    assert result.layers["sparse"] == 2 and result.updates == 8
    folder = killed / name
    assert not (folder / "result.json").exists()
    assert checkpoint_files(folder / "checkpoints")[0].name == "step-000000021.pt"
    # An update was made and written between the checkpoint and the kill.
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "update"][-1] == 25
    assert main(["train", "--out", str(folder), "--resume", "--quiet"]) == 0
    assert_ended_alike(tmp_path, folder)
    # Something was there to go wrong: blocks moved, and were freed on both sides of the kill.
    updates = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "update"]
    assert sum(line["dropped"] for line in updates) > 20
    assert all(line["dropped"] == line["grown"] for line in updates) == (name != "gradual")


@pytest.mark.parametrize(("name", "step"), [("set", 20), ("rigl", 24), ("snfs", 25), ("gradual", 10)])
def test_resume_right_before_and_after_an_update(name: str, step: int, tmp_path: Path) -> None:
    """A checkpoint of a step whose successor updates: what gradient scores need must be asked for again."""
    config = config_of(name, checkpoint_every=0)
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "stopped", reporter=At(step, signal.SIGINT))
    assert train(config, tmp_path / "stopped", resume=True).resumed_from == step
    assert_ended_alike(tmp_path / "whole", tmp_path / "stopped")


def test_convolutions_masked_layers_and_amp_resume(tmp_path: Path) -> None:
    config = config_of(
        "rigl", model="resnet20", width=0.5, block=4, below_break_even="masked", steps=9, subset=64, batch_size=10,
        update_every=2, amp=True, checkpoint_every=0,
    )  # fmt: skip
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "stopped", reporter=At(5, signal.SIGINT))
    train(config, tmp_path / "stopped", resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


# -- gradual pruning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", [0.0, 0.4])
def test_gradual_pruning_goes_from_many_blocks_to_those_of_the_plan(initial: float, tmp_path: Path) -> None:
    config = config_of("gradual", initial_sparsity=initial, snapshots=(0, 24, 25, 40), start_fraction=0.1)
    result = train(config, tmp_path)
    static = dataclasses.replace(
        config, method="static", compact_at=(), sparse_below=0.0, initial_sparsity=0.0, start_fraction=0.0,
        update_every=100, stop_fraction=0.75, sparse_lr=False,
    )  # fmt: skip
    example = load_task(config).example(torch.device("cpu"))
    planned, plan = build_network(static, example, 10)
    final = {layer.name: layer.nnz for layer in plan.layers if layer.state != "dense"}
    assert len(final) == 2
    nets = {step: load_model(tmp_path / "snapshots" / f"step-{step:09d}.pt") for step in config.snapshots}
    layers = {
        step: {name: m for name, m in net.named_modules() if isinstance(m, sk.SparseLinear)}
        for step, net in nets.items()
    }
    begin = {name: layer.layout.nnz for name, layer in layers[0].items()}
    if initial:
        # What the plan of a net of the initial sparsity stores, give or take the rounding of one block.
        at_start, _ = build_network(dataclasses.replace(static, sparsity=initial), example, 10)
        stored = {n: m.layout.nnz for n, m in at_start.model.named_modules() if isinstance(m, sk.SparseLinear)}
        assert all(abs(begin[name] - stored[name]) <= 1 for name in final) and max(begin.values()) < 64
    else:
        assert begin == dict.fromkeys(final, 64)
    for step in (24, 25, 40):
        # Zhu and Gupta's cubic between step 0.1 * 45 (rounded to 4) and 0.9 * 45 (40), as of the last update.
        left = (1 - (step // 5 * 5 - 4) / 36) ** 3
        stored = {name: layer.layout.nnz for name, layer in layers[step].items()}
        assert stored == {name: final[name] + round((begin[name] - final[name]) * left) for name in final}
    # Memory goes at the shares of compact_at: all of 90 % lie between steps 20 (83 %) and 25 (92 %).
    assert all(layer.values.shape[0] > layer.layout.nnz for layer in layers[24].values())
    assert all(layer.values.shape[0] == layer.layout.nnz for layer in layers[25].values())
    assert all(layer.masked for layer in layers[0].values()) and not any(m.masked for m in layers[40].values())
    assert result.params == planned.params and result.macs == planned.macs and result.layers == planned.layers
    # The rate follows the sparsity of the moment.
    rates = {
        line["step"]: line["lr"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "interval"
    }
    for step, sparsity_before in ((1, 1 - sum(begin.values()) / 128), (26, 1 - sum(stored_at(layers[25])) / 128)):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / 45))
        assert rates[step] == pytest.approx(0.1 * cosine * sparse_lr_factor(sparsity_before))


def test_layers_that_the_plan_masks_stay_masked_when_memory_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "pays", lambda speedup, source: False)
    config = config_of("gradual", below_break_even="masked", sparse_below=0.9, checkpoint_every=0)
    layers = [m for m in train(config).model.modules() if isinstance(m, sk.SparseLinear)]
    assert len(layers) == 2 and all(m.masked and m.values.shape[0] == m.layout.nnz < 64 for m in layers)


def stored_at(layers: dict[str, sk.SparseLinear]) -> list[int]:
    return [layer.layout.nnz for layer in layers.values()]


def test_gradual_pruning_of_a_trained_dense_net(tmp_path: Path) -> None:
    dense = TrainConfig(model="mlp-64-64", sparsity=0.0, steps=30, threads=1)
    train(dense, tmp_path / "dense")
    config = config_of("gradual", init=str(tmp_path / "dense"), snapshots=(0,), sparse_lr=False)
    result = train(config, tmp_path / "pruned")
    start = load_model(tmp_path / "pruned" / "snapshots" / "step-000000000.pt")
    assert_same(sk.dense_state_dict(start), weights(tmp_path / "dense"))
    assert result.layers["sparse"] == 2 and result.exploration_rate == 1.0
    assert json.loads((tmp_path / "pruned" / "plan.json").read_text())["totals"]["params"] == result.params


# -- what a run tells --------------------------------------------------------------------------------------------------


class Recorder(Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []
        self.updates: list[dict[str, Any]] = []

    def on_step(self, record: dict[str, Any]) -> None:
        self.steps.append(record)

    def on_epoch(self, record: dict[str, Any]) -> None:
        self.epochs.append(record)

    def on_update(self, record: dict[str, Any]) -> None:
        self.updates.append(record)


def test_exploration_is_the_union_of_the_masks(tmp_path: Path) -> None:
    at = (0, 5, 10, 15, 20, 25, 30, 35, 40)
    recorder = Recorder()
    result = train(config_of("set", snapshots=at), tmp_path, callbacks=[recorder])
    masks = [sk.masks(load_model(tmp_path / "snapshots" / f"step-{step:09d}.pt")) for step in at]
    names = list(masks[0])
    sizes = {name: masks[0][name].numel() for name in names}
    union = {name: masks[0][name].clone() for name in names}
    rates = {0: sum(int(union[name].sum()) for name in names) / sum(sizes.values())}
    for step, now, before in zip(at[1:], masks[1:], masks[:-1], strict=True):
        for name in names:
            union[name] |= now[name]
        rates[step] = sum(int(union[name].sum()) for name in names) / sum(sizes.values())
        # Blocks of 64 elements that came are the blocks that went.
        update = recorder.updates[at.index(step) - 1]
        came = sum(int((now[name] & ~before[name]).sum()) for name in names) // 64
        assert (update["step"], update["grown"], update["dropped"]) == (step, came, came)
        progress = step / (0.9 * 45)
        assert update["drop_fraction"] == pytest.approx(0.3 * (1 + math.cos(math.pi * progress)) / 2)
    logged = {line["step"]: line["exploration_rate"] for line in recorder.steps}
    assert logged == {step: pytest.approx(rates[step // 5 * 5]) for step in range(1, 46) if step // 5 * 5 in rates} | {
        45: pytest.approx(rates[40])
    }
    assert rates[40] > rates[20] > rates[0]
    assert result.exploration_rate == pytest.approx(rates[40]) and result.updates == 8
    assert result.exploration == {name: pytest.approx(int(union[name].sum()) / sizes[name]) for name in names}
    assert result.reliably_explored is not None and 0 < result.reliably_explored <= result.exploration_rate
    assert [line["step"] for line in recorder.epochs] == [15, 30, 45]
    assert recorder.epochs[-1]["exploration"] == result.exploration
    assert recorder.epochs[-1]["density"] == {name: int(masks[-1][name].sum()) / sizes[name] for name in names}
    # The file holds what the callbacks got.
    lines = read_metrics(tmp_path / "metrics.jsonl")
    for kind, records in (("interval", recorder.steps), ("epoch", recorder.epochs), ("update", recorder.updates)):
        assert [line for line in lines if line["kind"] == kind] == records
    assert result.step_seconds["topology"] > 0


def test_a_static_run_explores_its_density(tmp_path: Path) -> None:
    recorder = Recorder()
    static = dataclasses.replace(BASE, method="static", update_every=100, stop_fraction=0.75)
    result = train(static, callbacks=[recorder])
    assert result.model is not None
    layers = {name: m for name, m in result.model.named_modules() if isinstance(m, sk.SparseLinear)}
    assert result.exploration == {name: m.layout.density for name, m in layers.items()}  # 64 is 8 blocks
    assert result.exploration_rate == pytest.approx(sum(result.exploration.values()) / 2)
    assert (result.updates, result.reliably_explored, recorder.updates) == (0, None, [])
    assert "exploration_rate" not in recorder.steps[0]
    dense = train(dataclasses.replace(static, sparsity=0.0))
    assert (dense.exploration_rate, dense.exploration) == (None, {})


def test_curves_show_exploration_where_blocks_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    train(config_of("set"), tmp_path / "set")
    train(dataclasses.replace(BASE, method="static", update_every=100, stop_fraction=0.75), tmp_path / "static")
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: saved.append(self))
    plot_curves({"a": tmp_path / "static"}, tmp_path / "x.png")
    plot_curves({"a": tmp_path / "static", "b": tmp_path / "set"}, tmp_path / "x.png")
    assert [len(figure.axes) for figure in saved] == [2, 3]
    (line,) = saved[1].axes[2].lines
    intervals = [entry for entry in read_metrics(tmp_path / "set" / "metrics.jsonl") if entry["kind"] == "interval"]
    assert list(line.get_ydata()) == [entry["exploration_rate"] for entry in intervals]


def test_the_command_line_trains_and_tells_exploration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--model",
        "mlp-64-64",
        "--block",
        "8",
        "--below-break-even",
        "sparse",
        "--steps",
        "12",
        "--threads",
        "1",
    ]
    dynamic = ["--method", "set", "--update-every", "2", "--drop-fraction", "0.5", "--sparse-lr", "--snapshots", "0,6"]
    assert main(["train", *options, *dynamic]) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("runs/mlp-64-64-digits-s0.9-set/result.json").read_text())
    last = out.splitlines()[-1]
    assert f"R_s {result['exploration_rate']:.3f} (" in last and "reliably) after 4 updates" in last
    assert f"R_s {result['exploration_rate']:.3f}" in out.splitlines()[-2]
    assert "learning rate 0.1 x " in out
    # Another run begins from the first one's weights in the middle.
    start = "runs/mlp-64-64-digits-s0.9-set/snapshots/step-000000006.pt"
    assert main(["train", *options, "--init", start, "--lr", "0.01", "--quiet"]) == 0
    assert "R_s" not in capsys.readouterr().out and Path("runs/mlp-64-64-digits-init/result.json").exists()


# -- starting from a saved net -----------------------------------------------------------------------------------------


def test_snapshots_are_the_weights_of_shorter_runs(tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, method="static", update_every=100, stop_fraction=0.75, schedule="constant")
    train(dataclasses.replace(config, snapshots=(0, 10, 45, 10)), tmp_path / "long")
    train(dataclasses.replace(config, steps=10), tmp_path / "short")
    network, _ = build_network(config, load_task(config).example(torch.device("cpu")), 10)
    folder = tmp_path / "long" / "snapshots"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:09d}.pt" for step in (0, 10, 45)]
    assert_same(load_checkpoint(folder / "step-000000000.pt")["model"], dict(network.model.state_dict()))
    assert_same(load_checkpoint(folder / "step-000000010.pt")["model"], weights(tmp_path / "short"))
    assert_same(load_checkpoint(folder / "step-000000045.pt")["model"], weights(tmp_path / "long"))
    # Killed before a snapshot and resumed, a run has it all the same.
    with pytest.raises(Interrupted):
        train(dataclasses.replace(config, snapshots=(10,)), tmp_path / "stopped", reporter=At(9, signal.SIGINT))
    train(dataclasses.replace(config, snapshots=(10,)), tmp_path / "stopped", resume=True)
    assert_same(load_checkpoint(tmp_path / "stopped/snapshots/step-000000010.pt")["model"], weights(tmp_path / "short"))
    train(config, tmp_path / "stopped", overwrite=True)
    assert not (tmp_path / "stopped" / "snapshots").exists()


@pytest.mark.parametrize("sparsity", [0.0, 0.7], ids=["dense", "sparse"])
def test_a_run_starts_from_the_layers_of_a_file(sparsity: float, tmp_path: Path) -> None:
    config = TrainConfig(
        model="mlp-64-64", block=8, below_break_even="sparse", sparsity=sparsity, steps=15, threads=1, snapshots=(0,)
    )
    first = train(config, tmp_path / "first")
    # Whatever the options say of sparsity, the layers are those of the file.
    again = dataclasses.replace(config, init=str(tmp_path / "first"), sparsity=0.3, block=4, lr=0.0, seed=5)
    second = train(dataclasses.replace(again, lr=1e-9, weight_decay=0.0), tmp_path / "second")
    start = load_checkpoint(tmp_path / "second/snapshots/step-000000000.pt")["model"]
    assert_same(start, weights(tmp_path / "first"))
    assert (second.params, second.macs, second.layers) == (first.params, first.macs, first.layers)
    assert second.exploration_rate == first.exploration_rate
    assert (tmp_path / "second" / "plan.json").exists() == bool(sparsity)
    if sparsity:
        assert json.loads((tmp_path / "second/plan.json").read_text()) == json.loads(
            (tmp_path / "first/plan.json").read_text()
        )
        # Its blocks may move on.
        moved = train(dataclasses.replace(again, method="set", update_every=5), tmp_path / "moved")
        assert moved.updates == 2 and moved.params == first.params
        assert moved.exploration_rate is not None and first.exploration_rate is not None
        assert moved.exploration_rate > first.exploration_rate
    # A file may move or go: the checkpoint holds all that resuming needs.
    with pytest.raises(Interrupted):
        train(dataclasses.replace(again, log_every=1), tmp_path / "third", reporter=At(5, signal.SIGINT))
    (tmp_path / "first" / "model.pt").unlink()
    assert train(dataclasses.replace(again, log_every=1), tmp_path / "third", resume=True).resumed_from == 5


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    config = TrainConfig(model="mlp-64-64", block=8, below_break_even="sparse", steps=2, threads=1)
    train(config, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for changes, message in (
        ({"model": "mlp-64-32", "init": "run"}, r"run/model.pt \(mlp-64-64, width 1\) does not fit mlp-64-32"),
        ({"init": "absent"}, "init: checkpoint .*absent does not exist"),
        ({"init": "empty"}, "init: .*empty holds no trained net"),
        ({"init": "run/checkpoints/step-000000002.pt"}, "is no saved net"),
        ({"init": "run", "method": "gradual"}, "method gradual starts from a dense net"),
    ):
        changes["init"] = str(tmp_path / changes["init"])
        with pytest.raises(ConfigError, match=message):
            train(dataclasses.replace(config, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_slimmed_net_trains_and_its_folder_can_be_moved(tmp_path: Path) -> None:
    kept = {"kept": list(range(0, 64, 2)), "of": 64}
    record = {"format": 1, "about": {}, "blocks": [], "layers": {"layers.0": {"out": kept}, "layers.2": {"in": kept}}}
    (tmp_path / "channels.json").write_text(json.dumps(record))
    config = TrainConfig(
        model="mlp-64-64", channels=str(tmp_path / "channels.json"), sparsity=0.0, steps=10, log_every=1, threads=1,
        batch_size=100,
    )  # fmt: skip
    whole = train(config, tmp_path / "whole")
    assert whole.params == 32 * 65 + 64 * 33 + 10 * 65
    with pytest.raises(Interrupted):
        train(config, tmp_path / "stopped", reporter=At(4, signal.SIGINT))
    (tmp_path / "channels.json").unlink()
    (tmp_path / "stopped").rename(tmp_path / "moved")
    assert train(config, tmp_path / "moved", resume=True).resumed_from == 4
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "moved"))
    assert_same(dict(load_model(tmp_path / "moved").state_dict()), weights(tmp_path / "whole"))
    with pytest.raises(ConfigError, match=r"channels: .*channels.json does not exist"):
        train(config, tmp_path / "new")
    (tmp_path / "channels.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"channels: .*channels.json does not fit the model: "):
        train(config, tmp_path / "new")
    # Sparse training of the slimmed architecture, from its trained weights.
    again = dataclasses.replace(
        config, channels=str(tmp_path / "whole" / "channels.json"), init=str(tmp_path / "whole")
    )
    gradual = dataclasses.replace(again, method="gradual", sparsity=0.5, block=8, below_break_even="sparse")
    assert train(dataclasses.replace(gradual, update_every=2)).layers["sparse"] == 2


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "ste"}, "did you mean set?"),
        ({"update_every": 50}, "update_every: method static takes no update_every (taken by: set, rigl,"),
        ({"method": "set", "exact": True}, "exact: method set takes no exact (taken by: rigl, srigl), got True"),
        ({"method": "set", "capacity": 2}, "capacity: method set takes no capacity (taken by: snfs, dsr), got 2"),
        ({"method": "rigl", "growth": "unexplored"}, "growth: method rigl takes no growth (taken by: set)"),
        ({"method": "set", "compact_at": "0.5"}, "compact_at: method set takes no compact_at"),
        ({"method": "dsr"}, "capacity: method dsr moves blocks between layers"),
        ({"method": "snfs", "capacity": 1}, "capacity: method snfs moves blocks between layers"),
        ({"method": "set", "sparsity": 0}, "method: set needs a sparsity above 0"),
        ({"method": "gradual", "sparsity": 0}, "method: gradual needs a sparsity above 0"),
        (
            {"method": "gradual", "initial_sparsity": 0.9},
            "initial_sparsity: expected less than sparsity (0.9), got 0.9",
        ),
        ({"method": "gradual", "start_fraction": 0.8}, "start_fraction: expected less than stop_fraction (0.75)"),
        ({"method": "gradual", "budget": "macs"}, "budget: gradual pruning counts params"),
        ({"method": "set", "drop_fraction": 0}, "drop_fraction: method set needs a fraction above 0"),
        ({"method": "set", "drop_fraction": 1.5}, "drop_fraction: expected a value at least 0 and at most 1"),
        ({"method": "set", "drop_by": "l3"}, "drop_by: expected one of gradient, l1,"),
        ({"sparse_lr": True, "sparsity": 0}, "sparse_lr: needs a sparsity above 0"),
        ({"steps": 5, "snapshots": "0,6"}, "snapshots: expected steps up to 5 (the run's), got 6"),
        ({"snapshots": "-1"}, "snapshots: expected a value at least 0"),
    ],
)
def test_options_that_do_not_go_together_are_named_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_only_the_run_knows_is_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="snapshots: need the run folder"):
        train(dataclasses.replace(BASE, snapshots=(1,)))
    with pytest.raises(ConfigError, match=r"snapshots: expected steps up to 15 \(the run's\), got 16"):
        train(dataclasses.replace(BASE, steps=0, epochs=1, snapshots=(16,)), tmp_path / "a")
    # So small a net runs faster dense, and is left so.
    with pytest.raises(ConfigError, match=r"method: set needs sparse layers.*below_break_even"):
        train(dataclasses.replace(BASE, model="mlp-16", below_break_even="dense"), tmp_path / "a")
    with pytest.raises(ConfigError, match="blocks of 1x1"):
        train(dataclasses.replace(BASE, drop_by="signed"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_run_without_any_update_is_warned_of() -> None:
    for every, stop, warned in ((5, 0.9, False), (30, 0.6, True), (46, 0.9, True)):
        reporter = At(-1, 0)
        result = train(dataclasses.replace(BASE, update_every=every, stop_fraction=stop), reporter=reporter)
        assert any("blocks will not move" in text for text in reporter.warnings) == warned == (result.updates == 0)


def test_the_dense_twin_has_no_options_of_sparse_training() -> None:
    for name in METHODS:
        twin = config_of(name, snapshots=(3,)).dense(width=0.5)
        assert (twin.sparsity, twin.method, twin.sparse_lr, twin.width) == (0.0, "static", False, 0.5)
        assert (twin.optimizer, twin.clip_norm) == (config_of(name).optimizer, config_of(name).clip_norm)


# -- learning rate and step --------------------------------------------------------------------------------------------


def test_the_sparse_learning_rate_is_that_of_the_fit(tmp_path: Path) -> None:
    # exp(1.969 * 0.81 + 0.2905 * 0.9) and exp(1.969 * 0.25 + 0.2905 * 0.5), by hand.
    assert sparse_lr_factor(0.9) == pytest.approx(6.4004, rel=1e-4)
    assert sparse_lr_factor(0.5) == pytest.approx(1.8916, rel=1e-4)
    assert sparse_lr_factor(0.0) == 1.0
    with pytest.raises(ValueError, match=r"within \[0, 1\], got 90"):
        sparse_lr_factor(90)
    config = dataclasses.replace(
        BASE, method="static", update_every=100, stop_fraction=0.75, sparse_lr=True, lr=0.02, schedule="constant"
    )
    said: list[str] = []

    class Listener(Reporter):
        def line(self, text: str) -> None:
            said.append(text)

    result = train(config, tmp_path, reporter=Listener())
    assert result.model is not None
    layers = [m for m in result.model.modules() if isinstance(m, sk.SparseLinear)]
    sparsity = 1 - sum(int(m.mask.sum()) for m in layers) / sum(m.mask.numel() for m in layers)
    expected = 0.02 * math.exp(1.969 * sparsity**2 + 0.2905 * sparsity)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["lr"] for line in lines] == pytest.approx([expected] * len(lines))
    assert said[0].startswith("learning rate 0.02 x ") and f"{expected:.4g} at sparsity {sparsity:.4g}" in said[0]


class Watcher:
    """Stands in for a scheduler: sees what it would see."""

    def __init__(self, model: nn.Linear) -> None:
        self.model, self.weights, self.gradients = model, list[Tensor](), list[Tensor]()

    def step(self) -> None:
        assert self.model.weight.grad is not None
        self.weights.append(self.model.weight.detach().clone())
        self.gradients.append(self.model.weight.grad.clone())


def test_blocks_move_after_the_optimizer_and_before_gradients_go() -> None:
    config = TrainConfig(lr=0.1, momentum=0.0, weight_decay=0.0, clip_norm=0.01)
    model = nn.Linear(6, 3)
    before = model.weight.detach().clone()
    watcher = Watcher(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Step(model, optimizer, config, topology=watcher)(torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1]))  # type: ignore[arg-type]
    (weight,), (gradient,) = watcher.weights, watcher.gradients
    torch.testing.assert_close(weight, before - 0.1 * gradient)
    assert float(gradient.norm()) <= 0.01 * (1 + 1e-4) and model.weight.grad is None


@pytest.mark.parametrize("name", ["set", "rigl", "gradual"])
def test_compiled_nets_train_alike_and_do_not_recompile_at_updates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    real = torch.compile
    counters: list[CompileCounter] = []

    def compiled(model: nn.Module) -> Any:
        torch._dynamo.reset()
        counters.append(CompileCounter())
        return real(model, backend=counters[-1])

    monkeypatch.setattr(torch, "compile", compiled)
    config = config_of(name, checkpoint_every=0, steps=25, **({"sparse_below": 0.0} if name == "gradual" else {}))
    plain = train(config)
    fast = train(dataclasses.replace(config, compile=True))
    assert plain.model is not None and fast.model is not None and fast.updates == plain.updates >= 4
    assert_same(dict(plain.model.state_dict()), dict(fast.model.state_dict()))
    train(dataclasses.replace(config, compile=True, update_every=30))
    updated, still = (counter.frame_count for counter in counters)
    if name == "set":
        assert updated == still > 0
    else:
        # The update step of RigL collects scores; gradual pruning shrinks Parameters twice before step 25.
        assert updated > still > 0 and updated <= still + 4
