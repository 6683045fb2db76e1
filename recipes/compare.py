"""Compares activations by a plan: python recipes/compare.py --plan recipes/plans/smoke.yaml

Runs what is missing of the study, one run after the other or --jobs at once, and writes its report. Started again
after a crash, it goes on where it was; several machines may share the folder of a study.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import yaml

from hf_gem.compare.plan import load_plan
from hf_gem.compare.report import detectable, write_report
from hf_gem.compare.study import PLAN, Study, freeze
from hf_gem.training.signals import run_recipe

RECIPES = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="file of the plan, YAML or Python")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FLAG=VALUE",
        help="flags of the recipe, in place of those of the plan",
    )
    parser.add_argument(
        "--note", default="", help="what the report is to say of your data, behind the plan's own notes"
    )
    parser.add_argument("--study", type=Path, help="folder of the study (default: studies/ and the name of the plan)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at once (default: 1), one on each GPU in turn; a second driver needs a CUDA_VISIBLE_DEVICES",
    )
    parser.add_argument("--dry_run", action="store_true", help="only say what would run")
    parser.add_argument("--allow_mixed", action="store_true", help="take records of other code, versions or data too")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    plan = load_plan(arguments.plan)
    plan = replace(plan, notes=f"{plan.notes} {arguments.note}".strip())
    for flag in arguments.set:
        name, equals, value = flag.partition("=")
        if not (name and equals and value):
            parser.error(f"--set takes FLAG=VALUE, such as dataset=data/mnist, got {flag!r}")
        plan = replace(plan, flags={**plan.flags, name: yaml.safe_load(value)})
    folder = arguments.study or Path("studies") / plan.name
    tuning, final = plan.num_runs()
    print(
        f"{plan.name}: {len(plan.arms)} arms, {tuning} runs for tuning (more, where a grid is extended), {final} on "
        f"the final seeds, {plan.flags.get('steps', 'as many as the preset has')} steps each"
    )
    print(f"{detectable(plan)}; the smallest effect of interest is {plan.smallest_effect:g} ({plan.metric})")
    if arguments.dry_run:
        missing, left, seconds = list(plan.tuning_runs()), tuning + final, []
        if (folder / PLAN).exists():
            freeze(plan, folder)  # which refuses another plan
            study = Study(folder, RECIPES)
            missing, left, seconds = study.missing(), study.left(), study.seconds()
        if seconds:
            each = sum(seconds) / len(seconds)
            hours = left * each / 3600 / arguments.jobs
            print(f"{len(seconds)} runs are done, {each:,.0f} s each; what is planned takes {hours:.1f} hours more")
        else:
            print("What a run costs is known when one has finished; ask again then")
        for run in missing:
            print(f"  {run.name}")
        if left > len(missing):
            print(f"  then {len(plan.final_seeds)} seeds of each arm, as tuned")
        return
    freeze(plan, folder)
    study = Study(folder, RECIPES, arguments.allow_mixed)
    study.run(arguments.jobs)
    print(f"Report: {write_report(study)}")


if __name__ == "__main__":
    run_recipe(main)
