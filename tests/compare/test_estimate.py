"""What a study takes, by `recipes/compare.py --estimate`: arithmetic on made-up times, and runs of a real recipe."""

import re
import signal

import pytest

from hf_gem.compare import estimate as estimate_module
from hf_gem.compare.estimate import Short, cost_of, counts, estimate
from hf_gem.compare.plan import Plan, PlanError
from hf_gem.compare.preview import occupied
from hf_gem.compare.study import StudyError
from hf_gem.training.checkpoint import CheckpointStore
from hf_gem.training.errors import Interrupted
from recipes import compare as compare_recipe
from tests.helpers import ROOT, TINY, write_corpus

RECIPES = ROOT / "recipes"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")
    flags = dict(flag[2:].split("=") for flag in TINY if not flag.startswith("--learning_rate"))
    flags |= {"dataset": str(corpus), "cache_dir": str(corpus.parent), "steps": 12}

    def make(**more):
        return Plan(
            **{"name": "tiny", "recipe": "gpt2_pretrain", "preset": "demo", "flags": flags | more},
            **{"arms": {"relu": ["relu"], "gem_n2": ["gem_n2"]}, "baseline": "relu", "metric": "validation_loss"},
            **{"smallest_effect": 0.005, "learning_rates": [0.01, 0.02], "tuning_seeds": [5], "final_seeds": [0, 1]},
        )

    return make


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(estimate_module, "_SECONDS", 0.01)


@pytest.mark.parametrize(
    ("steps", "eval_every", "save_every", "expected"),
    [(600, 200, 300, (600, 4, 2)), (10, 200, 0, (10, 2, 1)), (7, 3, 2, (7, 4, 4)), (5, 0, 5, (5, 2, 1))],
)
def test_evaluations_and_checkpoints_are_counted(steps, eval_every, save_every, expected):
    assert counts({"steps": steps, "eval_every": eval_every, "save_every": save_every}) == expected


def made_up(steps, evaluation, evaluations=2, checkpoints=1):
    """A run with 100 tokens a step, which takes 0.25 s, and the first one 3 s."""
    training = 3 + 0.25 * (steps - 1) + evaluation * evaluations + 0.5 * checkpoints
    return Short(steps, training + 4, training, 0.5, 3 / 100, 3 / 100 + 0.25 / 100 * (steps - 1))


@pytest.mark.parametrize("evaluation", [0.0, 8.0])
def test_what_a_run_takes_follows_from_two_that_are_shorter(evaluation):
    config = {"steps": 1000, "eval_every": 100, "save_every": 300}
    cost = cost_of(made_up(10, evaluation), made_up(80, evaluation), config)
    assert [cost.around, cost.first, cost.step, cost.evaluation] == pytest.approx([4, 2.75, 0.25, evaluation], abs=1e-9)
    assert cost.run == pytest.approx(made_up(1000, evaluation, 11, 4).wall)


def test_times_that_vary_do_not_make_an_evaluation_give_time_back():
    config = {"steps": 1000, "eval_every": 0, "save_every": 0}
    cost = cost_of(made_up(10, -0.1), made_up(80, -0.1), config)
    assert cost.evaluation == 0
    assert 0.24 < cost.step < 0.25


def test_times_that_vary_do_not_make_a_step_give_time_back():
    """With few steps, the longer run may take less time than the shorter one."""
    config = {"steps": 2, "eval_every": 0, "save_every": 0}
    cost = cost_of(made_up(1, 8.0), made_up(2, 6.0), config)
    assert (cost.step, cost.first) == (0, 0)
    assert cost.evaluation == pytest.approx((2 * 8 + 3 + 2 * 6 + 3.25) / 4)
    assert cost.run > 0


def test_a_study_occupies_cores_or_gpus():
    assert occupied(10, 2, {"gpus": [], "torch_threads": 4}) == "80 core-hours"
    assert occupied(10, 0, {"gpus": [], "torch_threads": 1}) == "10 core-hours"
    assert occupied(10, 3, {"gpus": ["H100"] * 2, "torch_threads": 4}) == "20 GPU-hours"


def test_a_study_is_estimated_by_its_command(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.py").write_text(f"from hf_gem.compare.plan import Plan\nplan = Plan(**{plan().__dict__})\n")
    compare_recipe.main([f"--plan={tmp_path / 'plan.py'}", "--jobs=0", "--dry_run", "--estimate"])
    printed = capsys.readouterr().out
    assert "\n  relu-lr" in printed  # a run of the dry run
    number = r"([\d.e-]+)"
    found = re.search(
        rf"A run of relu takes {number} s, estimated from runs of 3 and 12 steps: {number} s before and after "
        rf"training, {number} s extra for the first step, 12 steps of {number} s, 5 evaluations of {number} s, "
        rf"6 checkpoints of {number} s\n",
        printed,
    )
    total, around, first, step, evaluation, saving = map(float, found.groups())
    assert total == pytest.approx(around + first + 12 * step + 5 * evaluation + 6 * saving, abs=0.2)  # as rounded
    assert re.search(
        rf"takes {number} hours with --jobs 0, {number} core-hours\. It has 8 runs, and 2 more for each extension",
        printed,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["plan.py"]  # nothing of a study


def test_what_cannot_be_estimated(plan):
    with pytest.raises(PlanError, match=r"the runs of tiny have one step\. An estimate needs at least two"):
        estimate(plan(steps=1, warmup_steps=1), RECIPES, 0)
    with pytest.raises(StudyError, match=r"a short run exited with status 2: .*--n_embd must be a multiple of n_head"):
        estimate(plan(n_head=3), RECIPES, 0)


def test_a_signal_stops_an_estimate(plan, monkeypatch):
    save = CheckpointStore.save

    def signalled(*arguments):
        signal.raise_signal(signal.SIGINT)
        return save(*arguments)

    monkeypatch.setattr(CheckpointStore, "save", signalled)
    with pytest.raises(Interrupted):
        estimate(plan(), RECIPES, 0)
