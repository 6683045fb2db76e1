"""What a study will do and cost, by `recipes/compare.py --dry_run`."""

import pytest
import torch

from hf_gem.compare.plan import PlanError
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
    with pytest.raises(PlanError, match=r"a study of another plan \(other notes\)"):
        compare_recipe.main([f"--plan={tmp_path / 'plan.py'}", f"--study={toy.folder}", "--note=Of JPEG images."])


def test_flags_in_place_of_those_of_a_plan(capsys):
    plan = f"--plan={ROOT / 'recipes' / 'plans' / 'smoke.yaml'}"
    compare_recipe.main([plan, "--dry_run", "--set", "steps=7", "--set", "dataset=data/text"])
    assert "7 steps each" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare_recipe.main([plan, "--dry_run", "--set", "steps"])
    assert "--set takes FLAG=VALUE, such as dataset=data/mnist, got 'steps'" in capsys.readouterr().err
