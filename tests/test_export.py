"""Whole models that leave Python: torch.export, ONNX, TorchScript and ahead-of-time compilation, with free sizes."""

import functools
import io
import itertools

import pytest
import torch

from hf_gem import get_activation
from hf_gem.modules import GemActivation
from tests.helpers import needs_compiler

pytest.importorskip("transformers")

from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning",
    "ignore::torch.jit.TracerWarning",
    "error:::hf_gem",
)

ACTS = ["segem_n2_eps0.25_learnable", "gem_n2", "egem_n2_eps0.01", "segem_eps0.01"]
SEQUENCE = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=32)}
# How far two forwards may be apart that sum in another order or fuse: each has some 600 roundings between input and
# logit (four layers with sums over at most 64 terms, and a head) of half an eps of the largest value.
FORWARD = 600 * torch.finfo(torch.float32).eps


class Logits(torch.nn.Module):
    """A model as a function of one tensor, which is what exporters take, with the activations ACTS in its layers."""

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options
        names = [name for name, module in model.named_modules() if isinstance(module, GemActivation)]
        for name, act in zip(names, itertools.cycle(ACTS)):
            model.set_submodule(name, get_activation(act))
        self.eval().requires_grad_(False)
        for name, p in model.named_parameters():
            if name.endswith("log_ratio"):
                p.fill_(0.5)  # trained a little, so that a lost value shows

    def forward(self, x):
        return self.model(x, **self.options).logits


def gpt2(num_layers=4):
    config = GPT2Config(n_layer=num_layers, n_head=2, n_embd=16, n_positions=32, vocab_size=64, hidden_act="gem")
    return Logits(GPT2LMHeadModel(config), use_cache=False)


def bert():
    config = BertConfig(num_hidden_layers=4, num_attention_heads=2, hidden_size=16, intermediate_size=32, vocab_size=64)
    config.hidden_act = "gem"
    return Logits(BertForMaskedLM(config))


def resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[3], layer_type="basic", hidden_act="gem")
    return Logits(ResNetForImageClassification(config))


class Case:
    """A model with inputs of two sizes: the one it is exported at, and another."""

    def __init__(self, name, **options):
        torch.manual_seed(0)
        self.name = name
        self.model = {"gpt2": gpt2, "bert": bert, "resnet": resnet}[name](**options)
        if name == "resnet":
            self.inputs = torch.randn(2, 3, 32, 32), torch.randn(3, 3, 32, 32)
            self.dynamic = {0: torch.export.Dim("batch")}
        else:
            self.inputs = torch.randint(64, (2, 16)), torch.randint(64, (3, 7))
            self.dynamic = SEQUENCE

    @functools.cached_property
    def program(self):
        return torch.export.export(self.model, (self.inputs[0],), dynamic_shapes=(self.dynamic,))

    def check(self, function):
        """Asserts that `function` is the model, at both sizes."""
        for x in self.inputs:
            expected = self.model(x)
            torch.testing.assert_close(function(x), expected, rtol=0, atol=FORWARD * expected.abs().max().item())


@pytest.fixture(scope="module", params=[pytest.param("gpt2", marks=pytest.mark.slow), "bert", "resnet"])
def case(request):
    return Case(request.param)


def in_onnxruntime(path):
    """The ONNX model as a function of a tensor, after looking that it needs nothing but ONNX itself."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert {opset.domain for opset in model.opset_import} <= {"", "ai.onnx"}
    assert not model.functions
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (x.name for x in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def test_export(case):
    stored = io.BytesIO()
    torch.export.save(case.program, stored)
    stored.seek(0)
    case.check(torch.export.load(stored).module())


def test_onnx(case, tmp_path):
    pytest.importorskip("onnxscript")
    torch.onnx.export(case.program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    case.check(in_onnxruntime(tmp_path / "model.onnx"))


def test_onnx_from_torchscript(case, tmp_path):
    if case.name == "gpt2":
        pytest.skip("the mask of transformers uses aten::diff, which this exporter does not know")
    axes = {0: "batch"} if case.name == "resnet" else {0: "batch", 1: "length"}
    path = tmp_path / "model.onnx"
    torch.onnx.export(case.model, (case.inputs[0],), path, dynamo=False, input_names=["x"], dynamic_axes={"x": axes})
    case.check(in_onnxruntime(path))


def test_trace(case):
    stored = io.BytesIO()
    torch.jit.save(torch.jit.trace(case.model, (case.inputs[0],)), stored)
    stored.seek(0)
    case.check(torch.jit.load(stored))


@pytest.mark.slow
@needs_compiler
def test_ahead_of_time():
    case = Case("gpt2", num_layers=1)
    package = torch._inductor.aoti_compile_and_package(case.program)
    case.check(torch._inductor.aoti_load_package(package))
