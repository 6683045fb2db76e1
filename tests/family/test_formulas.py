"""The formulas against exact rational arithmetic, over the whole range of every dtype.

Bounds count roundings, to first order, u being the unit roundoff. E is the relative error of the scaled eps (0 in
float64 and for a tensor, at most 1 u for a Python number cast to float32); x times a power of two is exact.

    t = v^2n                        (2n - 1)
    s = t / (t + e)                 2n (1 - s) + 2          t errs by (1 - s)(2n - 1), e by (1 - s), sum and quotient
    c = e * (1 / (t + e))           2n s + 3                past the bound t is exact: 4, and 1/4 for s taken as 1
    q = bound * (1 / v)             1
    egem    x s                     (2n + 2) + 1
    segem   (x q) c q^(2n-1)        (1 + 1) + 4 + 1 + (4n - 3) + 1 + 1/4
    slopes                          c q^2n errs by 4n + 4 at most, s by 2n (1 - s) + 2, then one for each operation

Every rounding may instead lose half a subnormal, which is u times the smallest normal number.
"""

import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from hf_gem.family import formulas
from hf_gem.family.arithmetic import scale, scale_tensor
from hf_gem.family.egem import EGEM
from hf_gem.family.egem import value as egem_value
from hf_gem.family.segem import SEGEM
from hf_gem.family.segem import value as segem_value
from tests import oracle

ORDERS = [1, 2, 3, 4]
EPSILONS = [1e-30, 1e-6, 1e-4, 0.01, 1.0, 10.0, 1e30]
WORKING_DTYPES = [torch.float32, torch.float64]
OURS = {"egem": EGEM, "segem": SEGEM}
EXACT = {"egem": oracle.egem, "segem": oracle.segem}
EXACT_SLOPES = {"egem": oracle.egem_slope, "segem": oracle.segem_slope}
EXACT_EPS_SLOPES = {"egem": oracle.egem_eps_slope, "segem": oracle.segem_eps_slope}
VALUE_BOUNDS = {"egem": lambda n: 2 * n + 3, "segem": lambda n: 4 * n + 7}


def egem_slope_bound(n):
    return max(4 * n + 4, 8 * n - 1)


def slope_at_bound(n):
    """Of `egem_slope_at` and `egem_inverse`, see the test of these."""
    return (2 * n - 1) * (4 * n + 8) + 2 * n + 4


everywhere = pytest.mark.parametrize("eps", EPSILONS)
orders = pytest.mark.parametrize("n", ORDERS)
families = pytest.mark.parametrize("family", list(OURS))
working_dtypes = pytest.mark.parametrize("dtype", WORKING_DTYPES)


def samples(dtype: torch.dtype, n: int, eps: float, sign: int) -> torch.Tensor:
    """Log-spaced from the smallest subnormal to the largest number, powers of two, and densely around the gate."""
    digits, min_exponent = oracle.FORMATS[dtype]
    low, high = min_exponent - digits + 1, 1 - min_exponent
    gate = np.log2(eps) / (2 * n)
    step = 4 if dtype == torch.float32 else 32
    exponents = np.concatenate(
        [
            np.linspace(low, high + 0.999, 60),
            np.arange(low, high + 1, step),
            gate + np.linspace(-7, 7, 60),
            np.floor(gate) + np.arange(-4, 25),  # where formulas change branch, at powers of two times the gate
        ]
    )
    largest = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    values = torch.from_numpy(np.exp2(exponents[(exponents >= low) & (exponents < high + 1)])).to(dtype)
    return sign * torch.cat([values, largest])


def assert_within(got, x, exact, scale, bound, dtype, absolute=0.0):
    """|got - exact| <= bound u max(scale, smallest normal), bar the second order; `absolute` adds to the floor."""
    unit = Fraction(oracle.unit_roundoff(dtype))
    factor = bound * unit / (1 - bound * unit)
    floor = Fraction(oracle.min_normal(dtype)) + Fraction(absolute)
    assert got.dtype == dtype
    for point, value in zip(x.tolist(), got.tolist(), strict=True):
        truth = exact(Fraction(point))
        allowed = factor * max(abs(scale(Fraction(point))), floor)
        assert abs(Fraction(value) - truth) <= allowed, (
            f"at x = {point!r}: got {value!r}, exact {float(truth)!r}, "
            f"{oracle.error_in_ulps(value, truth, dtype):.3g} ulp, allowed {float(allowed)!r}"
        )


@families
@orders
@everywhere
@working_dtypes
@pytest.mark.parametrize("sign", [1, -1])
def test_values(family, n, eps, dtype, sign):
    x = samples(dtype, n, eps, sign)
    eps_tensor = torch.tensor(eps, dtype=dtype)
    for given, true_eps in ((eps, eps), (eps_tensor, eps_tensor.item())):
        got = formulas.forward(OURS[family], n, given, x)

        def exact(v, true_eps=true_eps):
            return EXACT[family](v, n, Fraction(true_eps))

        assert_within(got, x, exact, exact, VALUE_BOUNDS[family](n), dtype)


@families
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("n", "eps"), [(1, 1e59), (2, 1e45), (2, 1e120), (5, 1e300), (8, 1e-200), (32, 1e-30), (32, 1.0), (32, 1e300)]
)
def test_values_for_extreme_n_and_eps(family, n, eps, sign):
    # What underflows is multiplied by up to 2^n, and by the scale of the gate.
    underflow = 2.0 ** (n - 126) * max(1.0, eps ** (1 / (2 * n)))
    x = samples(torch.float32, n, eps, sign)
    got = formulas.forward(OURS[family], n, eps, x)
    exact = partial(EXACT[family], n=n, eps=Fraction(eps))
    assert_within(got, x, exact, exact, VALUE_BOUNDS[family](n), torch.float32, underflow)


@families
@orders
@everywhere
@working_dtypes
def test_slopes(family, n, eps, dtype):
    # egem: s ((1 + 2n) - 2n s) changes by |1 - 2n + 4n c| / (1 + 2n c) of a change of s, c = 1 - s; with the error of s
    # that is 2n + 2 at s = 0, at most 3 (2n - 1) towards s = 1. The products and the difference add 2n + 2.
    # segem: c (1 - 2n s), (4n + 4) + (2n + 2) + 3 on the scale of c (1 + 2n s), since the difference vanishes at the
    # bottom of the dip. The second factor, at most 1 + 2n, multiplies a subnormal lost in the first.
    x = samples(dtype, n, eps, -1 if family == "segem" else 1)
    true_eps = Fraction(eps)

    def exact(v):
        return EXACT_SLOPES[family](v, n, true_eps)

    def scale(v):
        s = oracle.gate(v, n, true_eps)
        return (1 - s) * (1 + 2 * n * s) if family == "segem" else exact(v)

    bound = 6 * n + 9 if family == "segem" else egem_slope_bound(n)
    assert_within(
        formulas.slope(OURS[family], n, eps, x), x, exact, scale, bound, dtype, 2 * n * oracle.min_normal(dtype)
    )


@orders
@everywhere
@working_dtypes
def test_slope_from_the_output(n, eps, dtype):
    # v solves the equation to 4n + 8: the two sides of f err by 2n + 1 each, on the scale of v f'; e, the last product
    # and sum, w / v, and what the iteration leaves, 3e-9. A slope changes by at most 2n - 1 times as much, and its own
    # operations add 2n + 4. y is the exact value rounded, which is one more in v, and n more in the slope. What lies
    # below 2^-40 of the gate's scale counts as 0.15 (1 + 2n) s too small.
    x = samples(dtype, n, eps, 1)
    true_eps = Fraction(eps)
    y = torch.tensor(
        [oracle.round_exact(EXACT["egem"](Fraction(v), n, true_eps), dtype) for v in x.tolist()], dtype=dtype
    )

    def exact(v):
        return EXACT_SLOPES["egem"](v, n, true_eps)

    tiny = 2.0**-200 if dtype == torch.float64 else 2.0**-40
    floor = 0.15 * (1 + 2 * n) * tiny / (2.0**-n * tiny) ** (1 / (2 * n + 1))
    bound = slope_at_bound(n) + n
    floor = floor / (bound * oracle.unit_roundoff(dtype))
    assert_within(formulas.slope_at(EGEM, n, eps, y), x, exact, exact, bound, dtype, floor)
    eps_tensor = torch.tensor(eps, dtype=dtype)
    assert_within(formulas.slope_at(EGEM, n, eps_tensor, y), x, exact, exact, bound + 1, dtype, floor)
    # Where y is normal it tells x. Far below the gate's scale x is a power of y, and a rounding of the exponent counts
    # as often as |log y|.
    x, y = x[y >= oracle.min_normal(dtype)], y[y >= oracle.min_normal(dtype)]
    bound = 4 * n + 9 + abs(math.log(oracle.min_normal(dtype)))
    assert_within(formulas.inverse(EGEM, n, eps, y), x, Fraction, Fraction, bound, dtype)


@orders
@pytest.mark.parametrize("eps", [1e-6, 1e-4, 0.01, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slope_from_every_half_precision_output(n, eps, dtype):
    if not EGEM.invertible(n, eps, dtype):
        assert (n, eps, dtype) == (1, 1e-6, torch.float16)
        return
    y = torch.arange(1, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    y = y[torch.isfinite(y)]
    exact = formulas.slope(EGEM, n, eps, formulas.inverse(EGEM, n, eps, y.double()))
    # Fewer steps than in float32 leave less than a quarter of a rounding.
    bound = oracle.unit_roundoff(dtype) / 4 + slope_at_bound(n) * 2.0**-24
    torch.testing.assert_close(formulas.slope_at(EGEM, n, eps, y).double(), exact, rtol=bound, atol=2.0**-27)


@orders
@pytest.mark.parametrize("dtype", list(oracle.FORMATS))
@pytest.mark.parametrize("tensor_eps", [False, True])
def test_inverse_of_special_values(n, dtype, tensor_eps):
    inf, nan = torch.inf, torch.nan
    y = torch.tensor([inf, nan, 0.0, -0.0, -1.0, torch.finfo(dtype).max], dtype=dtype)
    eps = torch.tensor(1.0) if tensor_eps else 1.0
    largest = y[-1:].double().tolist()
    for got, expected in (
        (formulas.slope_at(EGEM, n, eps, y), [1.0, nan, 0.0, 0.0, 0.0, 1.0]),
        (formulas.inverse(EGEM, n, eps, y), [inf, nan, 0.0, 0.0, 0.0, *largest]),
    ):
        exact = torch.tensor(expected, dtype=torch.float64)
        # From a half type the slope is wanted to a rounding of that, though it comes in float32.
        torch.testing.assert_close(got.double(), exact, rtol=oracle.unit_roundoff(dtype), atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("eps", [1e-6, 7e-5, 1e-4, 1.0])
def test_where_outputs_underflow(n, eps):
    # The slope at the input against the slope from the rounded output, over all inputs of float16.
    x = torch.arange(1, 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x[torch.isfinite(x)].double()
    y = formulas.forward(EGEM, n, eps, x).to(torch.float16)
    lost = (formulas.slope_at(EGEM, n, eps, y).double() - formulas.slope(EGEM, n, eps, x)).abs().max().item()
    steepest = (1 + 2 * n) ** 2 / (8 * n)
    # A rounding of y, n times at most in the slope, and half a step more of the iteration; or more where y underflows.
    assert (lost <= (n + 1) * 2.0**-11 * steepest) == EGEM.invertible(n, eps, torch.float16)


@families
@orders
@everywhere
@working_dtypes
def test_slope_in_eps(family, n, eps, dtype):
    # x c s / eps: (4n + 4) + 2 + 3, or in range (2n s + 3) + (2n (1 - s) + 2) + 3. Half a subnormal lost before the
    # division by eps is divided too.
    x = samples(dtype, n, eps, -1 if family == "segem" else 1)
    eps_tensor = torch.tensor(eps, dtype=dtype)
    true_eps = Fraction(eps_tensor.item())

    def exact(v):
        return EXACT_EPS_SLOPES[family](v, n, true_eps)

    absolute = oracle.min_normal(dtype) / eps
    assert_within(formulas.eps_slope(OURS[family], n, eps_tensor, x), x, exact, exact, 4 * n + 9, dtype, absolute)


@families
@orders
@pytest.mark.parametrize("eps", [1e-4, 1.0, 10.0])
@working_dtypes
@pytest.mark.parametrize("tensor_eps", [False, True])
def test_autograd_of_the_plain_formula(family, n, eps, dtype, tensor_eps):
    # What compilers and exporters differentiate. There the quotient rule forms 1 - s as a difference of two terms,
    # each with at most 4n + 5 roundings, and repeated squaring adds at most 4n: 2n (2 (4n + 5) + 1 + 4n) + (2n + 3)
    # on the scale of s for egem. segem has no such difference: 4n + 7 in the value, at most 4n for each power and 2 a
    # factor, on the scale of c (1 + 2n s). A subnormal lost in the derivative by v = x r is multiplied by r, which is
    # at most sqrt(2) eps^(-1/2n).
    x = samples(dtype, n, eps, -1 if family == "segem" else 1).requires_grad_()
    eps_tensor = torch.tensor(eps, dtype=dtype)
    true_eps = Fraction(eps_tensor.item()) if tensor_eps else Fraction(eps)
    y = formulas.forward(OURS[family], n, eps_tensor if tensor_eps else eps, x)
    (slope,) = torch.autograd.grad(y.sum(), x)

    def exact(v):
        return EXACT_SLOPES[family](v, n, true_eps)

    def scale(v):
        s = oracle.gate(v, n, true_eps)
        return (1 - s) * (1 + 2 * n * s) if family == "segem" else s

    bound = 12 * n + 16 if family == "segem" else 2 * n * (12 * n + 11) + 2 * n + 3
    absolute = oracle.min_normal(dtype) * 2**0.5 * eps ** (-1 / (2 * n))
    assert_within(slope, x, exact, scale, bound, dtype, absolute)


@families
@orders
@pytest.mark.parametrize("eps", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number(family, n, eps, dtype):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[torch.isfinite(x)]
    got = formulas.forward(OURS[family], n, eps, x)
    assert got.dtype == dtype
    got = got.double().numpy()
    # test_values shows float64 to be right to a few 2^-53, which for this purpose is exact.
    exact = formulas.forward(OURS[family], n, eps, x.double()).numpy()
    # Rounding is monotonic: a float32 value inside exact ± error is rounded to between where the two ends round.
    unit = oracle.unit_roundoff(torch.float32)
    error = VALUE_BOUNDS[family](n) * unit * np.maximum(np.abs(exact), oracle.min_normal(torch.float32))
    low, high = oracle.round_array(exact - error, dtype), oracle.round_array(exact + error, dtype)
    assert ((low <= got) & (got <= high)).all()
    # So all are rounded correctly bar those for which the ends differ, with a midpoint between them: few.
    assert (low != high).mean() < 0.01


@families
@orders
@pytest.mark.parametrize("eps", [1e-30, 1e-4, 1.0, 1e30])
@pytest.mark.parametrize("dtype", list(oracle.FORMATS))
@pytest.mark.parametrize("tensor_eps", [False, True])
def test_special_values(family, n, eps, dtype, tensor_eps):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0], dtype=dtype, requires_grad=True)
    eps_argument = torch.tensor(eps) if tensor_eps else eps
    y = formulas.forward(OURS[family], n, eps_argument, x)
    expected = torch.tensor([inf, 0.0, nan, 0.0, 0.0], dtype=dtype)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    if family == "segem":
        assert torch.signbit(y[[1, 4]]).all()
    slopes = torch.tensor([1.0, 0.0, 0.0, 0.0] if family == "egem" else [1.0, 0.0, 1.0, 1.0])
    (plain,) = torch.autograd.grad(y.sum(), x)
    for got in (plain, formulas.slope(OURS[family], n, eps_argument, x.detach())):
        assert torch.equal(got[[0, 1, 3, 4]].float(), slopes)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("formula", [egem_value, segem_value], ids=["egem", "segem"])
@orders
@pytest.mark.parametrize("dtype", WORKING_DTYPES)
def test_torchscript(formula, n, dtype):
    x = torch.cat([torch.randn(100) * 10.0 ** torch.randint(-9, 9, (100,)), torch.tensor([torch.inf, -torch.inf, 0])])
    x = x.to(dtype)
    scripted = torch.jit.script(formula)
    for r, e in (scale(0.01, n), scale(1e-6, n), scale_tensor(torch.tensor(0.01, dtype=dtype), n)):
        r_tensor, e_tensor = (torch.as_tensor(number, dtype=dtype) for number in (r, e))
        for _ in range(3):  # the profiling executor optimises after the first calls
            assert torch.equal(scripted(x, n, r_tensor, e_tensor), formula(x, n, r, e))
