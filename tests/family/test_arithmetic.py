"""Small functions of the arithmetic at their limits; test_formulas.py tests what is made of them."""

import math

import pytest
import torch
from torch import fx

from hf_gem.family.arithmetic import digits, learnable_eps, saturated


def test_digits():
    dtypes = torch.float64, torch.float32, torch.float16, torch.bfloat16
    assert [digits(dtype) for dtype in dtypes] == [53, 24, 11, 8]


def test_a_learnable_eps_stays_in_its_range():
    inside = torch.tensor([1e-37, 1e-4, 1e37], dtype=torch.float64)
    assert torch.equal(saturated(inside), inside)
    outside = torch.tensor([0.0, 0.9e-37, 1.1e37, math.inf], dtype=torch.float64)
    assert saturated(outside).tolist() == [1e-37, 1e-37, 1e37, 1e37]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_learnable_eps_follows_its_log_ratio(dtype):
    log_ratio = torch.tensor([0.0, 2.0, -3.0], dtype=dtype)
    eps = learnable_eps(log_ratio, 0.25)
    assert eps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.tensor([0.25 * math.exp(value) for value in log_ratio.tolist()], dtype=torch.float64)
    assert eps[0] == 0.25
    assert (eps.double() / expected - 1).abs().max() < 4 * torch.finfo(eps.dtype).eps


@pytest.mark.parametrize("sign", [1, -1])
def test_a_learnable_eps_changes_by_a_limited_factor(sign):
    """A factor that is finite in float32, whatever the dtype; the last values that count are at 87."""
    log_ratio = sign * torch.tensor([86.5, 87.0, 87.5, 1e4], dtype=torch.float64)
    eps = learnable_eps(log_ratio, 10.0**-sign)
    assert eps[0] != eps[1] == eps[2] == eps[3]
    assert eps[1].item() == pytest.approx(10.0**-sign * math.exp(sign * 87.0), rel=1e-14)


def test_a_learnable_eps_is_one_node_of_a_graph():
    graph = fx.symbolic_trace(lambda log_ratio: learnable_eps(log_ratio, 0.5)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [learnable_eps]
