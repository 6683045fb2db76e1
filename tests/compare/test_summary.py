"""Several studies in one table."""

import json
import re

import numpy as np
import pytest

from hf_gem import cli
from hf_gem.compare.plan import PlanError, Run
from hf_gem.compare.study import Study
from tests.compare.toy import run

for package in ("scipy", "matplotlib", "markdown_it"):
    pytest.importorskip(package, reason="summaries need it")

from hf_gem.compare.summary import _panel, summarise, write_summary  # noqa: E402

FEW = {"learning_rates": [0.01], "tuning_seeds": [], "final_seeds": [0, 1, 2, 3]}


def test_gains_are_in_smallest_effects_of_interest(study, tmp_path, capsys):
    one = study("one", name="one", arms={"relu": ["relu"], "gem_n2": ["gem_n2"], "silu": ["silu"]}, **FEW)
    two = study("two", name="two", arms={"gelu": ["gelu"], "relu": ["relu"], "gem_n2": ["gem_n2"]}, baseline="gelu",
                smallest_effect=0.02, **FEW)  # fmt: skip
    for each in (one, two):
        run(each)
    found = {summary.act: summary for summary in summarise([one, two], "relu")}
    assert {act: list(summary.findings) for act, summary in found.items()} == {
        "gem_n2": ["one", "two"], "silu": ["one"], "gelu": ["two"],
    }  # fmt: skip
    gains = [(one.outcomes()["relu"][seed] - one.outcomes()["gem_n2"][seed]) / effect
             for effect in (0.005, 0.02) for seed in range(4)]  # fmt: skip
    assert found["gem_n2"].findings["two"].gains == pytest.approx(gains[4:])  # the loss is lower: a gain
    low, high = found["gem_n2"].findings["two"].interval
    assert low < np.mean(gains[4:]) < high
    assert found["gem_n2"].pooled[0] == pytest.approx(np.mean(sorted(gains)[2:6]))
    assert found["gem_n2"].pooled[1] < found["gem_n2"].pooled[0] < found["gem_n2"].pooled[2]
    assert found["silu"].pooled is None  # one study

    cli.main(["summary", str(one.folder), str(two.folder), f"--output_dir={tmp_path / 'pages'}"])
    assert "summary.html" in capsys.readouterr().out
    text = (tmp_path / "pages" / "summary.md").read_text()
    for name, pairs in (("one", 4), ("two", 4), ("all", 8)):
        assert re.search(rf"\| `gem_n2` \| {name} \| [^|]* \| {pairs} \| \+", text)
    assert (tmp_path / "pages" / "summary.png").exists()
    assert b"</svg>" in (tmp_path / "pages" / "summary.svg").read_bytes()
    panel = _panel(two, summarise([one, two], "relu"), "relu")
    assert panel.title == "two"
    assert panel.label == "gain over relu in validation loss"
    assert sorted(name.partition(":")[0] for name in panel.rows) == ["gelu", "gem_n2"]
    (row,) = (row for name, row in panel.rows.items() if name.startswith("gem_n2"))
    assert row.points == pytest.approx(np.multiply(gains[4:], 0.02))  # in the unit of the metric
    assert row.middle == pytest.approx(np.mean(row.points))


def test_studies_that_point_in_different_directions_have_no_common_gain(study):
    arms = {"relu": ["relu"], "gem_n2": ["gem_n2"]}
    one = study("one", name="one", arms=arms, **FEW)
    two = study("two", name="two", arms=arms, flags={"best_for_gem_n2": 0.03}, **FEW)  # at 0.01 it is behind
    for each in (one, two):
        run(each)
    (found,) = summarise([one, two], "relu")
    assert found.findings["one"].gains.mean() > 0 > found.findings["two"].gains.mean()
    assert found.pooled is None


def test_a_study_in_which_an_activation_diverged_stays(study, tmp_path):
    arms = {"relu": ["relu"], "gem": ["gem"]}
    one = study("one", name="one", arms=arms, **FEW)
    two = study("two", name="two", arms=arms, flags={"limit_for_gem": 1e-9}, **{**FEW, "final_seeds": list(range(8))})
    for each in (one, two):
        run(each)
    write_summary([one, two], "relu", tmp_path)
    assert "| `gem` | two | **worse** | 0 | - | - | 8 / 0 |" in (tmp_path / "summary.md").read_text()


def test_an_approximation_stands_in_the_row_of_what_it_approximates(study):
    one = study("one", name="one", arms={"relu": ["relu"], "gelu": ["gelu"]}, **FEW)
    two = study("two", name="two", arms={"relu": ["relu"], "gelu_pytorch_tanh": ["gelu_pytorch_tanh"]}, **FEW)
    for each in (one, two):
        run(each)
    assert [(s.act, list(s.findings)) for s in summarise([one, two], "relu")] == [("gelu", ["one", "two"])]


def test_an_approximation_that_a_study_compares_stays_apart(study, tmp_path):
    exact, tanh = {"gelu": ["gelu"]}, {"tanh": ["gelu_pytorch_tanh"]}
    one = study("one", name="one", arms={"relu": ["relu"], **exact, **tanh}, **FEW)
    two = study("two", name="two", arms={"relu": ["relu"], **tanh}, **FEW)
    three = study("three", name="three", arms={"relu": ["relu"], **exact}, **FEW)
    for each in (one, two, three):
        run(each)
    write_summary([two], "relu", tmp_path)
    assert "`gelu` includes" in (tmp_path / "summary.md").read_text()
    write_summary([three], "relu", tmp_path)
    assert "`gelu` includes" not in (tmp_path / "summary.md").read_text()  # there is nothing to include
    write_summary([one, two], "relu", tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "`gelu` includes" not in text
    for act, name in (("gelu", "one"), ("gelu_pytorch_tanh", "one"), ("gelu_pytorch_tanh", "two")):
        assert f"| `{act}` | {name} |" in text
    assert "| `gelu` | two |" not in text
    assert {row.partition(":")[0] for row in _panel(one, summarise([one, two], "relu"), "relu").rows} == {
        "gelu", "gelu_pytorch_tanh",
    }  # fmt: skip


def test_an_activation_at_two_learning_rates_stays_apart(study):
    toy = study(arms={"relu": ["relu"], "gem": ["gem", "gem_n2"], "n2": ["gem_n2"]}, final_rates=2, metric="test_loss",
                flags={"test": 1}, tuning_seeds=[100], final_seeds=[0, 1])  # fmt: skip
    run(toy)
    ((_, other),) = set(toy.finalists()["n2"]) - set(toy.finalists()["gem"])
    for act, rate in toy.final_trials():
        for seed in toy.plan.final_seeds:
            path = toy.folder / "records" / f"{Run(act, rate, seed).name}.json"
            record = json.loads(path.read_text())
            loss = record["result"]["validation_loss"]
            # on the final seeds, gem_n2 is best at a rate that only one of the arms took there
            record["result"] |= {"test_loss": loss, "validation_loss": loss - ((act, rate) == ("gem_n2", other))}
            path.write_text(json.dumps(record))
    found = {s.act: s.findings["toy"].comparison.arm for s in summarise([Study(toy.folder)], "relu")}
    assert found == {"gem_n2 learning_rate=0.01": "gem", f"gem_n2 learning_rate={other:g}": "n2"}


def test_arms_that_have_chosen_the_same_count_once(study, tmp_path):
    toy = study(arms={"relu": ["relu"], "gem": ["gem_n2"], "tuned": ["gem", "gem_n2"]})
    run(toy)
    (found,) = summarise([toy], "relu")
    assert (found.act, len(found.findings)) == ("gem_n2", 1)


def test_what_cannot_be_summarised(study):
    toy = study(arms={"relu": ["relu"], "gem": ["gem"], "silu": ["silu"]}, **FEW)
    with pytest.raises(PlanError, match=r"toy is not finished, or not paired: relu-lr0\.01-seed0"):
        summarise([toy], "relu")
    with pytest.raises(PlanError, match="studies must have different names, got toy, toy"):
        summarise([toy, toy], "relu")
    with pytest.raises(PlanError, match=r"toy has no arm 'gelu'\. Its arms are relu, gem, silu\."):
        summarise([toy], "gelu")
