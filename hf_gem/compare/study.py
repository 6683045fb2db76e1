"""Studies: a frozen plan, the records of its runs, and the choices of the tuning.

A study is a folder:

    plan.json           the frozen plan and its hash
    records/NAME.json   the record of each finished run
    runs/NAME/          the output of each run; when it has finished, its checkpoints and weights are deleted
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from filelock import FileLock

from ..files import check_type, read_json, shown, write_atomically
from ..training.errors import TrainingError
from ..training.record import read_record
from .plan import Plan, PlanError, Run, plan_of, slug
from .stats import Comparison, compare

PLAN = "plan.json"
_RECORD = re.compile(r"[\w.-]+-lr\d+(?:\.\d+)?(?:e[+-]?\d+)?-seed\d+\.json")


class StudyError(TrainingError, RuntimeError):
    """A run failed, or records do not belong together."""


def freeze(plan: Plan, folder: Path) -> None:
    """Freezes a plan in the folder of its study.

    Raises:
        PlanError: The folder holds a study of another plan, or cannot be written to.
    """
    frozen = folder / PLAN
    try:
        for name in ("records", "runs"):  # a copy of a study may lack them
            (folder / name).mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "runs" / "plan.lock"):  # another driver may start at the same time, with another plan
            if not frozen.exists():
                write_atomically(frozen, json.dumps({"hash": plan.hash, "plan": asdict(plan)}, indent=2) + "\n")
    except OSError as error:
        raise PlanError(
            f"cannot write to the study {folder}: {error}. Make its folders writable, or choose another --study folder."
        ) from error
    check_frozen(plan, folder)


def check_frozen(plan: Plan, folder: Path) -> None:
    """Raises PlanError if a folder holds a study of another plan."""
    saved = _frozen(folder)
    if saved["hash"] != plan.hash:
        differ = ", ".join(name for name, value in asdict(plan).items() if saved["plan"].get(name) != value)
        raise PlanError(
            f"{folder} is a study of another plan, which differs in {differ}. A plan is frozen when its first run "
            "starts. Give the changed plan another name, or choose another --study folder."
        )


class _Frozen(TypedDict):
    hash: str
    plan: dict[str, Any]


def _frozen(folder: Path) -> _Frozen:
    try:
        found: _Frozen = read_json(folder / PLAN, _Frozen)
    except ValueError as error:
        raise PlanError(f"{error}. Restore the file, or start another study.") from error
    return found


class Study:
    """The study in a folder, with the plan that is frozen there.

    Args:
        folder: The folder of the study.

    Raises:
        PlanError: The folder does not hold a study.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / PLAN).exists():
            raise PlanError(f"{folder} is not a study, because it has no {PLAN}. Run hf-gem compare to make one.")
        frozen = _frozen(folder)
        self.plan = plan_of(frozen["plan"], folder / PLAN)
        if self.plan.hash != frozen["hash"]:
            raise PlanError(f"{folder / PLAN} was changed after it was frozen. Restore it, or start another study.")
        self.folder = folder
        self._loaded: dict[str, dict[str, Any]] = {}  # records never change once they are written

    def record(self, run: Run) -> dict[str, Any] | None:
        """Returns the record of a run that has finished or diverged, or None."""
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
                raise ValueError(f"{path}: status must be finished or diverged, got {shown(record['status'])}")
            for metric in metrics if record["status"] == "finished" else ():
                check_type(record["result"].get(metric, "nothing"), float | None, f"{path}: result.{metric}")
            self._check_name(record, path)
        except ValueError as error:
            raise StudyError(f"{error}. Restore the record, or delete it to run it again.") from error
        return record

    def _check_name(self, record: Mapping[str, Any], path: Path) -> None:
        """Raises ValueError if a record is of another run than its name says. Older records lack some of the fields."""
        plan, config, seed = self.plan, record["config"], _seed(path.stem)
        start, _, rate = path.stem.rpartition("-seed")[0].rpartition("-lr")
        act = next((act for act in plan.acts if slug(act) == start), start)
        eps = plan.flags_of(act, seed).get("eps")
        all_eps = (str(plan.flags_of(each, seed).get("eps")) for each in plan.acts)
        asked = record.get("match", config).get("hidden_act")
        expected = {"hidden_act": act.split()[0], "learning_rate": float(rate), "seed": seed}
        found = {**config, "hidden_act": asked} if asked else config
        if eps is not None and asked:  # a number replaces the eps in the name
            expected["hidden_act"], found["hidden_act"] = (
                name.partition("_eps")[0] for name in (act.split()[0], str(asked))
            )
        if eps is not None or config.get("eps") in all_eps:  # otherwise it may be the preset's
            expected["eps"] = None if eps is None else str(eps)
        for key, value in expected.items():
            if key in found and found[key] != value:
                raise ValueError(
                    f"{path}: its {key} is {shown(found[key])}, but a record of this name has {shown(value)}"
                )

    def seconds(self) -> list[float]:
        """Returns the time of each run that has a record, including tuning runs."""
        return [sum(session["seconds"] for session in record["sessions"]) for _, record in self._records()]

    def hardware(self) -> dict[str, Any]:
        """Returns the hardware of one of the runs; empty if there are no records."""
        return next((record["sessions"][-1]["hardware"] for _, record in self._records()), {})

    def num_records(self) -> int:
        """Returns the number of records."""
        return len(self._names())

    def _names(self) -> list[str]:
        """Returns the names of all runs that have a record."""
        paths = (path for path in (self.folder / "records").glob("*.json") if not path.name.startswith("."))
        for path in (found := sorted(paths)):
            if not _RECORD.fullmatch(path.name):
                raise StudyError(f"{path} is not named like a record of a run, NAME-lrRATE-seedN.json. Move it away.")
        return [path.stem for path in found]

    def _records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields name and record of every run that has one."""
        return ((name, record) for name in self._names() if (record := self._record(name)))

    def outcome(self, run: Run) -> float:
        """Returns the final metric of a run, or its validation version in tuning; NaN if the run diverged."""
        return self.value(run, self._metric(run))

    def value(self, run: Run, metric: str) -> float:
        """Returns a metric of a run at its end; NaN if the run diverged."""
        record = self.record(run)
        assert record is not None, run
        return _outcome(record, metric)

    def _metric(self, run: Run) -> str:
        return self.plan.tuning_metric if run.seed in self.plan.tuning_seeds else self.plan.metric

    def parts(self, run: Run) -> np.ndarray | None:
        """Returns sums and counts for each group of evaluation samples, (2, groups).

        The ratio of their totals is the outcome. None if the run diverged or is missing, the outcome is not a mean over
        samples, or the record is too old.
        """
        record, (data, _, mean) = self.record(run) or {}, self._metric(run).partition("_")
        sums = {"loss": "losses", "accuracy": "correct"}.get(mean, "")
        found = (record.get("evaluation") or {}).get(data, {}) if record.get("status") == "finished" else {}
        return np.array([found[sums], found["counts"]], dtype=float) if sums in found else None

    def same_samples(self, runs: Iterable[Run]) -> bool:
        """Returns whether runs were evaluated on the same samples. With --allow_mixed they may not have been.

        Data of equal size have equal counts, so the hashes of the data must be equal too.
        """
        records = {run: record for run in runs if (record := self.record(run))}
        hashes = {record["data"]["hash"] for record in records.values()}
        counts = [part[1] for run in records if (part := self.parts(run)) is not None]
        return len(hashes) <= 1 and all(np.array_equal(count, counts[0]) for count in counts)

    def missing(self) -> list[Run]:
        """Returns the runs that can be run next: first the tuning runs, then the final runs, seed by seed.

        Running seed by seed keeps changes over time or between machines from looking like differences between arms.
        """
        if tuning := self._missing_in_tuning():
            return tuning
        trials = self.final_trials()
        final = [Run(*trial, seed) for seed in self.plan.final_seeds for trial in trials]
        return [run for run in final if self.record(run) is None]

    def _missing_in_tuning(self) -> list[Run]:
        """Returns the missing tuning runs, including extensions of the grid.

        A complete grid is extended if the best rate of an activation is at its edge. The extension is for all
        activations, since one with fewer trials than another would be at a disadvantage.
        """
        plan = self.plan
        missing = [run for run in plan.tuning_runs(self.rates()) if self.record(run) is None]
        if plan.tunes and not missing:
            more = {rate for act in plan.acts if (rate := plan.next_rate(self.tuned(act)))}
            missing = [run for run in plan.tuning_runs(sorted(more)) if self.record(run) is None]
        return missing

    def left(self) -> int:
        """Returns how many runs are left, without possible extensions of the grid."""
        missing = self.missing()
        tuning = bool(missing) and missing[0].seed in self.plan.tuning_seeds
        return len(missing) + (self.plan.num_runs()[1] if tuning else 0)

    def finalists(self) -> dict[str, list[tuple[str, float]]]:
        """Returns arm -> the best activations and learning rates in tuning, best first, which run on the final seeds.

        If all runs of an arm diverged, this is its first activation at the lowest rate.

        Raises:
            StudyError: The tuning is not finished.
        """
        plan = self.plan
        if missing := self._missing_in_tuning():
            raise StudyError(
                f"{self.folder} lacks {len(missing)} tuning runs, such as {missing[0].name}. Run the command that "
                "started the study again."
            )
        if not plan.tunes:
            return {arm: [(acts[0], plan.learning_rates[0])] for arm, acts in plan.arms.items()}
        ranked = {}
        for arm in plan.arms:
            means = self.trials(arm)
            ranked[arm] = sorted(means, key=means.__getitem__, reverse=plan.higher_is_better)[: plan.final_rates]
        return ranked

    def final_trials(self) -> list[tuple[str, float]]:
        """Returns the finalists of all arms, without duplicates. Arms may share one."""
        return list(dict.fromkeys(trial for trials in self.finalists().values() for trial in trials))

    def choices(self) -> dict[str, tuple[str, float]]:
        """Returns arm -> the activation and learning rate at which it is compared.

        If an arm has several finalists, this is the best one by validation over tuning and final seeds, or in tuning
        until all runs are done. A finalist that diverged less often is better.

        Raises:
            StudyError: The tuning is not finished.
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
        """Returns the grid of learning rates with its extensions so far, ascending."""
        tuning = [name.rpartition("-seed")[0] for name in self._names() if self._tunes(name)]
        return sorted({*self.plan.learning_rates, *(float(name.rpartition("-lr")[2]) for name in tuning)})

    def tuned(self, act: str) -> dict[float, float]:
        """Returns learning rate, ascending -> mean outcome over the tuning seeds, for rates with all records.

        If a run diverged, the mean is the worst possible outcome.
        """
        runs = {rate: [Run(act, rate, seed) for seed in self.plan.tuning_seeds] for rate in self.rates()}
        done = {rate: part for rate, part in runs.items() if part and all(self.record(run) for run in part)}
        means = {rate: float(np.mean([self.outcome(run) for run in part])) for rate, part in done.items()}
        return {rate: mean if math.isfinite(mean) else self.plan.worst for rate, mean in means.items()}

    def trials(self, arm: str) -> dict[tuple[str, float], float]:
        """Returns activation and learning rate -> mean outcome, for all trials of an arm; see `tuned`."""
        return {(act, rate): mean for act in self.plan.arms[arm] for rate, mean in self.tuned(act).items()}

    def runner_up(self, arm: str) -> tuple[tuple[str, float], float] | None:
        """Returns an arm's second best activation and learning rate in tuning, with its mean; None if none finished."""
        chosen = self.choices()[arm]
        others = {key: mean for key, mean in self.trials(arm).items() if key != chosen and math.isfinite(mean)}
        return self.plan.best(others.items(), key=lambda item: item[1]) if others else None

    def final_runs(self) -> dict[str, list[Run]]:
        """Returns arm -> its runs on the final seeds."""
        chosen = self.choices()
        return {arm: [Run(*chosen[arm], seed) for seed in self.plan.final_seeds] for arm in self.plan.arms}

    def outcomes(self) -> dict[str, dict[int, float]]:
        """Returns arm -> seed -> outcome, for the final runs that have a record."""
        return {
            arm: {run.seed: self.outcome(run) for run in runs if self.record(run)}
            for arm, runs in self.final_runs().items()
        }

    def set_aside(self) -> dict[tuple[str, float], list[float]]:
        """Returns activation and learning rate -> outcomes on the final seeds that are not part of any comparison.

        The tuning chose these earlier, but does not choose them any more.
        """
        final = {Run(*trial, seed).name for trial in self.final_trials() for seed in self.plan.final_seeds}
        found: dict[tuple[str, float], list[float]] = {}
        for name, record in self._records():
            if name not in final and not self._tunes(name):
                act, rate = name.rpartition("-seed")[0].rpartition("-lr")[::2]
                found.setdefault((act, float(rate)), []).append(_outcome(record, self.plan.metric))
        return found

    def comparisons(self, baseline: str | None = None) -> list[Comparison]:
        """Compares every arm with the plan's baseline, or with another arm, by the terms of the plan.

        There are no verdicts until all runs are done. Looking again after each new seed would eventually find a
        difference by chance.
        """
        plan = self.plan
        terms = plan.smallest_effect, plan.higher_is_better, plan.min_seeds
        final = self.final_runs()
        parts = {arm: {run.seed: part for run in runs if (part := self.parts(run)) is not None}
                 for arm, runs in final.items()}  # fmt: skip
        same = self.same_samples([run for runs in final.values() for run in runs])
        found = compare(self.outcomes(), baseline or plan.baseline, *terms, parts if same else None)
        if self.missing():
            found = [replace(c, verdict="pending", further_seeds=None, barred=False) for c in found]
        return found

    def check_pairing(self) -> list[str]:
        """Returns reasons why the arms of a seed differ in more than their activation."""
        wrong = []
        for seed, records in self._by_seed().items():
            wrong += [f"seed {seed}: the arms differ in {key}" for key in self._unequal(records)]
            if any(record.get("nonfinite", {}).get("skipped_batches") for record in records):
                wrong.append(f"seed {seed}: an arm skipped batches because its loss was not finite")
        return wrong

    def unequal_hashes(self) -> dict[int, list[str]]:
        """Returns seed -> the hashes in which its runs differ, in tuning too.

        Learning rates do not change them. The reason is a flag of one arm, or an error in the code.
        """
        by_seed: dict[int, list[dict[str, Any]]] = {}
        for name, record in self._records():
            by_seed.setdefault(_seed(name), []).append(record)
        found = {seed: self._unequal(records) for seed, records in by_seed.items()}
        return {seed: keys for seed, keys in found.items() if keys}

    def hashes(self) -> list[str]:
        """Returns the hashes that show pairing, as far as the records have them. Older ones lack `samples_hash`."""
        keys = ["init_signs_hash" if self.plan.own_gains else "init_hash", "order_hash", "samples_hash"]
        return [key for key in keys if any(record.get(key) for _, record in self._records())]

    def _unequal(self, records: list[dict[str, Any]]) -> list[str]:
        return [key for key in self.hashes() if len({record.get(key) for record in records}) > 1]

    def hardware_differs(self) -> list[int]:
        """Returns the final seeds whose arms did not all run on the same hardware."""
        found = {
            seed: {json.dumps(session["hardware"], sort_keys=True) for r in records for session in r["sessions"]}
            for seed, records in self._by_seed().items()
        }
        return [seed for seed, hardware in found.items() if len(hardware) > 1]

    def _by_seed(self) -> dict[int, list[dict[str, Any]]]:
        """Returns final seed -> the records of its runs."""
        trials = self.final_trials()
        return {
            seed: [record for trial in trials if (record := self.record(Run(*trial, seed)))]
            for seed in self.plan.final_seeds
        }

    def mixtures(self, here: Mapping[str, Any] | None = None) -> list[str]:
        """Returns the differences in code, versions, precision or data between records that should not differ.

        Args:
            here: The `environment()` of a process that will add runs.
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
        return _seed(name) in self.plan.tuning_seeds


def _seed(name: str) -> int:
    return int(name.rpartition("-seed")[2])


def _code(session: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts that must be the same for all sessions of a study."""
    return {
        "commit": session["commit"],
        "uncommitted changes": session.get("diff_hash", session["dirty"]),
        **session["versions"],
        # Records of earlier versions lack this, which does not count as a difference.
        **{f"launcher, {key}": value for key, value in session.get("launcher", {}).items()},
    }


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _outcome(record: Mapping[str, Any], metric: str) -> float:
    value = record["result"][metric] if record["status"] == "finished" else None
    return math.nan if value is None else float(value)
