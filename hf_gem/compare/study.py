"""Studies: a frozen plan, the records of its runs, and what the tuning chose from them.

A study is a folder:

    plan.json           the frozen plan and its hash
    records/NAME.json   the record of each finished run
    runs/NAME/          the run itself, while it is under way; its log stays
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ..files import check_type, read_json, write_atomically
from ..training.errors import TrainingError
from ..training.record import read_record
from .plan import Plan, PlanError, Run, plan_of
from .stats import Comparison, compare

PLAN = "plan.json"
_RECORD = re.compile(r"[\w.-]+-lr\d+(?:\.\d+)?(?:e[+-]?\d+)?-seed\d+\.json")


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
    saved = _frozen(folder)
    if saved["hash"] != plan.hash:
        differ = ", ".join(name for name, value in asdict(plan).items() if saved["plan"].get(name) != value)
        raise PlanError(
            f"{folder} is a study of another plan (other {differ}), frozen when its first run started; a changed plan "
            "is a new study: give it another name or --study folder"
        )


class _Frozen(TypedDict):
    hash: str
    plan: dict[str, Any]


def _frozen(folder: Path) -> _Frozen:
    try:
        found: _Frozen = read_json(folder / PLAN, _Frozen)
    except ValueError as error:
        raise PlanError(f"{error}; restore it, or start another study") from error
    return found


class Study:
    """The study in a folder, by the plan that is frozen there.

    Args:
        folder: Of the study.

    Raises:
        PlanError: the folder is that of no study.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / PLAN).exists():
            raise PlanError(f"{folder} is no study: it has no {PLAN}; `hf-gem compare` makes one")
        frozen = _frozen(folder)
        self.plan = plan_of(frozen["plan"], folder / PLAN)
        if self.plan.hash != frozen["hash"]:
            raise PlanError(f"{folder / PLAN} was changed after it was frozen; restore it, or start another study")
        self.folder = folder
        self._loaded: dict[str, dict[str, Any]] = {}  # the records, which nobody writes twice

    def record(self, run: Run) -> dict[str, Any] | None:
        """The record of a run, once it has finished or diverged."""
        return self._record(run.name)

    def _record(self, name: str) -> dict[str, Any] | None:
        path = self.folder / "records" / f"{name}.json"
        if not path.exists():
            return None
        if name not in self._loaded:
            self._loaded[name] = self._read(path)
        return self._loaded[name]

    def _read(self, path: Path) -> dict[str, Any]:
        metrics = {self.plan.tuning_metric if self._tunes(path.stem) else self.plan.metric}
        metrics |= {self.plan.tuning_metric} if self.plan.final_rates > 1 else set()
        try:
            record = read_record(path)
            if record["status"] not in ("finished", "diverged"):
                raise ValueError(f"{path}: status must be finished or diverged, got {record['status']}")
            for metric in metrics if record["status"] == "finished" else ():
                check_type(record["result"].get(metric, "nothing"), float | None, f"{path}: result.{metric}")
        except ValueError as error:
            raise StudyError(f"{error}; restore it, or remove it, and the run is done anew") from error
        return record

    def seconds(self) -> list[float]:
        """What each run took that there is a record of, tuning and all."""
        return [sum(session["seconds"] for session in record["sessions"]) for _, record in self._records()]

    def hardware(self) -> dict[str, Any]:
        """That of one of the runs; empty where there are no records."""
        return next((record["sessions"][-1]["hardware"] for _, record in self._records()), {})

    def num_records(self) -> int:
        """Of how many runs there are records."""
        return len(self._names())

    def _names(self) -> list[str]:
        """Of all runs that there are records of."""
        paths = (path for path in (self.folder / "records").glob("*.json") if not path.name.startswith("."))
        for path in (found := sorted(paths)):
            if not _RECORD.fullmatch(path.name):
                raise StudyError(f"{path} is not the record of a run, whose names end in -lrRATE-seedN; move it away")
        return [path.stem for path in found]

    def _records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and record of every run that there is one of."""
        return ((name, record) for name in self._names() if (record := self._record(name)))

    def outcome(self, run: Run) -> float:
        """What a run is judged by at its end, validation in tuning; NaN where the run diverged."""
        return self.value(run, self._metric(run))

    def value(self, run: Run, metric: str) -> float:
        """A metric of a run at its end; NaN where it diverged."""
        record = self.record(run)
        assert record is not None, run
        return _outcome(record, metric)

    def _metric(self, run: Run) -> str:
        return self.plan.tuning_metric if run.seed in self.plan.tuning_seeds else self.plan.metric

    def parts(self, run: Run) -> np.ndarray | None:
        """Sums and counts of the outcome in each group of evaluation samples, (2, groups), whose ratio is the outcome.

        None where the run diverged or is missing, the outcome is no mean over samples, or the record is older.
        """
        record, (data, _, mean) = self.record(run) or {}, self._metric(run).partition("_")
        sums = {"loss": "losses", "accuracy": "correct"}.get(mean, "")
        found = (record.get("evaluation") or {}).get(data, {}) if record.get("status") == "finished" else {}
        return np.array([found[sums], found["counts"]], dtype=float) if sums in found else None

    def missing(self) -> list[Run]:
        """What can be run next: first the tuning, as `_missing_in_tuning` has it, then the final seeds, seed by seed:
        what changes over time or between machines is then no difference between arms.
        """
        if tuning := self._missing_in_tuning():
            return tuning
        trials = self.final_trials()
        final = [Run(*trial, seed) for seed in self.plan.final_seeds for trial in trials]
        return [run for run in final if self.record(run) is None]

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

    def finalists(self) -> dict[str, list[tuple[str, float]]]:
        """Arm -> the activations and learning rates that run on the final seeds: the best in tuning, best first.

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
            return {arm: [(acts[0], plan.learning_rates[0])] for arm, acts in plan.arms.items()}
        ranked = {}
        for arm in plan.arms:
            means = self.trials(arm)
            ranked[arm] = sorted(means, key=means.__getitem__, reverse=plan.higher_is_better)[: plan.final_rates]
        return ranked

    def final_trials(self) -> list[tuple[str, float]]:
        """The finalists of all arms, each once: arms may share one."""
        return list(dict.fromkeys(trial for trials in self.finalists().values() for trial in trials))

    def choices(self) -> dict[str, tuple[str, float]]:
        """Arm -> the activation and learning rate that it is judged at.

        Of several finalists, that is the one that is best by validation over tuning and final seeds, once all of these
        are done, and in tuning before. The one that diverged less often is better than another.

        Raises:
            StudyError: the tuning is not over.
        """
        finalists, plan = self.finalists(), self.plan

        def rank(trial: tuple[str, float]) -> tuple[int, float]:
            runs = [Run(*trial, seed) for seed in (*plan.tuning_seeds, *plan.final_seeds)]
            values = np.array([self.value(run, plan.tuning_metric) for run in runs])
            finite = values[np.isfinite(values)]
            mean = float(finite.mean()) if len(finite) else math.inf
            return len(values) - len(finite), -mean if plan.higher_is_better else mean

        decided = plan.final_rates > 1 and not self.missing()
        return {arm: min(trials, key=rank) if decided else trials[0] for arm, trials in finalists.items()}

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
        final = {Run(*trial, seed).name for trial in self.final_trials() for seed in self.plan.final_seeds}
        found: dict[tuple[str, float], list[float]] = {}
        for name, record in self._records():
            if name not in final and not self._tunes(name):
                act, rate = name.rpartition("-seed")[0].rpartition("-lr")[::2]
                found.setdefault((act, float(rate)), []).append(_outcome(record, self.plan.metric))
        return found

    def comparisons(self, baseline: str | None = None) -> list[Comparison]:
        """Every arm against the plan's baseline, or another arm, by the plan's terms; no verdicts before all runs are
        done: who looks every time at more seeds finds a difference in the end.
        """
        plan = self.plan
        terms = plan.smallest_effect, plan.higher_is_better, plan.min_seeds
        parts = {arm: {run.seed: part for run in runs if (part := self.parts(run)) is not None}
                 for arm, runs in self.final_runs().items()}  # fmt: skip
        found = compare(self.outcomes(), baseline or plan.baseline, *terms, parts)
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

    def unequal_hashes(self) -> dict[int, list[str]]:
        """Final seed -> the hashes in which its arms differ, of seeds where they do: that is wrong with the code and no
        outcome.
        """
        found = {seed: self._unequal(records) for seed, records in self._by_seed().items()}
        return {seed: keys for seed, keys in found.items() if keys}

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
        trials = self.final_trials()
        return {
            seed: [record for trial in trials if (record := self.record(Run(*trial, seed)))]
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


def _code(session: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same for all sessions of a study."""
    return {
        "commit": session["commit"],
        "uncommitted changes": session.get("diff_hash", session["dirty"]),
        **session["versions"],
        # Records of earlier versions do not say it, which makes them no mixture.
        **{f"launcher, {key}": value for key, value in session.get("launcher", {}).items()},
    }


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _outcome(record: Mapping[str, Any], metric: str) -> float:
    value = record["result"][metric] if record["status"] == "finished" else None
    return math.nan if value is None else float(value)
