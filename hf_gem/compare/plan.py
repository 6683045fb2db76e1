"""Plans: what a study will run and how it will be judged, fixed before anything runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from transformers.activations import ACT2FN

from ..family.names import parse
from ..files import check_type, redact, shown
from ..surgery.fields import is_ours
from ..training.config import read_yaml
from ..training.errors import ConfigError, reason

# Metric of a recipe -> whether higher is better. Runs are tuned on validation samples and compared on test samples. If
# the metric of a plan is a validation metric, both happen on the same samples.
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
MOST_EXTENSIONS = 3  # of the grid of learning rates, at either end
_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,100}")  # it becomes part of paths
_ARM = re.compile(r"[A-Za-z0-9._+= -]{1,100}")
_MARKS = re.compile(r"[`|<>\[\]$\\]")  # special characters of Markdown, HTML and matplotlib's formulas
_BOOLEANS = {"true", "false", "yes", "no"}  # those words that YAML and recipes read alike
_SET_BY_STUDY = {"hidden_act", "learning_rate", "seed", "data_seed", "output_dir", "preset", "resume"}
# A plan only describes a comparison. These flags would publish the results, or read further flags from a file.
_NOT_FOR_PLANS = {"config", "push_to_hub", "hub_strategy", "hub_public"}


class PlanError(ConfigError):
    """A plan that is invalid or cannot be carried out."""


@dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
        act: The activation, followed by its own flags if the plan has some: `egem_n2 eps=match`.
        learning_rate: Peak learning rate.
        seed: Seed of weights, dropout and data.
    """

    act: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder and record: letters, digits, points, hyphens and underscores."""
        return f"{slug(self.act)}-lr{self.learning_rate:g}-seed{self.seed}"


def slug(act: str) -> str:
    """Converts an activation with its flags to a part of file names."""
    return re.sub(r"[^\w.]+", "-", act)


@dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        name: Name of the study: letters, digits, points, hyphens and underscores.
        recipe: Name of a file in `recipes/`, without its suffix.
        preset: Preset of the recipe.
        arms: Arm -> the activations it chooses from in tuning; choices of n and eps count as trials, like learning
            rates. An activation may be followed by flags of the recipe that apply only to it: `egem_n2 eps=match`.
        baseline: The arm that the others are compared with.
        metric: One of `METRICS`, at the last step. Tuning uses the validation version of this metric.
        smallest_effect: Smallest effect of interest. Smaller differences do not matter.
        learning_rates: Grid of learning rates, the same for every arm: ascending, with similar ratios and at most six
            digits. If the optimum of one arm is at the edge, the grid is extended for all arms, by the mean ratio.
        tuning_seeds: Seeds on which the arms are tuned. Empty if there is nothing to choose.
        final_seeds: Seeds on which the arms are compared. They must differ from the tuning seeds.
        flags: Further flags of the recipe, the same for all runs. `steps` is the horizon.
        tuning_flags: Flags that replace others in tuning, for example to hold out part of the training data so that
            nothing is chosen on the samples of the comparison.
        min_seeds: Smallest number of pairs for a verdict. A pair with a diverged run counts, but not for "equivalent".
        further_baselines: Other arms that all others are compared with too. Each one forms a separate family of
            hypotheses.
        final_rates: Number of an arm's best trials from tuning that run on the final seeds. With 2, validation over all
            seeds decides between them, rather than chance on a few tuning seeds.
        notes: Remarks on the data or the setting, shown in the report.
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
                raise PlanError(f"plan {shown(self.name)}: {message}")

        self._check_fields()
        require(self.metric in METRICS, f"metric must be one of {', '.join(METRICS)}, got {shown(self.metric)}")
        require(len(self.arms) > 1, "a comparison needs at least two arms, got one")
        for name in (self.baseline, *self.further_baselines):
            require(name in self.arms, f"baseline must be one of the arms {shown(list(self.arms))}, got {shown(name)}")
        require(all(acts and all(map(str.split, acts)) for acts in self.arms.values()), "every arm needs an activation")
        for act, *own in map(str.split, self.acts):
            require(act in ACT2FN, f"unknown activation {shown(act)}")
            canonical = not is_ours(act) or parse(act).name == act
            require(canonical, f"an activation must be written in its canonical spelling, got {shown(act)}")
            _check_flags(parse_flags(own), require)
        require(len(set(map(slug, self.acts))) == len(self.acts), "the runs of two activations would have equal names")
        require(len(set(map(slug, self.arms))) == len(self.arms),
                f"names of arms become names of files, so they must differ in more than spaces, +, = and -, got "
                f"{shown(list(self.arms))}")  # fmt: skip
        rates = self.learning_rates
        require(rates and all(0 < a < b for a, b in itertools.pairwise(rates)) and 0 < rates[0] <= rates[-1] < 1e100,
                f"learning_rates must be positive, finite and ascending, got {shown(rates)}")  # fmt: skip
        require(all(float(f"{rate:g}") == rate for rate in rates),
                f"learning_rates must have at most six digits, as in names of runs, got {shown(rates)}")  # fmt: skip
        both = sorted(set(self.tuning_seeds) & set(self.final_seeds))
        require(not both, f"tuning_seeds and final_seeds must differ, got {shown(both)} in both")
        for seeds in (self.tuning_seeds, self.final_seeds):
            require(all(0 <= seed < 2**63 for seed in seeds), f"seeds must be 0 to 2**63 - 1, got {shown(seeds)}")
            require(len(set(seeds)) == len(seeds), f"seeds must differ, got {shown(seeds)}")
        require(len(self.final_seeds) > 1, f"final_seeds must be at least two, got {shown(self.final_seeds)}")
        require(self.tuning_seeds or not self.tunes, "tuning_seeds is empty, but there is something to choose")
        require(0 < self.smallest_effect < 1e100,
                f"smallest_effect must be above 0 and finite, got {self.smallest_effect}")  # fmt: skip
        _check_flags({**self.flags, **self.tuning_flags}, require)
        require(self.final_rates in (1, 2), f"final_rates must be 1 or 2, got {self.final_rates}")
        require(
            self.final_rates == 1 or self.metric != self.tuning_metric,
            f"final_rates 2 needs a test metric, got {self.metric}, because validation on the final seeds chooses "
            "between the two rates",
        )
        require(self.final_rates == 1 or self.tunes, "final_rates is 2, but there is nothing to choose")

    def _check_fields(self) -> None:
        """Raises PlanError if a field has a wrong type, a name cannot be part of a path, or a field holds a secret."""
        hints = get_type_hints(type(self))
        try:
            for f in fields(self):
                check_type(getattr(self, f.name), hints[f.name], f.name)
        except ValueError as error:
            raise PlanError(f"plan {shown(self.name)}: {error}") from None
        named = [("name", self.name, _NAME), ("recipe", self.recipe, _NAME), ("preset", self.preset, _NAME)]
        for what, name, pattern in (*named, *(("arms", arm, _ARM) for arm in self.arms)):
            if not pattern.fullmatch(name):
                more = " and not . or .." if pattern is _NAME else ", spaces, + and ="
                raise PlanError(
                    f"{what} of a plan must be made of letters, digits, points, hyphens and underscores{more}, got "
                    f"{shown(name)}"
                )
        for what, values in (("acts", self.acts), ("flags", {**self.flags, **self.tuning_flags}.values())):
            if odd := [value for value in values if isinstance(value, str) and not value.isprintable()]:
                raise PlanError(f"plan {shown(self.name)}: {what} must be printable, got {shown(odd[0])}")
        if odd := [act for act in self.acts if _MARKS.search(act)]:
            raise PlanError(f"plan {shown(self.name)}: acts must not contain `|<>[]$\\, got {shown(odd[0])}")
        text = json.dumps(asdict(self), ensure_ascii=False)
        if re.search("[\ud800-\udfff]", text):
            raise PlanError(f"plan {self.name!r} holds half a character, which no file can be written with; remove it")
        if redact(text) != text:
            raise PlanError(
                f"plan {shown(self.name)} contains a password or token. Plans are stored and shown. Remove it, and use "
                "hf auth login, $HF_TOKEN or ~/.netrc instead."
            )

    @property
    def tuning_metric(self) -> str:
        """The metric by which tuning chooses."""
        return self.metric.replace("test_", "validation_")

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher metric is better."""
        return METRICS[self.metric]

    @property
    def best(self) -> Callable[..., Any]:
        """The best of some outcomes: max or min."""
        return max if self.higher_is_better else min

    @property
    def worst(self) -> float:
        """The infinite outcome that stands for a diverged run."""
        return -math.inf if self.higher_is_better else math.inf

    @property
    def acts(self) -> list[str]:
        """All activations, without duplicates. Arms may share one."""
        return list(dict.fromkeys(act for acts in self.arms.values() for act in acts))

    def require_arm(self, name: str) -> None:
        """Raises PlanError if there is no such arm."""
        if name not in self.arms:
            raise PlanError(f"{self.name} has no arm {shown(name)}. Its arms are {', '.join(self.arms)}. Name one.")

    @property
    def hash(self) -> str:
        """A SHA-256 over all fields. A changed plan is a different study."""
        values = asdict(self)
        for name, default in (("tuning_flags", {}), ("further_baselines", []), ("final_rates", 1)):
            if values[name] == default:
                del values[name]  # plans that were frozen before the field existed do not have it
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def own_gains(self) -> bool:
        """Whether arms scale the same initial weights for their activations; one flag of its own is enough."""
        return any(self.flags_of(act, self.final_seeds[0]).get("own_gain") for act in self.acts)

    def flags_of(self, act: str, seed: int) -> dict[str, Any]:
        """Returns the flags of an activation's runs at a seed. Its own replace the plan's, and tuning flags both."""
        tuning = self.tuning_flags if seed in self.tuning_seeds else {}
        return {**self.flags, **parse_flags(act.split()[1:]), **tuning}

    @property
    def tunes(self) -> bool:
        """Whether there is something to choose."""
        return len(self.learning_rates) > 1 or any(len(acts) > 1 for acts in self.arms.values())

    @property
    def ratio(self) -> float:
        """The mean ratio of neighbouring learning rates."""
        rates = self.learning_rates
        return (rates[-1] / rates[0]) ** (1 / (len(rates) - 1)) if len(rates) > 1 else 2.0

    def next_rate(self, means: Mapping[float, float]) -> float | None:
        """Returns the learning rate to try next if the best one is at the edge of the grid, or None.

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
        """Yields the tuning runs of the planned grid, or of other learning rates."""
        if self.tunes:
            for act in self.acts:
                for rate in self.learning_rates if rates is None else rates:
                    yield from (Run(act, rate, seed) for seed in self.tuning_seeds)

    def num_runs(self) -> tuple[int, int]:
        """Returns the number of tuning runs without extensions of the grid, and the number of final runs."""
        return len(list(self.tuning_runs())), len(self.arms) * len(self.final_seeds) * self.final_rates


def _check_flags(flags: Mapping[str, Any], require: Callable[[object, str], None]) -> None:
    def some(names: Iterable[str]) -> str:
        return ", ".join(sorted(names))

    ours, never = _SET_BY_STUDY & flags.keys(), _NOT_FOR_PLANS & flags.keys()
    require(not ours, f"flags must not include {some(ours)}, which the study sets")
    require(not never, f"flags must not include {some(never)}; to use them, run the recipe on its own")
    odd = [name for name in flags if not re.fullmatch(r"[A-Za-z0-9_]+", name)]
    require(not odd, f"flags must be named as in --help, with underscores, got {shown(odd)}")
    for name, value in flags.items():
        sound = isinstance(value, (str, int, float))
        require(sound, f"flag {name} must be text, a number, true or false, got {shown(value)}")


def parse_flags(words: Sequence[str]) -> dict[str, Any]:
    """Parses flags of a recipe from words such as `steps=100`.

    A value is a number, true or false if it prints back to the same word. YAML would also read 007 as 7 and on as true,
    but a recipe must get what was typed.

    Raises:
        PlanError: A word is malformed.
    """
    flags = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise PlanError(f"a flag must have the form FLAG=VALUE, such as dataset=data/mnist, got {shown(word)}")
        try:
            found = read_yaml(value)
            number = isinstance(found, (int, float)) and str(found) == value
        except ValueError as error:
            raise PlanError(f"cannot read the value of {shown(word)}: {error}") from error
        kept = number or value.lower() in _BOOLEANS or isinstance(found, (dict, list))  # a plan refuses the last two
        flags[name] = found if kept else value
    return flags


def load_plan(path: Path) -> Plan:
    """Reads a plan from YAML, or from a Python file that defines `plan`.

    Raises:
        PlanError: The file cannot be read, or a field is missing, unknown or makes no sense.
    """
    if path.suffix == ".py" and path.exists():
        plan = _run(path).get("plan")
        if not isinstance(plan, Plan):
            raise PlanError(f"the plan {path} must define `plan`, a hf_gem.compare.plan.Plan, got {shown(plan)}")
        return plan
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the plan {path}: {error}") from error
    if not isinstance(values, dict):
        raise PlanError(f"the plan {path} must have one `field: value` per line, got a {type(values).__name__}")
    values.setdefault("name", path.stem)
    try:
        arms = values.get("arms")
        if isinstance(arms, list):  # each arm is named after its activation
            values["arms"] = {name: [name] for name in arms}
        elif isinstance(arms, dict):
            values["arms"] = {name: [acts] if isinstance(acts, str) else acts for name, acts in arms.items()}
        if isinstance(rates := values.get("learning_rates"), list):  # YAML reads 1e-3 as a string
            values["learning_rates"] = [float(rate) if isinstance(rate, (str, int)) else rate for rate in rates]
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"the plan {path}: {str(error)[:150]}") from error
    return plan_of(values, path)


def _run(path: Path) -> dict[str, Any]:
    """Runs a plan in Python, which can import what is beside it, and returns its global names."""
    beside = str(path.resolve().parent)
    sys.path.insert(0, beside)
    try:
        return runpy.run_path(str(path))
    except PlanError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f", in line {lines[-1]}" if lines else ""  # a SyntaxError has its line in its text
        raise PlanError(f"cannot read the plan {path}: {reason(error)}{place}") from error
    finally:
        sys.path.remove(beside)


def plan_of(values: Mapping[Any, Any], path: Path) -> Plan:
    """Makes a plan from the fields in a file.

    Args:
        values: Field -> value.
        path: The file, for messages.

    Raises:
        PlanError: A field is missing, unknown or makes no sense.
    """
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(Plan)}
    if unknown := [shown(name).strip("'") for name in values if name not in known]:
        raise PlanError(
            f"the plan {path} has the unknown fields {', '.join(unknown)[:80]}. Known fields are "
            f"{', '.join(sorted(known))}. Remove or rename the others."
        )
    if missing := [name for name, needed in known.items() if needed and name not in values]:
        raise PlanError(f"the plan {path} lacks the fields {', '.join(missing)}. Add them.")
    try:
        return Plan(**values)
    except ValueError as error:
        raise PlanError(f"the plan {path}: {error}") from error
