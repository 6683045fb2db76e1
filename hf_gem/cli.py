"""The command `hf-gem`."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """`hf-gem report STUDY` writes the report of a study anew, from its records."""
    parser = argparse.ArgumentParser(prog="hf-gem", description="Tools of hf_gem; training is in recipes/.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="write the report of a study from its records")
    report.add_argument("study", type=Path, help="folder of a study that recipes/compare.py has made")
    arguments = parser.parse_args(argv)

    from .compare.report import write_report
    from .compare.run import Study
    from .training.errors import run_recipe

    run_recipe(lambda: print(f"Report: {write_report(Study(arguments.study))}"))


if __name__ == "__main__":
    main()
