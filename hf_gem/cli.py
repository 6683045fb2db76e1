"""The command `hf-gem`."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """`hf-gem report`, `summary` and `card`: pages made from the records of studies."""
    parser = argparse.ArgumentParser(prog="hf-gem", description="Tools of hf_gem; training is in recipes/.")
    commands = parser.add_subparsers(required=True)
    report = commands.add_parser("report", help="write the report of a study from its records")
    report.add_argument("study", type=Path, help="folder of a study that recipes/compare.py has made")
    report.add_argument("--baseline", help="another arm than the plan's, in a folder of its own in that of the study")
    report.set_defaults(run=_report)
    summary = commands.add_parser("summary", help="compare activations with one baseline, over several studies")
    summary.add_argument("study", type=Path, nargs="+", help="their folders")
    summary.add_argument("--baseline", default="relu", help="an arm of all of them (default: relu)")
    summary.add_argument("--output_dir", type=Path, default=Path(), help="of summary.md and .html (default: here)")
    summary.set_defaults(run=_summary)
    card = commands.add_parser("card", help="put what a study found about an activation into the model card of a run")
    card.add_argument("folder", type=Path, help="output folder of the run, with README.md and record.json")
    card.add_argument("study", type=Path, help="folder of a study of the same recipe")
    card.add_argument("--record", type=Path, help="the run's record, where it lies elsewhere")
    card.set_defaults(run=_card)
    arguments = parser.parse_args(argv)

    from .training.signals import run_recipe

    try:
        run_recipe(lambda: print(arguments.run(arguments)))
    except ModuleNotFoundError as error:
        parser.exit(1, f'error: {error}; pip install -e ".[train]" in the clone of hf_gem brings what this needs\n')


def _report(arguments: argparse.Namespace) -> str:
    from .compare.report import write_report
    from .compare.study import Study

    return f"Report: {write_report(Study(arguments.study), arguments.baseline)}"


def _summary(arguments: argparse.Namespace) -> str:
    from .compare.study import Study
    from .compare.summary import write_summary

    studies = [Study(folder) for folder in arguments.study]
    return f"Summary: {write_summary(studies, arguments.baseline, arguments.output_dir)}"


def _card(arguments: argparse.Namespace) -> str:
    from .compare.card import add_comparison
    from .compare.study import Study
    from .training.errors import ConfigError
    from .training.record import read_record

    card, record = arguments.folder / "README.md", arguments.record or arguments.folder / "record.json"
    if not record.exists():
        raise ConfigError(f"there is no record {record}; name that of the run with --record")
    try:
        found = read_record(record)
    except ValueError as error:
        raise ConfigError(f"{error}; name the record of the run with --record") from error
    add_comparison(card, found, Study(arguments.study))
    return f"Model card: {card}"


if __name__ == "__main__":
    main()
