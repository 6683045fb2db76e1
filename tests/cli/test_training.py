"""`hf-gem train`, `compare`, `recipes` and `run`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_gem.recipes import FOLDER, recipe_files
from tests.helpers import ROOT, run_python

SCRIPT = """
import json, sys
import timm
from transformers.activations import ACT2FN
import helper

model = timm.create_model("test_vit", act_layer=sys.argv[1])
names = [type(model.blocks[0].mlp.act).__name__, type(ACT2FN[sys.argv[1]]).__name__]
print(json.dumps([__name__, names, sys.argv, helper.HERE]))
"""


def test_the_recipes_of_a_clone_are_those_beside_the_package(hf_gem):
    assert FOLDER == ROOT / "recipes"
    found = json.loads(hf_gem("recipes", "--json")[1])
    files = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"compare"}
    assert set(found["recipes"]) == files == set(recipe_files())
    assert found["recipes"]["gpt2_pretrain"] == "Pretrains GPT-2 from scratch with any activation"
    assert all(Path(path).is_file() for part in ("plans", "launchers") for path in found[part].values())
    assert {"smoke", "gpt2-124m"} <= found["plans"].keys() == found["about_plans"].keys()
    assert found["about_plans"]["bert-small"] == "BERT-small for 3,000 steps, as in arXiv 2604.21677"
    assert all(found["about_plans"].values())
    assert "  bert-small  " in hf_gem("recipes")[1]
    assert {"multi_gpu", "cpu"} <= found["launchers"].keys()


@pytest.mark.parametrize("recipe", ["gpt2", "gpt2-pretrain", "gpt2_pretrain"])
def test_a_recipe_by_the_start_of_its_name(hf_gem, recipe):
    code, out, _ = hf_gem("train", recipe, "--help")
    assert code == 0
    assert "Pretrains GPT-2 from scratch" in out
    assert "--hidden_act" in out


def test_an_ambiguous_recipe(hf_gem):
    code, _, err = hf_gem("train", "vision")
    assert code == 1
    assert "'vision' could be vision_finetune or vision_train" in err


@pytest.mark.parametrize(("recipe", "near"), [("gtp2", "gpt2_pretrain"), ("gpt2_pretain", "gpt2_pretrain"), ("x", "")])
def test_a_misspelled_recipe(hf_gem, recipe, near):
    err = hf_gem("train", recipe)[2]
    assert f"the recipe {recipe!r} is not known. The recipes are bert_pretrain, " in err
    assert ("Did you mean" in err) == bool(near)
    assert near in err


def test_options_before_the_recipe_start_it(hf_gem):
    assert "the launcher 'nope' is not known. Give cpu, " in hf_gem("train", "--launcher", "nope", "gpt2")[2]
    assert "without --launcher" in hf_gem("train", "--num-processes", "2", "gpt2")[2]


def test_the_recipe_speaks_for_itself(hf_gem):
    code, _, err = hf_gem("train", "gpt2", "--hidden_act", "gem_n0")
    assert code == 2
    assert "gpt2_pretrain.py: error: " in err


def test_compare_knows_plans_by_name(hf_gem):
    code, out, err = hf_gem("compare", "--plan", "smoke", "--dry_run")
    assert code == 0, err
    assert "smoke: 3 arms" in out
    code, out, _ = hf_gem("compare", "--help")
    assert (code, out.startswith("usage: hf-gem compare [-h] --plan PLAN")) == (0, True)
    assert "--jobs" in out
    assert "compare.py" not in out
    code, _, err = hf_gem("compare")
    assert (code, err.splitlines()[-1]) == (
        2,
        "hf-gem compare: error: the following arguments are required: --plan",
    )


def test_compare_lists_the_plans(hf_gem, tmp_path, monkeypatch):
    code, _, err = hf_gem("compare", "--plan", "nope")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: there is no plan 'nope'. Give the path of a file, or one of bert-narrow-stdlib, ")
    (tmp_path / "smoke").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder with the name of a plan is no plan
    assert hf_gem("compare", "--plan", "smoke", "--dry_run")[0] == 0


@pytest.mark.slow
def test_run_registers_the_names(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("HERE = True")
    done = run_python("-m", "hf_gem", "run", tmp_path / "script.py", "gem_n2", "--json")
    assert done.returncode == 0, done.stderr
    arguments = [str(tmp_path / "script.py"), "gem_n2", "--json"]
    assert json.loads(done.stdout) == ["__main__", ["GEM", "GEM"], arguments, True]


def test_errors_of_a_script_are_its_own(hf_gem, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.exit(7)")
    assert hf_gem("run", script)[0] == 7
    script.write_text("import no_such_package")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        hf_gem("run", script)


def test_run_takes_a_module(hf_gem, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("import sys; print(__name__, sys.argv[1:], __spec__.name)")
    assert hf_gem("run", "-m", "mine", "--flag", "x") == (0, "__main__ ['--flag', 'x'] mine\n", "")


@pytest.mark.slow
def test_a_launcher_starts_the_processes(tmp_path):
    """`--help` of the recipe, from each of two processes."""
    command = [sys.executable, "-m", "hf_gem", "train", "--launcher", "single", "gpt2", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Pretrains GPT-2 from scratch" in done.stdout
