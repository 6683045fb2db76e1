"""Plans: what they refuse, how they are read, and what they ask for."""

import math
import sys
import textwrap
from dataclasses import replace

import pytest

from hf_gem.compare.plan import Plan, PlanError, load_plan, parse_flags
from recipes import compare as compare_recipe
from tests.compare.toy import PLAN
from tests.helpers import ROOT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "loss"}, "metric must be one of test_loss"),
        ({"further_baselines": ["gelu"]}, "baseline must be one of the arms .'relu'.*, got 'gelu'"),
        ({"final_rates": 2}, "final_rates 2 needs a test metric, got validation_loss"),
        ({"final_rates": 3}, "must be 1 or 2, got 3"),
        ({"arms": {"relu": ["relu"], "x": ["gem seed=3"]}}, "flags must not include seed, which the study sets"),
        ({"arms": {"relu": ["relu"], "x": ["gem steps"]}}, "the form FLAG=VALUE"),
        ({"arms": {"relu": ["relu a=1"], "x": ["relu a 1"]}}, "FLAG=VALUE"),
        ({"baseline": "gelu"}, "baseline must be one of the arms .'relu'.*, got 'gelu'"),
        ({"arms": {"relu": ["relu"]}}, "a comparison needs at least two arms"),
        *(({"arms": {"relu": ["relu"], "x": acts}}, "every arm needs an activation") for acts in ([], [""], [" "])),
        ({"arms": {"relu": ["relu"], "x y": ["gem"], "x+y": ["silu"]}}, "in more than spaces, .*'x y', 'x\\+y'"),
        ({"arms": {"relu": ["relu"], "x": ["gem_2"]}}, "'gem_2'"),
        ({"arms": {"relu": ["relu"], "x": ["egem_eps1e-6"]}}, "canonical spelling"),
        ({"learning_rates": [0.1, 0.01]}, "ascending"),
        ({"learning_rates": [0.01234567]}, "at most six digits"),
        ({"tuning_seeds": [7]}, r"must differ, got \[7\] in both"),
        ({"tuning_seeds": []}, "there is something to choose"),
        ({"final_seeds": [1]}, r"at least two, got \[1\]"),
        ({"final_seeds": [1, 2**63]}, r"seeds must be 0 to 2\*\*63 - 1, got \[1, 9223372036854775808\]"),
        ({"smallest_effect": 0}, "smallest_effect must be above 0"),
        ({"flags": {"seed": 3}}, "flags must not include seed, which the study sets"),
    ],
)
def test_plans_that_make_no_sense(changes, message):
    with pytest.raises((PlanError, ValueError), match=message):
        Plan(**{**PLAN, **changes})


def test_yaml_plans(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text(
        textwrap.dedent("""
            recipe: toy
            preset: demo
            arms: [relu, gem_n2]
            baseline: relu
            metric: validation_loss
            smallest_effect: 0.005
            learning_rates: [1e-3]
            final_seeds: [0, 1]
        """)
    )
    plan = load_plan(path)
    assert (plan.name, plan.arms, plan.learning_rates) == ("short", {"relu": ["relu"], "gem_n2": ["gem_n2"]}, [1e-3])
    assert not plan.tunes
    path.write_text(path.read_text() + "seeds: [1]\n")
    with pytest.raises(PlanError, match=r"unknown fields seeds\. Known fields are arms, "):
        load_plan(path)
    for name in ("none.yaml", "none.py"):
        with pytest.raises(PlanError, match="cannot read the plan"):
            load_plan(tmp_path / name)


def test_a_plan_in_python(tmp_path):
    path = tmp_path / "plan.py"
    path.write_text(f"from hf_gem.compare.plan import Plan\nplan = Plan(**{PLAN})\n")
    assert load_plan(path) == Plan(**PLAN)
    path.write_text("steps = 3")
    with pytest.raises(PlanError, match=r"plan.py must define `plan`, a hf_gem.compare.plan.Plan, got None"):
        load_plan(path)


def test_a_plan_in_python_imports_what_is_beside_it(tmp_path):
    (tmp_path / "beside_the_plan.py").write_text(f"from hf_gem.compare.plan import Plan\nmade = Plan(**{PLAN})\n")
    path, before = tmp_path / "plan.py", list(sys.path)
    path.write_text("from beside_the_plan import made as plan\n")
    assert load_plan(path) == Plan(**PLAN)
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n1 / 0", "ZeroDivisionError: division by zero, in line 2"),
        ("\n\nx = = 3", r"SyntaxError: invalid syntax \(plan\.py, line 3\)"),
        ("import no_such_helper", "ModuleNotFoundError: No module named 'no_such_helper', in line 1"),
        ("import json\njson.loads('')", "JSONDecodeError: .*, in line 2"),
    ],
)
def test_an_error_in_a_plan_in_python_is_told_with_its_line(tmp_path, text, message):
    path = tmp_path / "plan.py"
    path.write_text(text)
    with pytest.raises(PlanError, match=rf"cannot read the plan .*plan\.py: {message}"):
        load_plan(path)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_plans(path, capsys):
    plan = load_plan(path)
    recipe = __import__(f"recipes.{plan.recipe}", fromlist=["PRESETS"])
    preset = {**recipe.PRESETS[plan.preset], **plan.flags, "learning_rate": plan.learning_rates[0]}
    recipe.Config(**preset).validate()
    compare_recipe.main([f"--plan={path}", "--dry_run"])
    out = capsys.readouterr().out
    assert f"{plan.num_runs()[1]} on the final seeds" in out
    settles = len(plan.final_seeds) >= plan.min_seeds  # others are for trying it out, or for curves
    assert ("found with power 0.8" in out) == settles


def test_what_a_grid_asks_for(study):
    plan = study().plan  # a loss, with rates from 0.005 to 0.02
    assert plan.next_rate({0.005: 3.0, 0.01: 1.0, 0.02: 2.0}) is None
    assert plan.next_rate({0.005: 3.0, 0.01: 2.0, 0.02: 1.0}) == 0.04
    assert plan.next_rate({0.005: 1.0, 0.01: 2.0, 0.02: math.inf}) == 0.0025
    assert plan.next_rate({0.005: 3.0, 0.16: 1.0}) is None  # three times beyond
    assert replace(plan, metric="validation_accuracy").next_rate({0.005: 3.0, 0.01: 2.0}) == 0.0025
    assert replace(plan, learning_rates=[0.01]).next_rate({0.01: 1.0}) is None


def test_flags_as_words():
    assert parse_flags(["steps=7", "dataset=data/text", "own_gain=yes"]) == {
        "steps": 7, "dataset": "data/text", "own_gain": True,
    }  # fmt: skip
    for value in ("2024_10", "007", "1:30", "0x10", "on", "2024-01-01", "null", "1e-3"):  # of YAML, 1e-3 is no number
        assert parse_flags([f"x={value}"]) == {"x": value}
    assert parse_flags(["a=0.5", "b=No", "c=true", "d=-3"]) == {"a": 0.5, "b": False, "c": True, "d": -3}
    for word in ("steps", "steps=", "=7"):
        with pytest.raises(PlanError, match=f"the form FLAG=VALUE, such as dataset=data/mnist, got '{word}'"):
            parse_flags([word])
