"""What a run calls while it trains: to log to anything, or to look at the numbers."""

from __future__ import annotations

from typing import Any


class Callback:
    """Base class whose methods do nothing; override those you want.

    Each gets the line that goes into ``metrics.jsonl``, as a dict with ``kind``, ``step`` and ``epoch``. A slow one
    slows training down; what one raises ends the run. A resumed run repeats the records since its last checkpoint.

    TensorBoard::

        class TensorBoard(Callback):
            def __init__(self, folder):
                self.writer = torch.utils.tensorboard.SummaryWriter(folder)

            def on_step(self, record):
                self.writer.add_scalar("loss", record["loss"], record["step"])

            def on_epoch(self, record):
                self.writer.add_scalar("accuracy", record["test_acc"], record["step"])

        train(config, "runs/net", callbacks=[TensorBoard("runs/net/board")])
    """

    def on_step(self, record: dict[str, Any]) -> None:
        """Every ``log_every`` steps: mean ``loss`` and ``train_acc`` since the last, ``lr``, ``step_ms`` by phase,
        ``exploration_rate`` where blocks move."""

    def on_epoch(self, record: dict[str, Any]) -> None:
        """After every epoch: ``train_loss``, ``train_acc``, and ``test_acc`` and ``val_acc`` where it was tested; where
        blocks move, ``exploration_rate``, ``reliably_explored``, and per layer ``exploration`` and ``density``."""

    def on_update(self, record: dict[str, Any]) -> None:
        """After every update of the topology: ``number``, ``drop_fraction``, blocks ``dropped`` and ``grown``."""
