"""Compares activations by a plan: hf-gem compare --plan smoke

Runs the missing runs of a study, one after another or --jobs at once, and writes its report. After a crash, the same
command continues where it stopped. Several machines may share the folder of a study.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from hf_gem.compare.driver import Driver
from hf_gem.compare.estimate import estimate
from hf_gem.compare.plan import PlanError, load_plan, parse_flags
from hf_gem.compare.preview import dry_run, preview
from hf_gem.compare.report import write_report
from hf_gem.compare.study import Study, freeze
from hf_gem.recipes import plan_files
from hf_gem.training.signals import run_recipe

RECIPES = Path(__file__).resolve().parent


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line, including the flags in `--set`."""
    parser = argparse.ArgumentParser(
        prog="hf-gem compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, required=True, help="plan file, YAML or Python, or a name from plans/")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FLAG=VALUE",
        help="flags of the recipe that override those of the plan",
    )
    parser.add_argument("--note", default="", help="remark on your data for the report, added to the plan's notes")
    parser.add_argument("--study", type=Path, help="folder of the study (default: studies/NAME-OF-PLAN)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="number of runs at once (default: 1), assigned to the GPUs in turn; a second driver needs its own "
        "CUDA_VISIBLE_DEVICES. 0 runs one after another in this process, which is faster if a run takes seconds",
    )
    parser.add_argument("--dry_run", action="store_true", help="only print what would run")
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="only print how long the study takes, after two short runs of its baseline, --jobs of each at once",
    )
    parser.add_argument(
        "--allow_mixed", action="store_true", help="accept records with different code, versions or data"
    )
    arguments = parser.parse_args(argv)
    if arguments.jobs < 0:
        parser.error(f"--jobs must be at least 0, got {arguments.jobs}")
    try:
        arguments.set = parse_flags(arguments.set)
    except PlanError as error:
        parser.error(str(error))
    return arguments


def plan_file(given: Path) -> Path:
    """Returns the file of a plan that was given by its path or its name."""
    plans = plan_files(RECIPES)
    if given.exists() and not given.is_dir():
        return given
    if str(given) not in plans:
        raise PlanError(f"there is no plan {str(given)!r:.80}. Give the path of a file, or one of {', '.join(plans)}.")
    return plans[str(given)]


def main(argv: list[str] | None = None) -> None:
    arguments = arguments_of(argv)
    plan = load_plan(plan_file(arguments.plan))
    plan = replace(plan, flags={**plan.flags, **arguments.set}, notes=f"{plan.notes} {arguments.note}".strip())
    folder = arguments.study or Path("studies") / plan.name
    print(preview(plan), end="")
    if arguments.dry_run:
        print(dry_run(plan, folder, arguments.jobs), end="")
    if arguments.estimate:
        print(estimate(plan, RECIPES, arguments.jobs), end="")
    if arguments.dry_run or arguments.estimate:
        return
    freeze(plan, folder)
    study = Study(folder)
    Driver(study, RECIPES, arguments.jobs, arguments.allow_mixed).run()
    print(f"Report: {write_report(study)}")


if __name__ == "__main__":
    run_recipe(main)
