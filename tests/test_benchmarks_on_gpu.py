"""`make gpu`: its stages, what they leave where they fail, and the study that fits into a time. No time is asserted."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu, report
from benchmarks.common import machine
from benchmarks.device import run_suite
from benchmarks.evidence import PLAN, findings, fitted, from_root, joined, main, pilot, seconds_a_run
from benchmarks.processes import Ended, run_for
from hf_gem.compare.plan import load_plan
from hf_gem.compare.study import Study, freeze
from tests.helpers import ROOT, needs_compiler


@pytest.fixture
def quick(tmp_path):
    def run(*flags):
        gpu.main(["--device=cpu", "--quick", f"--results={tmp_path}", *flags])
        (folder,) = tmp_path.iterdir()
        return folder

    return run


@needs_compiler
@pytest.mark.slow
def test_every_stage_leaves_its_record_and_the_page_has_all(quick):
    folder = quick()
    records = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert records.keys() == {"gpu", *(stage.script for stage in gpu.STAGES.values())}
    stages = records["gpu"]["results"]["stages"]
    assert {name: stage["outcome"] for name, stage in stages.items()} == dict.fromkeys(gpu.STAGES, "well")
    text = (folder / "README.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        *("Stages", "Device", "Activations alone", "Memory", "GPT-2 as the recipe trains it", "Training steps"),
        "A study",
    ]
    for row in ("eager, save", "micro-batches of 32", "egem, n=1, from the output"):
        assert f"| {row}" in text
    assert "CIFAR-10" in text  # which the study needs


def test_a_stage_that_fails_is_noted_and_the_rest_goes_on(quick, monkeypatch, capfd):
    stages = {"bad": gpu.Stage("nothing"), "tests": gpu.Stage("processes")}
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "command", lambda stage, arguments: [sys.executable, "-c", SCRIPTS[stage.script]])
    with pytest.raises(SystemExit) as ended:
        quick()
    assert ended.value.code == 1
    (page,) = {Path(line.partition(": ")[2]) for line in capfd.readouterr().out.splitlines() if "All tables" in line}
    found = json.loads(page.with_name("gpu.json").read_text())["results"]["stages"]
    assert [found[name]["outcome"] for name in stages] == ["with status 3", "well"]
    assert found["bad"]["last_lines"] == ["what went wrong"]
    assert "    what went wrong\n" in page.read_text()
    with pytest.raises(SystemExit) as ended:
        quick("nonsense")
    assert ended.value.code == 2


SCRIPTS = {"nothing": "print('what went wrong'); raise SystemExit(3)", "processes": ""}


def test_a_command_is_stopped_with_what_it_started_when_its_time_is_up():
    for seconds in (1.0, 4.0, 16.0, 64.0):  # until it has had time to start something
        ended = run_for(seconds, ["sh", "-c", "sleep 600 & echo $!; wait"], group=True)
        assert ended.stopped
        assert ended.status < 0
        if ended.last_lines:
            break
    # Its output has ended, so what it started has too; ask the system whether that still runs.
    state = Path(f"/proc/{ended.last_lines[0]}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_failures_of_tests_are_named(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text(
        "import pytest\ndef test_right(): pass\ndef test_wrong(): assert 1 == 2\n"
        "def test_skipped(): pytest.skip('no reason')\n"
    )
    found = run_suite((str(path), f"--rootdir={tmp_path}"), torch.device("cpu"), seconds=100)
    assert (found["status"], found["tests"]) == (1, 3)
    assert found["skipped"] == {"no reason": 1}
    ((name, message),) = found["failures"].items()
    assert name.endswith("test_wrong")
    assert "1 == 2" in message


@pytest.mark.parametrize("name", ["cifar10-fast", "bert-narrow-stdlib", "pinn-poisson"])
def test_a_study_takes_as_much_as_fits(name):
    plan = load_plan(PLAN.with_name(f"{name}.yaml"))
    for runs in (10, 100, 150, 300, 10_000):
        found = fitted(plan, 2.0, 2.0 * runs)
        tuning, final = found.num_runs()
        assert set(found.learning_rates) <= set(plan.learning_rates)
        assert len(found.final_seeds) >= 2
        assert not set(found.final_seeds) & set(found.tuning_seeds)
        if len(found.final_seeds) > 2:
            extension = len(plan.acts) * len(found.tuning_seeds)
            assert tuning + extension + final <= runs
        if runs == 10_000:
            assert (found.learning_rates, found.tuning_seeds) == (plan.learning_rates, plan.tuning_seeds)
            assert len(found.final_seeds) > plan.min_seeds
    first = pilot(plan)
    assert first.num_runs() == (0, 2 * len(plan.arms))
    assert not set(first.final_seeds) & {*found.final_seeds, *plan.tuning_seeds}


def test_a_study_that_is_fitted_has_no_seed_twice():
    plan = replace(load_plan(PLAN), tuning_seeds=[0, 1, 5], final_seeds=[30, 2, 31])
    found = fitted(plan, 2.0, 20_000.0)
    assert found.final_seeds[:5] == [30, 2, 31, 3, 4]
    assert len(found.final_seeds) == len(set(found.final_seeds)) == 40
    assert not set(found.final_seeds) & set(plan.tuning_seeds)


def test_an_arm_that_chooses_is_timed_with_its_first_activation():
    plan = load_plan(PLAN)
    first = pilot(replace(plan, arms={**plan.arms, "gem": ["gem_n2", "gem"]}))
    assert first.arms["gem"] == ["gem_n2"]


@pytest.fixture
def cut_off(tmp_path, monkeypatch):
    """Calls the script again for a study that was stopped before its first run had ended, and stops it again."""
    monkeypatch.setattr("benchmarks.evidence.run_for", lambda *_: Ended(-15, 1.0, [], stopped=True))
    monkeypatch.setattr("benchmarks.evidence.SCRATCH", tmp_path / "scratch")
    folder = tmp_path / machine(torch.device("cpu")) / "smoke"
    plan = load_plan(PLAN.with_name("smoke.yaml"))
    freeze(replace(fitted(plan, 1.0, 1000.0), flags={**plan.flags, "dataset": "x.npz"}), folder)
    for name in ("x.npz", "y.npz"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmarks.evidence.ROOT", tmp_path)

    def run(*flags):
        main(["--device=cpu", f"--results={tmp_path}", f"--plan={PLAN.with_name('smoke.yaml')}", *flags])

    return run


def test_the_time_is_up_before_the_first_run_has_ended(cut_off):
    with pytest.raises(
        RuntimeError, match=r"the time was up before the study smoke had a record\. Give more --minutes"
    ):
        cut_off("--dataset=x.npz")


@pytest.mark.parametrize(
    ("flags", "field"), [(["--dataset=x.npz", "--arms=gem_n2"], "arms"), (["--dataset=y.npz"], "flags")]
)
def test_a_study_of_another_plan_is_not_continued(cut_off, capsys, flags, field):
    with pytest.raises(SystemExit):
        cut_off(*flags)
    assert f"smoke is a study of another plan, which differs in {field}. Delete the folder" in capsys.readouterr().err


def test_what_a_study_found_is_on_the_page():
    study = Study(ROOT / "results" / "cifar100-resnet20-short")
    found = json.loads(json.dumps(findings(study)))
    results = {"cost": {"runs": study.num_records()}, "study": "cifar10-fast", **found}
    text = report.evidence_table({"results": results})
    for comparison in study.comparisons():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {comparison.arm} |"))
        assert f"{comparison.difference:+.4g}" in row
        assert f"**{comparison.verdict}**" in row
    assert f"runs {study.num_records()}" in text
    assert seconds_a_run(study) > 0
    assert "not run" in report.evidence_table({"results": {}})


def test_a_study_that_was_cut_off_in_its_tuning_says_so(tmp_path):
    freeze(load_plan(PLAN), tmp_path)
    found = findings(Study(tmp_path))
    assert "not finished" in report.evidence_table({"results": {"cost": {}, "study": "cifar10-fast", **found}})


def test_a_study_does_not_depend_on_where_the_repository_is(tmp_path, monkeypatch):
    assert from_root(ROOT / "data" / "cifar10.npz") == Path("data/cifar10.npz")
    monkeypatch.chdir(ROOT / "docs")
    assert from_root(Path("../results")) == Path("results")
    assert from_root(tmp_path / "cifar10.npz") == tmp_path.resolve() / "cifar10.npz"


def test_parts_of_a_dataset_are_put_together(tmp_path):
    whole = {"x_train": np.arange(24).reshape(6, 4), "y_train": np.arange(6)}
    for k in range(2):
        np.savez(tmp_path / f"part{k}.npz", **{key: array[3 * k : 3 * k + 3] for key, array in whole.items()})
    path = joined([tmp_path / f"part{k}.npz" for k in range(2)], tmp_path / "whole.npz")
    loaded = np.load(path)
    assert {key: loaded[key].tolist() for key in loaded} == {key: array.tolist() for key, array in whole.items()}
    assert joined([path], tmp_path / "other.npz") == path
