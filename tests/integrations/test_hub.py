"""save_for_hub: a checkpoint loads with hf_gem imported, with hf_gem installed, without it, or it stops."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import hf_gem
from hf_gem.family.table import FAMILIES as TABLE
from hf_gem.integrations.hub import loading_notes, without_package
from tests.family.dgem import DGEM
from tests.helpers import ROOT
from tests.integrations.test_round_trips import GPT2, TEXT, build, by_hand, disturb, run

transformers = pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

# Of test_round_trips: how their activations come about differs, and so do the ways in which configs name them.
FAMILIES = ["gpt2", "bert", "gated t5", "resnet", "wav2vec2", "clip", "timm"]
FAMILIES += [f"converted {name}" for name in ("gpt2", "bart", "t5", "bloom", "llama", "convnext", "resnet", "clip")]
FAMILIES += ["by hand"]

LOAD = """
import json, os, sys, torch
way, root = sys.argv[1:]
if way == "without":
    sys.modules["hf_gem"] = None  # importing it is an ImportError
import transformers

def tensors(model, inputs):
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        found = torch.utils._pytree.tree_leaves(dict(model.eval()(**inputs)))
    return [t for t in found if isinstance(t, torch.Tensor)]

def alone(auto, folder):
    try:
        getattr(transformers, auto).from_pretrained(folder)
    except KeyError as error:
        return str(error)

names = sorted(os.listdir(root))
saved = {name: torch.load(f"{root}/{name}/expected.pt") for name in names}
results = {name: {"alone": alone(saved[name][0], f"{root}/{name}/saved")} for name in names}  # before any code is run
for name in names:
    folder = f"{root}/{name}/saved"
    auto, (_, inputs, expected) = getattr(transformers, saved[name][0]), saved[name]
    model = auto.from_pretrained(folder, trust_remote_code=True)
    again = f"{root}/{name}/{way}"
    model.save_pretrained(again)
    results[name] |= {
        "equal": [torch.equal(a, b) for a, b in zip(tensors(model, inputs), expected, strict=True)],
        "class": type(model).__name__,
        "ours": sorted({type(m).__module__.split(".")[0] for m in model.modules() if hasattr(m, "spec")}),
        "again": [
            torch.equal(a, b)
            for a, b in zip(
                tensors(auto.from_pretrained(again, trust_remote_code=True), inputs), expected, strict=True
            )
        ],
    }
    if way == "without" and name == "bert":  # the head has an eps that the checkpoint of the body lacks
        transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).save_pretrained(f"{root}/{name}/body")
        head = auto.from_pretrained(f"{root}/{name}/body", trust_remote_code=True)
        results[name]["new eps"] = head.cls.predictions.transform.transform_act_fn.log_ratio.tolist()
for name in names:  # names that a checkpoint's code has known are not known to transformers for that
    results[name]["after"] = alone(results[name]["class"], f"{root}/{name}/saved")
print(json.dumps(results))
"""


def auto_class(model, folder):
    classes = json.loads((folder / "config.json").read_text())["auto_map"]
    return next(auto for auto, cls in classes.items() if cls == f"modeling_gem.{type(model).__name__}")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder with a folder for each family: saved/, and the outputs that it is expected to give."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("hub")
    for family in FAMILIES:
        folder = root / family.replace(" ", "_")
        model, inputs = (by_hand(), TEXT) if family == "by hand" else build(family)
        if family == "bert":
            hf_gem.set_activation(model.config, "egem_learnable")
            model = disturb(type(model)(model.config))
        hf_gem.save_for_hub(model, folder / "saved")
        torch.save((auto_class(model, folder / "saved"), inputs, run(model, inputs)), folder / "expected.pt")
    return root


def load_elsewhere(way, root, cache):
    threads = str(torch.get_num_threads())  # on which rounding depends
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(cache),
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": str(ROOT),
    }
    arguments = [sys.executable, "-c", LOAD, way, str(root)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["installed", "without"])
def loaded(request, checkpoints, tmp_path_factory):
    return request.param, load_elsewhere(request.param, checkpoints, tmp_path_factory.mktemp("modules")), checkpoints


def test_trust_remote_code_gives_the_same_function(loaded):
    way, results, _ = loaded
    assert len(results) == len(FAMILIES)
    for name, result in results.items():
        assert result["equal"], name
        assert all(result["equal"]), name
        assert result["ours"] == ["hf_gem" if way == "installed" else "transformers_modules"], name


def test_what_is_saved_from_there_loads_everywhere(loaded):
    way, results, root = loaded
    for name, result in results.items():
        assert all(result["again"]), name
        auto, inputs, expected = torch.load(root / name / "expected.pt")
        model = getattr(transformers, auto).from_pretrained(root / name / way).eval()  # hf_gem is imported here
        assert all(map(torch.equal, run(model, inputs), expected)), name


def test_neither_import_nor_trust(loaded):
    way, results, _ = loaded
    assert {name for name, result in results.items() if "gem" not in (result["alone"] or "")} == {"converted_bloom"}
    if way == "without":
        assert {name: result["after"] for name, result in results.items()} == {
            name: result["alone"] for name, result in results.items()
        }


def test_an_eps_that_a_checkpoint_lacks(loaded):
    way, results, _ = loaded
    if way == "without":
        assert results["bert"]["new eps"] == [0.0]


def test_with_the_import(checkpoints):
    for family in FAMILIES:
        folder = checkpoints / family.replace(" ", "_")
        auto, inputs, expected = torch.load(folder / "expected.pt")
        model = getattr(transformers, auto).from_pretrained(folder / "saved").eval()
        assert all(map(torch.equal, run(model, inputs), expected)), family
        assert type(model).__module__.startswith("transformers.models.")


def gpt2(name="gem_n2"):
    return GPT2LMHeadModel(GPT2Config(**GPT2, hidden_act=name))


def test_the_files(tmp_path):
    model = gpt2()
    written = hf_gem.save_for_hub(model, tmp_path / "model", safe_serialization=True)
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {
        *("config.json", "model.safetensors", "README.md", "modeling_gem.py"),
        *(f"gem_{name}.py" for name in ("fallback", "configs", "fields", "plans", "slots", "formulas", "names")),
    }
    assert set(written) == {*(tmp_path / "model").glob("*.py"), tmp_path / "model" / "README.md"}
    auto_map = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_gem.GPT2LMHeadModel"
    assert auto_map["AutoModel"] == "modeling_gem.GPT2Model"
    assert not hasattr(model.config, "auto_map")


def test_a_compiled_model_and_shards(tmp_path):
    model = disturb(gpt2())
    hf_gem.save_for_hub(torch.compile(model, backend="eager"), tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert all(map(torch.equal, run(model, TEXT), run(GPT2LMHeadModel.from_pretrained(tmp_path), TEXT)))


def test_only_the_main_process_writes_the_code_and_the_card(tmp_path):
    assert hf_gem.save_for_hub(gpt2(), tmp_path, is_main_process=False) == []
    assert not {"README.md", "config.json", "modeling_gem.py"} & {path.name for path in tmp_path.iterdir()}


def test_the_code_stands_alone(tmp_path):
    """Its imports are in the folder, in torch, in transformers or in Python itself, which may be 3.10."""
    hf_gem.save_for_hub(gpt2(), tmp_path)
    files = {path.stem for path in tmp_path.glob("*.py")}
    for path in tmp_path.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, path
                assert node.module in files, path
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                own = {"hf_gem"} if path.stem == "modeling_gem" else set()
                allowed = sys.stdlib_module_names | {"torch", "transformers"} | own
                assert {name.split(".")[0] for name in names} <= allowed, path


def test_cards(tmp_path):
    model = gpt2()
    card = tmp_path / "README.md"
    hf_gem.save_for_hub(model, tmp_path)
    new = card.read_text()
    assert new.startswith("---\nlibrary_name: transformers\n")
    assert "stops with a `KeyError`" in re.sub(r"\s+", " ", new)
    assert max(map(len, new.splitlines())) <= 120
    hf_gem.save_for_hub(model, tmp_path)
    assert card.read_text() == new
    edited = new.replace("# GPT2LMHeadModel", "# Ours, naïve").replace("slower", "SLOWER") + "\nMore of ours.\n"
    card.write_text(edited, encoding="utf-8")
    hf_gem.save_for_hub(model, tmp_path)
    assert card.read_text(encoding="utf-8") == edited.replace("SLOWER", "slower")
    card.write_text("# A card of others")
    hf_gem.save_for_hub(model, tmp_path)
    assert card.read_text().startswith("# A card of others\n\n## Use\n")
    assert card.read_text().count("import hf_gem") == 1


def test_a_card_says_what_cannot_stop(checkpoints):
    quiet = {
        family
        for family in FAMILIES
        if "**another function**"
        in re.sub(r"\s+", " ", (checkpoints / family.replace(" ", "_") / "saved" / "README.md").read_text())
    }
    assert quiet == {"converted bloom"}


def test_notes_name_the_place():
    assert 'AutoModel.from_pretrained("me/model", trust_remote_code=True)' in loading_notes("AutoModel", "me/model")


def test_the_card_of_a_language_model_warns_of_runtimes_that_do_not_read_the_activation():
    assert "llama.cpp" in loading_notes("AutoModelForCausalLM", "me/model")
    assert "llama.cpp" not in loading_notes("AutoModelForImageClassification", "me/model")


@pytest.mark.parametrize("installed", [True, False])
def test_a_folder_of_that_name_is_not_the_package(tmp_path, installed):
    """`import hf_gem` succeeds where a folder hf_gem lies beside a script, and brings nothing."""
    hf_gem.save_for_hub(gpt2(), tmp_path / "model")
    (tmp_path / "empty" / "hf_gem").mkdir(parents=True)
    script = f"""
import sys, types
if not {installed}:  # what such a folder is imported as
    package = sys.modules["hf_gem"] = types.ModuleType("hf_gem")
    package.__path__ = ["hf_gem"]
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
print(sorted({{type(m).__module__.split(".")[0] for m in model.modules() if hasattr(m, "spec")}}))
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path / "empty",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(["hf_gem" if installed else "transformers_modules"])


def in_module(name, body="pass"):
    """A class of a model in a module of that name, as a file of a user, or one that a checkpoint brings, defines it."""
    module = types.ModuleType(name)
    module.GPT2LMHeadModel = GPT2LMHeadModel
    exec(f"class Theirs(GPT2LMHeadModel):\n    {body}\n", vars(module))
    return module.Theirs


@pytest.mark.parametrize(
    ("module", "body"),
    [
        ("image_models", "pass"),
        ("gem_image_models", "pass"),
        ("coordinate_models", "pass"),
        ("project.training.image_models", "pass"),
        ("modeling_gem", "pass"),
        ("project.modeling_gem", "pass"),
        ("transformers_modules.me.modeling_gem", "def forward(self): return None"),  # of a model that is called Gem
        ("transformers_modules.me.other", "pass"),
    ],
)
def test_a_name_does_not_make_a_file_ours(module, body, tmp_path):
    """The source of such a file was copied into the checkpoint, or its class lost."""
    model = in_module(module, body)(gpt2().config)
    with pytest.raises(ValueError, match=r"is not a class of transformers\. Its own code must be saved too"):
        hf_gem.save_for_hub(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_modules_with_a_spec_of_their_own(tmp_path):
    model = gpt2()
    model.transformer.drop.spec = "0.1"
    assert hf_gem.save_for_hub(model, tmp_path)


class Theirs(GPT2LMHeadModel):
    pass


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: nn.Linear(1, 1), TypeError, "got Linear.*Save a timm model with timm.models.save_for_hf"),
        (lambda: GPT2LMHeadModel, TypeError, "got type.*takes a transformers model"),
        (lambda: gpt2("gelu_new"), ValueError, "GPT2LMHeadModel has no activation of the family.*with save_pretrained"),
        (lambda: Theirs(gpt2().config), ValueError, "Theirs is not a class of transformers. Its own code must be"),
        (
            lambda: build("converted t5")[0].encoder,
            ValueError,
            "no Auto class builds a T5Stack .* one of .*T5Model",
        ),
    ],
)
def test_what_cannot_be_saved(model, error, message, tmp_path):
    with pytest.raises(error, match=message):
        hf_gem.save_for_hub(model(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["egem_eps1e-6", "gem_n1", "Gem"])
def test_a_name_is_registered_as_the_config_spells_it(name, tmp_path):
    hf_gem.save_for_hub(gpt2(name), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert f'register("{config["activation_function"]}")' in (tmp_path / "modeling_gem.py").read_text()


def test_a_family_without_a_file_leaves_nothing_behind(tmp_path, monkeypatch):
    family = dataclasses.replace(DGEM, name="nofile", title="NoFile", value=lambda z, n, r, e: z)
    monkeypatch.setitem(TABLE, "nofile", family)
    model = gpt2()
    model.transformer.h[0].mlp.act = hf_gem.get_activation("nofile")
    with pytest.raises(ValueError, match=r"the family 'nofile' is not a variable of .* Define it as a variable"):
        hf_gem.save_for_hub(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


USES = """
accent = "É"; FAMILY = hf_gem.register_family(
    hf_gem.Family("mine", "Mine", "x", f, f, f),  # one argument
)
----
from hf_gem import Family, register_family
FAMILY = Family("mine", "Mine", "x", f, f, f)
if __name__ != "__main__":
    register_family(FAMILY)
----
from hf_gem import (
    Family,
)
from hf_gem import register_family
from hf_gem.family.table import Family as Other
FAMILY = register_family(Other("mine", "Mine", "x", f, f, f))
"""


@pytest.mark.parametrize("body", USES.split("----\n"))
def test_the_file_of_a_family_needs_no_package(body):
    source = "import hf_gem\nfrom hf_gem.family.arithmetic import (\n    gate_power as f,\n    positive,\n)\n" + body
    changed = without_package(source)
    assert "register" not in changed
    assert without_package(changed) == changed
    scope = {"__name__": "mine"}
    exec(changed.replace("from .gem_", "from hf_gem.family."), scope)
    assert (scope["FAMILY"].title, scope["FAMILY"].value) == ("Mine", scope["f"])


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("import hf_gem as g", 3),
        ("import hf_gem.family", 3),
        ("from hf_gem import audit", 3),
        ("from hf_gem.functional import gem", 3),
        ("from .helpers import f", 3),
        ("from . import helpers", 3),
        ("import hf_gem\nf = hf_gem.audit", 4),
        ("from hf_gem import register_family\nf = register_family", 4),
    ],
)
def test_what_a_checkpoint_does_not_have_is_named(line, number):
    with pytest.raises(ValueError, match=f"line {number}"):
        without_package(f"import torch\n\n{line}\n")


def test_nothing_is_pushed_half(tmp_path):
    with pytest.raises(ValueError, match=r"got push_to_hub=True.*push the folder with huggingface_hub\.upload_folder"):
        hf_gem.save_for_hub(gpt2(), tmp_path / "model", push_to_hub=True)
    assert not (tmp_path / "model").exists()
