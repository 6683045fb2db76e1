"""`hf-gem report`, `summary` and `card`: write pages from the records of studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training.errors import ConfigError


def report(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Folder of a study that `hf-gem compare` ran.")],
    baseline: Annotated[
        str | None, typer.Option(help="Baseline to use instead of the plan's. The report then gets its own folder.")
    ] = None,
) -> None:
    """Write the report of a study from its records."""
    from ..compare.report import write_report
    from ..compare.study import Study

    print(f"Report: {write_report(Study(study), baseline)}")


def summary(
    study: Annotated[list[Path], typer.Argument(metavar="STUDY", help="Folders of the studies.")],
    baseline: Annotated[str, typer.Option(help="An arm that all studies have.")] = "relu",
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "--output_dir", help="Folder for summary.md, summary.html and summary.png.")
    ] = Path(),
) -> None:
    """Compare activations with one baseline over several studies."""
    from ..compare.study import Study
    from ..compare.summary import write_summary

    print(f"Summary: {write_summary([Study(folder) for folder in study], baseline, output_dir)}")


def card(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Output folder of the run, with README.md and record.json.")
    ],
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Folder of a study of the same recipe.")],
    record: Annotated[Path | None, typer.Option(help="The run's record, if it is elsewhere.")] = None,
) -> None:
    """Add the results of a study to the model card of a run."""
    from ..compare.card import add_comparison
    from ..compare.study import Study
    from ..training.record import read_record

    record, page = record or folder / "record.json", folder / "README.md"
    if not record.exists():
        raise ConfigError(f"there is no record {record}; name that of the run with --record")
    try:
        found = read_record(record)
    except ValueError as error:
        raise ConfigError(f"{error}; name the record of the run with --record") from error
    add_comparison(page, found, Study(study))
    print(f"Model card: {page}")
