"""``sparsekern train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekern.cli import recipes
from sparsekern.cli.options import with_config_options
from sparsekern.training.config import TrainConfig, load_yaml
from sparsekern.training.errors import ConfigError
from sparsekern.training.method_options import without_foreign

_START, _RUN = "Start from", "Run"


@with_config_options(before="out")
def train_command(
    recipe: Annotated[
        str | None, typer.Option(help="Named preset, see `sparsekern recipes`.", rich_help_panel=_START)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of option values, over the recipe.", rich_help_panel=_START)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/MODEL-DATA-SPARSITY[-METHOD].", rich_help_panel=_RUN)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out; options come from there.", rich_help_panel=_RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in --out.", rich_help_panel=_RUN)
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also train the dense twin and the narrower dense net of equal MACs, and print one table.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    progress: Annotated[
        bool, typer.Option("--progress/--no-progress", help="Draw a progress bar on a terminal.", rich_help_panel=_RUN)
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.", rich_help_panel=_RUN)] = False,
    **values: Any,
) -> None:
    """Train a network, sparse by default; --sparsity 0 trains it dense.

    Later values win: defaults, --recipe, --config, options. The run folder gets config.yaml, plan.json,
    metrics.jsonl, curves.png, model.pt, result.json and checkpoints. With --method, stored blocks move during training
    and R_s is the fraction of weights that were stored at some time.
    """
    from sparsekern.training.progress import Reporter, TerminalReporter

    saved: dict[str, Any] = {}
    if resume:
        if overwrite:
            raise ConfigError("expected --resume or --overwrite, got both")
        if out is not None and (out / "config.yaml").is_file():
            saved = load_yaml(out / "config.yaml")
    preset = recipes.load(recipe).config if recipe else {}
    file = load_yaml(config) if config else {}
    if method := {**file, **values}.get("method"):
        # A recipe's baselines: `--recipe rigl-wrn --method static` has no use for when to update.
        preset = without_foreign(preset, method)
    settings = TrainConfig(**{**saved, **preset, **file, **values})
    folder = out if out is not None else default_folder(settings, compare, resume=resume, overwrite=overwrite)
    reporter = Reporter() if quiet else TerminalReporter(bar=progress)
    if compare or (resume and (folder / "compare.json").is_file()):
        _compare(settings, folder, resume, overwrite, reporter)
    else:
        _train(settings, folder, resume, overwrite, reporter)


def _train(settings: TrainConfig, folder: Path, resume: bool, overwrite: bool, reporter: Any) -> None:
    from sparsekern.training.loop import train

    result = train(settings, folder, resume=resume, overwrite=overwrite, reporter=reporter)
    accuracy = "" if result.test_acc is None else f"test accuracy {100 * result.test_acc:.2f} %, "
    if result.test_acc_at_best_val is not None:
        accuracy += f"{100 * result.test_acc_at_best_val:.2f} % at the best validation accuracy, "
    step = 1e3 * result.step_seconds["total"]
    size = f"{result.params:,} parameters, {result.macs:,} MACs per sample"
    moved = ""
    if settings.method != "static" and result.exploration_rate is not None:
        moved = f", R_s {result.exploration_rate:.3f}"
        if result.reliably_explored is not None:
            moved += f" ({result.reliably_explored:.3f} reliably) after {result.updates} updates"
    typer.echo(f"{accuracy}{size}{moved}, {step:.2f} ms per step; {folder}")


def _compare(settings: TrainConfig, folder: Path, resume: bool, overwrite: bool, reporter: Any) -> None:
    from sparsekern.training.comparison import compare, rich_table
    from sparsekern.training.progress import TerminalReporter

    comparison = compare(settings, folder, resume=resume, overwrite=overwrite, reporter=reporter)
    TerminalReporter(bar=False).show(rich_table(comparison))
    typer.echo(f"{folder / 'table.md'}, {folder / 'curves.png'}")


def default_folder(config: TrainConfig, compare: bool, *, resume: bool, overwrite: bool) -> Path:
    """``runs/MODEL-DATA-sSPARSITY[-METHOD][-compare]``; numbered where taken, the latest number when resuming."""
    kind = f"s{config.sparsity:g}" if config.sparsity else "dense"
    kind = "init" if config.init is not None and config.method != "gradual" else kind
    kind += f"-{config.method}" if config.method != "static" else ""
    base = Path("runs") / f"{config.model}-{config.data}-{kind}{'-compare' if compare else ''}"
    number, folder, latest = 1, base, None
    while folder.exists():
        latest, number = folder, number + 1
        folder = base.with_name(f"{base.name}-{number}")
    if resume:
        if latest is None:
            raise ConfigError(f"resume: no run in {base}; name its folder with --out")
        return latest
    return base if overwrite else folder
