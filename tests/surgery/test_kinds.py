"""What is recognised as an activation, and where one can be."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_gem
from hf_gem.surgery.kinds import is_gate, kind, stock_slots

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


class ScaledReLU(nn.Module):
    def forward(self, x, scale=2.0):
        return scale * x.relu()


class ConvReLU(nn.Conv2d):
    pass


class LayerNormGELU(nn.LayerNorm):
    pass


class BlockReLU(nn.Sequential):
    pass


class FusedLeakyReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))


class BiasGELU(nn.Module):
    def forward(self, x, bias):
        return F.gelu(x + bias)

    def gelu(self, x):
        return F.gelu(x)


class HSigmoid(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6()


class HSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.sigmoid = HSigmoid()


class CallableReLU:
    def __call__(self, x):
        return x.relu()


def squared_relu(x):
    return x.relu().square()


def bias_gelu(x, bias):
    return F.gelu(x + bias)


def conv_relu(channels, kernel_size):
    return ConvReLU(channels, channels, kernel_size)


@pytest.mark.parametrize(
    ("occupant", "expected"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.LeakyReLU(0.1), "leakyrelu"),
        (nn.GELU(), "gelu"),
        (nn.SiLU(), "silu"),
        (nn.ELU(), "elu"),
        (nn.PReLU(8), "prelu"),
        (nn.Hardswish(), "hardswish"),
        (F.gelu, "gelu"),
        (F.leaky_relu, "leakyrelu"),
        (torch.relu, "relu"),
        (torch.Tensor.relu, "relu"),
        (functools.partial(F.gelu, approximate="tanh"), "gelu"),
        (functools.partial(functools.partial(F.elu, alpha=2.0), inplace=True), "elu"),
        (squared_relu, "squaredrelu"),
        (ScaledReLU(), "scaledrelu"),
        (HSwish(), "hswish"),
        (hf_gem.GEM(2), "gem"),
        (hf_gem.SEGEM(learnable=True, num_parameters=8), "segem"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+|\s+", "", repr(value)),
)
def test_activations(occupant, expected):
    assert kind(occupant) == expected
    assert not is_gate(expected)


@pytest.mark.parametrize(
    "gate", [HSigmoid(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Hardsigmoid(), torch.sigmoid, F.tanh]
)
def test_gates(gate):
    assert is_gate(kind(gate))


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(2, 2),
        nn.Identity(),
        nn.Dropout(),
        nn.Softmax(),
        nn.ReLU,  # classes are kept to be instantiated
        functools.partial(nn.GELU, approximate="tanh"),
        lambda x: x.relu(),
        BiasGELU().gelu,
        CallableReLU(),
        "relu",
        torch.zeros(2),
        None,
        F.softmax,
        # layers with weights, or of several inputs, whose name tells what they apply at the end
        ConvReLU(2, 2, 1),
        LayerNormGELU(8),
        FusedLeakyReLU(),
        BlockReLU(nn.Linear(2, 2), nn.ReLU()),
        BiasGELU(),
        bias_gelu,
        conv_relu,
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_is_none(other):
    assert kind(other) is None


def test_those_of_transformers():
    none = {name for name in transformers.activations.ACT2FN if kind(transformers.activations.ACT2FN[name]) is None}
    assert none == {"linear"}
    gates = {
        name for name in transformers.activations.ACT2FN if is_gate(kind(transformers.activations.ACT2FN[name]) or "")
    }
    assert gates == {"laplace", "sigmoid", "sqrtsoftplus", "tanh"}


@pytest.mark.parametrize("registry", ["_ACT_LAYER_DEFAULT", "_ACT_LAYER_ME", "_ACT_FN_DEFAULT", "_ACT_FN_ME"])
def test_those_of_timm(registry):
    from timm.layers import create_act

    entries = dict(getattr(create_act, registry))
    none = {name for name, entry in entries.items() if kind(entry() if isinstance(entry, type) else entry) is None}
    assert none <= {"identity"}
    assert kind(timm.models.metaformer.StarReLU()) == "starrelu"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
        self.again = self.conv
        self.branches = nn.ModuleDict({"a": nn.Sequential(nn.Sequential(nn.GELU())), "b": nn.ModuleList([nn.SiLU()])})
        self._swish = nn.SiLU()
        self.h_swish = HSwish()
        self.function = F.gelu
        self._function = torch.tanh
        self.made_of = transformers.activations.ACT2FN["gelu_10"]
        self.table = {"relu": nn.ReLU(), "gelu": F.gelu}
        self.rows = [F.relu]
        self.act_layer = nn.ReLU
        self.own = self.forward

    def forward(self, x):
        return x


def test_slots():
    found = {slot.path: kind(slot.occupant) for slot in stock_slots(Model())}
    assert found == {
        "conv.1": "relu",  # once, though the module is there twice
        "branches.a.0.0": "gelu",
        "branches.b.0": "silu",
        "_swish": "silu",
        "h_swish": "hswish",  # and nothing in it
        "function": "gelu",
        "_function": "tanh",
        "made_of": "clippedgelu",
    }


def test_one_module_under_two_names_has_two_places():
    model = nn.ModuleDict({"a": nn.ReLU()})
    model["b"] = model["a"]
    assert [slot.path for slot in stock_slots(model)] == ["a", "b"]


def test_what_torch_compile_made_of_one_cannot_be_changed():
    model = nn.Sequential(torch.compile(nn.ReLU(), backend="eager"), nn.GELU())
    assert [slot.path for slot in stock_slots(model)] == ["1"]
    assert [slot.path for slot in stock_slots(torch.compile(model))] == ["_orig_mod.1"]
