"""Runs the missing runs of a study, through the command lines of the recipes.

Any number of processes and machines may work on the folder of a study, because each run has a lock. After a kill, the
same command continues where the runs stopped.

A driver is one thread. A signal only sets a flag. The driver starts runs, waits for them, draws the progress bar, and
checks the flag several times a second. An exception from a signal handler could interrupt the bar while it holds its
lock, or hit after a process has started but before the driver has noted it.
"""

from __future__ import annotations

import re
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import shown, write_atomically
from ..recipes import recipe_files
from ..training.checkpoint import remove_all
from ..training.environment import environment
from ..training.errors import Interrupted, TrainingError
from ..training.record import read_record
from ..training.signals import STOPPED, catch_signals, check
from .executors import Child, Executor, InProcess, Processes, environment_of, last_lines
from .plan import PlanError, Run
from .progress import StudyProgress
from .study import Study, StudyError

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")  # as transformers saves them
_TICK = 0.1  # seconds between checks of the flag
_LOOK_AGAIN = 2.0  # seconds between checks of runs that other drivers work on
_STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}  # exit statuses


@dataclass
class _Job:
    """A running run: its lock, its device, and the time at which an earlier attempt wrote its record."""

    run: Run
    lock: FileLock
    device: int
    before: int | None
    child: Child


class Driver:
    """Runs the missing runs of a study: tuning, including extensions of the grid, and then the final seeds.

    Args:
        study: The study to run.
        recipes: The folder of the recipes.
        jobs: Number of runs at once, each in a separate process. On a machine with GPUs, use one per GPU. 0 runs one
            after another in this process.
        allow_mixed: Whether to accept records with different code, versions or data.
        executor: The executor of the runs; by default the one that fits `jobs`.

    Raises:
        PlanError: There is no such recipe.
    """

    def __init__(
        self,
        study: Study,
        recipes: Path,
        jobs: int = 1,
        allow_mixed: bool = False,
        executor: Executor | None = None,
    ) -> None:
        known = recipe_files(recipes)
        if study.plan.recipe not in known:
            raise PlanError(
                f"{recipes} has no recipe {shown(study.plan.recipe)}. It has {', '.join(known)}. Name one in the plan."
            )
        self.study, self.recipes, self.allow_mixed = study, recipes, allow_mixed
        self._executor = executor or (Processes(jobs) if jobs else InProcess())
        self._free = deque(range(max(1, jobs)))  # devices
        self._under_way: list[_Job] = []
        self._here: dict[str, Any] = {}

    def run(self) -> None:
        """Runs the missing runs.

        Raises:
            StudyError: A run failed for a reason other than a loss that is not finite, or records do not fit together.
            PlanError: The recipe does not have the metric of the plan.
            Interrupted: A signal arrived. Active runs were stopped too, and will resume next time.
        """
        study = self.study
        with catch_signals():
            self._here = environment(self.recipes.resolve())
            check()  # the signal may also have stopped git, so the commit may be missing
            self._refuse_mixed()
            self._progress = StudyProgress(study)
            with self._progress.bar:
                while todo := study.missing():
                    self._work_off(todo)
        self._refuse_unpaired()

    def command(self, run: Run) -> list[str]:
        """Returns the command line of a run: a script and its arguments."""
        plan = self.study.plan
        act = run.act.split()[0]
        ours = {"preset": plan.preset, "hidden_act": act, "learning_rate": run.learning_rate, "seed": run.seed}
        ours |= {"data_seed": run.seed, "output_dir": self._folder(run)}
        flags = {"report_to": "none", "project": plan.name, **plan.flags_of(run.act, run.seed), **ours}
        text = {True: "yes", False: "no"}  # YAML turns words such as mixed_precision: no into booleans
        return [
            str(self.recipes / f"{plan.recipe}.py"),
            *(f"--{name}={text[value] if isinstance(value, bool) else value}" for name, value in flags.items()),
        ]

    def _work_off(self, todo: Sequence[Run]) -> None:
        """Waits until all of these runs are done, here or by another driver."""
        waiting = dict.fromkeys(todo, 0.0)  # the earliest time to check each run
        failure: TrainingError | None = None
        try:
            while waiting or self._under_way:
                check()
                try:
                    if done := self._start_some(waiting):
                        self._progress.count(done)
                    self._executor.wait([job.child for job in self._under_way], _TICK)
                    self._progress.look()
                    for job in [job for job in self._under_way if job.child.exitcode is not None]:
                        self._end(job)
                        self._progress.count()
                except (OSError, EOFError, TrainingError) as error:
                    # A signal to the whole group may reach a run, or the process that forks them, before this one.
                    time.sleep(_TICK)
                    check()
                    if not isinstance(error, TrainingError):
                        raise
                    if failure is None and self._under_way:  # the error is only raised when all of them have ended
                        self._progress.write(f"{error}\nWaiting for the other active runs to finish")
                    failure = failure or error
                    waiting.clear()
        finally:
            self._stop()
        if failure is not None:
            raise failure

    def _start_some(self, waiting: dict[Run, float]) -> int:
        """Starts runs on free devices, and returns how many runs other drivers have finished meanwhile."""
        done = 0
        for run in [run for run, time_to_look in waiting.items() if time_to_look <= time.monotonic()]:
            if not self._free:
                break
            lock = FileLock(self.study.folder / "runs" / f"{run.name}.lock")
            try:
                lock.acquire(blocking=False)
                if self.study.record(run) is not None:
                    lock.release()
                    done += 1
                else:
                    self._start(run, lock)
                del waiting[run]
            except Timeout:
                lock.release()
                waiting[run] = time.monotonic() + _LOOK_AGAIN
            except BaseException:
                lock.release()
                raise
        return done

    def _start(self, run: Run, lock: FileLock) -> None:
        """Starts a run, or raises Timeout if its folder is in use."""
        folder = self._folder(run)
        if folder.exists():  # a run whose driver was killed holds the lock until it has saved
            with FileLock(folder / ".lock", blocking=False):  # the lock of the recipes
                pass
        record = folder / "record.json"
        before = record.stat().st_mtime_ns if record.exists() else None
        device = self._free[0]
        self._progress.start(run)
        child = self._executor.start(self.command(run), self._log(run), environment_of(device))
        self._under_way.append(_Job(run, lock, device, before, child))
        self._free.popleft()

    def _end(self, job: _Job) -> None:
        """Stores the record of a run that has ended, and releases its lock and device."""
        try:
            self._under_way.remove(job)
            self._progress.leave(job.run)
            self._keep_record(job)
            self._refuse_mixed()
            self._refuse_unpaired()
        finally:
            self._free.append(job.device)
            job.lock.release()

    def _keep_record(self, job: _Job) -> None:
        run, plan, status = job.run, self.study.plan, job.child.exitcode
        folder, log = self._folder(run), self._log(run)
        record = folder / "record.json"
        new = record.exists() and record.stat().st_mtime_ns != job.before  # otherwise it is from an earlier attempt
        if status in _STOPPED:
            raise Interrupted(f"{run.name} was {STOPPED}", signal.SIGTERM)
        try:
            found = read_record(record) if new else {}
        except ValueError as error:
            raise StudyError(
                f"the run {run.name} exited with status {status}, and its record is invalid: {error}. Its output is in "
                f"{log}."
            ) from error
        outcome = found.get("status")
        if outcome not in ("finished", "diverged"):
            printed = last_lines(log).rstrip(".") or "it printed nothing"
            raise StudyError(f"the run {run.name} exited with status {status}: {printed}. Its output is in {log}.")
        if outcome == "finished" and plan.metric not in found["result"]:
            raise PlanError(
                f"{plan.recipe} has no {plan.metric}. It has {', '.join(found['result'])}. For a test metric, set the "
                "flag test_split or test_fraction."
            )
        write_atomically(self.study.folder / "records" / f"{run.name}.json", record.read_text(encoding="utf-8"))
        remove_all(folder / "checkpoints")
        for weights in folder.glob("model*.safetensors"):
            if _WEIGHTS.fullmatch(weights.name):
                weights.unlink()

    def _stop(self) -> None:
        """Stops the active runs, and returns when they have saved and ended."""
        for job in self._under_way:  # from a terminal they got the signal too, and treat this as the same one
            job.child.terminate()
        while self._under_way:
            self._executor.wait([job.child for job in self._under_way], _TICK)
            for job in [job for job in self._under_way if job.child.exitcode is not None]:
                self._under_way.remove(job)
                self._free.append(job.device)
                job.lock.release()

    def _refuse_mixed(self) -> None:
        if not self.allow_mixed and (mixed := self.study.mixtures(self._here)):
            raise StudyError(
                f"the runs of this study differ: {'; '.join(mixed)}. They must share code, versions and data. Restore "
                f"these, start another study, delete the records to rerun from {self.study.folder / 'records'}, or "
                "pass --allow_mixed."
            )

    def _refuse_unpaired(self) -> None:
        for seed, keys in self.study.unequal_hashes().items():
            raise StudyError(f"the runs are not paired: the arms of seed {seed} differ in {', '.join(keys)}")

    def _folder(self, run: Run) -> Path:
        return self.study.folder / "runs" / run.name

    def _log(self, run: Run) -> Path:
        return self.study.folder / "runs" / f"{run.name}.txt"  # not with_suffix: a learning rate contains a point
