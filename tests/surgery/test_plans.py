"""Plans: what is written down of a conversion, and replayed on another model."""

import json

import pytest
import torch

import hf_gem
from hf_gem.surgery.plans import apply_plan, plan_of
from hf_gem.surgery.slots import undo
from tests.surgery.blocks import model, occupants, put_in


def test_a_plan_replayed():
    net = model()
    put_in(net, "gem_n2", ["2.act", "3.act"])
    put_in(net, "egem_learnable", ["0.act"])
    plan = json.loads(json.dumps(plan_of(net)))
    assert plan == {
        "version": 1,
        "model": "Sequential",
        "base": "",
        "activations": {"egem_learnable": ["0.act"], "gem_n2": ["2.act", "3.act"]},
        "parts": ["0", "1", "2", "3", "4"],
        "fields": {},
    }
    fresh = model()
    apply_plan(plan, fresh, hf_gem.get_activation)
    assert plan_of(fresh) == plan
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(fresh(x), net(x))
    acts = occupants(fresh)
    apply_plan(plan, fresh, hf_gem.get_activation)  # nothing left to do
    assert occupants(fresh) == acts
    undo(fresh)
    assert occupants(fresh).keys() == occupants(model()).keys()


def test_a_plan_of_what_was_put_in_by_hand():
    net = model()
    net[2].act = hf_gem.GEM(2)
    put_in(net, "egem", ["0.act"])
    plan = plan_of(net)
    assert plan["activations"] == {"egem": ["0.act"], "gem_n2": ["2.act"]}
    assert undo(net) == ["0.act"]
    assert plan_of(net)["activations"] == {"gem_n2": ["2.act"]}
    fresh = model()
    apply_plan(plan, fresh, hf_gem.get_activation)
    assert plan_of(fresh) == plan
    undo(fresh)  # where both were put in by the plan
    assert plan_of(fresh) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: {**plan, "version": 2}, "reads version 1; upgrade hf_gem, or remove the key"),
        (lambda plan: {"version": 1}, "cannot read the conversion"),
        (lambda plan: "gem", "cannot read the conversion"),
        (lambda plan: {**plan, "activations": {"gem": ["1.act", "9.act"]}}, "has no activation at '9.act'"),
        (lambda plan: {**plan, "activations": {"gem_n0": ["1.act"]}}, "got activation name 'gem_n0'"),
    ],
)
def test_a_plan_that_does_not_fit(change, message):
    net = model()
    put_in(net, "gem", ["1.act"])
    plan = change(plan_of(net))
    fresh = model()
    before = occupants(fresh)
    with pytest.raises(ValueError, match=message):
        apply_plan(plan, fresh, hf_gem.get_activation)
    assert occupants(fresh) == before
