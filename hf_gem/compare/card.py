"""Adds to a model card how the activation compares with others, according to a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import markdown_code, replace_between, shown
from ..training.config import TrainConfig
from ..training.errors import ConfigError
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
    act, plan = record["config"].get("hidden_act"), study.plan
    if record.get("recipe") != plan.recipe:
        raise ConfigError(
            f"the run is one of the recipe {shown(record.get('recipe'))}, but {plan.name} is a study of {plan.recipe}. "
            "Name a study of the same recipe."
        )
    if missing := study.missing():
        raise ConfigError(
            f"{plan.name} is not finished: {len(missing)} runs are missing, such as {missing[0].name}. Finish it first."
        )
    chosen = {arm: chosen for arm, (chosen, _) in study.choices().items()}
    arms = [arm for arm in chosen if chosen[arm] == act]
    if not arms:
        raise ConfigError(
            f"{plan.name} did not compare {shown(act)}. It compared {', '.join(chosen.values())}. Name another study."
        )
    content = card.read_text(encoding="utf-8") if card.exists() else ""
    if _NEXT not in content:
        raise ConfigError(f"{card} is not the card of a run: it has no section `Use`. Name the folder of a run.")
    if _HEADING not in content:
        content = content.replace(_NEXT, _HEADING + _NEXT, 1)
    section = _section(record, study, arms)
    card.write_text(replace_between(content, _HEADING, _NEXT, f"\n{section}"), encoding="utf-8")


def _section(record: dict[str, Any], study: Study, arms: list[str]) -> str:
    plan, choices, outcomes = study.plan, study.choices(), study.outcomes()
    runs = [found for arm in arms for run in study.final_runs()[arm] if (found := study.record(run))]
    here, there = record["config"], runs[0]["config"]
    same = TrainConfig.runtime | {"seed", "data_seed", "prompt"}  # differences here do not matter
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
        one_of_them=record.get("run_id") in {run.get("run_id", "") for run in runs},
        other=other,
        arms=rows,
        comparisons=[c for c in comparisons if c.arm in arms or plan.baseline in arms],
    )
