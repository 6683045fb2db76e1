"""Runs what a study lacks, through the command lines of the recipes.

Any number of processes and machines may work on the folder of one study: each run has a lock. Whatever is killed goes
on where it was when the command is started again.

A driver is one thread. A signal sets a flag and changes nothing else; the driver starts runs, waits for them and draws
the progress bar, and looks at the flag several times a second. An exception from a signal handler could hit while the
bar holds its lock, or between the start of a process and the note of it.
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

from ..files import write_atomically
from ..training.checkpoint import remove_all
from ..training.errors import Interrupted, TrainingError
from ..training.record import environment, read_record
from ..training.signals import Caught, catch_signals
from .executors import Child, Executor, InProcess, Processes, environment_of, last_lines
from .plan import PlanError, Run, parse_flags
from .progress import StudyProgress
from .study import Study, StudyError

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")  # as transformers saves them
_TICK = 0.1  # seconds between looks at the flag
_LOOK_AGAIN = 2.0  # seconds between looks at runs that others work on
_STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}  # exit statuses


@dataclass
class _Job:
    """A run under way: its lock, its device, and when the record of an earlier attempt was written."""

    run: Run
    lock: FileLock
    device: int
    before: int | None
    child: Child


class Driver:
    """Runs all that a study lacks: tuning, with the extensions of the grid that it asks for, and then the final seeds.

    Args:
        study: What to run.
        recipes: The folder of the recipes.
        jobs: Runs at once, each in a process of its own; on a machine with GPUs, one for each of them is a good number.
            0: one after the other, in this process.
        allow_mixed: Takes records together whose code, versions or data differ.
        executor: Where runs take place; by default, as `jobs` says.

    Raises:
        PlanError: there is no such recipe.
    """

    def __init__(
        self,
        study: Study,
        recipes: Path,
        jobs: int = 1,
        allow_mixed: bool = False,
        executor: Executor | None = None,
    ) -> None:
        known = sorted(path.stem for path in recipes.glob("*.py") if path.stem != "compare")
        if study.plan.recipe not in known:
            raise PlanError(f"no recipe {study.plan.recipe!r} in {recipes}; there are {', '.join(known)}")
        self.study, self.recipes, self.allow_mixed = study, recipes, allow_mixed
        self._executor = executor or (Processes(jobs) if jobs else InProcess())
        self._free = deque(range(max(1, jobs)))  # devices
        self._under_way: list[_Job] = []
        self._here: dict[str, Any] = {}

    def run(self) -> None:
        """Runs what is missing.

        Raises:
            StudyError: a run failed for another reason than a loss that is not finite, or records do not fit together.
            PlanError: the recipe does not have the metric of the plan.
            Interrupted: a signal asked to stop; runs under way have been stopped too, and go on next time.
        """
        study = self.study
        with catch_signals() as caught:
            self._here = environment(self.recipes.resolve())
            caught.raise_if_requested()  # git, which was asked there, may have got the signal too, and have no answer
            self._refuse_mixed()
            with StudyProgress(study) as self._progress:
                while todo := study.missing():
                    self._work_off(todo, caught)
        self._refuse_unpaired()

    def command(self, run: Run) -> list[str]:
        """The command line of a run: a script and its arguments."""
        plan = self.study.plan
        act, *own = run.act.split()
        ours = {"preset": plan.preset, "hidden_act": act, "learning_rate": run.learning_rate, "seed": run.seed}
        ours |= {"data_seed": run.seed, "output_dir": self._folder(run)}
        tuning = plan.tuning_flags if run.seed in plan.tuning_seeds else {}
        flags = {"report_to": "none", "project": plan.name, **plan.flags, **parse_flags(own), **tuning, **ours}
        text = {True: "yes", False: "no"}  # YAML's for what may be a word of its own, such as mixed_precision: no
        return [
            str(self.recipes / f"{plan.recipe}.py"),
            *(f"--{name}={text[value] if isinstance(value, bool) else value}" for name, value in flags.items()),
        ]

    def _work_off(self, todo: Sequence[Run], caught: Caught) -> None:
        """Sees to it that all of these are done, here or by another driver."""
        waiting = dict.fromkeys(todo, 0.0)  # the time before which there is no use in looking at each
        failure: TrainingError | None = None
        try:
            while waiting or self._under_way:
                caught.raise_if_requested()
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
                    caught.raise_if_requested()
                    if not isinstance(error, TrainingError):
                        raise
                    if failure is None and self._under_way:  # what is raised is seen when all of them have ended
                        self._progress.write(f"{error}\nWaiting for the runs that are under way")
                    failure = failure or error
                    waiting.clear()
        finally:
            self._stop()
        if failure is not None:
            raise failure

    def _start_some(self, waiting: dict[Run, float]) -> int:
        """Starts runs on the devices that are free, and returns how many others have done meanwhile."""
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
        """Starts a run; raises Timeout where its folder is in use."""
        folder = self._folder(run)
        if folder.exists():  # a run whose driver was killed keeps it until it has saved
            with FileLock(folder / ".lock", blocking=False):  # as the recipes have it
                pass
        record = folder / "record.json"
        before = record.stat().st_mtime_ns if record.exists() else None
        device = self._free[0]
        self._progress.start(run)
        child = self._executor.start(self.command(run), self._log(run), environment_of(device))
        self._under_way.append(_Job(run, lock, device, before, child))
        self._free.popleft()

    def _end(self, job: _Job) -> None:
        """Keeps the record of a run that has ended, and gives its lock and device back."""
        try:
            self._under_way.remove(job)
            self._progress.leave(job.run)
            self._keep_record(job)
            self._refuse_mixed()
            if job.run.seed in self.study.plan.final_seeds:
                self._refuse_unpaired()
        finally:
            self._free.append(job.device)
            job.lock.release()

    def _keep_record(self, job: _Job) -> None:
        run, plan, status = job.run, self.study.plan, job.child.exitcode
        folder, log = self._folder(run), self._log(run)
        record = folder / "record.json"
        new = record.exists() and record.stat().st_mtime_ns != job.before  # or it is one of an earlier attempt
        if status in _STOPPED:
            raise Interrupted(f"{run.name} was stopped; the same command goes on", signal.SIGTERM)
        try:
            found = read_record(record) if new else {}
        except ValueError as error:
            raise StudyError(f"the run {run.name} ended with status {status}, and {error}") from error
        outcome = found.get("status")
        if outcome not in ("finished", "diverged"):
            raise StudyError(
                f"the run {run.name} ended with status {status}: {last_lines(log)}. Its output is in {log}"
            )
        if outcome == "finished" and plan.metric not in found["result"]:
            raise PlanError(
                f"{plan.recipe} has no {plan.metric}; it has {', '.join(found['result'])}. Test samples are asked for "
                "by the flag test_split or test_fraction"
            )
        write_atomically(self.study.folder / "records" / f"{run.name}.json", record.read_text(encoding="utf-8"))
        remove_all(folder / "checkpoints")
        for weights in folder.glob("model*.safetensors"):
            if _WEIGHTS.fullmatch(weights.name):
                weights.unlink()

    def _stop(self) -> None:
        """Stops what is under way, and returns when it has saved and ended."""
        for job in self._under_way:  # from a terminal they have got the signal too, and take this for the same
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
                f"runs that do not belong into one study: {'; '.join(mixed)}. Go back to the same code, versions and "
                f"data, start another study, remove from {self.study.folder / 'records'} what is to be run anew, or "
                "--allow_mixed"
            )

    def _refuse_unpaired(self) -> None:
        for seed, keys in self.study.unequal_hashes().items():
            raise StudyError(f"the runs are not paired: of seed {seed} the arms differ in {', '.join(keys)}")

    def _folder(self, run: Run) -> Path:
        return self.study.folder / "runs" / run.name

    def _log(self, run: Run) -> Path:
        return self.study.folder / "runs" / f"{run.name}.txt"  # no suffix: a learning rate has a point
