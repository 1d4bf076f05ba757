"""``sparsekern prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekern.cli.options import with_config_options
from sparsekern.training.errors import ConfigError
from sparsekern.training.prune_settings import RUN_OPTIONS, STRATEGIES, PruneSettings

_WHAT, _LADDER, _THEN, _RUN = "What to prune", "Ladder", "Afterwards", "Run"


@with_config_options(RUN_OPTIONS, before="progress")
def prune_command(
    run: Annotated[Path, typer.Argument(help="Run folder, model.pt or snapshot of the network to prune.")],
    criterion: Annotated[
        str | None,
        typer.Option(
            help="What says which weights go: magnitude, gradient, random, snip, grasp, synflow, lamp. "
            "Default: magnitude.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of the pruned layers' weights to remove. Default: 0.9.",
                                   rich_help_panel=_WHAT)
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(help="Where weights compete: global, layer. Default: global; layer with --allocation.",
                     rich_help_panel=_WHAT),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(help="How scope layer spreads the sparsity (uniform, erk, ...). Default: uniform.",
                     rich_help_panel=_WHAT),
    ] = None,
    block: Annotated[
        str | None,
        typer.Option(metavar="B|BOxBI", help="Blocks that go whole; 1 is unstructured. Default: 1, or those stored.",
                     rich_help_panel=_WHAT),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Layers to prune, stem and classifier too where they match ('*' is all). "
                     "Default: all but these two.", rich_help_panel=_WHAT),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Layers to leave as they are.", rich_help_panel=_WHAT),
    ] = None,
    score_batches: Annotated[
        int | None,
        typer.Option(help="Training batches for gradient, snip and grasp. Default: 4.", rich_help_panel=_WHAT),
    ] = None,
    below_break_even: Annotated[
        str | None,
        typer.Option(help="Layers whose sparse kernel is slower than dense: sparse, masked. Default: sparse.",
                     rich_help_panel=_WHAT),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of random scores and fresh weights; level k adds k. Default: the run's.",
                     rich_help_panel=_WHAT),
    ] = None,
    levels: Annotated[
        int | None,
        typer.Option(help="Levels of a ladder, each a run of its own, instead of --sparsity.",
                     rich_help_panel=_LADDER),
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(help="Of what is left, how much each level removes. Default: 0.2.", rich_help_panel=_LADDER),
    ] = None,
    one_shot: Annotated[
        bool | None,
        typer.Option("--one-shot/--iterative", help="Prune every level from RUN, or from the level before (default).",
                     rich_help_panel=_LADDER, show_default=False),
    ] = None,
    then: Annotated[
        str | None, typer.Option(help=f"{', '.join(STRATEGIES)}. Default: finetune.", rich_help_panel=_THEN)
    ] = None,
    rewind_step: Annotated[
        int | None,
        typer.Option(help="Step that lottery rewinds to; RUN keeps it with --snapshots.", rich_help_panel=_THEN),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Epochs instead of the strategy's own; of lr-rewind: the last ones of the schedule.",
                     rich_help_panel=_THEN),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate instead of the strategy's own.", rich_help_panel=_THEN)
    ] = None,
    cap: Annotated[
        float | None,
        typer.Option(help="Most times as long that scratch-b trains (2 on ImageNet in the paper). Default: no limit.",
                     rich_help_panel=_THEN),
    ] = None,
    rescale: Annotated[
        bool | None,
        typer.Option("--rescale/--no-rescale", help="Multiply fresh weights by 1/sqrt(density). Default: no.",
                     rich_help_panel=_THEN, show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to. Default: RUN-CRITERION-SPARSITY-THEN beside the run.",
                                   rich_help_panel=_RUN)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue in --out; options come from there.", rich_help_panel=_RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier pruning in --out.", rich_help_panel=_RUN)
    ] = False,
    progress: Annotated[
        bool, typer.Option("--progress/--no-progress", help="Draw a progress bar on a terminal.", rich_help_panel=_RUN)
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.", rich_help_panel=_RUN)] = False,
    **run_options: Any,
) -> None:  # fmt: skip
    """Prune a trained network to real sparse storage, then train it on; once, or down a ladder of levels.

    Each level leaves its starting network (level-01.pt) and its run folder (level-01) in --out, and ladder.json,
    table.md and ladder.png sum up. A killed ladder continues with --resume.
    """
    from sparsekern.training.after_pruning import after, read_settings
    from sparsekern.training.progress import Reporter, TerminalReporter
    from sparsekern.training.prune_table import rich_table

    given = {
        "then": then,
        "criterion": criterion,
        "scope": scope,
        "sparsity": sparsity,
        "block": block,
        "allocation": allocation,
        "layers": tuple(layers) if layers else None,
        "exclude": tuple(exclude) if exclude else None,
        "levels": levels,
        "fraction": fraction,
        "one_shot": one_shot,
        "rewind_step": rewind_step,
        "epochs": epochs,
        "lr": lr,
        "cap": cap,
        "rescale": rescale,
        "seed": seed,
        "score_batches": score_batches,
        "below_break_even": below_break_even,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if resume:
        if out is None:
            raise ConfigError("resume: needs the folder of the pruning (--out)")
        saved, _, _ = read_settings(out)
        options = {**saved.to_dict(), **options}
    settings = PruneSettings.from_dict(options)
    folder = out if out is not None else _default_folder(run, settings)
    terminal = TerminalReporter(bar=progress and not quiet)
    if not quiet:
        typer.echo(f"{settings.describe()}; {folder}")
    pruning = after(
        run,
        out=folder,
        resume=resume,
        overwrite=overwrite,
        reporter=Reporter() if quiet else terminal,
        run_options=run_options,
        **settings.to_dict(),
    )
    terminal.show(rich_table(pruning.rows))
    if not quiet:
        typer.echo(f"{folder / 'table.md'}, {folder / 'ladder.json'}")


def _default_folder(run: Path, settings: PruneSettings) -> Path:
    from sparsekern.training.prune_start import beside, folder_of

    kind = f"{settings.levels}-levels" if settings.levels else f"s{settings.sparsity:g}"
    return beside(folder_of(run), f"{settings.criterion}-{kind}-{settings.then}")
