"""Gains against a quadrature of another kind."""

import math

import numpy as np
import pytest
import torch

from hf_gem import gain, get_activation
from hf_gem.init import init_feed_forward_

# The trapezoid in log|z| and these panels both promise errors below 1e-10.
TOLERANCE = 2e-10


def panels(function):
    """E[f(Z)], E[f(Z)^2] by Gauss-Legendre in z, on panels that shrink towards 0, where a small eps turns sharply."""
    edges = np.concatenate([[0.0], np.exp2(np.linspace(-30, math.log2(40), 200))])
    nodes, weights = np.polynomial.legendre.leggauss(20)
    half = np.diff(edges)[:, None] / 2
    z = (edges[:-1, None] + half * (nodes + 1)).ravel()
    density = (half * weights).ravel() * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    values = function(torch.from_numpy(np.stack([z, -z]))).detach().numpy()
    return float((values * density).sum()), float((values**2 * density).sum())


@pytest.mark.parametrize(
    "name", ["gem", "gem_n2", "gem_n8", "egem", "egem_n3_eps0.01", "segem", "segem_n2_eps0.1", "segem_n4_eps10"]
)
def test_moments(name):
    first, second = panels(get_activation(name))
    assert gain(name) == pytest.approx(1 / math.sqrt(second), rel=TOLERANCE)
    # Relative to the variance, errors of the moments grow by as much as E[f^2] exceeds it.
    assert second < 3 * (second - first**2)
    assert gain(name, centered=True) == pytest.approx(1 / math.sqrt(second - first**2), rel=3 * TOLERANCE)


@pytest.mark.parametrize("function", [torch.relu, torch.nn.functional.gelu, torch.nn.functional.silu, torch.tanh])
def test_other_activations(function):
    assert gain(function) == pytest.approx(1 / math.sqrt(panels(function)[1]), rel=TOLERANCE)


def test_closed_forms():
    assert gain(torch.relu) == pytest.approx(math.sqrt(2), rel=TOLERANCE)
    assert gain(lambda z: z) == pytest.approx(1, rel=TOLERANCE)
    assert gain(lambda z: 3 * z**2) == pytest.approx(1 / math.sqrt(27), rel=TOLERANCE)
    assert gain(torch.relu, centered=True) == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), rel=TOLERANCE)
    assert gain(lambda z: 3 * z**2, centered=True) == pytest.approx(1 / math.sqrt(18), rel=TOLERANCE)
    assert gain(torch.tanh, centered=True) == pytest.approx(gain(torch.tanh), rel=TOLERANCE)


def test_gem_in_closed_form():
    # GEM(1)^2 = x^6 / (1 + x^2)^2 = x^2 - 2 + 3 / (1 + x^2) - 1 / (1 + x^2)^2, with E[1 / (1 + Z^2)] = m, the Mills
    # ratio of the normal at 1, and E[1 / (1 + Z^2)^2] = 1/2, by parts; x > 0 is half of it.
    mills = math.sqrt(math.pi / 2) * math.exp(0.5) * math.erfc(math.sqrt(0.5))
    assert gain("gem") == pytest.approx(1 / math.sqrt((1 - 2 + 3 * mills - 0.5) / 2), rel=TOLERANCE)


def test_a_learnable_name_counts_with_its_initial_eps():
    assert gain("egem_n2_eps0.1_learnable") == pytest.approx(gain("egem_n2_eps0.1"), rel=TOLERANCE)


def test_towards_relu_as_eps_falls():
    # SEGEM differs from ReLU for z < 0 only, by at most sqrt(eps) / 2.
    for eps in (1.0, 1e-2, 1e-4):
        assert 0 < 1 / gain(f"segem_eps{eps}") ** 2 - 0.5 <= eps / 8


def test_of_a_function_that_works_in_place():
    assert gain(torch.nn.SiLU(inplace=True)) == gain(torch.nn.SiLU())


@pytest.mark.parametrize("function", [torch.zeros_like, lambda z: z / 0, lambda z: torch.full_like(z, torch.nan)])
def test_no_gain(function):
    with pytest.raises(ValueError, match=r"has a second moment of .* must be positive and finite"):
        gain(function)


def test_malformed_name():
    with pytest.raises(ValueError, match="Did you mean 'gem_n2'"):
        gain("gem-n2")


@pytest.mark.parametrize("name", ["gem", "gem_n2", "egem_n2_eps10", "segem"])
def test_feed_forward_layers_keep_the_scale(name):
    torch.manual_seed(0)
    width, hidden, scale = 1024, 2048, 0.5
    up, down, x = torch.empty(hidden, width), torch.empty(width, hidden), torch.randn(1024, width)
    init_feed_forward_(up, down, width, name, scale)
    inside = x @ up.T
    output = get_activation(name)(inside) @ down.T
    # Activations have a mean, so that what the weights of an output make of it is shared by all tokens: squares of
    # 1024 normal numbers, within six deviations of their mean. The inputs' is closer.
    within = 6 * (2 / width) ** 0.5
    assert inside.square().mean().item() == pytest.approx(1, rel=within)
    assert output.square().mean().item() == pytest.approx(scale**2, rel=within)
