"""``sparsekern slim``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekern.training.errors import ConfigError

_WHAT, _THEN, _RUN = "What goes", "Then", "Run"


def slim_command(
    run: Annotated[Path, typer.Argument(help="Run folder, model.pt or snapshot of a dense network.")],
    method: Annotated[
        str,
        typer.Option(
            help="l1-filters, thinet, regression, slimming, sss, soft-filters or uniform.", rich_help_panel=_WHAT
        ),
    ] = "l1-filters",
    ratio: Annotated[
        list[str] | None,
        typer.Option(
            metavar="R|GLOB=R",
            help="Fraction of channels removed, everywhere or in the layers that a glob matches; repeatable. For "
            "slimming of all channels together, for sss of the blocks.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Published architecture instead, such as vgg16-a.", rich_help_panel=_WHAT)
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Layers whose channels all stay; repeatable.", rich_help_panel=_WHAT),
    ] = None,
    coupled: Annotated[
        bool | None,
        typer.Option(
            "--coupled/--no-coupled",
            help="Also prune channels that residual additions tie. Default: for uniform.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    batches: Annotated[
        int, typer.Option(help="Training batches that thinet and regression look at.", rich_help_panel=_WHAT)
    ] = 4,
    samples: Annotated[int, typer.Option(help="Positions sampled from them.", rich_help_panel=_WHAT)] = 5000,
    seed: Annotated[
        int | None, typer.Option(help="Seed of samples and fresh weights. Default: the run's.", rich_help_panel=_WHAT)
    ] = None,
    then: Annotated[
        list[str] | None,
        typer.Option(help="finetune, scratch-e or scratch-b; repeatable. Default: prune only.", rich_help_panel=_THEN),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Of fine-tuning (default 40, 20 on image folders), or of the large network that scratch budgets count "
            "from (default: the run's).",
            rich_help_panel=_THEN,
            show_default=False,
            min=1,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate in place of the strategy's own.", rich_help_panel=_THEN, show_default=False),
    ] = None,
    cap: Annotated[
        float | None, typer.Option(help="Most times as long that scratch-b trains.", rich_help_panel=_THEN)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to. Default: RUN-METHOD beside RUN.", rich_help_panel=_RUN)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is in --out, add what is missing.", rich_help_panel=_RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result in --out.", rich_help_panel=_RUN)
    ] = False,
    data_dir: Annotated[
        str | None, typer.Option(help="Folder of the data files, if not the run's.", rich_help_panel=_RUN)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda[:N], if not the run's.", rich_help_panel=_RUN)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads, if not the run's.", rich_help_panel=_RUN)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.", rich_help_panel=_RUN)] = False,
) -> None:
    """Prune whole channels or blocks of a trained run: what is left is a smaller dense network.

    Writes model.pt (the small network), channels.json (which channels are left), slim.json, table.md and a run folder
    per --then. `sparsekern train --channels channels.json` trains the same architecture with other options.
    """
    from sparsekern.training.progress import Reporter, TerminalReporter
    from sparsekern.training.prune_start import beside
    from sparsekern.training.slim import rich_table, slim

    one, globs = _ratios(ratio or [])
    options = {"data_dir": data_dir, "device": device, "threads": threads}
    folder = out if out is not None else beside(run.with_suffix("") if run.is_file() else run, method)
    reporter = Reporter() if quiet else TerminalReporter()
    result = slim(
        run,
        folder,
        _list(then),
        epochs=epochs,
        lr=lr,
        cap=cap,
        resume=resume,
        overwrite=overwrite,
        reporter=reporter,
        run_options={name: value for name, value in options.items() if value is not None},
        method=method,
        ratio=one,
        ratios=globs,
        target=target,
        exclude=tuple(_list(exclude)),
        coupled=coupled,
        batches=batches,
        samples=samples,
        seed=seed,
    )
    TerminalReporter(bar=False).show(rich_table(result.rows))
    typer.echo(f"{result.folder / 'model.pt'}, {result.folder / 'channels.json'}")


def _list(values: list[str] | None) -> list[str]:
    """Entries of a repeatable option that may also be separated by commas."""
    return [part.strip() for value in values or [] for part in value.split(",") if part.strip()]


def _ratios(entries: list[str]) -> tuple[float | None, dict[str, float]]:
    one: float | None = None
    globs: dict[str, float] = {}
    for entry in _list(entries):
        glob, sign, number = entry.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise ConfigError(f"ratio: expected a fraction such as 0.5, or GLOB=0.5, got {entry!r}") from None
        if not 0 <= value < 1:
            raise ConfigError(f"ratio: expected a fraction from 0 to below 1, got {value:g}")
        if sign:
            globs[glob] = value
        else:
            one = value
    return one, globs
