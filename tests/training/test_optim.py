"""Learning rate and weight-decay groups."""

import itertools

import pytest
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_gem.training.config import TrainConfig
from hf_gem.training.optim import learning_rate, make_optimizer, parameter_groups


def test_learning_rate_warms_up_and_decays_to_its_floor():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1)
    assert (rates[54] + rates[55]) / 2 == pytest.approx(0.55)  # half-way, the cosine's middle


def test_linear_decay():
    config = TrainConfig(steps=101, warmup_steps=0, learning_rate=1.0, min_lr_ratio=0.2, lr_schedule="linear")
    assert [learning_rate(step, config) for step in (0, 25, 50, 100)] == pytest.approx([1.0, 0.8, 0.6, 0.2])


@pytest.mark.parametrize("config", [TrainConfig(steps=1, warmup_steps=1), TrainConfig(steps=1, warmup_steps=0)])
def test_a_single_step_has_a_learning_rate(config):
    assert learning_rate(0, config) == config.learning_rate


def test_matrices_decay_and_nothing_else():
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, activation_function="egem_learnable")
    )
    decay, keep = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in (decay, keep))
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.1, 0.0)
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    assert {"transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"} <= decayed
    assert "transformer.h.0.mlp.act.log_ratio" in kept
    assert all(name.endswith(("bias", "log_ratio")) or "ln_" in name for name in kept)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    optimizer = make_optimizer(model, TrainConfig())
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1]
    assert optimizer.defaults["betas"] == (0.9, 0.95)
