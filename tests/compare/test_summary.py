"""Several studies in one table."""

import re

import numpy as np
import pytest

from hf_gem import cli
from hf_gem.compare.plan import PlanError
from hf_gem.compare.summary import summarise

FEW = {"learning_rates": [0.01], "tuning_seeds": [], "final_seeds": [0, 1, 2, 3]}


def test_gains_are_in_smallest_effects_of_interest(study, tmp_path, capsys):
    one = study("one", name="one", arms={"relu": ["relu"], "gem_n2": ["gem_n2"], "silu": ["silu"]}, **FEW)
    two = study("two", name="two", arms={"gelu": ["gelu"], "relu": ["relu"], "gem_n2": ["gem_n2"]}, baseline="gelu",
                smallest_effect=0.02, **FEW)  # fmt: skip
    for each in (one, two):
        each.run(jobs=2)
    found = {summary.act: summary for summary in summarise([one, two], "relu")}
    assert {arm: list(summary.comparisons) for arm, summary in found.items()} == {
        "gem_n2": ["one", "two"], "silu": ["one"], "gelu": ["two"],
    }  # fmt: skip
    gains = [(one.outcomes()["relu"][seed] - one.outcomes()["gem_n2"][seed]) / effect
             for effect in (0.005, 0.02) for seed in range(4)]  # fmt: skip
    assert found["gem_n2"].gain == pytest.approx(np.mean(sorted(gains)[2:6]))  # the loss is lower: a gain
    assert found["gem_n2"].interval[0] < found["gem_n2"].gain < found["gem_n2"].interval[1]

    cli.main(["summary", str(one.folder), str(two.folder), f"--output_dir={tmp_path / 'pages'}"])
    assert "summary.html" in capsys.readouterr().out
    text = (tmp_path / "pages" / "summary.md").read_text()
    assert re.search(r"\| `gem_n2` \| 8 \| \+", text)
    assert re.search(r"one: \+[\d.]+, inconclusive, two: \+[\d.]+, inconclusive", text)
    assert (tmp_path / "pages" / "summary.png").exists()


def test_arms_that_have_chosen_the_same_count_once(study, tmp_path):
    toy = study(arms={"relu": ["relu"], "gem": ["gem_n2"], "tuned": ["gem", "gem_n2"]})
    toy.run(jobs=2)
    (found,) = summarise([toy], "relu")
    assert (found.act, len(found.gains)) == ("gem_n2", 1)


def test_what_cannot_be_summarised(study):
    toy = study(arms={"relu": ["relu"], "gem": ["gem"], "silu": ["silu"]}, **FEW)
    with pytest.raises(PlanError, match=r"toy is not finished, or not paired: relu-lr0\.01-seed0"):
        summarise([toy], "relu")
    with pytest.raises(PlanError, match="studies must differ in name, got toy, toy"):
        summarise([toy, toy], "relu")
    with pytest.raises(PlanError, match="toy has no arm 'gelu'; its arms are relu, gem, silu"):
        summarise([toy], "gelu")
