"""Our kernels as a package for Hugging Face's kernels: written, loaded from its folder, and put into models."""

import ast
import importlib.util
import json
import logging
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import hf_gem
from hf_gem._kernels import replaceable
from hf_gem.integrations.kernels import write_kernel_package
from hf_gem.surgery.audit import say_what_did_not_run
from tests.helpers import ROOT
from tests.integrations.test_round_trips import GPT2, TEXT, run

NAMES = ["gem", "gem_n2", "egem_n2_eps1em6", "segem_eps0.01"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("package")
    written = write_kernel_package(path)
    assert set(written) == {found for found in path.rglob("*") if found.is_file()}
    return path


@pytest.fixture(scope="module")
def kernels():
    return pytest.importorskip("kernels")


@pytest.fixture(scope="module")
def package(folder):
    """The package as kernels imports it, under the name in its metadata; by the means of Python alone."""
    variant = folder / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == name]:
        del sys.modules[loaded]


def mapping(kernels, folder, device="cpu"):
    layer = kernels.LocalLayerRepository(folder, layer_name="GemActivation")
    return kernels.use_kernel_mapping({"GemActivation": {device: layer}})


def kernelized(kernels, folder, model):
    with mapping(kernels, folder):
        return kernels.kernelize(model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device="cpu")


def with_gradient(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    return y, *torch.autograd.grad(y.square().sum(), x)


# ---- the package


def test_the_code_stands_alone(folder):
    """Its imports are in the package, by relative names, in torch, Triton, or in Python itself."""
    for path in folder.rglob("*.py"):
        variant = folder.joinpath(*path.relative_to(folder).parts[:2])
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert base.is_relative_to(variant), path
                inside = [base / alias.name for alias in node.names] if node.module is None else [base]
                assert all(p.with_suffix(".py").exists() or (p / "__init__.py").exists() for p in inside), path
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                top = {name.split(".")[0] for name in names}
                allowed = sys.stdlib_module_names | {"torch", "triton"}
                assert top <= allowed | ({"filelock"} if path.name == "_torch.py" else set()), path


@pytest.mark.parametrize("name", NAMES)
def test_its_functions_are_those_of_hf_gem(package, name):
    spec = hf_gem.parse(name)
    x = torch.randn(500)
    ours = with_gradient(lambda x: hf_gem.activation(x, spec.family, spec.n, spec.eps), x)
    theirs = with_gradient(lambda x: package.activation(x, spec.family, spec.n, spec.eps), x)
    assert package.activation is not hf_gem.activation
    assert all(map(torch.equal, ours, theirs))


def test_its_gradients_are_those_of_differences(package):
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: package.egem(x, 2, 0.1), x)
    assert torch.autograd.gradgradcheck(lambda x: package.segem(x, 1, 0.1), x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets only where there is no GPU")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets, in lanes that are not selected
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_triton_kernels_are_those_of_hf_gem(package, monkeypatch, dtype):
    pytest.importorskip("triton")
    launched = []
    gpu = importlib.import_module(f"{package.__name__}._kernels.gpu")
    launch = gpu.launch
    monkeypatch.setattr(gpu, "launch", lambda *args: launched.append(args[0]) or launch(*args))
    x = torch.randn(3000).to(dtype)
    with hf_gem.kernels("triton"):
        ours = with_gradient(lambda x: hf_gem.egem(x, 2, 0.1, save="output"), x)
    with importlib.import_module(f"{package.__name__}._kernels").kernels("triton"):
        theirs = with_gradient(lambda x: package.egem(x, 2, 0.1, save="output"), x)
    assert launched == ["forward", "backward_at"]
    assert all(map(torch.equal, ours, theirs))


def test_its_layers_are_stateless(package):
    """What kernels asks of a layer."""
    layer = package.layers.GemActivation
    assert layer.__init__ is nn.Module.__init__
    assert set(dir(layer)) - set(dir(nn.Module)) == {"can_torch_compile"}


def test_its_layer_compiles_whole(package):
    module = hf_gem.EGEM(2, 0.1)
    module.forward = types.MethodType(package.layers.GemActivation.forward, module)
    theirs, ours = (
        with_gradient(torch.compile(function, fullgraph=True, backend="aot_eager"), torch.linspace(-2, 2, 50))
        for function in (module, lambda x: hf_gem.egem(x, 2, 0.1))
    )
    assert all(map(torch.equal, theirs, ours))


# ---- with kernels


def test_kernels_loads_it_and_its_digest_is_right(kernels, folder):
    rust = importlib.import_module("kernels._rust")
    for variant in (folder / "build").iterdir():
        metadata = rust.Metadata.read_from_file(variant / "metadata.json")
        there = {path.relative_to(variant).as_posix() for path in variant.rglob("*.py")}
        assert metadata.digest.files.keys() == there
        assert str(metadata.backend.backend_type).lower() == variant.name.removeprefix("torch-")
    # The variant for XPU is one that nothing here imports, which would leave bytecode beside the files.
    actual = rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, folder / "build" / "torch-xpu")
    rust.Metadata.read_from_file(folder / "build" / "torch-xpu" / "metadata.json").digest.validate(actual)
    loaded = kernels.get_local_kernel(folder, backend="cpu")
    x = torch.randn(100)
    assert torch.equal(loaded.gem(x, 2), hf_gem.gem(x, 2))


@pytest.mark.parametrize("name", NAMES)
def test_kernelize_replaces_the_forward_of_our_modules(kernels, folder, name):
    model = nn.Sequential(nn.Linear(8, 8), hf_gem.get_activation(name))
    x = torch.randn(4, 8)
    expected = with_gradient(model, x)
    kernelized(kernels, folder, model)
    assert replaceable.is_replaced(model[1])
    assert all(map(torch.equal, with_gradient(model, x), expected))


def test_what_the_layer_lacks_keeps_its_forward(kernels, folder):
    learnable = hf_gem.EGEM(learnable=True)
    own = hf_gem.GemActivation("dgem")
    kernelized(kernels, folder, nn.Sequential(nn.Linear(2, 2), learnable, own))
    assert "forward" not in {*vars(learnable), *vars(own)}


def test_without_a_mapping_nothing_is_said_or_done(kernels, caplog):
    model = GPT2LMHeadModel(GPT2Config(**GPT2, hidden_act="gem_n2"))
    with caplog.at_level(logging.WARNING):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    assert "GemActivation" not in caplog.text
    assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, hf_gem.GemActivation))


def test_an_audit_knows_what_was_replaced(kernels, folder, recwarn):
    model = nn.Sequential(nn.Linear(4, 4), hf_gem.GEM(2), hf_gem.SEGEM(save="input"))
    before = hf_gem.audit(model, torch.randn(2, 4))
    after = hf_gem.audit(kernelized(kernels, folder, model), torch.randn(2, 4))
    assert [call.function for call in after.calls] == [call.function for call in before.calls] == ["gem_n2", "segem"]
    assert after.complete
    say_what_did_not_run(model)
    assert not recwarn.list


CHECKPOINT = """
import sys
sys.modules["hf_gem"] = None  # importing it is an ImportError
import kernels, torch, transformers
from pathlib import Path
folder, package = map(Path, sys.argv[1:])
model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=True)
assert {m.kernel_layer_name for m in model.modules() if hasattr(m, "spec")} == {"GemActivation"}
layer = kernels.LocalLayerRepository(package, layer_name="GemActivation")
with kernels.use_kernel_mapping({"GemActivation": {"cpu": layer}}):
    kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
print(*[m.spec.name for m in model.modules() if getattr(m, "forward", None).__module__.startswith("_hf_gem_")])
inputs, expected = torch.load(folder / "expected.pt")
output = model.eval()(**inputs).logits
output.square().sum().backward()  # the activations do not break the graph
assert torch.equal(output, expected)
"""


def test_a_checkpoint_without_hf_gem_gets_the_kernels(kernels, folder, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(**GPT2, hidden_act="gem_n2")).eval()
    hf_gem.convert(model, "segem", skip="transformer.h.0.mlp.act")
    hf_gem.save_for_hub(model, tmp_path / "model")
    torch.save((TEXT, run(model, TEXT)[0]), tmp_path / "expected.pt")
    (tmp_path / "load.py").write_text(CHECKPOINT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "load.py"), str(tmp_path), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["gem_n2", "segem"]
