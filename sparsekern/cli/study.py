"""``sparsekern study``: many runs that answer one question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekern.cli.options import with_config_options
from sparsekern.studies.dst import VARIED
from sparsekern.training.config import load_yaml, option_names
from sparsekern.training.errors import ConfigError, Interrupted

study_app = typer.Typer(no_args_is_help=True, help="Train a matrix of nets and make tables and plots of them.")

_STUDY = "Study"


@study_app.callback()
def _studies() -> None:
    """Keeps ``dst`` a command of its own while there is no other."""


@study_app.command("dst")
@with_config_options([name for name in option_names() if name not in VARIED], before="out")
def dst_command(
    methods: Annotated[
        str | None, typer.Option(help="How blocks move. Default: static,set,rigl,gradual.", rich_help_panel=_STUDY)
    ] = None,
    sparsities: Annotated[str | None, typer.Option(help="Default: 0.8,0.9.", rich_help_panel=_STUDY)] = None,
    blocks: Annotated[str | None, typer.Option(help="Default: 1,8,16.", rich_help_panel=_STUDY)] = None,
    seeds: Annotated[str | None, typer.Option(help="Default: 0,1,2.", rich_help_panel=_STUDY)] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of option values that all nets share.", rich_help_panel=_STUDY)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the study.", rich_help_panel=_STUDY)] = Path("runs/dst"),
    workers: Annotated[int, typer.Option(help="Processes that share the work.", min=1, rich_help_panel=_STUDY)] = 1,
    table: Annotated[
        bool, typer.Option("--table", help="Train nothing: tables and plots of what is done.", rich_help_panel=_STUDY)
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Train failed nets again.", rich_help_panel=_STUDY)
    ] = False,
    outputs: Annotated[bool, typer.Option(hidden=True)] = True,
    **values: Any,
) -> None:
    """Static, dynamic and gradual sparsity against dense nets of equal epochs, parameters and MACs.

    Trains every method at every sparsity and block, the dense net, and per sparsity the narrower dense net of equal
    MACs, with every seed. Kill it at any time: the same command, or --out alone, goes on. A later call with more
    methods, sparsities, blocks or seeds adds them. Several processes may work on one folder.
    """
    from sparsekern.studies.dst import DstStudy
    from sparsekern.studies.folder import StudyFolder, open_study
    from sparsekern.studies.outputs import write_outputs
    from sparsekern.studies.runner import forget_failures, run_study, run_workers
    from sparsekern.studies.summary import summarise

    base = {**(load_yaml(config) if config else {}), **values}
    lists = {"methods": methods, "sparsities": sparsities, "blocks": blocks, "seeds": seeds}
    given = {name: _entries(name, text) for name, text in lists.items() if text is not None}
    exists = StudyFolder(out).study_file.exists()
    if table:
        if base or given:
            raise ConfigError("table: expected --out alone; the study is read from there")
        study = StudyFolder(out).load()
    else:
        saved = StudyFolder(out).load() if exists else DstStudy()
        # What is not given is as in the folder; open_study compares and adds.
        kept = {name: getattr(saved, name) for name in lists}
        study = open_study(out, DstStudy(**{**kept, **given}, base={**saved.base, **base}))
    if retry_failed:
        forget_failures(study, out)
    status = 0
    try:
        if not table and workers > 1:
            status = run_workers(out, workers)
        elif not table:
            run_study(study, out, say=typer.echo)
    except Interrupted as error:
        typer.echo(f"sparsekern: stopped; continue with: sparsekern study dst --out {out}", err=True)
        raise typer.Exit(128 + error.signal_number) from None
    if not outputs:
        raise typer.Exit(status)
    for path in write_outputs(out):
        typer.echo(path)
    failed = summarise(out).in_state("failed")
    for one in failed:
        typer.echo(f"failed: {one.cell.name}: {one.error}", err=True)
    raise typer.Exit(status or (1 if failed else 0))


def _entries(name: str, text: str) -> tuple[Any, ...]:
    kind: Any = {"sparsities": float, "seeds": int}.get(name, str)
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        example = "0.8,0.9" if name == "sparsities" else "0,1,2"
        raise ConfigError(f"{name}: expected numbers such as {example}, got {text!r}") from None
