"""Recipes with torch, transformers, accelerate, tokenizers, numpy, timm and pillow alone."""

import json
import os
import sys

import pytest
import yaml

from hf_gem.training.errors import ConfigError
from recipes import gpt2_pretrain, vision_train
from tests.helpers import ROOT, run_here, run_python

BARE = os.pathsep.join(map(str, (ROOT / "tests" / "bare", ROOT)))
FEW = ("--steps=4", "--warmup_steps=1", "--eval_every=2", "--save_every=2", "--log_every=1")
TEXT = (
    *FEW,
    "--global_batch_size=4",
    "--max_train_tokens=20000",
    "--validation_fraction=0.02",
    "--min_validation_tokens=0",
    "--vocab_size=300",
)
DEMOS = """
import importlib, json, pathlib, sys
from hf_gem.training.data import text
from tests.helpers import run_here

files = text.stdlib_files()[::20]
text.stdlib_files = lambda: files  # a part of them, which is quickly read
folder, recipe, *flags = sys.argv[1:]
print(run_here(importlib.import_module(f"recipes.{recipe}"), pathlib.Path(folder), *flags))
"""


def bare(*arguments):
    return run_python(*arguments, PYTHONPATH=BARE, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


def test_the_hidden_packages_are_hidden():
    code = (
        "import importlib.util, importlib.metadata as m; print(importlib.util.find_spec('datasets')); m.version('dill')"
    )
    done = bare("-c", code)
    assert done.stdout == "None\n"
    assert "PackageNotFoundError" in done.stderr


def demo(recipe, folder, *flags):
    """Runs a recipe, checks what it leaves, and returns its record."""
    done = bare("-c", DEMOS, folder, recipe, *flags, f"--cache_dir={folder.parent / 'cache'}")
    assert done.returncode == 0, done.stderr
    assert "no loss_curve.png, since matplotlib is not installed" in done.stdout
    assert "Plot:" not in done.stdout
    card = (folder / "README.md").read_text()
    assert "validation loss" in card
    assert "loss_curve.png" not in card
    record = json.loads((folder / "record.json").read_text())
    assert (record["status"], record["step"], record["config"]["report_to"]) == ("finished", 4, "none")
    return record


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gpt2_pretrain", "bert_pretrain"])
def test_language_models_train(recipe, tmp_path):
    assert demo(recipe, tmp_path / "run", *TEXT)["result"]["validation_perplexity"] > 1


@pytest.mark.slow
def test_image_classifiers_train_and_are_fine_tuned(tmp_path):
    trained = demo("vision_train", tmp_path / "trained", *FEW, "--hidden_act=gelu")["result"]["validation_accuracy"]
    tuned = demo("vision_finetune", tmp_path / "tuned", *FEW, f"--model={tmp_path / 'trained'}")
    assert tuned["before_conversion"]["accuracy"] == trained


@pytest.mark.slow
def test_a_study_runs_and_says_what_its_report_needs(tmp_path):
    plan = yaml.safe_load((ROOT / "recipes" / "plans" / "smoke.yaml").read_text())
    plan |= {
        "arms": ["gelu", "gem_n2"],
        "baseline": "gelu",
        "learning_rates": [0.003],
        "final_rates": 1,
        "final_seeds": [0, 1],
    }
    plan["flags"] |= {"steps": 2, "warmup_steps": 1, "eval_every": 2, "save_every": 2, "max_train_tokens": 20000}
    (tmp_path / "plan.yaml").write_text(
        yaml.safe_dump({**plan, "flags": {**plan["flags"], "cache_dir": str(tmp_path)}})
    )
    study = tmp_path / "study"
    done = bare("recipes/compare.py", "--plan", tmp_path / "plan.yaml", "--study", study)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: the runs are saved in {study}, but their report needs a package.")
    assert "The package scipy is not installed." in line
    assert len(list((study / "records").glob("*.json"))) == 4


@pytest.mark.slow
def test_all_tests_can_be_collected():
    done = bare("-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", "tests")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("recipe", [gpt2_pretrain, vision_train])
def test_a_dataset_of_the_hub_needs_a_package(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = (
        r"reading --dataset 'some/where' needs a package. The package datasets is not installed. .* pip install .*train"
    )
    with pytest.raises(ConfigError, match=message):
        run_here(recipe, tmp_path, "--dataset=some/where", f"--cache_dir={tmp_path}", "--report_to=none")
