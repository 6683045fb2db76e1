"""What a study lacks, and what its tuning chooses."""

import json
import math
import shutil
import threading
from pathlib import Path

import pytest

from hf_gem import cli
from hf_gem.compare.plan import Plan, PlanError, Run
from hf_gem.compare.preview import dry_run
from hf_gem.compare.report import write_report
from hf_gem.compare.study import Study, StudyError, freeze
from hf_gem.files import write_atomically
from tests.compare.toy import PLAN, TWO_ARMS, run, started


def test_an_optimum_at_the_edge_extends_the_grid(study):
    toy = study(flags={"best": 0.04}, final_seeds=[0, 1])
    run(toy)
    assert {rate for _, rate in toy.choices().values()} == {0.04}
    assert sorted(toy.tuned("relu")) == [0.005, 0.01, 0.02, 0.04, 0.08]


def test_a_grid_is_extended_so_far_and_no_further(study):
    toy = study(flags={"best": 10, "limit": 100}, final_seeds=[0, 1])
    run(toy)
    assert sorted(toy.tuned("relu")) == [0.005, 0.01, 0.02, 0.04, 0.08, 0.16]  # three more
    count = len(started(toy))
    run(toy)
    assert len(started(toy)) == count


def test_a_grid_that_is_to_be_extended_is_not_finished(study, tmp_path, capsys):
    """Stopped between the grid as planned and its extension: what is run next is that, and nothing is concluded."""
    toy = study(flags={"best_for_gem": 0.04}, arms={"relu": ["relu"], "gem": ["gem"]}, final_seeds=[0, 1])
    run(toy)
    for path in (toy.folder / "records").glob("*-lr0.0[48]-seed10*"):
        path.unlink()
    extension = [Run(act, 0.04, seed) for act in ("relu", "gem") for seed in (100, 101)]
    assert toy.missing() == extension
    assert toy.left() == 4 + 4
    with pytest.raises(StudyError, match="lacks 4 tuning runs"):
        toy.comparisons()
    (toy.folder / "records" / "gem-lr0.04-seed0.json").unlink()
    run(toy)
    assert not toy.missing()


def test_a_copy_without_records_or_runs_goes_on(study):
    toy = study(**TWO_ARMS)
    for name in ("records", "runs"):
        shutil.rmtree(toy.folder / name)
    assert "known when one has finished" in dry_run(toy.plan, toy.folder, 1)
    assert not (toy.folder / "runs").exists()  # a dry run writes nothing
    freeze(toy.plan, toy.folder)
    run(toy)
    assert not toy.missing()


def test_a_study_that_cannot_be_written_to_is_named(study, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match=r"cannot write to the study .*file: .*choose another --study folder\.$"):
        freeze(study().plan, tmp_path / "file")


def test_a_grid_is_extended_for_all(study):
    toy = study(flags={"best_for_gem": 0.04}, arms={"relu": ["relu"], "gem": ["gem"]}, final_seeds=[0, 1])
    run(toy)
    assert {arm: rate for arm, (_, rate) in toy.choices().items()} == {"relu": 0.01, "gem": 0.04}
    assert sorted(toy.tuned("relu")) == sorted(toy.tuned("gem")) == [0.005, 0.01, 0.02, 0.04, 0.08]


def test_diverged_runs_are_outcomes(study):
    toy = study(flags={"limit": 0.015})
    run(toy)
    assert toy.tuned("relu")[0.02] == math.inf
    assert toy.choices()["relu"] == ("relu", 0.01)


def test_the_two_best_rates_run_on_the_final_seeds_and_validation_decides(study):
    plan = {"metric": "test_loss", "final_rates": 2, "flags": {"test": 1}, "final_seeds": list(range(8))}
    toy = study(**plan, arms={"relu": ["relu"], "gem": ["gem best=0.012"]})
    run(toy)
    assert toy.finalists()["relu"][0] == ("relu", 0.01)
    assert {rate for _, rate in toy.finalists()["gem"]} == {0.01, 0.02}
    assert len([name for name in started(toy) if "seed10" not in name]) == 2 * 2 * 8
    means = {
        trial: [toy.value(Run(*trial, seed), "validation_loss") for seed in (100, 101, *range(8))]
        for trial in toy.finalists()["gem"]
    }
    assert toy.choices()["gem"] == min(means, key=lambda trial: sum(means[trial]))
    assert toy.outcomes()["gem"][0] == pytest.approx(2 + abs(math.log(toy.choices()["gem"][1] / 0.012)))
    assert not toy.set_aside()
    assert Run("gem best=0.012", 0.01, 0).name == "gem-best-0.012-lr0.01-seed0"


def test_a_finalist_that_diverges_is_not_chosen(study):
    plan = {"metric": "test_loss", "final_rates": 2, "flags": {"test": 1}, "final_seeds": [0, 1]}
    toy = study(**plan, arms={"relu": ["relu"], "gem": ["gem"]})
    run(toy)
    (act, rate), other = toy.finalists()["gem"]
    path = toy.folder / "records" / f"{Run(act, rate, 1).name}.json"
    path.write_text(path.read_text().replace('"finished"', '"diverged"'))
    again = study(**plan, arms={"relu": ["relu"], "gem": ["gem"]})
    assert again.choices()["gem"] == other


def test_a_frozen_plan_that_was_changed(study):
    toy = study()
    path = toy.folder / "plan.json"
    path.write_text(path.read_text().replace('"smallest_effect": 0.005', '"smallest_effect": 0.5'))
    with pytest.raises(PlanError, match="was changed after it was frozen"):
        study()


def test_a_record_of_an_activation_with_flags_of_its_own(study):
    arms = {"relu": ["relu"], "match": ["egem_n2 eps=match"], "eps": ["egem eps=0.01"], "egem": ["egem"]}
    plan = {**TWO_ARMS, "arms": arms, "final_seeds": [0, 1]}
    toy = study(**plan)
    run(toy)

    def rewritten(act, like, **changes):
        record = toy.record(Run(like, 0.01, 0))
        found = {**record, **changes, "config": record["config"] | changes["config"]}
        (toy.folder / "records" / f"{Run(act, 0.01, 0).name}.json").write_text(json.dumps(found))
        return study(**plan).record(Run(act, 0.01, 0))

    asked = {"match": {"hidden_act": "egem_n2"}, "config": {"hidden_act": "egem_n2_eps0.09"}}
    assert rewritten("egem_n2 eps=match", "egem_n2 eps=match", **asked)  # as recipes write them
    assert rewritten("egem eps=0.01", "egem eps=0.01", config={"hidden_act": "egem_eps0.01"})
    for act, like, eps in (("egem", "egem eps=0.01", "0.01"), ("egem eps=0.01", "egem", None)):
        with pytest.raises(StudyError, match=r"seed0\.json: its eps is .*, but a record of this name has"):
            rewritten(act, like, config={"eps": eps})


def test_a_changed_plan_is_another_study(study):
    study()
    with pytest.raises(
        PlanError,
        match=r"a study of another plan, which differs in smallest_effect\. A plan is frozen when its first run starts",
    ):
        study(smallest_effect=0.01)


def test_of_two_plans_for_one_new_folder_only_the_first_is_frozen(tmp_path, monkeypatch):
    """The second comes while the first one writes its file."""
    first, second, folder, refused = Plan(**PLAN), Plan(**{**PLAN, "smallest_effect": 0.01}), tmp_path / "new", []

    def freeze_second():
        try:
            freeze(second, folder)
        except PlanError as error:
            refused.append(str(error))

    other = threading.Thread(target=freeze_second)

    def slowly(path, content):
        if threading.current_thread() is not other:
            other.start()
            other.join(0.3)
        write_atomically(path, content)

    monkeypatch.setattr("hf_gem.compare.study.write_atomically", slowly)
    freeze(first, folder)
    other.join()
    assert "a study of another plan, which differs in smallest_effect" in "".join(refused)
    assert Study(folder).plan == first


def test_final_runs_go_seed_by_seed(study):
    toy = study(**TWO_ARMS)
    assert [(each.seed, each.act) for each in toy.missing()[:3]] == [(0, "relu"), (0, "gem"), (1, "relu")]


def test_a_folder_that_is_no_study(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path)])
    assert "is not a study, because it has no plan.json" in capsys.readouterr().err
    assert Path(tmp_path).exists()


def test_tuning_can_be_evaluated_on_samples_of_its_own(study):
    toy = study(tuning_flags={"data": "held-out"}, final_seeds=[0, 1], arms={"relu": ["relu"], "gem": ["gem"]})
    run(toy)
    data = {each.seed: toy.record(each)["data"]["hash"] for each in (Run("gem", 0.01, 100), Run("gem", 0.01, 1))}
    assert data == {100: "held-out", 1: "test"}
    write_report(toy)
    assert "Tuning runs used `data=held-out`." in (toy.folder / "report.md").read_text()


def test_outcomes_have_parts(study):
    toy = study(**TWO_ARMS, flags={"documents": 12})
    run(toy)
    found = toy.parts(Run("gem", 0.01, 3))
    assert found.shape == (2, 12)
    assert found[0].sum() / found[1].sum() == pytest.approx(toy.outcome(Run("gem", 0.01, 3)))
    (compared,) = toy.comparisons()
    assert (compared.components.num_seeds, compared.components.num_groups) == (8, 12)
    assert toy.comparisons("gem")[0].components is not None


def test_outcomes_without_parts(study):
    old, lost = study("old", **TWO_ARMS), study("lost", **TWO_ARMS, flags={"documents": 12, "limit_for_gem": 1e-9})
    for toy in (old, lost):
        run(toy)
        assert toy.parts(Run("gem", 0.01, 3)) is None
        assert toy.comparisons()[0].components is None
