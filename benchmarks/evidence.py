"""Runs a study of activations in a few minutes on one GPU: python -m benchmarks.evidence

Runs a plan with recipes/compare.py, several runs at once on one card. First times two runs of each arm, then uses as
many learning rates and seeds as fit. The study stays in a folder next to the record. If it was cut off, the same
command resumes it, and another plan is refused. Delete the folder to start a new one. The record has the last study
that was run.

The default plan is recipes/plans/cifar10-fast.yaml. The images of CIFAR-10 must be in --dataset: `x_train`, `y_train`,
`x_test` and `y_test` as NumPy arrays in an .npz file, or in several, which are concatenated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.common import QUICK_RESULTS, RESULTS, Goal, machine, make_parser, pick_device, write
from benchmarks.processes import ROOT, run_for
from hf_gem.compare.plan import Plan, PlanError, load_plan
from hf_gem.compare.study import Study, StudyError
from hf_gem.compare.words import mean

PLAN = ROOT / "recipes" / "plans" / "cifar10-fast.yaml"
DATASET = ROOT / "data" / "cifar10.npz"
SCRATCH = QUICK_RESULTS / "evidence"  # for the timed runs and prepared data
_LEAST_GRID = (3, 2)  # numbers of learning rates and tuning seeds
_MOST_SEEDS = 40
_RESERVE = 0.85  # share of the time; the rest is for the reports and for variation
_QUICK: dict[str, Any] = {"steps": 3, "warmup_steps": 1, "global_batch_size": 8, "micro_batch_size": 8}


def joined(parts: Sequence[Path], path: Path) -> Path:
    """Concatenates several .npz files, each with a part of the images, into one at `path`."""
    if len(parts) == 1:
        return parts[0]
    loaded = [np.load(part) for part in parts]
    arrays: Any = {key: np.concatenate([part[key] for part in loaded]) for key in loaded[0]}
    np.savez(path, **arrays)
    return path


def chosen(plan: Plan, arguments: argparse.Namespace) -> Plan:
    """Returns a plan with no arms but its baseline and those asked for.

    Raises:
        PlanError: There is no such arm.
    """
    wanted = arguments.arms or (["egem"] if arguments.quick and "egem" in plan.arms else plan.arms)
    for name in wanted:
        plan.require_arm(name)
    arms = {name: act for name, act in plan.arms.items() if name in {plan.baseline, *wanted}}
    return replace(plan, arms=arms, further_baselines=[name for name in plan.further_baselines if name in arms])


def pilot(plan: Plan) -> Plan:
    """Makes a plan with two runs of each arm, to measure their cost. Their outcomes are not used."""
    middle = plan.learning_rates[len(plan.learning_rates) // 2]
    arms = {name: acts[:1] for name, acts in plan.arms.items()}  # nothing is left to choose
    few: dict[str, Any] = {"arms": arms, "tuning_seeds": [], "final_seeds": [1000, 1001], "final_rates": 1}
    return replace(plan, name="pilot", learning_rates=[middle], **few)


def fitted(plan: Plan, seconds_a_run: float, seconds: float) -> Plan:
    """Fits a plan into a time, by choosing the number of its learning rates and seeds.

    It chooses the largest grid that leaves enough final seeds for a verdict, or else the smallest grid. One extension
    of the grid is included in the time.
    """
    most = int(seconds / seconds_a_run)
    sizes = zip(_LEAST_GRID, (len(plan.learning_rates), len(plan.tuning_seeds)), strict=True)
    grids = itertools.product(*(range(min(least, size), size + 1) for least, size in sizes))
    for num_rates, num_seeds in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[1]), reverse=True):
        left = most - len(plan.acts) * (num_rates + 1) * num_seeds
        final = left // (len(plan.arms) * plan.final_rates)
        if final >= plan.min_seeds:
            break
    first = (len(plan.learning_rates) - num_rates + 1) // 2
    seeds = dict.fromkeys([*plan.final_seeds, *range(_MOST_SEEDS + len(plan.tuning_seeds))])
    free = [seed for seed in seeds if seed not in plan.tuning_seeds]
    return replace(
        plan,
        learning_rates=plan.learning_rates[first : first + num_rates],
        tuning_seeds=plan.tuning_seeds[:num_seeds],
        final_seeds=free[: max(2, min(_MOST_SEEDS, final))],
    )


def resumed(plan: Plan, folder: Path) -> Plan:
    """Returns the plan of a study that was cut off.

    Raises:
        PlanError: It differs from `plan` in more than what `fitted` changes.
    """
    found = Study(folder).plan
    fewer = ("learning_rates", "tuning_seeds")
    differ = [
        name
        for name, value in asdict(plan).items()
        if name not in (*fewer, "final_seeds") and getattr(found, name) != value
    ]
    differ += [name for name in fewer if not set(getattr(found, name)) <= set(getattr(plan, name))]
    if differ:
        raise PlanError(
            f"{folder} is a study of another plan, which differs in {', '.join(differ)}. Delete the folder to start a "
            "new study, or give the same plan and flags to resume it."
        )
    return found


def from_root(path: Path) -> Path:
    """Makes a path inside the repository relative to its root, so that a study can be resumed in another clone."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def compare(plan: Plan, folder: Path, jobs: int, seconds: float, flags: dict[str, Any]) -> Study:
    """Runs a plan with recipes/compare.py until its time is up."""
    path = SCRATCH / f"{plan.name}.yaml"
    path.write_text(yaml.safe_dump(asdict(plan), sort_keys=False))
    settings = [f"{name}={value}" for name, value in flags.items()]
    command = [sys.executable, "recipes/compare.py", "--plan", str(path), "--study", str(from_root(folder))]
    command += ["--jobs", str(jobs), *(["--set", *settings] if settings else [])]
    ended = run_for(seconds, command, {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))})
    if ended.status and not ended.stopped:
        raise RuntimeError(f"the study {plan.name} exited with status {ended.status}: {ended.last_lines[-1:]}")
    if not list((folder / "records").glob("*.json")):
        raise RuntimeError(f"the time was up before the study {plan.name} had a record. Give more --minutes")
    return Study(folder)


def seconds_a_run(study: Study) -> float:
    """Computes the time per run of a study with several runs at once, from the first start to the last record.

    If a study was cut off and resumed, the time in between counts too.
    """
    records = list((study.folder / "records").glob("*.json"))
    sessions = [json.loads(path.read_text())["sessions"][0] for path in records]
    first = min(datetime.fromisoformat(session["started"]).timestamp() for session in sessions)
    return (max(path.stat().st_mtime for path in records) - first) / len(records)


def findings(study: Study) -> dict[str, Any]:
    """Returns the results of a study for each arm, as JSON; empty until its tuning is finished."""
    try:
        choices = study.choices()
    except StudyError:
        return {"comparisons": []}
    compared = [
        {
            **{key: getattr(c, key) for key in ("arm", "seeds", "difference", "interval", "p_holm", "verdict")},
            "choice": choices[c.arm],
            "mean": mean(dict(enumerate(c.values))),
            "baseline_mean": mean(dict(enumerate(c.baseline))),
        }
        for c in study.comparisons()
    ]
    return {"metric": study.plan.metric, "baseline": study.plan.baseline, "comparisons": compared}


def flags_of(arguments: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """Returns the flags of the recipe that override those of the plan, and concatenates the dataset.

    Raises:
        FileNotFoundError: A part of the dataset is missing.
    """
    flags: dict[str, Any] = {}
    is_cifar10 = plan.preset.startswith("cifar10")
    if arguments.quick:
        flags |= _QUICK | ({"model": "resnet8x2-cifar"} if is_cifar10 else {})
    if parts := arguments.dataset or ([DATASET] if is_cifar10 else []):
        if missing := [path for path in parts if not path.exists()]:
            raise FileNotFoundError(
                f"the study needs {'CIFAR-10' if is_cifar10 else 'its images'} in {missing[0]}: x_train, y_train, "
                "x_test, y_test, from np.savez"
            )
        flags["dataset"] = str(from_root(joined(parts, SCRATCH / "dataset.npz")))
    return flags


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Goal], list[str]]:
    began, device = time.monotonic(), pick_device(arguments.device)
    plan, jobs = arguments.plan, arguments.jobs or max(1, min(8, (os.cpu_count() or 1) // 2))
    SCRATCH.mkdir(parents=True, exist_ok=True)
    try:
        flags = flags_of(arguments, plan)
    except FileNotFoundError as error:
        return {}, [], [str(error)]
    results = arguments.results or (QUICK_RESULTS if arguments.quick else RESULTS)
    folder = results / machine(device) / plan.name
    first = pilot(plan)
    if arguments.quick:
        plan = replace(first, name=plan.name, final_seeds=[0, 1])
    if (folder / "plan.json").exists():
        plan = resumed(replace(plan, flags=plan.flags | flags), folder)
    else:
        shutil.rmtree(SCRATCH / "pilot", ignore_errors=True)
        each = seconds_a_run(compare(first, SCRATCH / "pilot", jobs, 60 * arguments.minutes, flags))
        left = 60 * arguments.minutes * _RESERVE - (time.monotonic() - began)
        plan = plan if arguments.quick else fitted(plan, each, left)
    study = compare(plan, folder, jobs, 60 * arguments.minutes - (time.monotonic() - began), flags)
    seconds = study.seconds()
    if not study.left():
        shutil.rmtree(folder / "runs", ignore_errors=True)  # the records have all that matters
    cost = {
        "runs": len(seconds),
        "runs at once": jobs,
        "seconds a run": round(seconds_a_run(study), 2),
        "seconds of training in a run": round(statistics.median(seconds), 2),
        "learning rates": len(plan.learning_rates),
        "tuning seeds": len(plan.tuning_seeds),
        "final seeds": len(plan.final_seeds),
    }
    goals = [Goal("runs that the study lacks", study.left(), 0)]
    return {"cost": cost, "study": folder.name, **findings(study)}, goals, []


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--plan", type=Path, default=PLAN, help=f"plan file (default: {PLAN.name})")
    parser.add_argument("--minutes", type=float, default=8.0, help="total time (default: 8)")
    parser.add_argument("--jobs", type=int, help="runs at once; by default one per two cores, at most 8")
    parser.add_argument("--arms", nargs="+", help="arms to compare with the plan's baseline (default: all)")
    parser.add_argument("--dataset", type=Path, nargs="+", help="(default for CIFAR-10: data/cifar10.npz)")
    arguments = parser.parse_args(argv)
    try:
        arguments.plan = chosen(load_plan(arguments.plan), arguments)
        found = run(arguments)
    except PlanError as error:
        parser.error(str(error))
    write("evidence", arguments, argv, *found)


if __name__ == "__main__":
    main()
