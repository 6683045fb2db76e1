"""Estimates how long a study will take, from two short runs of its baseline arm."""

from __future__ import annotations

import json
import math
import signal
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..training.record import read_record
from ..training.signals import catch_signals, check
from .driver import Driver
from .executors import Child, Executor, InProcess, Processes, environment_of, last_lines
from .plan import Plan, PlanError, Run
from .preview import occupied
from .study import Study, StudyError, freeze
from .words import render

_SECONDS = 20.0  # the approximate time that the longer run spends on its steps
_TICK = 0.1  # seconds between checks for a signal


@dataclass(frozen=True)
class Short:
    """A short run, or the mean of several simultaneous ones. Times are in seconds.

    Attributes:
        steps: Number of steps.
        wall: Time from start to end.
        training: Time in the training loop, including evaluations and checkpoints.
        saving: Time to write the last checkpoint.
        first: Time of the first step, in an unknown unit: the tokens or images of a step.
        all_steps: Time of all steps, in the same unit.
    """

    steps: int
    wall: float
    training: float
    saving: float
    first: float
    all_steps: float

    @property
    def step_at_most(self) -> float:
        """An upper bound for the time of a step after the first. It includes evaluations."""
        later = (self.all_steps - self.first) / max(1, self.steps - 1) or self.first
        return self.training / self.all_steps * later


@dataclass(frozen=True)
class Cost:
    """The time of one run of a study, in seconds.

    Attributes:
        around: Time before and after the loop: starting the process, data, model, and writing the results.
        first: Extra time of the first step, for example for compilation.
        step: Time of a step.
        evaluation: Time of an evaluation.
        saving: Time of a checkpoint.
        counts: Numbers of steps, evaluations and checkpoints in a run.
    """

    around: float
    first: float
    step: float
    evaluation: float
    saving: float
    counts: tuple[int, int, int]

    @property
    def run(self) -> float:
        """The time of a whole run."""
        parts = zip(self.counts, (self.step, self.evaluation, self.saving), strict=True)
        return self.around + self.first + sum(count * seconds for count, seconds in parts)


def counts(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Counts steps, evaluations and checkpoints of a run, which starts with an evaluation and ends with both."""
    steps = config["steps"]

    def times(every: int) -> int:
        return math.ceil(steps / every) if every else 1

    return steps, 1 + times(config["eval_every"]), times(config["save_every"])


def cost_of(short: Short, long: Short, config: Mapping[str, Any]) -> Cost:
    """Estimates the cost of a run with `config` from two shorter runs with two evaluations and one checkpoint each.

    The log of a run gives the time of its steps in an unknown unit. Two runs with different numbers of steps determine
    the unit:

        training - saving = unit * all_steps + 2 * evaluation
    """
    rest = [part.training - part.saving for part in (short, long)]
    unit = (rest[1] - rest[0]) / (long.all_steps - short.all_steps)
    evaluation = (rest[0] - unit * short.all_steps) / 2
    if unit < 0:  # the steps take less than the variation of the evaluations
        unit, evaluation = 0.0, sum(rest) / 4
    elif evaluation < 0:  # it takes less than the variation of the steps
        unit, evaluation = sum(rest) / (short.all_steps + long.all_steps), 0.0
    step = unit * (long.all_steps - long.first) / (long.steps - 1)
    return Cost(
        around=(short.wall - short.training + long.wall - long.training) / 2,
        first=max(0.0, unit * long.first - step),
        step=step,
        evaluation=evaluation,
        saving=(short.saving + long.saving) / 2,
        counts=counts(config),
    )


def estimate(plan: Plan, recipes: Path, jobs: int) -> str:
    """Estimates the time of a study without extensions of its grid, on this machine under its current load.

    A first run prepares the data and stops at its first step. Two short runs follow, each with as many copies at once
    as in the study.

    Args:
        plan: The plan of the study.
        recipes: The folder of the recipes.
        jobs: Number of runs at once; see `Driver`.

    Raises:
        PlanError: The runs of the plan have only one step.
        StudyError: A run failed.
        Interrupted: A signal arrived.
    """
    with tempfile.TemporaryDirectory() as folder, catch_signals():
        pilot = _Pilot(plan, recipes, jobs, Path(folder))
        config, hardware = pilot.prepare()
        if config["steps"] < 2:
            raise PlanError(f"the runs of {plan.name} have one step. An estimate needs at least two. Set more steps.")
        few = max(1, min(10, config["steps"] // 4))
        short = pilot.measure(few, config)
        many = max(4 * few, math.ceil(_SECONDS / short.step_at_most))
        long = pilot.measure(min(many, config["steps"]), config)
    cost = cost_of(short, long, config)
    waves = sum(math.ceil(number / max(1, jobs)) for number in plan.num_runs())
    hours = (pilot.ready + waves * cost.run) / 3600
    return render(
        "estimate.txt.j2",
        plan=plan,
        short=short,
        long=long,
        cost=cost,
        jobs=jobs,
        runs=sum(plan.num_runs()),
        hours=hours,
        occupied=occupied(hours, jobs, hardware),
    )


class _Pilot:
    """Short runs of a plan's baseline arm, at its lowest learning rate, in a separate folder."""

    def __init__(self, plan: Plan, recipes: Path, jobs: int, folder: Path) -> None:
        freeze(plan, folder)
        self.folder = folder
        self.executor: Executor = Processes(jobs) if jobs else InProcess()
        driver = Driver(Study(folder), recipes, jobs, executor=self.executor)
        unused = 1 + max(*plan.tuning_seeds, *plan.final_seeds)
        act, rate = plan.arms[plan.baseline][0], plan.learning_rates[0]
        self.commands = [driver.command(Run(act, rate, unused + job)) for job in range(max(1, jobs))]
        self.ready = 0.0  # seconds until the first process can start

    def prepare(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Prepares the data, and returns the config and the hardware of a run."""
        stop, over, output = self.folder / "stop", threading.Event(), self.folder / "prepared"
        record = output / "record.json"  # it appears when training begins
        watch = threading.Thread(target=_touch, args=(stop, record, over), daemon=True)
        watch.start()
        try:
            self._run([[*self.commands[0], f"--output_dir={output}"]], {"HF_GEM_STOP_FILE": str(stop)})
        finally:
            over.set()
            watch.join()
        found = _record(record)
        return found["config"], found["sessions"][0]["hardware"]

    def measure(self, steps: int, config: Mapping[str, Any]) -> Short:
        """Runs some steps, with as many runs at once as in the study, and returns the mean."""
        shorter = {"steps": steps, "warmup_steps": min(steps, config["warmup_steps"]), "eval_every": 0, "save_every": 0}
        outputs = [self.folder / f"{steps}-{job}" for job in range(len(self.commands))]
        walls = self._run(
            [
                [*command, *(f"--{name}={value}" for name, value in shorter.items()), f"--output_dir={output}"]
                for command, output in zip(self.commands, outputs, strict=True)
            ]
        )
        found = [_read(output, wall) for output, wall in zip(outputs, walls, strict=True)]
        return Short(steps, *map(float, np.mean(found, axis=0)))

    def _run(self, commands: Sequence[list[str]], env: Mapping[str, str] | None = None) -> list[float]:
        """Runs commands at the same time, and returns the seconds that each takes.

        Args:
            commands: The commands to run.
            env: Environment variables that make them stop before the end.
        """
        began: list[tuple[Child, float]] = []
        took: dict[int, float] = {}
        logs = [self.folder / f"{job}.txt" for job in range(len(commands))]
        try:
            for job, (command, log) in enumerate(zip(commands, logs, strict=True)):
                before = time.perf_counter()
                child = self.executor.start(command, log, {**environment_of(job), **(env or {})})
                began.append((child, before))
                if child.exitcode is None and not self.ready:
                    self.ready = time.perf_counter() - before
            while len(took) < len(began):
                check()
                self._wait(began, took)
        finally:
            for child, _ in began:
                child.terminate()
            while len(took) < len(began):
                self._wait(began, took)
        check()
        for (child, _), log in zip(began, logs, strict=True):
            if child.exitcode not in (0, 128 + signal.SIGTERM if env else 0):
                raise StudyError(f"a short run exited with status {child.exitcode}: {last_lines(log)}")
        return [took[job] for job in range(len(began))]

    def _wait(self, began: Sequence[tuple[Child, float]], took: dict[int, float]) -> None:
        """Waits a moment, and notes the commands that have ended."""
        self.executor.wait([child for job, (child, _) in enumerate(began) if job not in took], _TICK)
        for job, (child, before) in enumerate(began):
            if job not in took and child.exitcode is not None:
                took[job] = time.perf_counter() - before


def _touch(stop: Path, record: Path, over: threading.Event) -> None:
    """Creates the file `stop` as soon as `record` exists."""
    while not over.wait(_TICK):
        if record.exists():
            stop.touch()
            return


def _record(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except ValueError as error:
        raise StudyError(f"a short run left no valid record: {error}") from error


def _read(output: Path, wall: float) -> tuple[float, ...]:
    """Reads the fields of `Short` except `steps`, for a run that took `wall` seconds."""
    record, log = output / "record.json", output / "log.jsonl"
    found = _record(record)
    saving = record.stat().st_mtime - log.stat().st_mtime  # the last checkpoint was written in between
    rate = f"{found['result']['unit']}_per_second"
    entries = [entry for line in log.read_text().splitlines() if rate in (entry := json.loads(line))]
    steps = np.diff([0, *(entry["step"] for entry in entries)])
    laps = steps / np.array([entry[rate] for entry in entries])
    return wall, found["sessions"][0]["seconds"], saving, float(laps[0]), float(laps.sum())
