"""The recipe for differential equations as a person meets it."""

import json
import re
import signal

import pytest
import torch
import yaml
from transformers import AutoModel

import hf_gem
from hf_gem.compare.card import add_comparison
from hf_gem.compare.study import Study
from hf_gem.training.coordinate_models import CoordinateMLPModel
from hf_gem.training.data.collocation import GridPoints
from hf_gem.training.evaluate import relative_l2
from hf_gem.training.pde import PROBLEMS
from hf_gem.training.record import hash_weights
from recipes import compare, pinn
from tests.helpers import ROOT, STOPPING, finish, launch, losses, run_here, run_python, start, stopping

RECIPE = ROOT / "recipes" / "pinn.py"
# Rounding of float32 sums taken in another order, carried through the steps of a model this small.
REORDERED = 4000 * torch.finfo(torch.float32).eps
SHORT = (
    *("--steps=8", "--warmup_steps=2", "--global_batch_size=16", "--micro_batch_size=16", "--width=6", "--depth=2"),
    *("--eval_every=4", "--save_every=4", "--log_every=1", "--report_to=none"),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, run_here(pinn, folder, "--report_to=none")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "run"
    run_here(pinn, folder, *SHORT, "--preset=burgers", "--keep_checkpoints=9")
    return folder


def test_the_demo_solves_its_equation(demo):
    folder, printed = demo
    error = float(re.search(r"Relative L2 error (\S+)", printed)[1])
    assert error < 0.1
    result = json.loads((folder / "record.json").read_text())["result"]
    assert result["validation_relative_l2"] == pytest.approx(error, rel=0.01)
    assert result["validation_log10_relative_l2"] == pytest.approx(torch.tensor(error).log10().item(), abs=0.01)
    assert result["unit"] == "points"
    model, grid = AutoModel.from_pretrained(folder), GridPoints(PROBLEMS["poisson"])
    with torch.no_grad():
        values = model(grid.points).field
    assert relative_l2(values, grid.labels) == pytest.approx(result["validation_relative_l2"], rel=1e-4)
    assert hf_gem.audit(model, points=grid.points[:3]).num_gem == 3


def test_its_card(demo):
    folder, _ = demo
    card = (folder / "README.md").read_text()
    result = json.loads((folder / "record.json").read_text())["result"]
    error = f"{result['validation_relative_l2']:.3g}"
    for fact in (
        f"relative L2 error | {error} on a grid of 10,201 points",
        "800 steps of 128 points",
        "points 0 |",
        "the Poisson equation",
        "metric",
        "gem_*.py",
    ):
        assert fact in card
    assert not any(mark in card for mark in ("{{", "{%", "None", "TF32", "nats", "Data"))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    done = run_python("-c", code + "\nassert type(model).__name__ == 'CoordinateMLPModel', model")
    assert done.returncode == 0, done.stderr


def test_relu_does_not_see_the_equation(tmp_path):
    """Its second derivative is zero: without the conditions nothing reaches a weight."""
    flags = ("--hidden_act=relu", "--report_to=none", "--steps=50", "--warmup_steps=5", "--eval_every=0")
    for folder, weight in (("equation", 0), ("both", 100)):
        run_here(pinn, tmp_path / folder, *flags, f"--boundary_weight={weight}")
        record = json.loads((tmp_path / folder / "record.json").read_text())
        assert record["result"]["validation_relative_l2"] > 0.9
        model = AutoModel.from_pretrained(tmp_path / folder)
        assert (hash_weights(model) == record["init_hash"]) == (folder == "equation")
    assert "import hf_gem.training.coordinate_models" in (tmp_path / "both" / "README.md").read_text()


@pytest.mark.parametrize("problem", ["helmholtz", "burgers"])
def test_the_other_problems_train(problem, tmp_path):
    flags = ("--steps=220", "--warmup_steps=10", "--global_batch_size=128", "--eval_every=0", "--log_every=1")
    run_here(pinn, tmp_path, f"--preset={problem}", *flags, "--report_to=none")
    found = list(losses(tmp_path).values())
    assert sum(found[-10:]) < sum(found[:10]) / 2


@pytest.mark.slow
def test_the_launcher_gives_the_same_run(short, tmp_path):
    flags = (*SHORT, "--preset=burgers", f"--output_dir={tmp_path}", "--micro_batch_size=4")
    code, output = launch(2, *flags, recipe=RECIPE)
    assert code == 0, output
    for key in ("loss", "validation_loss", "validation_relative_l2"):
        assert losses(tmp_path, key) == pytest.approx(losses(short, key), rel=REORDERED)


def test_it_resumes_bit_for_bit(short, tmp_path):
    checkpoint = short / "checkpoints" / "step_00000004"
    run_here(pinn, tmp_path, *SHORT, "--preset=burgers", f"--resume={checkpoint}")
    for key in ("loss", "validation_log10_relative_l2"):
        assert losses(tmp_path, key) == losses(short, key)


def test_ctrl_c_and_the_same_command(short, tmp_path):
    flags = (*SHORT, "--preset=burgers", f"--output_dir={tmp_path / 'run'}")
    child = start(*stopping(signal.SIGINT, 4, RECIPE), *flags, recipe=STOPPING)
    code, output = finish(child)
    assert code == 130, output
    assert "of 8; run the same command again to continue" in output
    run_here(pinn, tmp_path / "run", *flags[:-1])
    assert losses(tmp_path / "run") == losses(short)


def test_weights_at_the_gain_of_the_activation():
    one, two = (pinn.build_model(pinn.Config(hidden_act="gem", own_gain=own)).config for own in (False, True))
    assert (one.initializer_gain, two.initializer_gain) == (1, hf_gem.gain("gem"))
    assert isinstance(pinn.build_model(pinn.Config(problem="burgers")), CoordinateMLPModel)
    assert pinn.build_model(pinn.Config(problem="burgers")).config.lower == [-1, 0]


def test_presets_are_valid():
    for name, preset in pinn.PRESETS.items():
        pinn.Config(**preset).validate()
        assert preset["problem"] in (name, "poisson")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--problem=heat"], "invalid choice: 'heat'"),
        (["--depth=0"], "--depth must be at least 1, got 0"),
        (["--boundary_weight=-1"], "--boundary_weight must be at least 0, got -1"),
        (
            ["--compile=yes"],
            "--compile must be false, because torch.compile cannot differentiate a backward pass, got True",
        ),
    ],
)
def test_wrong_values_name_the_flag(flags, message, capsys):
    with pytest.raises(SystemExit):
        pinn.main(flags)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_study(tmp_path):
    """From a shipped plan to its report and a card, with fewer and shorter runs."""
    plan = yaml.safe_load((ROOT / "recipes" / "plans" / "pinn-burgers.yaml").read_text())
    plan |= {"name": "short", "arms": ["tanh", "gem_n2"], "learning_rates": [0.01], "final_seeds": [0, 1]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**plan, "flags": dict(f[2:].split("=") for f in SHORT)}))
    compare.main([f"--plan={tmp_path / 'plan.yaml'}", f"--study={tmp_path / 'study'}"])
    report = (tmp_path / "study" / "report.md").read_text()
    assert "| data | `burgers`, SHA-256" in report
    assert "validation_log10_relative_l2 of `gem_n2` was" in report
    run_here(pinn, tmp_path / "run", *SHORT, "--preset=burgers", "--hidden_act=gem_n2", "--learning_rate=0.01")
    card, record = tmp_path / "run" / "README.md", json.loads((tmp_path / "run" / "record.json").read_text())
    add_comparison(card, record, Study(tmp_path / "study"))
    assert "## Compared with other activations" in card.read_text()
