"""Adds to a model card how the activation compares with others, according to a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import markdown_code, replace_between, shown
from ..training.config import TrainConfig, is_positive
from ..training.errors import ConfigError
from .plan import parse_flags
from .sample import sample_of
from .study import Study
from .words import mean, number, render, signed, span, spread

_HEADING = "\n## Compared with other activations\n"
_NEXT = "\n## Use\n"


def add_comparison(card: Path, record: dict[str, Any], study: Study) -> None:
    """Adds the results of a study about a checkpoint's activation to its card, replacing earlier ones.

    The machine-readable numbers of the card remain those of the checkpoint.

    Args:
        card: The `README.md` that a recipe wrote.
        record: The record of the run.
        study: A study of the same recipe in which an arm chose the activation.

    Raises:
        ConfigError: The study is about something else, or the card is not that of a run.
    """
    plan = study.plan
    if record.get("recipe") != plan.recipe:
        raise ConfigError(
            f"the run is one of the recipe {shown(record.get('recipe'))}, but {plan.name} is a study of {plan.recipe}. "
            "Name a study of the same recipe."
        )
    if missing := study.missing():
        raise ConfigError(
            f"{plan.name} is not finished: {len(missing)} runs are missing, such as {missing[0].name}. Finish it first."
        )
    records = _records(record, study)
    content = card.read_text(encoding="utf-8") if card.exists() else ""
    if _NEXT not in content:
        raise ConfigError(f"{card} is not the card of a run: it has no section `Use`. Name the folder of a run.")
    if _HEADING not in content:
        content = content.replace(_NEXT, _HEADING + _NEXT, 1)
    section = _section(record, study, records)
    card.write_text(replace_between(content, _HEADING, _NEXT, f"\n{section}"), encoding="utf-8")


def _records(record: dict[str, Any], study: Study) -> dict[str, list[dict[str, Any]]]:
    """Returns the final records of the arms that a run is part of, or else of those that asked for the same.

    Raises:
        ConfigError: There is none.
    """
    final = {arm: [r for run in runs if (r := study.record(run))] for arm, runs in study.final_runs().items()}
    if found := {arm: runs for arm, runs in final.items() if _has(runs, record)}:
        return found
    own = [flag for act in study.plan.acts for flag in parse_flags(act.split()[1:])]
    flags = list(dict.fromkeys(["eps", "match_c", *own]))
    asked = _asked(record, flags)
    if found := {arm: runs for arm, runs in final.items() if _asked(runs[0], flags) == asked}:
        return found
    compared = ", ".join(act for act, _ in study.choices().values())
    raise ConfigError(f"{study.plan.name} did not compare {shown(asked)}. It compared {compared}. Name another study.")


def _has(runs: Sequence[dict[str, Any]], record: dict[str, Any]) -> bool:
    return record.get("run_id") in {run.get("run_id", "") for run in runs}


def _asked(record: dict[str, Any], flags: Sequence[str]) -> str:
    """Returns the activation that a run asked for and its values of some flags, as in a plan: `egem_n2 eps=match`."""
    values = record["config"]
    if values.get("eps") is None or is_positive(str(values["eps"])):  # then its value is in hidden_act
        values = {**values, "eps": None, "match_c": None}
    # With eps=match, hidden_act has what the inputs gave at this seed.
    act = record["match"]["hidden_act"] if "match" in record else values.get("hidden_act")
    return " ".join([str(act), *(f"{flag}={values[flag]}" for flag in flags if values.get(flag) is not None)])


def _section(record: dict[str, Any], study: Study, records: dict[str, list[dict[str, Any]]]) -> str:
    plan, choices, outcomes = study.plan, study.choices(), study.outcomes()
    runs = [run for found in records.values() for run in found]
    here, there = record["config"], runs[0]["config"]
    # Differences in these do not matter. With eps=match, hidden_act differs between the seeds of an arm.
    same = TrainConfig.runtime | {"seed", "data_seed", "prompt", "hidden_act"}
    other = [
        f"{key} {there.get(key)} (here {here[key]})" for key in here if key not in same and here[key] != there.get(key)
    ]
    comparisons = study.comparisons()
    found = {c.arm: c for c in comparisons}
    rows = [
        [
            name, markdown_code(choices[name][0]), f"{choices[name][1]:g}", str(len(values)), number(mean(values)),
            number(spread(values)),
            *([signed(c.difference), span(c.interval), c.verdict] if (c := found.get(name)) else ["", "", "baseline"]),
        ]
        for name, values in outcomes.items()
    ]  # fmt: skip
    return render(
        "card.md.j2",
        study=study,
        plan=plan,
        sample=sample_of(study),
        one_of_them=_has(runs, record),
        other=other,
        arms=rows,
        comparisons=[c for c in comparisons if c.arm in records or plan.baseline in records],
    )
