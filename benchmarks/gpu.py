"""Runs all GPU benchmarks in half an hour: make gpu, or python -m benchmarks.gpu [STAGE ...]

Each stage runs a script of this folder in its own process, with a time limit. It writes a record, and then the page of
this machine is written again, so a failure costs only one stage. The exit status is 1 if a stage failed. `gpu.json` and
the page contain its last lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.common import QUICK_RESULTS, RESULTS, Goal, machine, make_parser, pick_device, write
from benchmarks.processes import run_for
from hf_gem.files import shown

_PLANNED = 0.93  # share of a stage's time; the rest is for starting it and writing its record


@dataclass(frozen=True)
class Stage:
    """A script of this folder.

    Attributes:
        script: Name of the script.
        flags: Flags of its command line.
        quick_flags: Flags of its command line for --quick.
        plans: Whether it takes `--minutes` and does what fits, rather than being cut off.
    """

    script: str
    flags: tuple[str, ...] = ()
    quick_flags: tuple[str, ...] = ()
    plans: bool = False


STAGES = {
    "tests": Stage("device", plans=True),
    "activations": Stage("activation", ("--rounds=15",)),
    "memory": Stage("memory"),
    "training": Stage("recipe_step", plans=True),
    "evidence": Stage("evidence", plans=True),
    "models": Stage(
        "train_step",
        ("--models", "bert", "resnet50", "--modes", "compiled", "--activations", "gem_n2"),
        ("--models", "bert", "--modes", "eager", "--activations", "gem_n2"),
    ),
}


def command(stage: Stage, arguments: argparse.Namespace) -> list[str]:
    """Returns the command line of a stage."""
    flags = [*(stage.quick_flags if arguments.quick else stage.flags)]
    flags += ["--quick", "--rounds=2"] if arguments.quick else []
    flags += [f"--{name}={value}" for name in ("device", "rounds", "results") if (value := getattr(arguments, name))]
    if stage.plans:
        flags.append(f"--minutes={arguments.minutes * _PLANNED:g}")
    if stage.script == "evidence" and arguments.dataset:
        flags += ["--dataset", *arguments.dataset]
    return [sys.executable, "-m", f"benchmarks.{stage.script}", *flags]


def run_stage(stage: Stage, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a stage, and returns its command, how it ended, and its last lines if it failed."""
    env = {"PYTHONUNBUFFERED": "1", **({"CUDA_VISIBLE_DEVICES": ""} if arguments.device == "cpu" else {})}
    ended = run_for(60 * arguments.minutes, command(stage, arguments), env, group=True)
    outcome = "well" if ended.status == 0 else "its time was up" if ended.stopped else f"with status {ended.status}"
    return {
        "command": command(stage, arguments)[1:],
        "outcome": outcome,
        "failed": ended.status != 0,
        "seconds": ended.seconds,
        "last_lines": ended.last_lines if ended.status else [],
    }


def earlier_stages(results: Path) -> dict[str, Any]:
    """Reads the stages of an earlier run."""
    path = results / "gpu.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"]["stages"] if path.exists() else {}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, rounds=0)
    parser.set_defaults(rounds=None)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"by default all: {', '.join(STAGES)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of each stage (default: 9)")
    parser.add_argument("--dataset", nargs="+", default=[], help="CIFAR-10 as .npz, for `evidence`; see its --help")
    arguments = parser.parse_intermixed_args(argv)
    if unknown := [name for name in arguments.stages if name not in STAGES]:
        parser.error(f"unknown stage {shown(unknown[0])}. The stages are {', '.join(STAGES)}. Name one.")
    device = pick_device(arguments.device)
    results = arguments.results or (QUICK_RESULTS if arguments.quick else RESULTS)
    chosen = arguments.stages or list(STAGES)
    stages = earlier_stages(results / machine(device))
    for name in chosen:
        print(f"\n== {name}", flush=True)
        stages[name] = run_stage(STAGES[name], arguments)
        goals = [Goal("stages that failed", sum(stage["failed"] for stage in stages.values()), 0)]
        write("gpu", arguments, argv, {"stages": stages}, goals)
        report.write_pages(results, report.load(results))
    if results == RESULTS:
        report.report(RESULTS, report.README)
    print(f"\nAll tables: {results / machine(device) / 'README.md'}")
    if any(stages[name]["failed"] for name in chosen):
        sys.exit(1)


if __name__ == "__main__":
    main()
