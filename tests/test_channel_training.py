"""Training that prepares channel pruning: penalties reach the weights, runs resume, what is saved is ordinary."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsekern.pruning import structured
from sparsekern.training import Callback, ConfigError, TrainConfig, load_model, train

pytest.importorskip("torch_pruning")

CONFIG = TrainConfig(
    model="resnet20", width=0.125, data="digits", subset=64, test_subset=32, batch_size=16, steps=4, sparsity=0.0,
    lr=0.1, schedule="constant", weight_decay=0.0, threads=1, log_every=1, checkpoint_minutes=0.0,
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            raise RuntimeError("stop")


def weights(model: nn.Module | None) -> dict[str, torch.Tensor]:
    assert model is not None
    return {name: p.detach() for name, p in model.named_parameters()}


def test_slimming_moves_only_the_scales_by_lr_times_s() -> None:
    config = dataclasses.replace(CONFIG, steps=1, momentum=0.0)
    plain = weights(train(config).model)
    slimmed = train(dataclasses.replace(config, slimming=0.02)).model
    norms = {f"{n}.weight" for n, m in slimmed.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, value in weights(slimmed).items():
        torch.testing.assert_close(value, plain[name] - (0.1 * 0.02 if name in norms else 0.0))


def test_block_scales_are_resumed_to_the_bit_and_folded(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, block_penalty=1.0, checkpoint_every=2)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stop"):
        train(config, tmp_path / "stopped", callbacks=[StopAt(3)])
    resumed = train(config, tmp_path / "stopped", resume=True)
    assert resumed.resumed_from == 2
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(resumed.model)[name]), name
    # Saved without a trace of the scales, and with their effect.
    saved, x = load_model(tmp_path / "whole"), torch.randn(4, 1, 8, 8)
    assert torch.equal(saved(x), whole.model(x))
    unpenalised = weights(train(CONFIG).model)
    shrunk = [
        weights(saved)[n].abs().mean() < 0.9 * v.abs().mean() for n, v in unpenalised.items() if "bn2.weight" in n
    ]
    assert all(shrunk)
    # A finished run is returned as it was saved.
    again = train(config, tmp_path / "stopped", resume=True)
    for name, value in weights(resumed.model).items():
        assert torch.equal(value, weights(again.model)[name]), name


def test_a_large_penalty_removes_blocks_without_changing_the_output(tmp_path: Path) -> None:
    model = train(dataclasses.replace(CONFIG, block_penalty=2.0, steps=12)).model
    x = torch.randn(4, 1, 8, 8)
    before = model(x)
    report = structured.prune_(model, x, "sss")
    assert report.blocks
    torch.testing.assert_close(model(x), before)


def test_soft_filters_are_zero_at_the_end_of_an_epoch() -> None:
    model = train(dataclasses.replace(CONFIG, width=0.5, soft_filters=0.3)).model  # 4 steps are an epoch
    for name, channels in (("stages.0.0.conv1", 8), ("stages.2.1.conv1", 32)):
        zero = model.get_submodule(name).weight.flatten(1).eq(0).all(1)
        assert int(zero.sum()) == int(0.3 * channels)
    assert not model.stem.weight.flatten(1).eq(0).all(1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "mlp-8", "slimming": 1e-4}, "expected a model with batch norm"),
        ({"model": "vgg11", "block_penalty": 0.1}, "expected a network with residual blocks"),
        ({"block_penalty": 0.1, "snapshots": (1,)}, "do not hold the scales"),
        ({"sparsity": 0.5, "block": 1, "below_break_even": "sparse", "soft_filters": 0.3}, "expected a dense model"),
    ],
)
def test_what_does_not_fit_leaves_no_folder(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(CONFIG, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()
