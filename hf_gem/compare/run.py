"""Studies: the runs of a plan, driven through the command lines of the recipes, and what came of them.

A study is a folder:

    plan.json           the frozen plan and its hash
    records/NAME.json   the record of each finished run
    runs/NAME/          the run itself, while it is under way; its log stays

Any number of processes and machines may work on one folder: each run has a lock. Whatever is killed goes on where it
was when the command is started again.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..training.errors import Interrupted, TrainingError
from ..training.files import write_atomically
from ..training.record import environment
from .plan import Plan, PlanError, Run
from .stats import Comparison, compare

PLAN = "plan.json"
_WAIT = 2.0  # seconds between looks at runs that others work on
# Runs are processes of their own, forked where possible from one that has imported what all recipes do: that takes
# longer than a small run trains.
_CONTEXT: Any = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
_IMPORTED = [f"hf_gem.training.{module}" for module in ("data_text", "data_vision", "evaluation", "loop", "report")]
_IMPORTED += ["timm", "matplotlib.pyplot", "hf_gem.compare.report"]  # by recipes/compare.py, which children import too


class StudyError(TrainingError, RuntimeError):
    """A run failed, or records do not belong together."""


def freeze(plan: Plan, folder: Path) -> None:
    """Makes a folder the study of a plan.

    Raises:
        PlanError: it is that of another plan.
    """
    frozen = folder / PLAN
    if not frozen.exists():
        for name in ("records", "runs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_atomically(frozen, json.dumps({"hash": plan.hash, "plan": asdict(plan)}, indent=2) + "\n")
        return
    saved = json.loads(frozen.read_text())
    if saved["hash"] != plan.hash:
        differ = ", ".join(name for name, value in asdict(plan).items() if saved["plan"].get(name) != value)
        raise PlanError(
            f"{folder} is a study of another plan (other {differ}), frozen when its first run started; a changed plan "
            "is a new study: give it another name or --study folder"
        )


class Study:
    """The study in a folder, by the plan that is frozen there.

    Args:
        folder: Of the study.
        recipes: The folder of the recipes.
        allow_mixed: Take records together whose code, versions or data differ.

    Raises:
        PlanError: the folder is that of no study.
    """

    def __init__(self, folder: Path, recipes: Path = Path("recipes"), allow_mixed: bool = False) -> None:
        if not (folder / PLAN).exists():
            raise PlanError(f"{folder} is no study: it has no {PLAN}; recipes/compare.py makes one")
        frozen = json.loads((folder / PLAN).read_text())
        self.plan = Plan(**frozen["plan"])
        if self.plan.hash != frozen["hash"]:
            raise PlanError(f"{folder / PLAN} was changed after it was frozen; restore it, or start another study")
        self.folder, self.recipes, self.allow_mixed = folder, recipes, allow_mixed
        self._starting = threading.Lock()  # multiprocessing collects ended processes whenever it starts one
        self._alive: set[Any] = set()

    # ---- outcomes

    def record(self, run: Run) -> dict[str, Any] | None:
        """The record of a run, once it has finished or diverged."""
        path = self.folder / "records" / f"{run.name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def seconds(self) -> list[float]:
        """What each run took that there is a record of, tuning and all."""
        return [sum(session["seconds"] for session in record["sessions"]) for _, record in self._records()]

    def _records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and record of every run that there is one of."""
        for path in sorted((self.folder / "records").glob("*.json")):
            yield path.stem, json.loads(path.read_text())

    def outcome(self, run: Run) -> float:
        """The metric at the end; NaN where the run diverged."""
        record = self.record(run)
        assert record is not None, run
        value = record["result"][self.plan.metric] if record["status"] == "finished" else None
        return math.nan if value is None else float(value)

    def missing(self) -> list[Run]:
        """The planned runs without a record; those on the final seeds only once the tuning is over, seed by seed: what
        changes over time or between machines is then no difference between arms.
        """
        if tuning := self._missing_in_tuning():
            return tuning
        final = [run for runs in zip(*self.final_runs().values(), strict=True) for run in runs]
        return [run for run in dict.fromkeys(final) if self.record(run) is None]

    def _missing_in_tuning(self) -> list[Run]:
        return [run for run in self.plan.tuning_runs() if self.record(run) is None]

    def choices(self) -> dict[str, tuple[str, float]]:
        """Arm -> the activation and learning rate that were best in tuning.

        Where all of an arm's runs diverged, that is its first activation at the lowest rate: it has had its chance.

        Raises:
            StudyError: the tuning is not over.
        """
        plan = self.plan
        if missing := self._missing_in_tuning():
            raise StudyError(
                f"{self.folder} lacks {len(missing)} runs of its tuning, such as {missing[0].name}; the command that "
                "started it goes on"
            )
        if not plan.tunes:
            return {arm: (acts[0], plan.learning_rates[0]) for arm, acts in plan.arms.items()}
        chosen = {}
        for arm, acts in plan.arms.items():
            means = {(act, rate): mean for act in acts for rate, mean in self.tuned(act).items()}
            chosen[arm] = plan.best(means, key=lambda key, means=means: means[key])
        return chosen

    def tuned(self, act: str) -> dict[float, float]:
        """Learning rate, ascending -> mean outcome over the tuning seeds, of rates with records of all of these; the
        worst there is, where one of them diverged.
        """
        rates = {Path(p).name for p in (self.folder / "records").glob(f"{act}-lr*-seed*.json")}
        found = sorted({float(name.removeprefix(f"{act}-lr").partition("-seed")[0]) for name in rates})
        runs = {rate: [Run(act, rate, seed) for seed in self.plan.tuning_seeds] for rate in found}
        done = {rate: part for rate, part in runs.items() if part and all(self.record(run) for run in part)}
        means = {rate: float(np.mean([self.outcome(run) for run in part])) for rate, part in done.items()}
        return {rate: mean if math.isfinite(mean) else self.plan.worst for rate, mean in means.items()}

    def final_runs(self) -> dict[str, list[Run]]:
        """Arm -> its runs on the final seeds."""
        chosen = self.choices()
        return {arm: [Run(*chosen[arm], seed) for seed in self.plan.final_seeds] for arm in self.plan.arms}

    def outcomes(self) -> dict[str, dict[int, float]]:
        """Arm -> seed -> outcome, of the final runs that there are records of."""
        return {
            arm: {run.seed: self.outcome(run) for run in runs if self.record(run)}
            for arm, runs in self.final_runs().items()
        }

    def comparisons(self, baseline: str | None = None) -> list[Comparison]:
        """Every arm against the plan's baseline, or another arm, by the plan's terms; no verdicts before all runs are
        done: who looks every time at more seeds finds a difference in the end.
        """
        plan = self.plan
        terms = plan.smallest_effect, plan.higher_is_better, plan.min_seeds
        found = compare(self.outcomes(), baseline or plan.baseline, *terms)
        if self.missing():
            found = [replace(c, verdict="pending", further_seeds=None, barred=False) for c in found]
        return found

    def check_pairing(self) -> list[str]:
        """What is wrong with the claim that the arms of a seed differ in their activation alone."""
        wrong = []
        arms = self.final_runs().values()  # reads all records of the tuning: once is enough
        for seed in self.plan.final_seeds:
            records = [r for runs in arms for run in runs if run.seed == seed and (r := self.record(run))]
            for key in ("init_signs_hash" if self.plan.own_gains else "init_hash", "order_hash", "samples_hash"):
                if len({record.get(key) for record in records}) > 1:
                    wrong.append(f"seed {seed}: the arms differ in {key}")
            if any(record.get("nonfinite", {}).get("skipped_batches") for record in records):
                wrong.append(f"seed {seed}: an arm skipped batches, for its loss was not finite")
        return wrong

    def mixtures(self, here: Mapping[str, Any] | None = None) -> list[str]:
        """In what code, versions, precision or data the records differ, where they should not.

        Args:
            here: `environment()` of a process whose runs are to join them.
        """
        seen: dict[str, dict[str, list[str]]] = {}

        def add(name: str, facts: Mapping[str, Any]) -> None:
            for key, value in facts.items():
                seen.setdefault(key, {}).setdefault(str(value), []).append(name)

        for name, record in self._records():
            add(name, {"mixed precision": record.get("mixed_precision")})
            add(name, {"tuning data" if self._tunes(name) else "data": record["data"]["hash"]})
            for session in record["sessions"]:
                add(name, _code(session))
        if here:
            add("this process", _code(here))
        return [
            f"{key}: " + ", ".join(f"{value} in {_some(names)}" for value, names in values.items())
            for key, values in seen.items()
            if len(values) > 1
        ]

    def _tunes(self, name: str) -> bool:
        return int(name.rpartition("-seed")[2]) in self.plan.tuning_seeds

    # ---- running

    def run(self, jobs: int = 1) -> None:
        """Runs all that is missing: tuning, with the extensions of the grid that it asks for, and then the final seeds.

        Args:
            jobs: Runs at once; on a machine with GPUs, one for each of them is a good number.

        Raises:
            PlanError: there is no such recipe.
            StudyError: a run failed for another reason than a loss that is not finite, or records do not fit together.
        """
        if not (self.recipes / f"{self.plan.recipe}.py").exists():
            known = ", ".join(sorted(path.stem for path in self.recipes.glob("*.py")))
            raise PlanError(f"no recipe {self.plan.recipe!r} in {self.recipes}; there are {known}")
        if not torch.cuda.is_available():  # before the first process, which has to know when it imports torch
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        _CONTEXT.set_forkserver_preload(_IMPORTED)
        here = environment(self.recipes.resolve())
        self._refuse_mixed(here)
        tuning = {run.name for run in self.plan.tuning_runs()}
        planned = sum(self.plan.num_runs())
        done = {path.stem for path in (self.folder / "records").glob("*.json")}
        extended = sum(map(self._tunes, done - tuning))
        with tqdm(total=planned + extended, initial=len(done), desc=self.plan.name, unit="run", smoothing=0) as bar:
            self._execute(self._missing_in_tuning(), jobs, bar, here)
            while more := self._extensions():
                bar.total += len(more)
                self._execute(more, jobs, bar, here)
            self._execute(self.missing(), jobs, bar, here)
        if wrong := self.check_pairing():
            raise StudyError("the runs are not paired: " + "; ".join(wrong))

    def _extensions(self) -> list[Run]:
        """What the grid lacks, for all activations: one that had fewer trials than another would be at a loss."""
        plan = self.plan
        if not plan.tunes:
            return []
        tuned = [self.tuned(act) for act in plan.acts]
        grid = set().union(*tuned, (rate for means in tuned if (rate := plan.next_rate(means))))
        runs = (Run(act, rate, seed) for act in plan.acts for rate in sorted(grid) for seed in plan.tuning_seeds)
        return [run for run in runs if self.record(run) is None]

    def _refuse_mixed(self, here: Mapping[str, Any]) -> None:
        if not self.allow_mixed and (mixed := self.mixtures(here)):
            raise StudyError(
                f"runs that do not belong into one study: {'; '.join(mixed)}. Go back to the same code, versions and "
                f"data, start another study, remove from {self.folder / 'records'} what is to be run anew, or "
                "--allow_mixed"
            )

    def _execute(self, todo: list[Run], jobs: int, bar: tqdm, here: Mapping[str, Any]) -> None:
        devices: Queue[int] = Queue()
        for job in range(jobs):
            devices.put(job)
        stop = threading.Event()

        def work(run: Run) -> bool:
            """Whether the run is done; another process may have it."""
            if stop.is_set():
                return True
            job = devices.get()
            try:
                with FileLock(self.folder / "runs" / f"{run.name}.lock", blocking=False):
                    if self.record(run) is None:
                        self._wait_for_orphan(run)
                        self._start(run, job)
                        self._refuse_mixed(here)
                bar.update()
                return True
            except Timeout:
                return False
            except BaseException:
                stop.set()
                raise
            finally:
                devices.put(job)

        with ThreadPoolExecutor(jobs) as pool:
            while todo:
                try:
                    waiting = [run for run, done in zip(todo, pool.map(work, todo), strict=True) if not done]
                    if waiting:
                        time.sleep(_WAIT)
                except KeyboardInterrupt:
                    stop.set()
                    with self._starting:  # from a terminal they have got it too, and take this for the same
                        for process in self._alive:
                            process.terminate()
                    raise Interrupted("stopped; the same command goes on", signal.SIGINT) from None
                todo = waiting

    def _wait_for_orphan(self, run: Run) -> None:
        """One whose driver was killed keeps its folder until it has saved; raises Timeout, to look again later."""
        folder = self.folder / "runs" / run.name
        if folder.exists():
            with FileLock(folder / ".lock", blocking=False):  # as the recipes have it
                pass

    def _start(self, run: Run, job: int) -> None:
        folder = self.folder / "runs" / run.name
        log = folder.with_name(f"{run.name}.txt")  # no suffix: a learning rate has a point
        record = folder / "record.json"
        before = record.stat().st_mtime_ns if record.exists() else None
        env = {}
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
            env["CUDA_VISIBLE_DEVICES"] = devices[job % len(devices)]
        process = _CONTEXT.Process(target=_run_script, args=(self.command(run), log, env))
        with self._starting:
            process.start()
            self._alive.add(process)
        wait([process.sentinel])
        with self._starting:
            process.join()
            self._alive.remove(process)
        new = record.exists() and record.stat().st_mtime_ns != before  # or it is one of an earlier attempt
        found = json.loads(record.read_text()) if new else {}
        status = found.get("status")
        if process.exitcode in (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGTERM):
            raise Interrupted(f"{run.name} was stopped; the same command goes on", signal.SIGTERM)
        if status not in ("finished", "diverged"):
            tail = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
            raise StudyError(f"the run {run.name} ended with status {process.exitcode}: {tail}. Its output is in {log}")
        if status == "finished" and self.plan.metric not in found["result"]:
            raise PlanError(f"{self.plan.recipe} has no {self.plan.metric}; it has {', '.join(found['result'])}")
        write_atomically(self.folder / "records" / f"{run.name}.json", record.read_text())
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for weights in folder.glob("*.safetensors"):
            weights.unlink()

    def command(self, run: Run) -> list[str]:
        """The command line of a run: a script and its arguments."""
        plan = self.plan
        ours = {"preset": plan.preset, "hidden_act": run.act, "learning_rate": run.learning_rate, "seed": run.seed}
        ours |= {"data_seed": run.seed, "output_dir": self.folder / "runs" / run.name}
        tuning = plan.tuning_flags if run.seed in plan.tuning_seeds else {}
        flags = {"report_to": "none", **plan.flags, **tuning, **ours}
        text = {True: "yes", False: "no"}  # YAML's for what may be a word of its own, such as mixed_precision: no
        return [
            str(self.recipes / f"{plan.recipe}.py"),
            *(f"--{name}={text[value] if isinstance(value, bool) else value}" for name, value in flags.items()),
        ]


def _code(session: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same for all sessions of a study."""
    return {
        "commit": session["commit"],
        "uncommitted changes": session.get("diff_hash", session["dirty"]),
        **session["versions"],
    }


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _run_script(command: list[str], log: Path, env: Mapping[str, str]) -> None:
    """Runs a script as the main program of this process, which stops and saves when the study's is gone."""
    os.environ.update(env)
    with log.open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")


def _stop_without_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
