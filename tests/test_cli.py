"""The command line: options from one source, recipes, one line per error, exit statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sparsekern.cli import main, recipes
from sparsekern.training import TrainConfig
from sparsekern.training.checkpoint import checkpoint_files, load_checkpoint
from sparsekern.training.config import option_names

FAST = ["--model", "mlp-32", "--subset", "100", "--batch-size", "50", "--threads", "1", "--steps", "2"]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSEKERN_DATA", raising=False)
    monkeypatch.delenv("SPARSEKERN_DEBUG", raising=False)


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(list(arguments))
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_help_lists_every_option_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run("train", "--help", capsys=capsys)
    assert status == 0
    for name in option_names():
        assert out.count(f"│ --{name.replace('_', '-')} ") == 1, name
    for group in ("Start from", "Model and data", "Optimization", "Sparsity", "Dynamic sparsity", "Run"):
        assert f" {group} " in out


def test_version_and_bare_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version", capsys=capsys)[:2] == (0, "sparsekern 0.1.0\n")
    status, out, err = run(capsys=capsys)
    assert status == 2 and "train" in out + err and "error" not in out + err


def write(path: str, text: str) -> str:
    Path(path).write_text(text)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["train", "--foo"], "No such option: --foo"),
        (["train", "--lr", "abc"], "Invalid value for '--lr'"),
        (["train", "--optimizer", "sdg"], "did you mean sgd"),
        (["train", "--model", "mpl"], "did you mean 'mlp'"),
        (["train", "--data", "digts"], "did you mean 'digits'"),
        (["train", "--data", "cifar10"], "cifar10: expected a data folder, got none"),
        (["train", "--data", "mnist", "--data-dir", "absent"], "found nothing"),
        (["train", "--sparsity", "1.5"], "sparsity: expected a value at least 0 and below 1, got 1.5"),
        (["train", "--override", "head"], "override: expected GLOB=SPARSITY"),
        (["train", "--allocation", "magic"], "expected one of uniform"),
        (["train", "--exclude", "*"], "expected at least one layer to match"),
        (["train", "--recipe", "itp"], "did you mean itop"),
        (["train", "--config", "absent.yaml"], "config file absent.yaml does not exist"),
        (["train", "--out", "absent", "--resume"], "absent holds no run"),
        (["train", "--resume"], "no run in runs/mlp-digits-s0.9"),
        (["train", "--resume", "--overwrite"], "expected --resume or --overwrite, got both"),
        (["train", "--compare", "--sparsity", "0"], "there is nothing to compare with"),
        (["train", "--label-noise", "0.1", "--noise-kind", "odd"], "expected one of symmetric"),
        (["plan", "mlp", "--in-shape", "3,3"], "in-shape: expected C,H,W"),
        (["plan", "mlp", "--sparsity", "0"], "nothing would change"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = run(*arguments, capsys=capsys)
    assert status == 2 and out == ""
    assert message in err and err.count("\n") == 1 and err.startswith("sparsekern: error: ")
    assert not Path("runs").exists()


def test_damaged_files_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mnist").mkdir()
    Path("mnist/train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    status, _, err = run("train", "--data", "mnist", "--data-dir", "mnist", capsys=capsys)
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err
    assert run("train", *FAST, "--sparsity", "0", "--out", "r", "--quiet", capsys=capsys)[0] == 0
    (only,) = checkpoint_files("r/checkpoints")
    only.write_bytes(only.read_bytes()[:100])
    status, _, err = run("train", "--out", "r", "--resume", capsys=capsys)
    assert status == 2 and err.count("\n") == 1 and "truncated" in err and "--overwrite" in err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEKERN_DEBUG", "1")
    with pytest.raises(ValueError, match="sparsity"):
        main(["train", "--sparsity", "2"])


def test_an_internal_error_is_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("sparsekern.training.loop.train", broken)
    status, _, err = run("train", *FAST, capsys=capsys)
    assert status == 1 and err.count("\n") == 1 and "ZeroDivisionError: a defect" in err and "SPARSEKERN_DEBUG" in err


def test_later_values_win(capsys: pytest.CaptureFixture[str]) -> None:
    write("c.yaml", "lr: 0.2\nmomentum: 0.7\nbatch-size: 60\n")
    arguments = ["train", "--recipe", "demo", "--config", "c.yaml", *FAST, "--momentum", "0.5", "--out", "r", "--quiet"]
    status, out, _ = run(*arguments, capsys=capsys)
    assert status == 0 and out.count("\n") == 1
    saved = TrainConfig(**yaml.safe_load(Path("r/config.yaml").read_text()))
    demo = recipes.load("demo").config
    # command line, file, recipe, default
    assert (saved.momentum, saved.batch_size, saved.lr) == (0.5, 50, 0.2)
    assert saved.schedule == demo["schedule"] == "cosine" and saved.gamma == TrainConfig().gamma


def test_run_folders_are_numbered_and_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run("train", *FAST, "--sparsity", "0", "--quiet", capsys=capsys)[0] == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["mlp-32-digits-dense", "mlp-32-digits-dense-2"]
    status, out, _ = run("train", *FAST, "--sparsity", "0", "--resume", "--quiet", capsys=capsys)
    assert status == 0 and "mlp-32-digits-dense-2" in out
    status, _, err = run("train", "--out", "runs/mlp-32-digits-dense", *FAST, capsys=capsys)
    assert status == 2 and "--resume" in err and "--overwrite" in err
    status, _, err = run("train", "--out", "runs/mlp-32-digits-dense", "--resume", "--lr", "9", capsys=capsys)
    assert status == 2 and "lr (saved 0.0, now 9.0)" in err


def test_every_recipe_loads(capsys: pytest.CaptureFixture[str]) -> None:
    from sparsekern import models

    assert {"demo", "random-pruning", "rethinking", "sparse-double-descent", "itop"} <= set(recipes.names())
    for name in recipes.names():
        recipe = recipes.load(name)
        config = TrainConfig(**recipe.config)
        shape = {"digits": (1, 8, 8), "mnist": (1, 28, 28)}.get(config.data, (3, 32, 32))
        if config.model != "wrn-50-2":  # 70 million weights
            models.build(config.model, in_shape=shape, width=0.1)
        assert recipe.about and recipe.source and "\n" not in recipe.about
    status, out, _ = run("recipes", capsys=capsys)
    assert status == 0 and all(name in out for name in recipes.names())


def test_recipes_hold_the_values_of_the_papers() -> None:
    pruning = TrainConfig(**recipes.load("random-pruning").config)
    assert (pruning.epochs, pruning.batch_size, pruning.base_lr, pruning.weight_decay) == (160, 128, 0.1, 5e-4)
    assert (pruning.milestones, pruning.gamma, pruning.val_split) == ((0.5, 0.75), 0.1, 0.1)
    rigl = TrainConfig(**recipes.load("rigl-wrn").config)
    assert [round(m * rigl.steps) for m in rigl.milestones] == [30000, 60000, 90000]
    assert (rigl.method, rigl.drop_fraction, rigl.update_every) == ("rigl", 0.3, 100)
    assert round(rigl.stop_fraction * rigl.steps) == 75000
    for name, method, every in (("itop-set", "set", 1500), ("itop-rigl", "rigl", 4000)):
        itop = TrainConfig(**recipes.load(name).config)
        assert (itop.method, itop.update_every, itop.drop_fraction, itop.stop_fraction) == (method, every, 0.5, 1.0)
        assert (itop.epochs, itop.sparsity, itop.allocation) == (250, 0.95, "erk")
    mlp = TrainConfig(**recipes.load("set-mlp").config)
    # Weights per layer epsilon (n_in + n_out) with epsilon = 20.
    shapes = [(3072, 4000), (4000, 1000), (1000, 4000)]
    kept = sum(20 * (n_in + n_out) for n_in, n_out in shapes)
    assert mlp.sparsity == pytest.approx(1 - kept / sum(n_in * n_out for n_in, n_out in shapes), abs=1e-5)
    assert (mlp.drop_by, mlp.drop_fraction, mlp.update_every * mlp.batch_size) == ("signed", 0.3, 50_000)
    snfs = TrainConfig(**recipes.load("snfs-wrn").config)
    per_epoch = 45_000 // snfs.batch_size
    assert snfs.update_every == per_epoch
    assert [round(m * snfs.epochs * per_epoch) for m in snfs.milestones] == [25_000, 50_000, 75_000, 100_000]
    descent = TrainConfig(**recipes.load("sparse-double-descent").config)
    assert (descent.sparsity, descent.snapshots) == (0.0, (1000,))
    assert (descent.label_noise, descent.weight_decay, descent.model) == (0.2, 1e-4, "resnet18")


def test_a_recipe_drops_what_another_method_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", "dst-demo", *FAST, "--block", "8", "--below-break-even", "masked", "--quiet"]
    assert run("train", *arguments, "--method", "static", "--out", "static", capsys=capsys)[0] == 0
    static = TrainConfig(**yaml.safe_load(Path("static/config.yaml").read_text()))
    assert (static.method, static.update_every, static.rescale) == ("static", 100, True)
    assert run("train", *arguments, "--method", "rigl", "--out", "rigl", capsys=capsys)[0] == 0
    rigl = TrainConfig(**yaml.safe_load(Path("rigl/config.yaml").read_text()))
    assert (rigl.method, rigl.update_every, rigl.drop_fraction) == ("rigl", 50, 0.3)
    # What the user gives is not dropped.
    given = ["--method", "static", "--update-every", "7", "--out", "given"]
    status, _, err = run("train", *arguments, *given, capsys=capsys)
    assert status == 2 and "update_every: method static takes no update_every" in err


def test_plan_prints_without_training(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "mlp-64-64", "--block", "8", "--below-break-even", "sparse", "--batch-size", "32"]
    status, out, _ = run(*arguments, capsys=capsys)
    assert status == 0 and "layers.0" in out and "8x8" in out and not Path("runs").exists()
    status, out, _ = run(*arguments, "--in-shape", "3,4,4", "--classes", "7", "--json", capsys=capsys)
    plan = json.loads(out)
    assert [layer["weight_shape"] for layer in plan["layers"]] == [[64, 48], [64, 64], [7, 64]]
    assert plan["totals"]["sparse"] == 2


def test_compare_ends_with_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--block", "8", "--below-break-even", "sparse", "--model", "mlp-64-64", "--out", "r", "--compare"]
    status, out, _ = run("train", *FAST, *arguments, capsys=capsys)
    assert status == 0
    for row in ("test accuracy", "parameters", "MACs per sample", "training step [ms]", "speedup", "layers"):
        assert row in out
    assert {"dense", "small", "sparse", "table.md", "compare.json", "curves.png", "config.yaml"} == set(os.listdir("r"))
    # The folder remembers that it is a comparison.
    status, out, _ = run("train", "--out", "r", "--resume", "--quiet", capsys=capsys)
    assert status == 0 and "training step [ms]" in out
    status, _, err = run("train", "--out", "r/sparse", "--resume", "--compare", capsys=capsys)
    assert status == 2 and "not a comparison" in err


def test_ctrl_c_says_how_to_resume() -> None:
    arguments = ["--model", "mlp-32", "--sparsity", "0", "--steps", "100000000", "--threads", "1", "--log-every", "1"]
    command = [sys.executable, "-m", "sparsekern", "train", *arguments, "--out", "r", "--quiet"]
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (Path("r/metrics.jsonl").exists() and Path("r/metrics.jsonl").stat().st_size):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and out == ""
    assert err.count("\n") == 1 and "continue with: sparsekern train --out r --resume" in err
    (checkpoint,) = checkpoint_files("r/checkpoints")
    assert f"stopped at step {load_checkpoint(checkpoint)['step']} of" in err
