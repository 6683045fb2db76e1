"""Small models with activations in every kind of place, and what a caller could see change in them."""

import contextlib
import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

import hf_gem
from hf_gem.surgery.kinds import stock_slots
from hf_gem.surgery.slots import replace, slot_at


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


def put_in(net, name="egem", paths=None, make=hf_gem.get_activation):
    slots = list(stock_slots(net)) if paths is None else [slot_at(net, path) for path in paths]
    replace(net, {hf_gem.parse(name): slots}, make)
    return [block.act for block in net]


def occupants(net):
    return {slot.path: slot.occupant for slot in stock_slots(net)}


class Everything(nn.Module):
    """Modules, functions, containers, gates, and what cannot be reached."""

    def __init__(self):
        super().__init__()
        shared = nn.ReLU(inplace=True)
        self.stem = nn.Sequential(nn.Linear(4, 4), shared)
        self.norm = nn.BatchNorm1d(4)
        self.blocks = nn.ModuleList([Block(shared), Block(nn.GELU()), Block(F.silu)])
        self.partial = functools.partial(F.leaky_relu, negative_slope=0.1)
        self.bound = self.square
        self.gate = nn.Sigmoid()
        self.cls = nn.ReLU
        self.table = {"gelu": nn.GELU()}
        self.rows = [F.relu]
        self.by_hand = lambda x: F.elu(x)  # noqa: PLW0108  # a function that says nothing by its name

    def square(self, x):
        return F.relu(x).square()

    def forward(self, x):
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = self.partial(x) * self.gate(x)
        for act in (self.bound, self.cls(), self.table["gelu"], self.rows[0], self.by_hand):
            x = act(x)
        return x


REACHED = {
    "stem.1": "relu",
    "blocks.0.act": "relu",
    "blocks.1.act": "gelu",
    "blocks.2.act": "silu",
    "partial": "leakyrelu",
}
X = torch.linspace(-3, 3, 32).reshape(8, 4)


def snapshot(model):
    """All that a caller could see change, but values of tensors, which come as copies."""
    return [
        (
            path,
            module.training,
            {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"},
            dict(module._modules),
            {k: id(v) for k, v in module._parameters.items()},
            {k: id(v) for k, v in module._buffers.items()},
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for path, module in model.named_modules()
    ]


def same(model, before, state):
    now = model.state_dict()
    return snapshot(model) == before and all(torch.equal(now[key], value) for key, value in state.items())


@contextlib.contextmanager
def unchanged(model):
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    yield
    assert same(model, before, state)


def replaced(report):
    return {r.path: r.old for r in report.replaced}
