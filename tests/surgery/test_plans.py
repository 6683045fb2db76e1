"""Plans: what is written down of a conversion, and replayed on another model."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_gem
from hf_gem.surgery.plans import apply_plan, plan_of, unnamed
from hf_gem.surgery.slots import undo
from tests.surgery.blocks import Block, model, occupants, put_in


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
        "left": 2,
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


@pytest.mark.filterwarnings("error")
def test_a_model_with_more_layers_than_the_converted_one():
    """Layers that were left on purpose need no warning, and neither does what is no activation, or an older plan."""
    net = nn.Sequential(Block(nn.ReLU()), Block(F.relu), Block(nn.Linear(4, 4)), Block(nn.Identity()))
    put_in(net, "gem", ["0.act"])
    plan = plan_of(net)
    same = nn.Sequential(Block(nn.ReLU()), Block(F.relu), Block(nn.Linear(4, 4)), Block(nn.Identity()))
    apply_plan(plan, same, hf_gem.get_activation)
    larger = nn.Sequential(*same, Block(nn.Identity()), Block(nn.Linear(4, 4)), Block(nn.GELU()))
    with pytest.warns(UserWarning, match="has 1 activation that the converted .* such as GELU at 6.act") as told:
        apply_plan(plan, larger, hf_gem.get_activation)
    assert len(told) == 1
    del plan["left"]
    apply_plan(plan, larger, hf_gem.get_activation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: {**plan, "version": 2}, r"reads version 1\. Upgrade hf_gem, or remove the key"),
        (lambda plan: {"version": 1}, "cannot read the conversion"),
        (lambda plan: "gem", "cannot read the conversion"),
        (lambda plan: {**plan, "activations": {}}, "names no activation"),
        (lambda plan: {**plan, "activations": {"gem": "1.act"}}, r"activations\['gem'\] must be a list, got '1.act'"),
        (lambda plan: {**plan, "activations": {"gem": [1]}}, r"activations\['gem'\]\[0\] must be text, got 1"),
        (lambda plan: {**plan, "left": "1"}, r"left must be a whole number"),
        (lambda plan: {**plan, "parts": [[]]}, r"parts\[0\] must be text"),
        (lambda plan: {**plan, "model": "x" * 9999, "activations": {"gem": ["y" * 9999]}}, "has no activation at 'yyy"),
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
    with pytest.raises(ValueError, match=message) as error:
        apply_plan(plan, fresh, hf_gem.get_activation)
    assert occupants(fresh) == before
    assert len(str(error.value)) < 600


class _Scaled(nn.Module):
    """An activation with a number that is trained, and another inside it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.inner = nn.Tanh()


class _Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(9))


@pytest.mark.parametrize(
    ("occupant", "refused"),
    [
        (nn.ReLU(), False),
        (nn.PReLU(4), False),
        (nn.Identity(), False),  # where an activation may be wanted
        (nn.Softmax(-1), False),
        (_Scaled(), False),
        (torch.nn.functional.gelu, False),
        (hf_gem.EGEM(learnable=True, num_parameters=4), False),
        (nn.Linear(4, 4), True),
        (nn.LazyLinear(4), True),
        (nn.Dropout(), True),
        (nn.LayerNorm(4, elementwise_affine=False), True),
        (nn.Sequential(nn.ReLU(), nn.AvgPool1d(2)), True),
        (nn.ModuleList([Block(nn.ReLU())]), True),
        (Block(nn.ReLU()), True),
        (_Table(), True),
    ],
)
def test_a_plan_replaces_activations_only(occupant, refused):
    """Whoever writes a config could otherwise take a whole block out of the model."""
    net = Block(occupant)
    plan = {"version": 1, "model": "Block", "base": "", "parts": [], "activations": {"gem": ["act"]}, "fields": {}}
    if refused:
        with pytest.raises(
            ValueError, match=f"replaces 'act' with 'gem', but that is a {type(occupant).__name__}, which is a la"
        ):
            apply_plan(plan, net, hf_gem.get_activation)
        assert net.act is occupant
    else:
        apply_plan(plan, net, hf_gem.get_activation)
        assert isinstance(net.act, hf_gem.GEM)


def test_what_could_not_be_loaded_is_not_saved():
    """The classes that `convert(replace=)` is given may be any."""
    net = Block(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    hf_gem.convert(net, "gem", replace=nn.Sequential)
    assert "act replaced a Sequential" in unnamed(net)
    hf_gem.revert(net)
    hf_gem.convert(net, "gem")
    assert unnamed(net) is None


def test_what_others_call_spec():
    """An attribute of that name does not make a module one of the family."""
    net = model()
    net[2].act.spec = {"name": "gem"}
    net[0].act.spec = torch.ones(2)
    assert plan_of(net) is None
    put_in(net, "gem", ["1.act"])
    plan = plan_of(net)
    other = model()
    other[1].act.spec = torch.ones(2)
    apply_plan(plan, other, hf_gem.get_activation)
    assert plan_of(other) == plan
    net[2].act.spec = torch.ones(2)
    assert hf_gem.convert(net, "gem").replaced
