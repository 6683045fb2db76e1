"""Slots, replacement, undoing, and plans replayed on another model."""

import copy
import functools
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_gem
from hf_gem.surgery import plans as conversion
from hf_gem.surgery.plans import Slot, converted, plan_of, slot_at, undo
from hf_gem.surgery.stock import stock_slots


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act = act

    def forward(self, x):
        return self.act(self.linear(x))


def model():
    """Two places that share a module, one of its own, two functions, one block that is there twice."""
    shared = nn.ReLU()
    blocks = [Block(shared), Block(shared), Block(nn.GELU()), Block(F.relu), Block(F.relu)]
    return nn.Sequential(*blocks, blocks[0])


def replace(net, name="egem", paths=None, make=hf_gem.get_activation):
    slots = list(stock_slots(net)) if paths is None else [slot_at(net, path) for path in paths]
    conversion.replace(net, {name: slots}, make)
    return [block.act for block in net]


def occupants(net):
    return {slot.path: slot.occupant for slot in stock_slots(net)}


# ---- slots


@pytest.mark.parametrize("path", ["0.act", "3.act"])
def test_a_slot(path):
    net = model()
    slot = slot_at(net, path)
    old = slot.occupant
    assert old is net[int(path[0])].act
    for new in (nn.SiLU(), F.silu, hf_gem.GEM(), old):
        slot.put(new)
        assert net[int(path[0])].act is slot.occupant is new
        assert ("act" in net[int(path[0])]._modules) == isinstance(new, nn.Module) != ("act" in vars(net[int(path[0])]))


@pytest.mark.parametrize("path", ["9.act", "0.nothing", "0.linear.in_features", "", "0.linear.weight"])
def test_no_slot(path):
    with pytest.raises(KeyError):
        slot_at(model(), path)


def test_a_slot_in_a_container_keeps_its_place():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    slot_at(net, "1").put(hf_gem.GEM())
    assert [type(module) for module in net] == [nn.Linear, hf_gem.GEM, nn.Linear]


# ---- replacing


def test_what_was_shared_stays_shared():
    acts = replace(model())
    assert acts[0] is acts[1] is acts[5]
    assert len({id(act) for act in acts}) == 4
    assert all(type(act) is hf_gem.EGEM for act in acts)


def test_a_learnable_one_belongs_to_one_place():
    net = model()
    acts = replace(net, "egem_learnable")
    assert len({id(act) for act in acts}) == 5  # block 0 is block 5
    assert sum(key.endswith("log_ratio") for key, _ in net.named_parameters()) == 5


@pytest.mark.parametrize("name", ["gem_n2", "egem_learnable"])
def test_the_state_dict(name):
    net = model()
    keys = list(net.state_dict())
    replace(net, name)
    added = set(net.state_dict()) - set(keys)
    assert added == ({f"{i}.act.log_ratio" for i in range(6)} if "learnable" in name else set())
    undo(net)
    assert list(net.state_dict()) == keys


def test_the_mode_is_that_of_the_surroundings():
    net = model().eval()
    net[2].train()
    assert [act.training for act in replace(net)] == [False, False, True, False, False, False]


@pytest.mark.parametrize("ambient", ["cpu", "meta"])
def test_a_learnable_one_goes_where_its_neighbours_are(ambient):
    net = nn.Sequential(
        Block(nn.ReLU()).to("meta"),
        Block(nn.Sequential(nn.ReLU())).to(torch.bfloat16),  # nothing with weights beside it, but around it
        Block(nn.ReLU()).double(),
    )
    net.append(nn.ModuleDict({"act": nn.ReLU()}))  # as all there is: the first of the model
    with torch.device(ambient):
        conversion.replace(net, {"egem_learnable": list(stock_slots(net))}, hf_gem.get_activation)
    found = {name: (p.device.type, p.dtype) for name, p in net.named_parameters() if name.endswith("log_ratio")}
    assert found == {
        "0.act.log_ratio": ("meta", torch.float32),
        "1.act.0.log_ratio": ("cpu", torch.bfloat16),
        "2.act.log_ratio": ("cpu", torch.float64),
        "3.act.log_ratio": ("meta", torch.float32),
    }
    assert not net[1].act[0].log_ratio.any()


def test_a_learnable_one_beside_weights_in_eight_bits():
    block = Block(nn.ReLU())
    block.linear.weight = nn.Parameter(block.linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    net = nn.Sequential(block.to("cpu"))
    block.linear.bias.data = block.linear.bias.data.bfloat16()
    conversion.replace(net, {"egem_learnable": list(stock_slots(net))}, hf_gem.get_activation)
    assert block.act.log_ratio.dtype == torch.bfloat16


def test_nothing_changes_where_one_cannot_be_made():
    net = model()
    before = occupants(net)

    def make(name):
        if len(made) == 2:
            raise MemoryError
        made.append(name)
        return hf_gem.get_activation(name)

    made = []
    with pytest.raises(MemoryError):
        replace(net, "egem", make=make)
    assert occupants(net) == before


# ---- undoing


def test_undoing_several_conversions():
    net = model()
    net.register_buffer("mark", torch.zeros(1))
    before = occupants(net)
    replace(net, "egem", ["2.act", "3.act"])
    replace(net, "gem_n2")
    replace(net, "segem_learnable", ["0.act", "4.act"])
    assert {slot.path for slot in converted(net)} == set(before)
    assert sorted(undo(net)) == sorted(before)
    assert all(occupant is before[path] for path, occupant in occupants(net).items())
    assert [type(block.act) for block in net[3:5]] == [type(F.relu)] * 2
    assert undo(net) == []
    assert plan_of(net) is None


def test_what_comes_back_has_the_mode_of_what_goes():
    net = nn.Sequential(Block(nn.RReLU()))
    replace(net)
    net.eval()
    undo(net)
    assert not net[0].act.training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_undoing_a_copy(copied):
    net = model()
    acts = replace(net)
    twin = copied(net)
    assert [slot.path for slot in converted(twin)] == [slot.path for slot in converted(net)]
    undo(twin)
    assert [type(block.act).__name__ for block in twin] == ["ReLU", "ReLU", "GELU", "function", "function", "ReLU"]
    assert twin[0].act is twin[1].act is not net[0].act.replaces[0]
    assert [block.act for block in net] == acts


# ---- torch's encoders, whose inference path is fused


def encoder(activation, **kwargs):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation=activation, **kwargs)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("activation", ["relu", F.gelu, nn.ReLU(), nn.GELU()], ids=["relu", "gelu", "ReLU", "GELU"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fused_path_of_encoders(activation):
    net = encoder(activation)
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    codes = [layer.activation_relu_or_gelu for layer in net.layers]
    with torch.no_grad():
        stock = net(x, src_key_padding_mask=padding)
        conversion.replace(net, {"egem_eps1": list(stock_slots(net))}, hf_gem.get_activation)
        fused = net(x, src_key_padding_mask=padding)
    with_gradients = net(x, src_key_padding_mask=padding)  # which no fused kernel computes
    torch.testing.assert_close(fused, with_gradients)
    assert not torch.allclose(fused[~padding], stock[~padding], rtol=1e-3)
    undo(net)
    assert codes == [layer.activation_relu_or_gelu for layer in net.layers] != [0, 0]
    with torch.no_grad():
        assert torch.equal(net(x, src_key_padding_mask=padding), stock)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_encoders_that_never_packed_do_not_after_undoing():
    for net in (encoder(F.silu), encoder("relu", norm_first=True)):
        assert not net.use_nested_tensor
        conversion.replace(net, {"egem": list(stock_slots(net))}, hf_gem.get_activation)
        undo(net)
        assert not net.use_nested_tensor


# ---- plans


def test_a_plan_replayed():
    net = model()
    replace(net, "gem_n2", ["2.act", "3.act"])
    replace(net, "egem_learnable", ["0.act"])
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
    conversion.apply_plan(plan, fresh, hf_gem.get_activation)
    assert plan_of(fresh) == plan
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(fresh(x), net(x))
    acts = occupants(fresh)
    conversion.apply_plan(plan, fresh, hf_gem.get_activation)  # nothing left to do
    assert occupants(fresh) == acts
    undo(fresh)
    assert occupants(fresh).keys() == occupants(model()).keys()


def test_a_plan_of_what_was_put_in_by_hand():
    net = model()
    net[2].act = hf_gem.GEM(2)
    replace(net, "egem", ["0.act"])
    plan = plan_of(net)
    assert plan["activations"] == {"egem": ["0.act"], "gem_n2": ["2.act"]}
    assert undo(net) == ["0.act"]
    assert plan_of(net)["activations"] == {"gem_n2": ["2.act"]}
    fresh = model()
    conversion.apply_plan(plan, fresh, hf_gem.get_activation)
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
    replace(net, "gem", ["1.act"])
    plan = change(plan_of(net))
    fresh = model()
    before = occupants(fresh)
    with pytest.raises(ValueError, match=message):
        conversion.apply_plan(plan, fresh, hf_gem.get_activation)
    assert occupants(fresh) == before


def test_slots_are_values():
    net = model()
    assert slot_at(net, "0.act") == Slot("0.act", net[0], "act")
    with pytest.raises(AttributeError):
        slot_at(net, "0.act").key = "other"
    partial = functools.partial(F.gelu, approximate="tanh")
    net[0].act = None
    vars(net[0])["act"] = partial
    assert slot_at(net, "0.act").occupant is partial
