"""The functions as a user sees them: their mathematics, and every way torch can differentiate and run them."""

import math
import warnings
from fractions import Fraction

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import hf_gem
from hf_gem import egem, gem, segem
from hf_gem.family.formulas import forward, inverse
from hf_gem.family.table import FAMILIES as TABLE
from hf_gem.functional import gem_glu
from tests import oracle
from tests.helpers import needs_compiler

ORDERS = [1, 2, 3, 4]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FUNCTIONS = {
    "gem": lambda x, n, eps=1.0: gem(x, n),
    "egem": lambda x, n, eps=0.3: egem(x, n, eps),
    "segem": lambda x, n, eps=0.3: segem(x, n, eps),
}
EPS = {"gem": 1.0, "egem": 0.3, "segem": 0.3}
PAIRS = {"egem": egem, "segem": segem}

families = pytest.mark.parametrize("family", list(FUNCTIONS))
with_eps = pytest.mark.parametrize("family", list(PAIRS))
orders = pytest.mark.parametrize("n", ORDERS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def both_sides(*shape, dtype=torch.float64):
    """Random points of both signs, around the gate; none so near 0 that a finite difference would straddle it."""
    x = torch.randn(*shape, dtype=torch.float64)
    return (x + 0.05 * torch.sign(x)).to(dtype)


def plain(family, x, n, eps):
    """What compilers and exporters get."""
    return forward(TABLE[family], n, eps, x)


# ---- the definitions


@pytest.mark.parametrize(("n", "eps"), [(1, 1e-4), (2, 0.01), (3, 1.0), (4, 10.0)])
@dtypes
def test_one_function_serves_the_family(n, eps, dtype):
    # Both sides are rounded: egem and segem by 2n + 3 and 4n + 7 units in the working dtype, once in their own, and
    # the sum once; half types are summed in float64 here. See test_formulas.
    x = (torch.randn(500, dtype=torch.float64) * eps ** (1 / (2 * n))).to(dtype)
    working = torch.promote_types(dtype, torch.float32)
    unit = (6 * n + 11) * oracle.unit_roundoff(working) + 2 * oracle.unit_roundoff(dtype)
    left = segem(x, n, eps).double()
    right = x.double() + egem(-x, n, eps).double()
    floor = oracle.min_normal(dtype) * oracle.unit_roundoff(dtype)
    assert ((left - right).abs() <= unit * x.double().abs() + 2 * floor).all()


def test_gem_is_egem_with_eps_one():
    x = torch.randn(100)
    for n in ORDERS:
        assert torch.equal(gem(x, n), egem(x, n, 1.0))
    assert torch.equal(gem(x), gem(x, 1))
    assert torch.equal(egem(x), egem(x, 1, 1e-4))
    assert torch.equal(segem(x), segem(x, 1, 1e-4))


@families
@pytest.mark.parametrize("n", [1, 2, 3])
def test_smoothness_at_zero(family, n):
    # Near 0 the functions are (their side of) x^(2n+1) / eps (1 - x^2n / eps + ...): derivatives up to 2n vanish
    # there from both sides, and number 2n + 1 jumps by (2n+1)! / eps. segem adds x, whose derivatives past the first
    # are 0.
    eps, h, top = EPS[family], 2.0**-10, 2 * n + 1
    function = FUNCTIONS[family]
    x = torch.tensor([-h, h], dtype=torch.float64, requires_grad=True)
    derivative = function(x, n)
    if family == "segem":
        derivative = derivative - x.clamp(max=0) - x.clamp(min=0)
    jump = math.factorial(top) / eps
    # The next term of the series, by its coefficient of x^(4n+1); rounding stays far below it for these n and h.
    series = math.factorial(4 * n + 1) / math.factorial(2 * n) / eps**2 * h ** (2 * n)
    for k in range(1, top + 1):
        (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)
        left, right = derivative.tolist()
        if family == "segem":
            left, right = right, left  # what bends is its negative side
        assert left == pytest.approx(0, abs=1e-12 * jump)
        expected = jump * h ** (top - k) / math.factorial(top - k)
        assert abs(abs(right) - expected) <= series * h ** (top - k) + 1e-12 * jump


@with_eps
@orders
@pytest.mark.parametrize("eps", [1e-4, 1.0])
def test_shape_of_the_function(family, n, eps):
    function = PAIRS[family]
    sigma = eps ** (1 / (2 * n))
    x = sigma * torch.exp2(torch.linspace(-8, 8, 40001, dtype=torch.float64))
    depth = sigma * (2 * n - 1) ** ((2 * n - 1) / (2 * n)) / (2 * n)
    # A grid misses an extremum by at most half a step, to second order: (step/2)^2 / 2 times the curvature in log x,
    # which is below 4n^2 for the gate and a few times that for the products.
    missed = (16 * math.log(2) / 40000 / 2) ** 2 / 2 * 8 * (2 * n + 1) ** 2
    if family == "egem":
        y = function(x, n, eps)
        assert (y.diff() > 0).all()
        assert (y <= x).all()
        assert not function(-x, n, eps).any()
        assert (x - y).max().item() == pytest.approx(depth, rel=missed)
        steep = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(steep, n, eps).sum(), steep)
        assert slope.max().item() == pytest.approx((1 + 2 * n) ** 2 / (8 * n), rel=missed)
        assert slope.min() > 0
    else:
        assert torch.equal(function(x, n, eps), x)
        y = function(-x, n, eps)
        assert (y < 0).all()
        assert y.min().item() == pytest.approx(-depth, rel=missed)
        below = (-x).requires_grad_()
        (slope,) = torch.autograd.grad(function(below, n, eps).sum(), below)
        # No dead neurons: the slope vanishes at the bottom of the dip only, where 2n s = 1.
        bottom = sigma * (2 * n - 1) ** (-1 / (2 * n))
        assert ((slope > 0) == (x < bottom)).all()


@with_eps
@pytest.mark.parametrize(("n", "p"), [(1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (1, math.inf), (3, math.inf)])
def test_distance_to_relu(family, n, p):
    # With x = sigma y, sigma = eps^(1/2n), the distance to ReLU at x is sigma y / (1 + y^2n), so its L^p norm is
    # c eps^((1 + 1/p) / 2n), c^p = B((p+1)/2n, p - (p+1)/2n) / 2n. It is finite where p (2n - 1) > 1: at n = 1 the
    # L^1 distance diverges.
    y = torch.exp(torch.arange(-20, 14, 1 / 64, dtype=torch.float64))
    measured = []
    for eps in (1e-1, 1e-3, 1e-5):
        x = eps ** (1 / (2 * n)) * y
        distance = x - egem(x, n, eps) if family == "egem" else segem(x, n, eps).relu() - x - segem(-x, n, eps)
        assert (distance >= 0).all()
        norm = distance.max().item() if p == math.inf else float((distance**p * x).sum() / 64) ** (1 / p)
        measured.append(norm / eps ** ((1 + 1 / p) / (2 * n)))
    if p == math.inf:
        constant, relative = (2 * n - 1) ** ((2 * n - 1) / (2 * n)) / (2 * n), (2 * n / 64) ** 2
    else:
        a, b = (p + 1) / (2 * n), p - (p + 1) / (2 * n)
        constant = (math.gamma(a) * math.gamma(b) / math.gamma(a + b) / (2 * n)) ** (1 / p)
        # What lies past the last y, and roundings of x - egem(x), at most 2^-50 y each over the whole range.
        last = y[-1].item()
        tail = last ** (1 - p * (2 * n - 1)) / (p * (2 * n - 1) - 1)
        relative = (tail + (2.0**-50 * last) ** p * last) / constant**p + 1e-9
    assert measured == pytest.approx([constant] * 3, rel=relative)


def test_l1_distance_diverges_for_n_1():
    # Each further decade of x adds the same: the integral of 1/x.
    totals = []
    for decades in (2, 4, 6):
        y = torch.exp(torch.arange(-10, decades * math.log(10), 1 / 64, dtype=torch.float64))
        totals.append(float((-segem(-y, 1, 1.0) * y).sum() / 64))
    assert totals[2] - totals[1] == pytest.approx(2 * math.log(10), rel=0.01)
    assert totals[1] - totals[0] == pytest.approx(2 * math.log(10), rel=0.01)


# ---- values, dtypes, shapes


@families
@orders
@dtypes
def test_eager_equals_the_reference(family, n, dtype):
    x = torch.randn(200, dtype=dtype)
    y = FUNCTIONS[family](x, n)
    assert y.dtype == dtype
    assert torch.equal(y, plain(family, x, n, EPS[family]))


@families
@pytest.mark.parametrize("n", [1, 3])
@dtypes
def test_special_values(family, n, dtype):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0], dtype=dtype, requires_grad=True)
    y = FUNCTIONS[family](x, n)
    torch.testing.assert_close(y, torch.tensor([inf, 0, nan, 0, 0], dtype=dtype), rtol=0, atol=0, equal_nan=True)
    (slope,) = torch.autograd.grad(y.sum(), x)
    zero = 1.0 if family == "segem" else 0.0
    assert slope[[0, 1, 3, 4]].tolist() == [1.0, 0.0, zero, zero]


@families
@pytest.mark.parametrize(
    "x",
    [
        torch.tensor(0.7),
        torch.empty(0),
        torch.empty(3, 0, 2),
        torch.randn(6, 4).t(),
        torch.randn(10)[::3],
        torch.randn(3, 1).expand(3, 5),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    ],
    ids=["0-dim", "empty", "empty-3d", "transposed", "strided", "expanded", "channels_last", "channels_last_3d"],
)
def test_layouts(family, x):
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    function = FUNCTIONS[family]
    y = function(x, 2)
    assert y.shape == x.shape
    assert y.stride() == torch.relu(x).stride()
    assert torch.equal(y, function(x.contiguous(), 2))
    out = function(leaf, 2)
    out.backward(torch.ones_like(out))
    assert leaf.grad.shape == x.shape
    for memory_format in (torch.channels_last, torch.channels_last_3d):
        if x.dim() == 4 + (memory_format is torch.channels_last_3d):
            assert y.is_contiguous(memory_format=memory_format)
            assert leaf.grad.is_contiguous(memory_format=memory_format)


def test_the_input_is_left_alone():
    x = torch.randn(50)
    before = x.clone()
    for function in FUNCTIONS.values():
        function(x, 1)
    assert torch.equal(x, before)


@with_eps
@dtypes
@pytest.mark.parametrize("eps_dtype", [torch.float32, torch.float64], ids=str)
def test_tensor_eps_keeps_the_dtype_of_x(family, dtype, eps_dtype):
    x = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    eps = torch.tensor([0.5, 0.25, 2.0], dtype=eps_dtype, requires_grad=True)
    y = PAIRS[family](x, 2, eps)
    assert y.dtype == dtype
    columns = [plain(family, x.detach()[:, i], 2, value) for i, value in enumerate(eps.tolist())]
    assert torch.equal(y, torch.stack(columns, 1))
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert eps.grad.dtype == eps_dtype
    assert eps.grad.shape == eps.shape


# ---- derivatives


@with_eps
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True), (False, False)])
def test_only_what_requires_grad(family, wanted):
    x = both_sides(4, 3).requires_grad_(wanted[0])
    eps = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64, requires_grad=wanted[1])
    y = PAIRS[family](x, 1, eps)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.sum().backward()
    assert (x.grad is not None, eps.grad is not None) == wanted


@families
@orders
def test_slope_is_exact(family, n):
    eps = EPS[family]
    x = both_sides(40, dtype=torch.float32).requires_grad_()
    (slope,) = torch.autograd.grad(FUNCTIONS[family](x, n).sum(), x)
    exact_slope = oracle.segem_slope if family == "segem" else oracle.egem_slope
    for point, got in zip(x.tolist(), slope.tolist(), strict=True):
        point, true_eps = Fraction(point), Fraction(eps)
        s = oracle.gate(point, n, true_eps)
        scale = (1 - s) * (1 + 2 * n * s) if family == "segem" else s * (1 + 2 * n * (1 - s))
        # The bound of test_formulas, and the product with the incoming gradient.
        assert abs(Fraction(got) - exact_slope(point, n, true_eps)) <= (6 * n + 10) * scale / 2**24


# ---- what the backward pass keeps


def saved_by(function, *arguments):
    """Where the tensors are that autograd keeps for a call, and what the call returned."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function(*arguments)
    return [t.untyped_storage().data_ptr() for t in saved], y


@families
def test_only_the_input_is_saved(family):
    x = torch.randn(64, requires_grad=True)
    saved, _ = saved_by(FUNCTIONS[family], x, 3)
    assert saved == [x.data_ptr()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_memory_where_a_linear_follows(dtype):
    first, second = torch.nn.Linear(8, 16, dtype=dtype), torch.nn.Linear(16, 8, dtype=dtype)
    x = torch.randn(4, 8, dtype=dtype)

    def mlp(save):
        return second(gem(first(x), 2, save=save))

    with_input, _ = saved_by(mlp, "input")
    with_output, _ = saved_by(mlp, "output")
    # x, the weights, and the input of the second layer; the activation adds its own input, or nothing.
    assert len(set(with_input)) == len(set(with_output)) + 1


@pytest.mark.parametrize("eps", [0.3, 1e-4])
@orders
def test_gradients_from_the_output(n, eps):
    scale = eps ** (1 / (2 * n))  # finite differences at the scale of the gate

    def function(v):
        return egem(v * scale, n, eps, save="output") / scale

    x = both_sides(12).requires_grad_()
    assert gradcheck(function, x)
    assert gradgradcheck(function, x, check_rev_over_rev=True)


@orders
def test_losses_of_values_and_derivatives_from_the_output(n):
    x = both_sides(12).requires_grad_()
    eps = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    gradients = []
    for save in ("input", "output"):
        y = egem(x, n, eps, save=save)
        of_x, of_eps = torch.autograd.grad(y.sum(), (x, eps), create_graph=True)
        (second,) = torch.autograd.grad(of_x.square().sum(), x, create_graph=True)
        loss = (y + of_x + second).square().sum() + of_eps.square()
        gradients.append(torch.autograd.grad(loss, (x, eps)))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [1e-4, 1.0])
def test_slopes_from_the_output_are_those_from_the_input(n, dtype, eps):
    x = torch.cat([torch.randn(2000) * eps ** (0.5 / n), torch.tensor([0.0, -torch.inf, torch.inf, 1e4])]).to(dtype)
    slopes = []
    for save in ("input", "output"):
        leaf = x.clone().requires_grad_()
        egem(leaf, n, eps, save=save).sum().backward()
        slopes.append(leaf.grad.double())
    # Roundings of y count n times at most in the slope; test_formulas has the two formulas.
    unit = oracle.unit_roundoff(dtype)
    working = (12 * n * n + 30 * n) * 2.0**-24
    torch.testing.assert_close(
        *slopes, rtol=(n + 2) * unit + working, atol=2.0**-25 if dtype != torch.float16 else unit
    )


def derivatives(x, n, eps, save, num):
    z = x.clone().requires_grad_()
    found = [egem(z, n, eps, save=save)]
    for _ in range(num):
        found += torch.autograd.grad(found[-1].sum(), z, create_graph=True)
    return [d.detach() for d in found]


@pytest.mark.parametrize("eps", [1e-4, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_higher_derivatives_from_the_output(n, eps):
    """They are the derivatives from the input at the x that the output gives, so they are as accurate and as finite.

    An output of 0 gives an x below 0, where all derivatives are 0.
    """
    scale = eps ** (1 / (2 * n))
    positive = torch.logspace(-6, 3, 300) * scale
    x = torch.cat([-positive, positive, torch.zeros(1), torch.logspace(-30, -6, 100) * scale])
    y, *found = derivatives(x, n, eps, "output", 5)
    recovered = torch.where(y == 0, -1.0, inverse(TABLE["egem"], n, eps, y))
    for got, expected in zip(found, derivatives(recovered, n, eps, "input", 5)[1:], strict=True):
        assert torch.equal(got, expected)
        assert torch.isfinite(got).all()
    # Each derivative is a sum of terms no larger than a few times the largest, of some 50 roundings each.
    exact = derivatives(x.double(), n, eps, "input", 3)[1:]
    for got, expected in zip(found, exact, strict=False):
        assert (got - expected)[:600].abs().max() <= 50 * 2**-24 * expected.abs().max()


@pytest.mark.parametrize("eps", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_higher_derivatives_from_a_rounded_output_are_finite_if_they_fit(n, eps, dtype):
    x = torch.cat([torch.linspace(-2, 2, 500), torch.logspace(-15, 3, 500)]).to(dtype)
    exact = derivatives(x.double(), n, eps, "input", 4)
    for got, expected in zip(derivatives(x, n, eps, "output", 4), exact, strict=True):
        assert got[expected.abs() < torch.finfo(dtype).max / 2].isfinite().all()


def test_an_output_overwritten_in_place():
    x = torch.randn(20, requires_grad=True)
    y = torch.nn.functional.dropout(egem(x, save="output"), 0.5, inplace=True)
    with pytest.raises(RuntimeError, match=r'save="input".*inplace operation'):
        y.sum().backward()
    y = torch.nn.functional.dropout(egem(x, save="input"), 0.5, inplace=True)
    y.sum().backward()
    assert x.grad.any()


# ---- gated


@families
@pytest.mark.parametrize("n", [1, 3])
@dtypes
def test_glu(family, n, dtype):
    gate, up, grad = (torch.randn(3, 200, dtype=torch.float64)).to(dtype)
    pair = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    eps = EPS[family]
    y = gem_glu(*pair, family, n, eps)
    y.backward(grad)
    wide = [gate.double().requires_grad_(), up.double().requires_grad_()]
    exact = FUNCTIONS[family](wide[0], n) * wide[1]
    exact.backward(grad.double())
    working = oracle.unit_roundoff(torch.promote_types(dtype, torch.float32))
    own = oracle.unit_roundoff(dtype) if dtype not in (torch.float32, torch.float64) else 0.0
    floor = oracle.min_normal(dtype)
    # The bounds of test_formulas, a product or two, and one rounding to the dtype.
    bounds = {"rtol": (8 * n + 15) * working + own, "atol": floor}
    torch.testing.assert_close(y.double(), exact, **bounds)
    torch.testing.assert_close(pair[1].grad.double(), wide[1].grad, **bounds)
    # A slope may be a small difference of terms up to 1 + 2n.
    limit = (1 + 2 * n) * (up * grad).abs().double() * bounds["rtol"] + floor
    assert ((pair[0].grad.double() - wide[0].grad).abs() <= limit).all()
    assert y.dtype == pair[0].grad.dtype == pair[1].grad.dtype == dtype


def test_glu_defaults_and_forms():
    gate, up = torch.randn(2, 50)
    assert torch.equal(gem_glu(gate, up), egem(gate) * up)
    assert torch.equal(gem_glu(gate, up, "gem", 2), gem(gate, 2) * up)
    assert torch.equal(gem_glu(gate, up, "segem", eps=0.1), segem(gate, 1, 0.1) * up)


@families
def test_glu_saves_its_inputs_and_nothing_else(family):
    gate, up = torch.randn(2, 30, requires_grad=True).unbind()
    saved, _ = saved_by(gem_glu, gate, up, family)
    assert set(saved) == {gate.untyped_storage().data_ptr()}


def test_wrong_arguments_of_glu():
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"got up of type float\. up must be a tensor of float16, "):
        gem_glu(x, 1.0)
    for up, got in ((x[0], r"\(3,\)"), (x.double(), "torch.float64"), (x.to("meta"), "meta")):
        with pytest.raises(ValueError, match=f"got gate .* and up .*{got}.*the same shape, dtype and device"):
            gem_glu(x, up)
    with pytest.raises(ValueError, match="got family='silu'"):
        gem_glu(x, x, "silu")
    with pytest.raises(ValueError, match="eps"):
        gem_glu(x, x, "egem", 1, -1.0)


@needs_compiler
@families
def test_training_is_the_same_with_kernels(family):
    # Every path through autograd, with the kernels that a user has after a while.
    def steps(backend):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x = torch.randn(32, 8)
        with hf_gem.kernels(backend):
            for _ in range(3):
                hidden = model[0](x)
                y = model[1](FUNCTIONS[family](hidden, 2) + gem_glu(hidden, hidden, family, 2))
                optimizer.zero_grad()
                y.square().mean().backward()
                optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(steps("eager"), steps("compiled"))


# ---- compilers and exporters


def assert_compiled(compiled, family, n, eps, dtype):
    """Values and slopes of a compiled function against the formula in float64, within the bounds of test_formulas."""
    x = torch.cat([2 * both_sides(100), torch.tensor([torch.inf, -torch.inf, 0.0])]).to(dtype).requires_grad_()
    y = compiled(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    exact_x = x.detach().double().requires_grad_()
    exact = plain(family, exact_x, n, eps)
    (exact_slope,) = torch.autograd.grad(exact.sum(), exact_x)
    assert y.dtype == dtype
    working = oracle.unit_roundoff(torch.promote_types(dtype, torch.float32))
    own = oracle.unit_roundoff(dtype) if dtype != torch.float32 else 0.0
    floor = oracle.min_normal(dtype)
    # Slopes are measured on the scale of the largest one, (1 + 2n)^2 / 8n.
    steepest = max(1, (1 + 2 * n) ** 2 / (8 * n))
    torch.testing.assert_close(y.double(), exact, rtol=(4 * n + 7) * working + own, atol=floor)
    slope_bound = (2 * n * (12 * n + 11) + 2 * n + 3) * working + own
    torch.testing.assert_close(slope.double(), exact_slope, rtol=0, atol=slope_bound * steepest)
    assert slope[-3:].tolist() == [1.0, 0.0, 1.0 if family == "segem" else 0.0]


@families
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_traces_without_a_break(family, n, dtype):
    compiled = torch.compile(lambda x: FUNCTIONS[family](x, n), fullgraph=True, backend="aot_eager")
    assert_compiled(compiled, family, n, EPS[family], dtype)


@pytest.mark.slow
def test_inductor():
    compiled = torch.compile(lambda x: segem(x, 2, 0.3), fullgraph=True)
    assert_compiled(compiled, "segem", 2, 0.3, torch.float32)


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch._dynamo.reset()  # these tests compile one lambda for many functions, which counts as recompiling it


class _Model(torch.nn.Module):
    def __init__(self, family):
        super().__init__()
        self.family = family
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return FUNCTIONS[self.family](self.linear(x), 2)


@families
def test_export_round_trip(family, tmp_path):
    model = _Model(family)
    x = torch.randn(3, 4)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (3, 7):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow if f == "gem" else []) for f in FUNCTIONS])
def test_onnx(family, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    x = both_sides(64, dtype=torch.float32)

    class Activation(torch.nn.Module):
        def forward(self, x):
            return FUNCTIONS[family](x, 2)

    program = torch.onnx.export(Activation().eval(), (x,), dynamo=True)
    assert {node.domain for node in program.model.graph} <= {"", "ai.onnx"}
    assert not program.model.functions
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    exact = plain(family, x.double(), 2, EPS[family])
    # 15 roundings (test_formulas), and none saved by a subnormal.
    bound = 15 * oracle.unit_roundoff(torch.float32)
    torch.testing.assert_close(torch.from_numpy(y).double(), exact, rtol=bound, atol=oracle.min_normal(torch.float32))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@families
def test_jit_trace(family):
    traced = torch.jit.trace(lambda x: FUNCTIONS[family](x, 2), torch.randn(3))
    x = torch.randn(4, 5)
    assert torch.equal(traced(x), FUNCTIONS[family](x, 2))


@families
def test_fx_symbolic_trace(family):
    model = _Model(family)
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(traced(x), model(x))
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [{"gem": gem, "egem": egem, "segem": segem}[family]]


@pytest.mark.parametrize("function", [egem, segem])
def test_compile_with_a_symbolic_eps(function):
    x = torch.randn(64)
    compiled = torch.compile(lambda x, eps: function(x, 2, eps), fullgraph=True, backend="aot_eager")
    for eps in (1e-4, 0.5, 10.0):  # from the second one on, torch.compile takes floats for symbols
        assert torch.equal(compiled(x, eps), function(x, 2, eps))
    dynamic = torch.compile(lambda x, eps: function(x, 2, eps), fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(dynamic(x, 0.25), function(x, 2, 0.25))


def _quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated by torch
        return torch.quantize_per_tensor(torch.tensor([-1.0, 2.0]), 0.1, 0, torch.qint8)


def _nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype of torch
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)


@pytest.mark.parametrize(
    "make",
    [
        _quantised,
        lambda: _nested(torch.strided),
        lambda: _nested(torch.jagged),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_mkldnn(),
        lambda: torch.arange(3),
        lambda: torch.ones(2, dtype=torch.complex64),
    ],
    ids=["quantised", "nested", "jagged", "sparse", "mkldnn", "integers", "complex"],
)
def test_the_advice_for_a_tensor_that_is_not_taken_works(make):
    x = make()
    with pytest.raises(TypeError, match=r"x must be a .*\. Convert it with ") as raised:
        gem(x)
    converted = eval(str(raised.value).rpartition("Convert it with ")[2].rstrip("."), {"x": x, "torch": torch})
    assert gem(converted).shape == converted.shape
