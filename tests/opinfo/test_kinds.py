"""Every kind of derivative, of every function of the family in each of its variables, with every backend and `save`."""

import functools
import itertools

import pytest
import torch

import hf_gem
from hf_gem.family.formulas import forward
from hf_gem.family.table import FAMILIES
from hf_gem.functional import activation, gem_glu
from hf_gem.modules import GemActivation
from tests import oracle
from tests.helpers import needs_compiler
from tests.opinfo.database import BUILT, EPS, ORDERS, saves
from tests.opinfo.kinds import FIRST, SECOND, func_linearize

POINTS = torch.tensor([-2.5, -1.0, -0.6, -0.3, 0.2, 0.5, 0.8, 1.2, 3.0], dtype=torch.float64)
EPSILONS = torch.linspace(0.2, 1.0, len(POINTS), dtype=torch.float64)
UP, G, V = (POINTS.roll(k) * s for k, s in ((2, 0.7), (4, 0.5), (7, -0.9)))
VARIABLES = {  # the variable that is differentiated in, and a family
    "x": ["gem", "egem", "segem"],
    "eps": ["egem", "segem"],
    "log_ratio": ["egem", "segem"],
    "gate": ["gem", "egem", "segem"],
    "up": ["egem"],
}
CASES = [(variable, family) for variable, families in VARIABLES.items() for family in families]
CURVED = [case for case in CASES if case[0] != "up"]  # torch has no second derivative of what is linear: x * y raises
ALL_KINDS = [
    # It traces anew at every call.
    pytest.param(kind, order, marks=pytest.mark.slow if kind is func_linearize else [], id=kind.__name__)
    for order, kinds in ((1, FIRST), (2, SECOND))
    for kind in kinds
]


def eps_of(family):
    return 1.0 if family == "gem" else EPS


def function(variable, family, n, save, dtype):
    """One function of one variable, where it is looked at, and the same in plain formulas and float64."""
    definition, eps = FAMILIES[family], eps_of(family)
    points, up = POINTS.to(dtype), UP.to(dtype)
    if variable == "x":
        return (lambda x: activation(x, family, n, eps, save)), points, lambda x: forward(definition, n, eps, x)
    if variable == "eps":
        f = lambda e: activation(points, family, n, e, save)  # noqa: E731
        return f, EPSILONS.to(dtype), lambda e: forward(definition, n, e, points.double())
    if variable == "log_ratio":
        module = GemActivation(family, n, eps, True, num_parameters=len(points), channel_dim=0, save=save).to(dtype)
        f = lambda p: torch.func.functional_call(module, {"log_ratio": p}, (points,))  # noqa: E731
        return f, UP.to(dtype), lambda p: forward(definition, n, eps * torch.exp(p), points.double())
    if variable == "gate":
        f = lambda x: gem_glu(x, up, family, n, eps)  # noqa: E731
        return f, points, lambda x: forward(definition, n, eps, x) * up.double()
    f = lambda u: gem_glu(points, u, family, n, eps)  # noqa: E731
    return f, up, lambda u: forward(definition, n, eps, points.double()) * u


@functools.cache
def expected(variable, family, n, dtype, order):
    """The derivative by plain autograd through the plain formulas, and the g and v it was taken with."""
    _, x, plain = function(variable, family, n, "input", dtype)
    x = x.double().requires_grad_()
    g, v = G.to(dtype), V.to(dtype)
    (first,) = torch.autograd.grad(plain(x), x, g.double(), create_graph=True)
    if order == 1:
        return (g,), first.detach()
    return (g, v), torch.autograd.grad(first, x, v.double())[0]


def variants(variable, family, orders, dtype):
    for n in orders:
        kept = ["input"] if variable in ("gate", "up") else saves(family, n, dtype, variable != "x")
        yield from ((n, save) for save in kept)


@pytest.mark.parametrize(("kind", "order"), ALL_KINDS)
def test_in_float64(kind, order):
    for variable, family in CASES if order == 1 else CURVED:
        orders = ORDERS if order == 1 or variable == "x" else BUILT[-1:]
        for n, save in variants(variable, family, orders, torch.float64):
            f, x, _ = function(variable, family, n, save, torch.float64)
            weights, exact = expected(variable, family, n, torch.float64, order)
            got = kind(f, x, *weights)
            # Thousands of roundings at the scale of the largest; more where x is recovered from the output.
            close = (1e-10 if save == "output" else 1e-12) * exact.abs().max().clamp(min=1)
            error = (got - exact).abs().max()
            assert error <= close, f"{variable} of {family}, n={n}, save={save!r}: {error:.2g}, not {close:.2g}"
            assert got.dtype == x.dtype


@pytest.mark.parametrize("kind", [kind for kind in FIRST if kind is not func_linearize])
def test_first_order_in_float32(kind):
    for (variable, family), dtype in itertools.product(CASES[:3], (torch.float32, torch.bfloat16)):
        for n, save in variants(variable, family, ORDERS, dtype):
            f, x, _ = function(variable, family, n, save, dtype)
            weights, exact = expected(variable, family, n, dtype, 1)
            got = kind(f, x, *weights)
            # The bounds of test_functional: by the formulas or by autograd through them, or from the output.
            working = oracle.unit_roundoff(torch.float32)
            own = oracle.unit_roundoff(dtype) if dtype != torch.float32 else 0.0
            bound = (2 * n * (12 * n + 11) + 2 * n + 3) * working + own
            if save == "output":
                bound += (n + 2) * oracle.unit_roundoff(dtype) + (12 * n * n + 30 * n) * working
            steepest = max(1, (1 + 2 * n) ** 2 / (8 * n))
            limit = (bound + own) * steepest * weights[0].abs().double()
            wrong = (got.double() - exact).abs() > limit
            assert not wrong.any(), f"{family}, n={n}, save={save!r}, {dtype}: {got} for {exact}"
            assert got.dtype == dtype


@needs_compiler
@pytest.mark.parametrize(("kind", "order"), ALL_KINDS)
def test_kernels_change_no_bit(kind, order):
    for variable, family in CASES if order == 1 else CURVED:
        if variable in ("eps", "log_ratio"):
            continue  # no kernel takes a tensor eps
        for dtype in (torch.float32, torch.float16)[: 3 - order]:
            for n, save in variants(variable, family, BUILT, dtype):
                f, x, _ = function(variable, family, n, save, dtype)
                weights = [w.to(dtype) for w in (G, V)[:order]]
                results = []
                for backend in ("eager", "compiled"):
                    with hf_gem.kernels(backend):
                        results.append(kind(f, x, *weights))
                assert torch.equal(*results), f"{variable} of {family}, n={n}, save={save!r}, {dtype}"


@pytest.mark.parametrize("order", [1, 2])
def test_kinds_are_told_apart_by_a_wrong_derivative(order):
    # A Function whose forward mode is right and whose backward pass is not is found out, by every kind that uses it.
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 2 * grad * x**2

    x = POINTS
    right = 3 * G * x**2 if order == 1 else 6 * G * V * x
    kinds = [k for k in (FIRST if order == 1 else SECOND) if not k.__name__.startswith(("func_", "forward_", "old_"))]
    weights = (G,) if order == 1 else (G, V)
    for kind in kinds:
        try:
            got = kind(Wrong.apply, x, *weights)
        except RuntimeError:  # a Function of this old form cannot be transformed
            continue
        assert not torch.allclose(got, right), kind.__name__
