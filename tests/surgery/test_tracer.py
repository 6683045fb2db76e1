"""How operations, formulas written by hand and modules are recognised as activations or gates."""

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import hf_gem
from hf_gem import audit


def function(f, size=(2, 8)):
    """The audit of one function, as part of a model."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(size[-1], size[-1])

        def forward(self, x):
            return f(self.linear(x))

    return audit(Model(), torch.randn(size))


def counts(report, kind=None):
    """Function -> number of calls, of all kinds or one."""
    total = {}
    for call in report.calls:
        if kind in (None, call.kind):
            total[call.function] = total.get(call.function, 0) + call.count
    return total


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.relu(x) * 2


@torch.jit.script
def scripted(x):
    return F.silu(x) + torch.relu(x)


@pytest.mark.parametrize(
    ("f", "found"),
    [
        (lambda x: x.relu_(), {"relu": 1}),
        (lambda x: F.relu6(x) + F.hardtanh(x), {"relu6": 1, "hardtanh": 1}),
        (lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"), {"gelu": 1, "gelu_tanh": 1}),
        (lambda x: F.elu(x) + F.selu(x) + F.celu(x), {"elu": 1, "selu": 1, "celu": 1}),
        (lambda x: F.prelu(x, torch.ones(1)) + F.rrelu(x), {"prelu": 1, "rrelu": 1}),
        (lambda x: F.softsign(x) + F.tanhshrink(x), {"softsign": 1, "tanhshrink": 1}),
        (lambda x: F.threshold(x, 0, 0) + F.threshold(x, 1, 0), {"relu": 1, "threshold": 1}),
        (lambda x: x.clamp(min=0) + torch.clamp_min(x, 0), {"relu (hand-written)": 2}),
        (lambda x: x.clamp(0, 1) + x.clamp(min=1e-5) + x.long().clamp(min=0), {}),
        (Double.apply, {"relu": 1}),
        (scripted, {"silu": 1, "relu": 1}),
        (timm.layers.activations_me.swish_me, {"silu (hand-written)": 1}),
        (lambda x: hf_gem.gem(x) + hf_gem.egem(x, 2, 1e-6), {"gem": 1, "egem_n2_eps1em6": 1}),
        (lambda x: hf_gem.egem(x, 2, torch.ones(8)), {"egem_n2_learnable (eps is a tensor)": 1}),
    ],
)
def test_nothing_that_runs_escapes(f, found):
    assert counts(function(f)) == found


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: x.sigmoid().mul_(x), "silu"),
        (lambda x: x * torch.sigmoid(1.702 * x), "silu"),
        (lambda x: 0.5 * x * (1 + torch.tanh(0.79788 * (x + 0.044715 * x**3))), "gelu_tanh"),
        (lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)), "gelu"),
        (lambda x: (x.double() * 0.5 * (1 + torch.erf(x.double() / 2**0.5))).to(x.dtype), "gelu"),
        (lambda x: x * torch.tanh(F.softplus(x)), "mish"),
        (lambda x: x * F.relu6(x + 3) / 6, "hardswish"),
        (lambda x: x * F.hardsigmoid(x), "hardswish"),
    ],
)
def test_formulas_written_by_hand_count_once(f, name):
    assert counts(function(f)) == {f"{name} (hand-written)": 1}


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.sigmoid(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
        lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True)),
        lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x)),
        lambda x: 50 * torch.tanh(x / 50),
        lambda x: torch.sigmoid(x @ x.T) @ x,
    ],
)
def test_gates_are_no_activations(f):
    report = function(f)
    assert report.num_other == 0
    assert len(report.gates) > 0


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (nn.LSTM(8, 8, num_layers=2), {"lstm": 1}),
        (nn.GRU(8, 8), {"gru": 1}),
        (nn.RNN(8, 8, nonlinearity="relu"), {"rnn_relu": 1}),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), {"relu": 2}),
        (nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True), {"gelu": 1}),
        (nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()), {"sigmoid": 1}),
        (nn.Sequential(nn.Linear(8, 8)), {}),
        (
            nn.Sequential(timm.layers.activations.QuickGELU(), timm.layers.activations_me.SwishMe()),
            {"quickgelu": 1, "swish": 1},
        ),
        (
            nn.Sequential(timm.layers.activations.Tanh(), transformers.activations.LaplaceActivation()),
            {"tanh": 1, "laplace": 1},
        ),
    ],
)
def test_modules_of_torch(module, found):
    for training in (True, False):
        assert counts(audit(module.train(training), torch.randn(2, 3, 8))) == found


def test_scores_of_a_router_are_gates():
    report = audit(nn.Sequential(transformers.activations.ACT2FN["sqrtsoftplus"]), torch.randn(2, 3))
    assert [(call.function, call.kind) for call in report.calls] == [("sqrtsoftplus", "gate")]
