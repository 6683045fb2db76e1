"""The chunked loss is the whole loss, without its memory; residuals are those of the equation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from hf_gem.training.coordinate_models import CoordinateMLPConfig, CoordinateMLPModel
from hf_gem.training.data.collocation import CollocationPoints
from hf_gem.training.loss import IGNORE, CausalLMLoss, MaskedLMLoss, ResidualLoss, chunked_cross_entropy
from hf_gem.training.pde import PROBLEMS

TOKENS, WIDTH, VOCAB = 50, 8, 37


def setup():
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=False)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[::7] = IGNORE
    return head, hidden, labels


@pytest.mark.parametrize("chunk_size", [0, 1, 16, 50, 64])
def test_value_and_gradients_do_not_depend_on_the_chunk(chunk_size):
    head, hidden, labels = setup()
    chunked_cross_entropy(hidden, head, labels, chunk_size).backward()
    got = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    loss = F.cross_entropy(head(hidden), labels, ignore_index=IGNORE, reduction="sum")
    loss.backward()
    # a sum of TOKENS terms in another order: at most TOKENS roundings of its largest partial sum
    bound = TOKENS * torch.finfo(torch.float32).eps
    torch.testing.assert_close(chunked_cross_entropy(hidden, head, labels, chunk_size), loss, rtol=bound, atol=0)
    torch.testing.assert_close(got[0], hidden.grad, rtol=0, atol=bound * hidden.grad.abs().max().item())
    torch.testing.assert_close(got[1], head.weight.grad, rtol=0, atol=bound * head.weight.grad.abs().max().item())


def test_no_tensor_as_large_as_the_logits_is_kept():
    head, hidden, labels = setup()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        chunked_cross_entropy(hidden, head, labels, 10)
    assert max(sizes) <= max(10 * VOCAB, TOKENS * WIDTH)
    sizes.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        chunked_cross_entropy(hidden, head, labels, 0)
    assert max(sizes) == TOKENS * VOCAB  # the measure sees what it should


def test_it_is_the_loss_that_transformers_computes():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=VOCAB, n_positions=12)).eval()
    ids = torch.randint(VOCAB, (3, 13))
    total = CausalLMLoss(model, chunk_size=5)(ids[:, :-1], ids[:, 1:]).loss
    theirs = model(ids[:, :12], labels=ids[:, :12]).loss  # shifts by itself, so it leaves the last target out
    ours = CausalLMLoss(model)(ids[:, :11], ids[:, 1:12]).loss / (3 * 11)
    torch.testing.assert_close(ours, theirs, rtol=64 * torch.finfo(torch.float32).eps, atol=0)
    assert total > 0


def test_masked_loss_is_that_of_transformers():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=16, **sizes)).eval()
    ids = torch.randint(VOCAB, (3, 10))
    positions = torch.tensor([[1, 4], [2, 3], [7, 9]])
    labels = torch.tensor([[5, 6], [7, IGNORE], [IGNORE, IGNORE]])
    whole = torch.full_like(ids, IGNORE).scatter(1, positions, labels)
    expected = model(input_ids=ids, labels=whole).loss * 3
    got = MaskedLMLoss(model, head="cls")(ids, positions, labels).loss
    torch.testing.assert_close(got, expected)


def residual_loss(name, act, dtype=torch.float64, size=6, save="auto"):
    problem = PROBLEMS[name]
    torch.manual_seed(0)
    config = CoordinateMLPConfig(problem.lower, problem.upper, hidden_size=size, num_hidden_layers=2, hidden_act=act)
    model = CoordinateMLPModel(config).to(dtype)
    for module in model.modules():
        if hasattr(module, "save"):
            module.save = save
    points = CollocationPoints(problem, seed=0).batch(np.arange(size**2))
    return ResidualLoss(model, problem, 10.0), {key: value.to(dtype) for key, value in points.items()}


@pytest.mark.parametrize("act", ["tanh", "silu", "gelu", "relu", "gem", "gem_n2", "gem_n3", "segem_eps1"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_residuals_are_those_that_torch_func_finds(name, act):
    objective, batch = residual_loss(name, act)
    model = objective.model

    def value(point):
        return model(point[None]).field[0]

    u = model(batch["points"]).field
    first = torch.func.vmap(torch.func.grad(value))(batch["points"])
    hessian = torch.func.vmap(torch.func.hessian(value))(batch["points"])
    if name == "burgers":
        residual = first[:, 1] + u * first[:, 0] - 0.01 / math.pi * hessian[:, 0, 0]
    else:
        b, k = {"poisson": (1, 0), "helmholtz": (4, 1)}[name]
        source = ((1 + b**2) * math.pi**2 - k**2) * objective.problem.exact(batch["points"])
        residual = -hessian[:, 0, 0] - hessian[:, 1, 1] - k**2 * u - source
    expected = (residual**2).sum() + 10 * ((model(batch["boundary"]).field - batch["labels"]) ** 2).sum()
    found = objective(**batch).loss
    bound = 1000 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(found, expected, rtol=bound, atol=0)
    weights = list(model.parameters())
    wanted = torch.autograd.grad(expected, weights, materialize_grads=True)
    for ours, theirs in zip(torch.autograd.grad(found, weights, materialize_grads=True), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound * theirs.abs().max().item())


def test_in_evaluation_the_loss_is_the_squared_error():
    objective, batch = residual_loss("burgers", "gem_n2", torch.float32)
    labels = torch.linspace(-1, 1, 36)
    with torch.no_grad():
        found = objective(batch["points"], labels)
    assert torch.equal(found.predictions, objective.model(batch["points"]).field)
    assert torch.equal(found.loss, (found.predictions - labels).square().sum())
    assert not batch["points"].requires_grad


@pytest.mark.parametrize("act", ["gem", "gem_n3"])
def test_float32_is_enough_where_a_gpu_would_keep_outputs(act):
    """From an output near zero the slope is found with its relative accuracy, and its own derivatives are not."""

    def gradient(dtype):
        objective, batch = residual_loss("poisson", act, dtype, size=20, save="output")
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective(**batch).loss, [*objective.parameters()])])

    exact = gradient(torch.float64)
    error = (gradient(torch.float32) - exact).norm() / exact.norm()
    assert error < 100 * torch.finfo(torch.float32).eps
