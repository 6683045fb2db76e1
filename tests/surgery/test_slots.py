"""Places of activations, what is put there, and how it is undone."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_gem
from hf_gem.surgery.kinds import stock_slots
from hf_gem.surgery.plans import apply_plan, plan_of
from hf_gem.surgery.slots import Slot, converted, replace, slot_at, undo
from tests.surgery.blocks import Block, model, occupants, put_in


@pytest.mark.parametrize("path", ["0.act", "3.act"])
def test_a_slot(path):
    net = model()
    slot = slot_at(net, path)
    old = slot.occupant
    assert old is net[int(path[0])].act
    for new in (nn.SiLU(), hf_gem.EGEM(learnable=True), hf_gem.GEM(), F.silu, hf_gem.GEM(), old):
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


class Container(nn.ModuleList):
    def __init__(self):
        super().__init__([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.act = F.relu

    def forward(self, x):
        for layer in self:
            x = self.act(layer(x))
        return x


class Children(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.a, self.b = F.relu, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        for layer in self.children():
            x = self.act(layer(x))
        return x


@pytest.mark.parametrize("build", [Container, Children])
@pytest.mark.parametrize("choice", [{}, {"eps": "match"}, {"eps": "fit", "per_layer": True}], ids=str)
def test_loops_over_children_run_what_they_ran(build, choice):
    net = nn.Sequential(build())
    x = torch.randn(3, 4)
    stock, layers = net(x), list(net[0].children())
    report = hf_gem.convert(net, "egem_n1", data=[x], **choice)
    assert [r.path for r in report.replaced] == ["0.act"]
    act = net[0].act
    want = x
    for layer in layers:
        want = act(layer(want))
    (found,) = report.audit.calls
    assert (found.module, found.count, report.audit.complete) == ("0.act", 2, True)
    plan = plan_of(net)
    assert plan["activations"] == {report.replaced[0].new: ["0.act"]}
    replayed = nn.Sequential(build())
    apply_plan(plan, replayed, hf_gem.get_activation)
    replayed.load_state_dict(net.state_dict())
    for twin in (net, replayed, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), want)
        assert hf_gem.audit(twin, x).complete
        assert hf_gem.convert(twin, "gem_n2", inputs=x).audit.num_gem == 2
        assert not torch.equal(twin(x), want)
        assert hf_gem.revert(twin) == ["0.act"]
        assert len(list(twin[0].children())) == 2
        assert torch.equal(twin(x), stock)


@pytest.mark.parametrize("build", [Container, Children])
def test_what_loops_over_children_cannot_learn_the_eps_of_its_attribute(build):
    net = nn.Sequential(build())
    match = rf"learnable egem_learnable for 0\.act, .* a {build.__name__}\..* skip='0\.act'"
    with pytest.raises(ValueError, match=match):
        hf_gem.convert(net, "egem_learnable")
    assert net[0].act is F.relu


def decoder():
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2).eval()


def test_copies_of_a_decoder_compute_the_same():
    """torch restores a ReLU in a copy whose activation is a submodule."""
    net, x = decoder(), torch.randn(2, 3, 8)
    hf_gem.convert(net, "segem_eps0.3", inputs=(x, x))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.optim.swa_utils.AveragedModel(net)):
        assert torch.equal(twin(x, x), net(x, x))
    assert hf_gem.revert(copy.deepcopy(net)) == ["layers.0.activation", "layers.1.activation"]
    with pytest.raises(ValueError, match=r"learnable egem_learnable for layers\.0\.activation.*copies of this class"):
        hf_gem.convert(decoder(), "egem_learnable")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), F.relu

    def forward(self, x):
        return self.act(self.linear(x))


def test_in_place_of_a_function_is_a_submodule():
    net = nn.Sequential(Plain(), Plain())
    hf_gem.convert(net, "egem")
    assert [type(module) for module in net.modules()].count(hf_gem.EGEM) == 2
    assert "EGEM" in str(net)
    x = torch.randn(3, 4)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))
    assert torch.equal(torch.jit.script(net)(x), net(x))
    hf_gem.revert(net)
    assert [name for name, _ in net[0].named_children()] == ["linear"]
    hf_gem.convert(net, "egem_learnable")
    assert [name for name, _ in net.named_parameters()].count("0.act.log_ratio") == 1


# ---- replacing


def test_what_was_shared_stays_shared():
    acts = put_in(model())
    assert acts[0] is acts[1] is acts[5]
    assert len({id(act) for act in acts}) == 4
    assert all(type(act) is hf_gem.EGEM for act in acts)


def test_a_learnable_one_belongs_to_one_place():
    net = model()
    acts = put_in(net, "egem_learnable")
    assert len({id(act) for act in acts}) == 5  # block 0 is block 5
    assert sum(key.endswith("log_ratio") for key, _ in net.named_parameters()) == 5


@pytest.mark.parametrize("name", ["gem_n2", "egem_learnable"])
def test_the_state_dict(name):
    net = model()
    keys = list(net.state_dict())
    put_in(net, name)
    added = set(net.state_dict()) - set(keys)
    assert added == ({f"{i}.act.log_ratio" for i in range(6)} if "learnable" in name else set())
    undo(net)
    assert list(net.state_dict()) == keys


def test_the_mode_is_that_of_the_surroundings():
    net = model().eval()
    net[2].train()
    assert [act.training for act in put_in(net)] == [False, False, True, False, False, False]


@pytest.mark.parametrize("ambient", ["cpu", "meta"])
def test_a_learnable_one_goes_where_its_neighbours_are(ambient):
    net = nn.Sequential(
        Block(nn.ReLU()).to("meta"),
        Block(nn.Sequential(nn.ReLU())).to(torch.bfloat16),  # nothing with weights beside it, but around it
        Block(nn.ReLU()).double(),
    )
    net.append(nn.ModuleDict({"act": nn.ReLU()}))  # as all there is: the first of the model
    with torch.device(ambient):
        replace(net, {hf_gem.parse("egem_learnable"): list(stock_slots(net))}, hf_gem.get_activation)
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
    replace(net, {hf_gem.parse("egem_learnable"): list(stock_slots(net))}, hf_gem.get_activation)
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
        put_in(net, "egem", make=make)
    assert occupants(net) == before


# ---- undoing


def test_undoing_several_conversions():
    net = model()
    net.register_buffer("mark", torch.zeros(1))
    before = occupants(net)
    put_in(net, "egem", ["2.act", "3.act"])
    put_in(net, "gem_n2")
    put_in(net, "segem_learnable", ["0.act", "4.act"])
    assert {slot.path for slot in converted(net)} == set(before)
    assert sorted(undo(net)) == sorted(before)
    assert all(occupant is before[path] for path, occupant in occupants(net).items())
    assert [type(block.act) for block in net[3:5]] == [type(F.relu)] * 2
    assert undo(net) == []
    assert plan_of(net) is None


def test_what_comes_back_has_the_mode_of_what_goes():
    net = nn.Sequential(Block(nn.RReLU()))
    put_in(net)
    net.eval()
    undo(net)
    assert not net[0].act.training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_undoing_a_copy(copied):
    net = model()
    acts = put_in(net)
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
        replace(net, {hf_gem.parse("egem_eps1"): list(stock_slots(net))}, hf_gem.get_activation)
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
        replace(net, {hf_gem.parse("egem"): list(stock_slots(net))}, hf_gem.get_activation)
        undo(net)
        assert not net.use_nested_tensor


def test_slots_are_values():
    net = model()
    assert slot_at(net, "0.act") == Slot("0.act", net[0], "act")
    with pytest.raises(AttributeError):
        slot_at(net, "0.act").key = "other"
    partial = functools.partial(F.gelu, approximate="tanh")
    net[0].act = None
    vars(net[0])["act"] = partial
    assert slot_at(net, "0.act").occupant is partial
