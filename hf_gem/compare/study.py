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

from ..files import write_atomically
from ..training.errors import Interrupted, TrainingError
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
        self._loaded: dict[str, dict[str, Any]] = {}  # the records, which nobody writes twice
        self._starting = threading.Lock()  # multiprocessing collects ended processes whenever it starts one
        self._alive: set[Any] = set()

    # ---- outcomes

    def record(self, run: Run) -> dict[str, Any] | None:
        """The record of a run, once it has finished or diverged."""
        return self._record(run.name)

    def _record(self, name: str) -> dict[str, Any] | None:
        path = self.folder / "records" / f"{name}.json"
        if not path.exists():
            return None
        if name not in self._loaded:
            self._loaded[name] = json.loads(path.read_text())
        return self._loaded[name]

    def seconds(self) -> list[float]:
        """What each run took that there is a record of, tuning and all."""
        return [sum(session["seconds"] for session in record["sessions"]) for _, record in self._records()]

    def _names(self) -> list[str]:
        """Of all runs that there are records of."""
        return sorted(path.stem for path in (self.folder / "records").glob("*.json"))

    def _records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and record of every run that there is one of."""
        return ((name, record) for name in self._names() if (record := self._record(name)))

    def outcome(self, run: Run) -> float:
        """The metric at the end; NaN where the run diverged."""
        record = self.record(run)
        assert record is not None, run
        return self._outcome(record)

    def _outcome(self, record: Mapping[str, Any]) -> float:
        value = record["result"][self.plan.metric] if record["status"] == "finished" else None
        return math.nan if value is None else float(value)

    def missing(self) -> list[Run]:
        """What can be run next: first the tuning, as `_missing_in_tuning` has it, then the final seeds, seed by seed:
        what changes over time or between machines is then no difference between arms.
        """
        if tuning := self._missing_in_tuning():
            return tuning
        final = [run for runs in zip(*self.final_runs().values(), strict=True) for run in runs]
        return [run for run in dict.fromkeys(final) if self.record(run) is None]

    def _missing_in_tuning(self) -> list[Run]:
        """What the grid lacks and, once that is full for all activations, one more rate for all of them where the best
        of one lies at its edge: one that had fewer trials than another would be at a loss.
        """
        plan = self.plan
        missing = [run for run in plan.tuning_runs(self.rates()) if self.record(run) is None]
        if plan.tunes and not missing:
            more = {rate for act in plan.acts if (rate := plan.next_rate(self.tuned(act)))}
            missing = [run for run in plan.tuning_runs(sorted(more)) if self.record(run) is None]
        return missing

    def left(self) -> int:
        """How many runs are left, as far as it is known: a grid that is full may be extended."""
        missing = self.missing()
        tuning = bool(missing) and missing[0].seed in self.plan.tuning_seeds
        return len(missing) + (self.plan.num_runs()[1] if tuning else 0)

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
        trials = {arm: self.trials(arm) for arm in plan.arms}
        return {arm: plan.best(means, key=means.__getitem__) for arm, means in trials.items()}

    def rates(self) -> list[float]:
        """The grid of learning rates, as far as it has been extended, ascending."""
        tuning = [name.rpartition("-seed")[0] for name in self._names() if self._tunes(name)]
        return sorted({*self.plan.learning_rates, *(float(name.rpartition("-lr")[2]) for name in tuning)})

    def tuned(self, act: str) -> dict[float, float]:
        """Learning rate, ascending -> mean outcome over the tuning seeds, of rates with records of all of these; the
        worst there is, where one of them diverged.
        """
        runs = {rate: [Run(act, rate, seed) for seed in self.plan.tuning_seeds] for rate in self.rates()}
        done = {rate: part for rate, part in runs.items() if part and all(self.record(run) for run in part)}
        means = {rate: float(np.mean([self.outcome(run) for run in part])) for rate, part in done.items()}
        return {rate: mean if math.isfinite(mean) else self.plan.worst for rate, mean in means.items()}

    def trials(self, arm: str) -> dict[tuple[str, float], float]:
        """Activation and learning rate -> mean outcome, of all that an arm chooses from; see `tuned`."""
        return {(act, rate): mean for act in self.plan.arms[arm] for rate, mean in self.tuned(act).items()}

    def runner_up(self, arm: str) -> tuple[tuple[str, float], float] | None:
        """The second best activation and learning rate of an arm in tuning, and its mean; None where none finished."""
        chosen = self.choices()[arm]
        others = {key: mean for key, mean in self.trials(arm).items() if key != chosen and math.isfinite(mean)}
        return self.plan.best(others.items(), key=lambda item: item[1]) if others else None

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

    def set_aside(self) -> dict[tuple[str, float], list[float]]:
        """Activation and learning rate -> outcomes on the final seeds that are compared with nothing: the tuning chose
        these once, and does not any more.
        """
        final = {run.name for runs in self.final_runs().values() for run in runs}
        found: dict[tuple[str, float], list[float]] = {}
        for name, record in self._records():
            if name not in final and not self._tunes(name):
                act, rate = name.rpartition("-seed")[0].rpartition("-lr")[::2]
                found.setdefault((act, float(rate)), []).append(self._outcome(record))
        return found

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
        for seed, records in self._by_seed().items():
            wrong += [f"seed {seed}: the arms differ in {key}" for key in self._unequal(records)]
            if any(record.get("nonfinite", {}).get("skipped_batches") for record in records):
                wrong.append(f"seed {seed}: an arm skipped batches, for its loss was not finite")
        return wrong

    def hashes(self) -> list[str]:
        """The keys that show pairing, of those that records have: older ones lack `samples_hash`."""
        keys = ["init_signs_hash" if self.plan.own_gains else "init_hash", "order_hash", "samples_hash"]
        return [key for key in keys if any(record.get(key) for _, record in self._records())]

    def _unequal(self, records: list[dict[str, Any]]) -> list[str]:
        return [key for key in self.hashes() if len({record.get(key) for record in records}) > 1]

    def hardware_differs(self) -> list[int]:
        """The final seeds of which not all arms ran on the same hardware."""
        found = {
            seed: {json.dumps(session["hardware"], sort_keys=True) for r in records for session in r["sessions"]}
            for seed, records in self._by_seed().items()
        }
        return [seed for seed, hardware in found.items() if len(hardware) > 1]

    def _by_seed(self) -> dict[int, list[dict[str, Any]]]:
        """Final seed -> the records of its runs."""
        arms = self.final_runs().values()
        return {
            seed: [record for runs in arms for run in runs if run.seed == seed and (record := self.record(run))]
            for seed in self.plan.final_seeds
        }

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
        done = len(self._names())
        with tqdm(total=done + self.left(), initial=done, desc=self.plan.name, unit="run", smoothing=0) as bar:
            while todo := self.missing():
                bar.total = bar.n + self.left()
                self._execute(todo, jobs, bar, here)
        self._refuse_unpaired()

    def _refuse_mixed(self, here: Mapping[str, Any]) -> None:
        if not self.allow_mixed and (mixed := self.mixtures(here)):
            raise StudyError(
                f"runs that do not belong into one study: {'; '.join(mixed)}. Go back to the same code, versions and "
                f"data, start another study, remove from {self.folder / 'records'} what is to be run anew, or "
                "--allow_mixed"
            )

    def _refuse_unpaired(self) -> None:
        """Raises where the hashes of a seed differ, which is wrong with the code and no outcome."""
        for seed, records in self._by_seed().items():
            if unequal := self._unequal(records):
                raise StudyError(f"the runs are not paired: of seed {seed} the arms differ in {', '.join(unequal)}")

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
                        if run.seed in self.plan.final_seeds:
                            self._refuse_unpaired()
                bar.update()
                return True
            except Timeout:
                return False
            except BaseException as error:
                if jobs > 1 and not stop.is_set():  # what is raised here is seen when all threads have ended
                    tqdm.write(f"{error}\nWaiting for the runs that are under way", file=sys.stderr)
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
