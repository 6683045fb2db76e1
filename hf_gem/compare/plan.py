"""Plans: what a study will run and how it will be judged, written down before anything runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import reprlib
import runpy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from transformers.activations import ACT2FN

from ..family.names import is_claimed, parse
from ..files import check_type, read_yaml, redact
from ..training.errors import ConfigError

# Metric of a recipe -> whether higher is better. On test samples runs are compared, on validation samples they are
# tuned; a plan whose metric is one of validation does both on the same.
METRICS = {
    f"{part}_{name}": higher
    for part in ("test", "validation")
    for name, higher in (
        ("loss", False),
        ("perplexity", False),
        ("accuracy", True),
        ("relative_l2", False),
        ("log10_relative_l2", False),
    )
}
MOST_EXTENSIONS = 3  # of a grid of learning rates, at either end
_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,100}")  # it becomes a part of paths
_ARM = re.compile(r"[A-Za-z0-9._+= -]{1,100}")
_MARKS = re.compile(r"[`|<>\[\]$\\]")  # of Markdown, HTML and the formulas of matplotlib
_SET_BY_STUDY = {"hidden_act", "learning_rate", "seed", "data_seed", "output_dir", "preset", "resume"}
# A plan says what is compared. These would publish what comes out, or read further flags from a file.
_NOT_FOR_PLANS = {"config", "push_to_hub", "hub_strategy", "hub_public"}


class PlanError(ConfigError):
    """A plan that cannot be carried out."""


@dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
        act: The activation, with flags of its own behind it where a plan gives some: `egem_n2 eps=match`.
        learning_rate: Peak.
        seed: Of weights and dropout, and of data.
    """

    act: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and record: letters, digits, points, hyphens and underscores."""
        return f"{slug(self.act)}-lr{self.learning_rate:g}-seed{self.seed}"


def slug(act: str) -> str:
    """An activation with its flags, as a part of names of files."""
    return re.sub(r"[^\w.]+", "-", act)


@dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        name: Of the study: letters, digits, points, hyphens and underscores.
        recipe: A file of `recipes/`, without its ending.
        preset: Of the recipe.
        arms: Arm -> the activations among which it chooses, in tuning; n and eps count as trials like learning rates.
            Flags of the recipe may follow one, `egem_n2 eps=match`, for this activation alone.
        baseline: The arm that the others are compared with.
        metric: One of `METRICS`, at the last step. Tuning goes by the same metric of the validation samples.
        smallest_effect: Differences smaller than this are of no interest.
        learning_rates: The same grid for every arm, ascending, with ratios that are alike and at most six digits. An
            optimum of one arm at its edge extends it for all, by the mean ratio.
        tuning_seeds: Over which an arm chooses; none where there is nothing to choose.
        final_seeds: On which the arms are compared; none of the tuning seeds.
        flags: Further flags of the recipe, the same for all; `steps` is the horizon.
        tuning_flags: Flags in place of those in tuning, such as those that hold out a part of the training data, so
            that nothing is chosen on the samples of the comparison.
        min_seeds: With fewer finished pairs, no arm is called better or worse.
        further_baselines: Other arms that all others are compared with as well; for each, that is a family of
            hypotheses of its own.
        final_rates: How many of an arm's trials, the best in tuning, run on the final seeds: with 2, validation over
            all seeds decides between them, and not what few tuning seeds had by chance.
        notes: What a report has to say about the data or the setting.
    """

    name: str
    recipe: str
    preset: str
    arms: dict[str, list[str]]
    baseline: str
    metric: str
    smallest_effect: float
    learning_rates: list[float]
    final_seeds: list[int]
    tuning_seeds: list[int] = field(default_factory=list)
    flags: dict[str, str | int | float | bool] = field(default_factory=dict)
    tuning_flags: dict[str, str | int | float | bool] = field(default_factory=dict)
    min_seeds: int = 8
    notes: str = ""
    further_baselines: list[str] = field(default_factory=list)
    final_rates: int = 1

    def __post_init__(self) -> None:
        def require(condition: object, message: str) -> None:
            if not condition:
                raise PlanError(f"plan {self.name!r}: {message}")

        self._check_fields()
        require(self.metric in METRICS, f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        require(len(self.arms) > 1, "it has one arm, and a comparison takes two")
        for name in (self.baseline, *self.further_baselines):
            require(name in self.arms, f"baseline {name!r} is no arm; arms: {reprlib.repr(list(self.arms))}")
        for act, *own in map(str.split, self.acts):
            require(act in ACT2FN, f"the activation {reprlib.repr(act)} is not known")
            require(not is_claimed(act) or parse(act).name == act,
                    f"write {reprlib.repr(act)} in its canonical spelling")  # fmt: skip
            _check_flags(parse_flags(own), require)
        require(len(set(map(slug, self.acts))) == len(self.acts), "two activations would have runs of the same names")
        require(all(self.arms.values()), "every arm needs an activation")
        rates = self.learning_rates
        require(rates and all(0 < a < b for a, b in itertools.pairwise(rates)) and 0 < rates[0] <= rates[-1] < 1e100,
                f"learning_rates must be positive, finite and ascending, got {reprlib.repr(rates)}")  # fmt: skip
        require(all(float(f"{rate:g}") == rate for rate in rates),
                "learning_rates have six digits at most, as in the names of runs, "
                f"got {reprlib.repr(rates)}")  # fmt: skip
        shared = sorted(set(self.tuning_seeds) & set(self.final_seeds))
        require(not shared, f"seeds {reprlib.repr(shared)} are both tuning and final seeds")
        for seeds in (self.tuning_seeds, self.final_seeds):
            require(all(seed >= 0 for seed in seeds), f"seeds must be at least 0, got {reprlib.repr(seeds)}")
            require(len(set(seeds)) == len(seeds), f"seeds must differ, got {reprlib.repr(seeds)}")
        require(len(self.final_seeds) > 1, "final_seeds needs two or more")
        require(self.tuning_seeds or not self.tunes, "tuning_seeds is empty, and there is something to choose")
        require(0 < self.smallest_effect < 1e100,
                f"smallest_effect must be above 0 and finite, got {self.smallest_effect}")  # fmt: skip
        _check_flags({**self.flags, **self.tuning_flags}, require)
        require(self.final_rates in (1, 2), f"final_rates must be 1 or 2, got {self.final_rates}")
        require(
            self.final_rates == 1 or self.metric != self.tuning_metric,
            f"final_rates 2 needs a metric of test samples, got {self.metric}: which of the two rates counts is chosen "
            "by validation, on the final seeds too",
        )
        require(self.final_rates == 1 or self.tunes,
                f"final_rates is {self.final_rates}, and there is nothing to choose")  # fmt: skip

    def _check_fields(self) -> None:
        """Raises PlanError where a field has another type, a name could be no part of a path, or a secret stands."""
        hints = get_type_hints(type(self))
        try:
            for f in fields(self):
                check_type(getattr(self, f.name), hints[f.name], f.name)
        except ValueError as error:
            raise PlanError(f"plan {reprlib.repr(self.name)}: {error}") from None
        named = [("name", self.name, _NAME), ("recipe", self.recipe, _NAME), ("preset", self.preset, _NAME)]
        for what, name, pattern in (*named, *(("arms", arm, _ARM) for arm in self.arms)):
            if not pattern.fullmatch(name):
                more = " and not . or .." if pattern is _NAME else ", spaces, + and ="
                raise PlanError(
                    f"{what} of a plan must be made of letters, digits, points, hyphens and underscores{more}, got "
                    f"{reprlib.repr(name)}"
                )
        for what, values in (("acts", self.acts), ("flags", {**self.flags, **self.tuning_flags}.values())):
            if odd := [value for value in values if isinstance(value, str) and not value.isprintable()]:
                raise PlanError(f"plan {self.name!r}: {what} must be printable, got {reprlib.repr(odd[0])}")
        if odd := [act for act in self.acts if _MARKS.search(act)]:
            raise PlanError(f"plan {self.name!r}: acts must have none of `|<>[]$\\, got {reprlib.repr(odd[0])}")
        text = json.dumps(asdict(self), ensure_ascii=False)
        if re.search("[\ud800-\udfff]", text):
            raise PlanError(f"plan {self.name!r} holds half a character, which no file can be written with; remove it")
        if redact(text) != text:
            raise PlanError(
                f"plan {self.name!r} holds a password or token, and plans are kept and shown; take it out, and give it "
                "by hf auth login, $HF_TOKEN or ~/.netrc"
            )

    @property
    def tuning_metric(self) -> str:
        """What is chosen by."""
        return self.metric.replace("test_", "validation_")

    @property
    def higher_is_better(self) -> bool:
        """Whether the metric is to be large."""
        return METRICS[self.metric]

    @property
    def best(self) -> Callable[..., Any]:
        """The best of some outcomes: max or min."""
        return max if self.higher_is_better else min

    @property
    def worst(self) -> float:
        """The outcome of a run that diverged, among others: infinite."""
        return -math.inf if self.higher_is_better else math.inf

    @property
    def acts(self) -> list[str]:
        """All activations, each once: arms may share one."""
        return list(dict.fromkeys(act for acts in self.arms.values() for act in acts))

    def require_arm(self, name: str) -> None:
        """Raises PlanError where this is no arm."""
        if name not in self.arms:
            raise PlanError(f"{self.name} has no arm {name!r}; its arms are {', '.join(self.arms)}")

    @property
    def hash(self) -> str:
        """SHA-256 over all fields: a changed plan is another study."""
        values = asdict(self)
        for name, default in (("tuning_flags", {}), ("further_baselines", []), ("final_rates", 1)):
            if values[name] == default:
                del values[name]  # which plans that were frozen before there were any do not have
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def own_gains(self) -> bool:
        """Whether arms start from other scales of the same weights: a difference of activations, not of scales."""
        return bool(self.flags.get("own_gain"))

    @property
    def tunes(self) -> bool:
        """Whether there is something to choose."""
        return len(self.learning_rates) > 1 or any(len(acts) > 1 for acts in self.arms.values())

    @property
    def ratio(self) -> float:
        """Of neighbouring learning rates."""
        rates = self.learning_rates
        return (rates[-1] / rates[0]) ** (1 / (len(rates) - 1)) if len(rates) > 1 else 2.0

    def next_rate(self, means: Mapping[float, float]) -> float | None:
        """The learning rate to try next, where the best of some lies at their edge; None where it does not.

        Args:
            means: Learning rate -> mean outcome.
        """
        if len(self.learning_rates) == 1:
            return None
        best = self.best(sorted(means), key=lambda rate: means[rate])
        ratio = {min(means): 1 / self.ratio, max(means): self.ratio}.get(best)
        reach = self.ratio ** (MOST_EXTENSIONS + 0.5)  # half a step for rounding
        if ratio and self.learning_rates[0] / reach < best * ratio < self.learning_rates[-1] * reach:
            return float(f"{best * ratio:.6g}")
        return None

    def tuning_runs(self, rates: Sequence[float] | None = None) -> Iterator[Run]:
        """Those of the grid as planned, or of other learning rates."""
        if self.tunes:
            for act in self.acts:
                for rate in self.learning_rates if rates is None else rates:
                    yield from (Run(act, rate, seed) for seed in self.tuning_seeds)

    def num_runs(self) -> tuple[int, int]:
        """Tuning runs without extensions of the grid, and final runs."""
        return len(list(self.tuning_runs())), len(self.arms) * len(self.final_seeds) * self.final_rates


def _check_flags(flags: Mapping[str, Any], require: Callable[[object, str], None]) -> None:
    def some(names: Iterable[str]) -> str:
        return ", ".join(sorted(names))

    ours, never = _SET_BY_STUDY & flags.keys(), _NOT_FOR_PLANS & flags.keys()
    require(not ours, f"flags {some(ours)} are set by the study")
    require(not never, f"flags {some(never)} are not for plans; run the recipe by itself to use them")
    odd = [name for name in flags if not re.fullmatch(r"[A-Za-z0-9_]+", name)]
    require(not odd, f"flags must be named as in --help, with underscores, got {reprlib.repr(odd)}")
    for name, value in flags.items():
        sound = isinstance(value, (str, int, float))
        require(sound, f"flag {name} must be text, a number or true or false, got {reprlib.repr(value)}")


def parse_flags(words: Sequence[str]) -> dict[str, Any]:
    """Flags of a recipe, from words such as `steps=100`, with values in YAML.

    Raises:
        PlanError: one is no such word.
    """
    flags = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise PlanError(f"--set takes FLAG=VALUE, such as dataset=data/mnist, got {word!r}")
        try:
            flags[name] = read_yaml(value)
        except ValueError as error:
            raise PlanError(f"the value of {reprlib.repr(word)} cannot be read: {error}") from error
    return flags


def load_plan(path: Path) -> Plan:
    """Reads a plan from YAML, or from a Python file that calls one `plan`.

    Raises:
        PlanError: the file cannot be read, or a field is missing, unknown or makes no sense.
    """
    if path.suffix == ".py" and path.exists():
        plan = runpy.run_path(str(path)).get("plan")
        if not isinstance(plan, Plan):
            raise PlanError(f"the plan {path} must define `plan`, a hf_gem.compare.plan.Plan, got {plan!r}")
        return plan
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"the plan {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise PlanError(f"the plan {path} must hold one `field: value` a line, got a {type(values).__name__}")
    values.setdefault("name", path.stem)
    try:
        arms = values.get("arms")
        if isinstance(arms, list):  # each with the activation of its name
            values["arms"] = {name: [name] for name in arms}
        elif isinstance(arms, dict):
            values["arms"] = {name: [acts] if isinstance(acts, str) else acts for name, acts in arms.items()}
        if isinstance(rates := values.get("learning_rates"), list):  # YAML takes 1e-3 for a string
            values["learning_rates"] = [float(rate) if isinstance(rate, (str, int)) else rate for rate in rates]
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"the plan {path}: {str(error)[:150]}") from error
    return plan_of(values, path)


def plan_of(values: Mapping[Any, Any], path: Path) -> Plan:
    """The plan with some fields, which a file has.

    Args:
        values: Field -> value.
        path: The file, for messages.

    Raises:
        PlanError: a field is missing, unknown or makes no sense.
    """
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(Plan)}
    if unknown := [reprlib.repr(name).strip("'") for name in values if name not in known]:
        more = f" and {len(unknown) - 5} more" if unknown[5:] else ""
        raise PlanError(
            f"the plan {path} has unknown fields {', '.join(unknown[:5])}{more}; known are {', '.join(sorted(known))}"
        )
    if missing := [name for name, needed in known.items() if needed and name not in values]:
        raise PlanError(f"the plan {path} lacks the fields {', '.join(missing)}")
    try:
        return Plan(**values)
    except ValueError as error:
        raise PlanError(f"the plan {path}: {error}") from error
