"""Studies from plan to report."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from hf_gem import cli
from hf_gem.compare import study as run_module
from hf_gem.compare.plan import Plan, PlanError, Run, load_plan
from hf_gem.compare.report import write_report
from hf_gem.compare.study import StudyError
from hf_gem.training.record import environment
from recipes import compare as compare_recipe
from tests.compare.conftest import PLAN
from tests.helpers import ROOT

# Runs a study as recipes/compare.py does.
DRIVER = """
from pathlib import Path
from hf_gem.compare.run import Study
from hf_gem.training.errors import run_recipe
run_recipe(lambda: Study(Path({!r}), Path({!r})).run(2))
"""


def started(study):
    return (study.folder / "started.txt").read_text().split()


def test_from_plan_to_report(study):
    toy = study()
    toy.run(jobs=2)
    assert len(started(toy)) == 4 * 3 * 2 + 3 * 8  # four activations, three rates, two seeds; then three arms
    assert toy.choices() == {"relu": ("relu", 0.01), "gem": ("gem_n2", 0.01), "silu": ("silu", 0.01)}
    assert not list(toy.folder.glob("runs/*/*.safetensors"))
    assert {path.stem for path in toy.folder.glob("runs/*.txt")} == set(started(toy))  # a log for each
    page = write_report(toy).read_text()
    results = json.loads((toy.folder / "results.json").read_text())
    verdicts = {c["arm"]: c["verdict"] for c in results["comparisons"]}
    assert verdicts == {"gem": "better", "silu": "equivalent"}
    report = (toy.folder / "report.md").read_text()
    assert "of `gem` was 0.0" in report
    assert "below that of `relu`" in report
    assert "equal initial weights" in report
    assert page.count("data:image/png;base64,") == 4  # forest, curves, learning rates, n
    assert not re.search(r'(src|href)="(?!data:)', page)
    for name in re.findall(r"\]\((\w+\.png)\)", report):
        assert (toy.folder / name).exists()


def test_nothing_is_run_twice_and_the_report_is_the_same(study, capsys):
    toy = study()
    toy.run()
    first = {name: (write_report(toy).parent / name).read_bytes() for name in ("report.md", "report.html")}
    count = len(started(toy))
    study().run()
    assert len(started(toy)) == count
    cli.main(["report", str(toy.folder)])
    assert "report.html" in capsys.readouterr().out
    assert {name: (toy.folder / name).read_bytes() for name in first} == first


def test_a_run_that_failed_stops_the_study_and_can_be_repeated(study, capsys):
    name = "gem-lr0.01-seed100"
    with pytest.raises(StudyError, match=rf"the run {name} ended with status 1: .*out of memory.*output is in"):
        study(flags={"breaks": name}).run(jobs=2)
    assert "Waiting for the runs that are under way" in capsys.readouterr().err
    toy = study(flags={"breaks": name})
    done = set(started(toy)) - {name}
    toy.run()
    assert all(started(toy).count(other) == 1 for other in done)
    assert started(toy).count(name) == 2


def test_ctrl_c_stops_the_study_and_it_goes_on(study, tmp_path):
    toy = study(flags={"slow": 1}, learning_rates=[0.01], arms={"relu": ["relu"], "gem": ["gem"]}, tuning_seeds=[])
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(str(toy.folder), str(tmp_path / "recipes"))],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not (toy.folder / "started.txt").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopped; the same command goes on" in output
    assert len(started(toy)) <= 2
    (toy.folder / "fast").touch()
    toy.run()
    assert len(toy.outcomes()["gem"]) == 8


def test_an_optimum_at_the_edge_extends_the_grid(study):
    toy = study(flags={"best": 0.04}, final_seeds=[0, 1])
    toy.run()
    assert {rate for _, rate in toy.choices().values()} == {0.04}
    assert sorted(toy.tuned("relu")) == [0.005, 0.01, 0.02, 0.04, 0.08]


def test_a_grid_is_extended_so_far_and_no_further(study):
    toy = study(flags={"best": 10, "limit": 100}, final_seeds=[0, 1])
    toy.run(jobs=2)
    assert sorted(toy.tuned("relu")) == [0.005, 0.01, 0.02, 0.04, 0.08, 0.16]  # three more
    count = len(started(toy))
    toy.run()
    assert len(started(toy)) == count


def test_a_grid_that_is_to_be_extended_is_not_finished(study, tmp_path, capsys):
    """Stopped between the grid as planned and its extension: what is run next is that, and nothing is concluded."""
    toy = study(flags={"best_for_gem": 0.04}, arms={"relu": ["relu"], "gem": ["gem"]}, final_seeds=[0, 1])
    toy.run(jobs=2)
    for path in (toy.folder / "records").glob("*-lr0.0[48]-seed10*"):
        path.unlink()
    extension = [Run(act, 0.04, seed) for act in ("relu", "gem") for seed in (100, 101)]
    assert toy.missing() == extension
    assert toy.left() == 4 + 4
    with pytest.raises(StudyError, match="lacks 4 runs of its tuning"):
        toy.comparisons()
    (toy.folder / "records" / "gem-lr0.04-seed0.json").unlink()
    toy.run(jobs=2)
    assert not toy.missing()


def test_runs_that_the_tuning_does_not_choose_are_told(study):
    toy = study(learning_rates=[0.01], arms={"relu": ["relu"], "gem": ["gem"]}, tuning_seeds=[], final_seeds=[0, 1])
    toy.run(jobs=2)
    for seed, loss in ((0, 3.5), (1, 3.7)):
        record = json.loads((toy.folder / "records" / f"gem-lr0.01-seed{seed}.json").read_text())
        record["result"]["validation_loss"] = loss
        (toy.folder / "records" / f"gem-lr0.02-seed{seed}.json").write_text(json.dumps(record))
    assert toy.set_aside() == {("gem", 0.02): [3.5, 3.7]}
    write_report(toy)
    assert (
        "**Set aside:** 2 runs of `gem` at 0.02 on the final seeds, with a mean of 3.6000."
        in (toy.folder / "report.md").read_text()
    )


def test_a_choice_of_chance_is_called_one(study):
    few = {"arms": {"relu": ["relu"], "gem": ["gem"]}, "final_seeds": [0, 1]}
    toy = study(learning_rates=[0.0099, 0.01], **few)
    toy.run(jobs=2)
    write_report(toy)
    assert "the second best of `relu`, `gem` was nearer than" in (toy.folder / "report.md").read_text()
    toy = study("clear", learning_rates=[0.0001, 0.01, 1], **few)
    toy.run(jobs=2)
    write_report(toy)
    assert "a choice of chance" not in (toy.folder / "report.md").read_text()


def test_a_grid_is_extended_for_all(study):
    toy = study(flags={"best_for_gem": 0.04}, arms={"relu": ["relu"], "gem": ["gem"]}, final_seeds=[0, 1])
    toy.run()
    assert {arm: rate for arm, (_, rate) in toy.choices().items()} == {"relu": 0.01, "gem": 0.04}
    assert sorted(toy.tuned("relu")) == sorted(toy.tuned("gem")) == [0.005, 0.01, 0.02, 0.04, 0.08]


def test_diverged_runs_are_outcomes(study):
    toy = study(flags={"limit": 0.015})
    toy.run()
    assert toy.tuned("relu")[0.02] == math.inf
    assert toy.choices()["relu"] == ("relu", 0.01)


def test_an_arm_that_always_diverges_has_had_its_chance(study):
    toy = study(flags={"limit_for_silu": 1e-9})
    toy.run(jobs=2)
    assert toy.choices()["silu"] == ("silu", 0.000625)  # the lowest, after three extensions
    write_report(toy)
    report = (toy.folder / "report.md").read_text()
    assert "8 runs of `silu` and 0 of `relu` diverged, and 0 seeds finished at both (p = 0.016 after Holm)" in report
    assert "it is worse." in report
    assert "| silu | `silu` | 0.000625 (the edge of the grid) |" in report

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((toy.folder / "results.json").read_text(), parse_constant=refuse)  # NaN is not JSON


def test_a_study_under_way(study):
    toy = study(learning_rates=[0.01])
    with pytest.raises(StudyError, match=r"lacks 8 runs of its tuning, such as relu-lr0.01-seed100; the command"):
        write_report(toy)
    toy.run(jobs=2)
    for seed in (5, 6):
        (toy.folder / "records" / f"relu-lr0.01-seed{seed}.json").unlink()
    write_report(toy)
    report = (toy.folder / "report.md").read_text()
    assert "**Not finished:** 2 runs are missing, such as relu-lr0.01-seed5." in report
    assert "On 6 seeds" in report
    assert "**pending**" in report  # also of what is plainly settled: gem_n2 is better
    assert "no verdict before they are done" in report


def test_a_frozen_plan_that_was_changed(study):
    toy = study()
    path = toy.folder / "plan.json"
    path.write_text(path.read_text().replace('"smallest_effect": 0.005', '"smallest_effect": 0.5'))
    with pytest.raises(PlanError, match="was changed after it was frozen"):
        study()


def test_a_record_of_an_earlier_attempt_is_not_taken_for_this_one(study):
    toy = study(flags={"breaks": "gem-lr0.01-seed100"})
    folder = toy.folder / "runs" / "gem-lr0.01-seed100"
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps({"status": "interrupted"}))
    with pytest.raises(StudyError, match="out of memory"):
        toy.run()


def test_runs_stop_when_their_study_is_killed(study, tmp_path):
    toy = study(flags={"slow": 1}, learning_rates=[0.01], arms={"relu": ["relu"], "gem": ["gem"]}, tuning_seeds=[])
    process = subprocess.Popen([sys.executable, "-c", DRIVER.format(str(toy.folder), str(tmp_path / "recipes"))])
    while process.poll() is None and not (toy.folder / "started.txt").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    process.kill()
    process.wait()
    time.sleep(1)
    (toy.folder / "fast").touch()
    toy.run(jobs=2)  # with nobody left in the folders
    assert len(toy.outcomes()["gem"]) == 8
    assert not subprocess.run(["pgrep", "-f", str(toy.folder)], capture_output=True, text=True).stdout


def test_two_drivers_share_a_study(study):
    one, two = study(), study()
    threads = [threading.Thread(target=s.run) for s in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = started(one)
    assert len(names) == len(set(names)) == 48


@pytest.mark.parametrize("key", ["init_hash", "order_hash", "samples_hash"])
def test_what_is_not_paired_stops_the_study(study, key):
    toy = study(flags={"unpaired": key}, final_seeds=[0, 1])
    with pytest.raises(StudyError, match=rf"the runs are not paired: of seed 0 the arms differ in {key}"):
        toy.run()
    assert len(started(toy)) == 4 * 3 * 2 + 2  # and not after all final runs
    write_report(toy)
    assert f"**Not paired:** seed 0: the arms differ in {key}" in (toy.folder / "report.md").read_text()


def test_a_run_that_skipped_batches_is_told_in_the_report(study):
    toy = study(flags={"skips": "silu-lr0.01-seed1"}, final_seeds=[0, 1])
    toy.run(jobs=2)
    write_report(toy)
    assert "**Not paired:** seed 1: an arm skipped batches" in (toy.folder / "report.md").read_text()


def test_pairing_is_claimed_by_the_hashes_that_there_are(study):
    toy = study(final_seeds=[0, 1])
    toy.run(jobs=2)
    for path in (toy.folder / "records").glob("*"):
        record = json.loads(path.read_text())
        del record["samples_hash"]  # as older records
        if path.stem == "silu-lr0.01-seed1":
            record["sessions"][0]["hardware"] = {**record["sessions"][0]["hardware"], "gpus": ["another"]}
        path.write_text(json.dumps(record))
    write_report(study(final_seeds=[0, 1]))
    report = (toy.folder / "report.md").read_text()
    assert "are equal, of initial weights and the order of samples. Of 1 seeds not all arms" in report


def test_arms_with_gains_of_their_own_are_paired_by_the_signs_of_their_weights(study):
    toy = study(flags={"own_gain": True}, final_seeds=[0, 1])
    toy.run()
    write_report(toy)
    assert "equal initial weights, each scaled for its activation, and saw" in (toy.folder / "report.md").read_text()


def test_arms_that_differ_in_n_or_eps_have_a_picture_of_it(study):
    arms = {act: [act] for act in ("relu", "gem", "gem_n2", "egem", "egem_eps0.01", "egem_n2")}
    toy = study(arms=arms, learning_rates=[0.01], tuning_seeds=[], final_seeds=[0, 1])
    toy.run(jobs=2)
    write_report(toy)
    report = (toy.folder / "report.md").read_text()
    assert {path.name for path in toy.folder.glob("*.png")} == {"forest.png", "curves.png", "n.png", "eps.png"}
    assert "Outcome by n" in report
    assert "Outcome by eps" in report


def test_records_of_other_code_are_not_mixed_in(study):
    toy = study()
    toy.run()
    path = toy.folder / "records" / "silu-lr0.01-seed7.json"
    record = json.loads(path.read_text())
    record["sessions"][0]["commit"] = "another"
    path.write_text(json.dumps(record))
    with pytest.raises(
        StudyError, match=r"commit: None in gem-.* and \d+ more, another in silu-lr0.01-seed7\. .*--allow_mixed"
    ):
        study().run()
    mixed = study(allow_mixed=True)
    mixed.run()
    write_report(mixed)
    assert "**Mixed:** commit: None in" in (mixed.folder / "report.md").read_text()


def test_code_that_differs_is_refused_before_it_runs(study, monkeypatch):
    toy = study()
    toy.run()
    (toy.folder / "records" / "silu-lr0.01-seed7.json").unlink()
    here = environment(toy.recipes)
    monkeypatch.setattr(run_module, "environment", lambda folder: here | {"commit": "another"})
    count = len(started(toy))
    with pytest.raises(StudyError, match="another in this process"):
        toy.run()
    assert len(started(toy)) == count


def test_a_recipe_that_is_none(study):
    with pytest.raises(PlanError, match=r"no recipe 'top' in .*; there are toy"):
        study(recipe="top").run()


def test_a_changed_plan_is_another_study(study):
    study()
    with pytest.raises(
        PlanError, match=r"a study of another plan \(other smallest_effect\), frozen when its first run started"
    ):
        study(smallest_effect=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "loss"}, "metric must be one of validation_loss"),
        ({"baseline": "gelu"}, "baseline 'gelu' is no arm"),
        ({"arms": {"relu": ["relu"]}}, "a comparison takes two"),
        ({"arms": {"relu": ["relu"], "x": ["gem_2"]}}, "'gem_2'"),
        ({"arms": {"relu": ["relu"], "x": ["egem_eps1e-6"]}}, "canonical spelling"),
        ({"learning_rates": [0.1, 0.01]}, "ascending"),
        ({"learning_rates": [0.01234567]}, "six digits at most"),
        ({"tuning_seeds": [7]}, r"seeds \[7\] are both"),
        ({"tuning_seeds": []}, "there is something to choose"),
        ({"final_seeds": [1]}, "two or more"),
        ({"smallest_effect": 0}, "smallest_effect must be above 0"),
        ({"flags": {"seed": 3}}, "flags seed are set by the study"),
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
    with pytest.raises(PlanError, match="unknown fields seeds"):
        load_plan(path)
    for name in ("none.yaml", "none.py"):
        with pytest.raises(PlanError, match="cannot be read"):
            load_plan(tmp_path / name)


def test_a_plan_in_python(tmp_path):
    path = tmp_path / "plan.py"
    path.write_text(f"from hf_gem.compare.plan import Plan\nplan = Plan(**{PLAN})\n")
    assert load_plan(path) == Plan(**PLAN)
    path.write_text("steps = 3")
    with pytest.raises(PlanError, match=r"plan.py must define `plan`, a hf_gem.compare.plan.Plan, got None"):
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
    settles = plan.name != "smoke"  # which is for trying it out
    assert ("found with power 0.8" in out) == settles


def test_what_a_grid_asks_for(study):
    plan = study().plan  # a loss, with rates from 0.005 to 0.02
    assert plan.next_rate({0.005: 3.0, 0.01: 1.0, 0.02: 2.0}) is None
    assert plan.next_rate({0.005: 3.0, 0.01: 2.0, 0.02: 1.0}) == 0.04
    assert plan.next_rate({0.005: 1.0, 0.01: 2.0, 0.02: math.inf}) == 0.0025
    assert plan.next_rate({0.005: 3.0, 0.16: 1.0}) is None  # three times beyond
    assert replace(plan, metric="validation_accuracy").next_rate({0.005: 3.0, 0.01: 2.0}) == 0.0025
    assert replace(plan, learning_rates=[0.01]).next_rate({0.01: 1.0}) is None


def test_final_runs_go_seed_by_seed(study):
    toy = study(learning_rates=[0.01], arms={"relu": ["relu"], "gem": ["gem"]}, tuning_seeds=[])
    assert [(run.seed, run.act) for run in toy.missing()[:3]] == [(0, "relu"), (0, "gem"), (1, "relu")]


def test_a_run_that_outlives_its_driver_is_waited_for(study):
    toy = study(learning_rates=[0.01], arms={"relu": ["relu"], "gem": ["gem"]}, tuning_seeds=[], final_seeds=[0, 1])
    folder = toy.folder / "runs" / toy.missing()[0].name
    folder.mkdir()
    orphan = FileLock(folder / ".lock", thread_local=False)  # which it has until it has saved
    orphan.acquire()
    driver = threading.Thread(target=toy.run)
    driver.start()
    while len(toy.missing()) > 1:
        time.sleep(0.05)
    assert folder.name not in started(toy)
    orphan.release()
    driver.join()
    assert not toy.missing()


def test_progress_leaves_out_what_was_there(study, capsys):
    toy = study(learning_rates=[0.01], arms={"relu": ["relu"], "gem": ["gem"]}, tuning_seeds=[])
    toy.run(jobs=2)
    (toy.folder / "records" / "gem-lr0.01-seed7.json").unlink()
    capsys.readouterr()
    toy.run()
    bar = capsys.readouterr().err
    assert " 15/16 " in bar.split("\r")[1]
    assert " 16/16 " in bar


def test_a_metric_that_the_recipe_does_not_have_is_told_at_the_first_run(study):
    toy = study(metric="validation_accuracy")
    with pytest.raises(PlanError, match="toy has no validation_accuracy; it has validation_loss"):
        toy.run()
    assert len(started(toy)) == 1


def test_another_baseline_has_a_report_of_its_own(study, capsys):
    toy = study()
    toy.run(jobs=2)
    write_report(toy)
    first = (toy.folder / "report.md").read_text()
    cli.main(["report", str(toy.folder), "--baseline", "gem"])
    report = (toy.folder / "against-gem" / "report.md").read_text()
    assert "of `relu` was 0.0" in report
    assert "above that of `gem`" in report
    assert "The plan had named `relu`" in report
    assert (toy.folder / "report.md").read_text() == first
    with pytest.raises(SystemExit):
        cli.main(["report", str(toy.folder), "--baseline", "gelu"])
    assert "toy has no arm 'gelu'; its arms are relu, gem, silu" in capsys.readouterr().err


def test_a_folder_that_is_no_study(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path)])
    assert "is no study: it has no plan.json" in capsys.readouterr().err
    assert Path(tmp_path).exists()


def test_flags_are_words_that_recipes_take(study):
    command = study(flags={"mixed_precision": False, "own_gain": True}).command(Run("relu", 1e-5, 3))
    assert {"--mixed_precision=no", "--own_gain=yes", "--learning_rate=1e-05"} <= set(command)


def test_tuning_can_be_evaluated_on_samples_of_its_own(study):
    toy = study(tuning_flags={"data": "held-out"}, final_seeds=[0, 1], arms={"relu": ["relu"], "gem": ["gem"]})
    toy.run(jobs=2)
    data = {run.seed: toy.record(run)["data"]["hash"] for run in (Run("gem", 0.01, 100), Run("gem", 0.01, 1))}
    assert data == {100: "held-out", 1: "test"}
    write_report(toy)
    assert "Tuning runs had `data=held-out`." in (toy.folder / "report.md").read_text()
    assert "--data=held-out" not in toy.command(Run("gem", 0.01, 1))


def test_what_is_left_to_run_has_a_cost(study, tmp_path, capsys):
    toy = study(learning_rates=[0.01], arms={"relu": ["relu"], "gem": ["gem"]}, tuning_seeds=[])
    toy.run(jobs=2)
    (tmp_path / "plan.py").write_text(f"from hf_gem.compare.plan import Plan\nplan = Plan(**{toy.plan.__dict__})\n")
    for path in sorted((toy.folder / "records").glob("*"))[:4]:
        path.unlink()
    command = [f"--plan={tmp_path / 'plan.py'}", f"--study={toy.folder}", "--dry_run"]
    compare_recipe.main(command)
    # each says that it took 3 s
    assert "12 runs are done, 3 s each; what is planned takes 0.0 hours more" in capsys.readouterr().out
    compare_recipe.main([command[0], "--dry_run"])
    assert "known when one has finished" in capsys.readouterr().out


def test_a_note_is_a_part_of_the_plan(study, tmp_path):
    toy = study()
    (tmp_path / "plan.py").write_text(f"from hf_gem.compare.plan import Plan\nplan = Plan(**{toy.plan.__dict__})\n")
    with pytest.raises(PlanError, match=r"a study of another plan \(other notes\)"):
        compare_recipe.main([f"--plan={tmp_path / 'plan.py'}", f"--study={toy.folder}", "--note=Of JPEG images."])


def test_flags_in_place_of_those_of_a_plan(capsys):
    plan = f"--plan={ROOT / 'recipes' / 'plans' / 'smoke.yaml'}"
    compare_recipe.main([plan, "--dry_run", "--set", "steps=7", "--set", "dataset=data/text"])
    assert "7 steps each" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare_recipe.main([plan, "--dry_run", "--set", "steps"])
    assert "--set takes FLAG=VALUE, such as dataset=data/mnist, got 'steps'" in capsys.readouterr().err
