"""What a study will do and cost, by `recipes/compare.py --dry_run`."""

import numpy as np
import pytest
import torch

from hf_gem.compare.plan import PlanError, Run
from hf_gem.compare.power import minimum_detectable_effect
from hf_gem.compare.preview import dry_run, expected
from hf_gem.compare.study import Study
from hf_gem.compare.two_way import components
from recipes import compare as compare_recipe
from tests.compare.toy import TWO_ARMS, run
from tests.helpers import ROOT


def test_what_is_left_to_run_has_a_cost(study, tmp_path, capsys):
    toy = study(**TWO_ARMS)
    run(toy)
    (tmp_path / "plan.py").write_text(f"from hf_gem.compare.plan import Plan\nplan = Plan(**{toy.plan.__dict__})\n")
    for path in sorted((toy.folder / "records").glob("*"))[:4]:
        path.unlink()
    command = [f"--plan={tmp_path / 'plan.py'}", f"--study={toy.folder}", "--dry_run"]
    compare_recipe.main(command)
    # each says that it took 3 s
    cores = 4 * 3 * torch.get_num_threads() / 3600
    line = f"12 runs are done, 3 s each; what is planned takes 0.0 hours more, {cores:.2g} core-hours"
    assert line in capsys.readouterr().out
    compare_recipe.main([command[0], "--dry_run"])
    assert "known when one has finished" in capsys.readouterr().out


def test_a_note_is_a_part_of_the_plan(study, tmp_path):
    toy = study()
    (tmp_path / "plan.py").write_text(f"from hf_gem.compare.plan import Plan\nplan = Plan(**{toy.plan.__dict__})\n")
    with pytest.raises(PlanError, match=r"a study of another plan, which differs in notes"):
        compare_recipe.main([f"--plan={tmp_path / 'plan.py'}", f"--study={toy.folder}", "--note=Of JPEG images."])


def test_flags_in_place_of_those_of_a_plan(capsys):
    plan = f"--plan={ROOT / 'recipes' / 'plans' / 'smoke.yaml'}"
    compare_recipe.main([plan, "--dry_run", "--set", "steps=7", "--set", "dataset=data/text"])
    assert "7 steps each" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare_recipe.main([plan, "--dry_run", "--set", "steps"])
    assert "the form FLAG=VALUE, such as dataset=data/mnist, got 'steps'" in capsys.readouterr().err


def test_tuning_runs_say_how_exact_the_final_seeds_will_be(study):
    toy = study(flags={"documents": 40, "spread": 0.05}, arms={"relu": ["relu"], "gem": ["gem"]})
    assert "standard error" not in dry_run(toy.plan, toy.folder, 1)
    run(toy)
    for path in (toy.folder / "records").glob("*"):
        if int(path.stem.rpartition("-seed")[2]) < 100:
            path.unlink()
    toy = Study(toy.folder)
    (found,) = expected(toy).values()
    (rate,) = {rate for _, rate in toy.choices().values()}
    parts = {(act, seed): toy.parts(Run(act, rate, seed)) for act in ("relu", "gem") for seed in (100, 101)}
    sums = np.array([parts["gem", seed][0] - parts["relu", seed][0] for seed in (100, 101)])
    assert found.seen == components(sums, parts["relu", 100][1])
    assert found.planned == found.seen.planned(8, 40)
    error = found.planned.estimate.error
    assert found.effect == pytest.approx(minimum_detectable_effect(8) * error * 8**0.5)
    text = dry_run(toy.plan, toy.folder, 1)
    assert "gem, by 2 tuning seeds and 40 groups of evaluation samples: with 8 seeds its difference from relu" in text
    assert f"is expected to have a standard error of {error:.2g} (of its variance," in text
    assert "a larger evaluation sample would help most" in text
    few = study("few", flags={"documents": 40}, arms={"relu": ["relu"], "gem": ["gem"]}, final_seeds=[0, 1])
    run(few)
    assert "no difference is found; more seeds would help most" in dry_run(few.plan, few.folder, 1)


def test_tuning_runs_without_parts_say_nothing_of_it(study):
    toy = study()
    run(toy)
    assert expected(toy) == {}
    assert "standard error" not in dry_run(toy.plan, toy.folder, 1)
