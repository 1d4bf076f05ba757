"""Remove channels or blocks of a trained run, then train what is left: fine-tune it, or start it from scratch."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sparsekern.pruning.structured import METHODS, TARGETS, Channels, Report, prune_
from sparsekern.pruning.structured.prune import DATA
from sparsekern.training import budgets, text_table
from sparsekern.training.config import TrainConfig, suggest
from sparsekern.training.errors import CheckpointError, ConfigError
from sparsekern.training.folder import write_json
from sparsekern.training.network import build_dense, load_model
from sparsekern.training.part import check_whole, train_part
from sparsekern.training.progress import Reporter
from sparsekern.training.prune_start import Source
from sparsekern.training.result import TrainResult
from sparsekern.training.weights import CHANNELS, is_sparse

RECORD = "slim.json"
FRESH = "fresh.pt"
THEN = {
    "finetune": "keep the weights, a few epochs at a small constant rate",
    "scratch-e": "fresh weights, as many epochs as the large network",
    "scratch-b": "fresh weights, as many MACs as the large network",
}


@dataclass(frozen=True)
class SlimSettings:
    """How the network of a run is made smaller. Checked on construction; :class:`ConfigError` names field and fix.

    Attributes:
        method: one of :data:`sparsekern.pruning.structured.METHODS`.
        ratio: fraction removed everywhere, or None.
        ratios: ``{glob of layers: fraction}`` instead.
        target: a published architecture instead.
        exclude: globs of layers whose channels all stay.
        coupled: also channels that residual additions tie; None is the method's default.
        batches: training batches that thinet and regression look at.
        samples: positions sampled from them.
        seed: of the sampled positions and of fresh weights; None is the run's, plus one for the weights.
    """

    method: str = "l1-filters"
    ratio: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    target: str | None = None
    exclude: tuple[str, ...] = ()
    coupled: bool | None = None
    batches: int = 4
    samples: int = 5000
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(suggest("method", self.method, METHODS))
        if self.target is not None and self.target not in TARGETS:
            raise ConfigError(suggest("target", self.target, TARGETS))
        given = [
            n for n, v in (("ratio", self.ratio is not None), ("ratios", self.ratios), ("target", self.target)) if v
        ]
        if len(given) > 1:
            raise ConfigError(f"{given[0]}: expected one of ratio, ratios and target, got {' and '.join(given)}")
        if not given and self.method != "sss":
            raise ConfigError(f"ratio: {self.method} needs the fraction to remove, or a target; got neither")
        for name, low in (("batches", 1), ("samples", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}: expected {low} and more, got {value}")

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {**values, "exclude": list(self.exclude)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> SlimSettings:
        try:
            return cls(**{**values, "exclude": tuple(values.get("exclude", ()))})
        except TypeError as error:
            raise CheckpointError(f"{source}: no settings of slim ({error})") from None


@dataclass
class Slimmed:
    """What :func:`slim` returns.

    Attributes:
        folder: holds ``model.pt`` (the small network), ``channels.json``, ``slim.json``, ``table.md`` and a run folder
            per training.
        rows: the large network, the small one right after pruning, and after each training; see ``slim.json``.
        report: channels per layer; None when an earlier pruning was continued.
    """

    folder: Path
    rows: list[dict[str, Any]]
    report: Report | None


def slim(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    then: Sequence[str] = (),
    *,
    epochs: int | None = None,
    lr: float | None = None,
    cap: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    run_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Slimmed:
    """Prune channels of a trained run and train the small dense network on, or anew.

    Args:
        run: run folder, ``model.pt`` or a snapshot of a dense network.
        out: folder to write to.
        then: trainings of :data:`THEN`, each a run folder of that name in ``out``. Data, augmentation and label noise
            are the run's; fresh weights come from another seed.
        epochs: of fine-tuning; for scratch budgets, of the large network that they count from.
        lr: in place of the strategy's own.
        cap: most times as long that scratch-b trains.
        resume: keep what ``out`` holds already, add what is missing.
        overwrite: replace what ``slim`` wrote to ``out`` before.
        run_options: ``data_dir``, ``device``, ``threads``, ``checkpoint_every``, ``checkpoint_minutes`` in place of
            the run's own.
        options: fields of :class:`SlimSettings`.

    Raises:
        ConfigError: an option that does not fit, a sparse run, a folder in use, Torch-Pruning missing.
        Others: those of :func:`sparsekern.training.train`.
    """
    settings = SlimSettings(**options)
    for name in then:
        if name not in THEN:
            raise ConfigError(suggest("then", name, THEN))
    if "finetune" in then and len(then) > 1 and (epochs is not None or lr is not None):
        raise ConfigError("epochs, lr: mean other things to finetune and to scratch; call once for each, with --resume")
    folder = Path(out)
    check_folder(folder, Path(run), settings, resume=resume, overwrite=overwrite)
    return _Slim(Path(run), folder, settings, reporter or Reporter(), dict(run_options or {})).go(
        list(dict.fromkeys(then)), resume, epochs=epochs, lr=lr, cap=cap
    )


def check_folder(folder: Path, run: Path, settings: SlimSettings, *, resume: bool, overwrite: bool) -> None:
    """:class:`ConfigError` says what is in the way of slimming ``run`` into ``folder``; nothing is written."""
    path = folder / RECORD
    check_whole(folder, resume=resume, overwrite=overwrite)
    if not path.is_file():
        if resume:
            raise ConfigError(f"resume: {folder} holds no slimmed network ({RECORD} is missing); check --out")
        return
    if resume:
        record = _read(path)
        saved = SlimSettings.from_dict(record["settings"], str(path))
        names = [f.name for f in dataclasses.fields(saved) if getattr(saved, f.name) != getattr(settings, f.name)]
        if names or Path(record["run"]).resolve() != run.resolve():
            what = ", ".join(f"{n} (saved {getattr(saved, n)}, now {getattr(settings, n)})" for n in names)
            raise ConfigError(f"resume: {folder} was made otherwise: {what or record['run']}; use another --out")
    elif not overwrite:
        raise ConfigError(f"{folder} already holds a slimmed network; add to it with --resume, or use --overwrite")


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {"run": record["run"], "settings": record["settings"], **record}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); start again with --overwrite") from None


class _Slim:
    def __init__(
        self, run: Path, folder: Path, settings: SlimSettings, reporter: Reporter, options: dict[str, Any]
    ) -> None:
        self.run, self.folder, self.settings, self.reporter = run, folder, settings, reporter
        self.source = Source(run, options)

    def go(self, then: list[str], resume: bool, **budget: Any) -> Slimmed:
        report = None
        if resume:
            record = _read(self.folder / RECORD)
            self._small()
        else:
            model = load_model(self.source.path, self.source.device)
            record, report = self._prune(model)
        rows: dict[str, dict[str, Any]] = {row["name"]: row for row in record["rows"]}
        for name in then:
            result = self._train(name, rows, resume, **budget)
            rows[name] = _row(name, result.params, result.macs, result.test_acc, epochs=result.epochs)
            self._write(record, rows)
        return Slimmed(self.folder, list(rows.values()), report)

    def _prune(self, model: nn.Module) -> tuple[dict[str, Any], Report]:
        settings, source = self.settings, self.source
        if is_sparse(model):
            raise ConfigError(f"slim: expected a dense run, {self.run} has sparse layers; train it with --sparsity 0")
        large = source.test(model)[1]
        ratios = settings.ratio if settings.ratio is not None else settings.ratios or None
        batches = source.task.scoring_batches(source.device, settings.batches) if settings.method in DATA else None
        try:
            report = prune_(
                model,
                source.task.example(source.device)[:2],
                settings.method,
                ratios=ratios,
                target=settings.target,
                batches=batches,
                exclude=settings.exclude,
                coupled=settings.coupled,
                samples=settings.samples,
                seed=source.config.seed if settings.seed is None else settings.seed,
            )
        except (ValueError, ImportError) as error:
            raise ConfigError(str(error)) from None
        if report.params_after == report.params_before:
            raise ConfigError(f"slim: {settings.method} found nothing to remove; raise the ratio")
        self._clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        channels = report.channels
        if source.saved.channels is not None:
            channels = Channels.load(source.saved.channels).then(channels)
        channels.save(self.folder / CHANNELS)
        self._small()
        source.save(model, self.folder / "model.pt", None)
        self.reporter.show(report)
        rows = [
            _row("large", report.params_before, report.macs_before, large),
            _row("pruned", report.params_after, report.macs_after, source.test(model)[1]),
        ]
        record = {"run": str(self.run), "settings": settings.to_dict(), "report": report.to_dict(), "rows": rows}
        self._write(record, {row["name"]: row for row in rows})
        return record, report

    def _small(self) -> None:
        """From here on the run is that of the small network."""
        self.source.config = dataclasses.replace(self.source.config, channels=str(self.folder / CHANNELS))

    def _clear(self) -> None:
        """Remove what an earlier call wrote, and nothing else."""
        if (self.folder / RECORD).is_file():
            for name in THEN:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in (RECORD, CHANNELS, FRESH, "model.pt", "table.md"):
                (self.folder / name).unlink(missing_ok=True)

    def _train(
        self,
        name: str,
        rows: Mapping[str, Any],
        resume: bool,
        *,
        epochs: int | None,
        lr: float | None,
        cap: float | None,
    ) -> TrainResult:
        config = self.source.config.dense(snapshots=(), slimming=0.0, block_penalty=0.0, soft_filters=0.0)
        if name == "finetune":
            config = budgets.finetune(dataclasses.replace(config, init=str(self.folder / "model.pt")), epochs, lr)
        else:
            config = dataclasses.replace(config, init=str(self._fresh(config)))
            if epochs is not None:
                config = dataclasses.replace(config, epochs=epochs, steps=0)
            if lr is not None:
                config = dataclasses.replace(config, lr=lr)
            large, small = rows["large"]["macs"], rows["pruned"]["macs"]
            config = budgets.scratch_b(config, large, small, cap) if name == "scratch-b" else budgets.scratch_e(config)
        hint = "continue with the same sparsekern slim command and --resume"
        return train_part(config, self.folder / name, resume=resume, reporter=self.reporter, hint=hint)

    def _fresh(self, config: TrainConfig) -> Path:
        """The small network with weights of another seed: the run's own seed would give those it began with."""
        path = self.folder / FRESH
        if not path.is_file():
            seed = (self.source.config.seed if self.settings.seed is None else self.settings.seed) + 1
            saved = self.source.saved
            model = build_dense(dataclasses.replace(config, seed=seed, init=None), saved.in_shape, saved.num_classes)
            self.source.save(model, path, None)
        return path

    def _write(self, record: dict[str, Any], rows: Mapping[str, dict[str, Any]]) -> None:
        record["rows"] = list(rows.values())
        write_json(self.folder / RECORD, record)
        (self.folder / "table.md").write_text(markdown(record["rows"]), encoding="utf-8")


def _row(name: str, params: int, macs: int, test_acc: float | None, epochs: float | None = None) -> dict[str, Any]:
    return {"name": name, "params": params, "macs": macs, "epochs": epochs, "test_acc": test_acc}


HEAD = ("network", "parameters", "MACs per sample", "epochs", "test acc [%]")


def cells(row: Mapping[str, Any]) -> list[str]:
    """One line of the table under :data:`HEAD`."""
    epochs = "-" if row["epochs"] is None else f"{row['epochs']:.4g}"
    accuracy = "-" if row["test_acc"] is None else f"{100 * row['test_acc']:.2f}"
    return [row["name"], f"{row['params']:,}", f"{row['macs']:,}", epochs, accuracy]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    return text_table.markdown(HEAD, [cells(row) for row in rows])


def rich_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The table for a terminal."""
    return text_table.terminal(HEAD, [cells(row) for row in rows])
