"""The scale of what activations are given."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_gem
from hf_gem.surgery.kinds import activation_slots
from hf_gem.surgery.scales import input_scales
from tests.surgery.blocks import REACHED, Block, Everything, X, unchanged

# Values are rounded to bfloat16, by 2^-8 of themselves at most.
ROUNDED = {"rel": 2**-8}


def scales(model, *batches):
    return input_scales(model, {slot.path: slot for slot in activation_slots(model)}, batches)


def rms(*tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).square().mean().item() ** 0.5


def test_each_activation_and_all_of_them():
    one, two = nn.Linear(4, 8), nn.Linear(8, 2)
    model = nn.Sequential(one, nn.GELU(), two, hf_gem.EGEM(eps=0.1), nn.Dropout(0.9)).train()
    batches = [X, 3 * X]
    with unchanged(model):
        found = scales(model, *batches)
    with torch.no_grad():
        first = [one(x) for x in batches]
        second = [two(F.gelu(x)) for x in first]
    assert found.layers == {"1": pytest.approx(rms(*first), **ROUNDED), "3": pytest.approx(rms(*second), **ROUNDED)}
    assert found.rms == pytest.approx(rms(*first, *second), **ROUNDED)


def test_batch_normalisation_takes_the_statistics_of_the_batch_and_keeps_its_own():
    for training in (True, False):
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU()).train(training)
        before = copy.deepcopy(model.state_dict())
        found = scales(model, 100 * torch.randn(64, 4) + 30)
        assert found.rms == pytest.approx(1, **ROUNDED)
        after = model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert [module.training for module in model] == [training] * 3


def test_functions_count_and_gates_do_not():
    assert scales(Everything(), X).layers.keys() == REACHED.keys()


def test_a_shared_module_counts_once():
    shared = nn.ReLU()
    model = nn.Sequential(Block(shared), Block(shared))
    found = scales(model, X)
    with torch.no_grad():
        inputs = [model[0].linear(X), model[1].linear(model[0](X))]
    assert found.layers == dict.fromkeys(("0.act", "1.act"), pytest.approx(rms(*inputs), **ROUNDED))
    assert found.rms == found.layers["0.act"]


def test_what_has_no_scale():
    assert scales(nn.Sequential(nn.ReLU()), torch.tensor([1.0, math.inf])).layers["0"] != pytest.approx(1)
    assert math.isnan(scales(nn.Sequential(nn.ReLU()), torch.tensor([1.0, math.inf])).rms)
    assert scales(nn.Sequential(nn.ReLU()), torch.zeros(3)).rms == 0
    nothing = scales(nn.Linear(4, 4), X)
    assert (math.isnan(nothing.rms), nothing.layers) == (True, {})
