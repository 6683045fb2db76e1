"""What holds for every input, on inputs that hypothesis looks for."""

import math
import time

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import hf_gem
from hf_gem import GemSpec, activation, parse
from hf_gem.family.names import MAX_N, check_eps, is_claimed, is_name
from hf_gem.family.table import FAMILIES, family_named
from tests import oracle

# The same examples at every run, however fast the machine is.
settings.register_profile("tests", derandomize=True, deadline=None, database=None, max_examples=200)
settings.load_profile("tests")

WORDS = ["gem", "egem", "segem", "dgem", "_n", "_eps", "_learnable", *("em", "e-", "e", ".", "-", " ", "0", "1", "32")]
names = st.one_of(st.text(max_size=40), st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=2))).map("".join))


@st.composite
def specs(draw):
    family = family_named(draw(st.sampled_from(sorted(FAMILIES))))
    n = draw(st.integers(1, MAX_N))
    if family.fixed_eps is not None:
        return GemSpec(family.name, n)
    learnable = draw(st.booleans())
    limit = min(200 * n * math.log10(2), 307)
    limit = min(limit, 37) if learnable else limit
    return GemSpec(family.name, n, 10 ** draw(st.floats(-limit, limit)), learnable)


def short_error(function, *args):
    """What a function returns, or None for a TypeError or ValueError that is fit to be read."""
    try:
        return function(*args)
    except (TypeError, ValueError) as error:
        message = str(error)
    assert 20 < len(message) < 900
    return None


@given(specs())
def test_a_spec_prints_as_a_name_that_reads_back(spec):
    for spelling in (spec.name, spec.name.upper()):
        assert parse(spelling) == spec
        assert is_name(spelling)
        assert is_claimed(spelling)


@settings(max_examples=500)
@given(names)
@example("gem_eps1")  # its eps is not in the grammar, whatever its value
@example("gem_n" + "9" * 100_000)
@example("egem_eps" + "9" * 100_000)
@example("segem_n2_eps0." + "1" * 100_000 + "x")
@example("egem" + "_e" * 50_000)
@example("egem_eps" + " " * 100_000)
def test_any_text_is_a_name_or_a_short_error(text):
    spec = short_error(parse, text)
    assert is_name(text) == (spec is not None)
    if spec is None:
        return
    assert is_claimed(text)
    assert parse(spec.name) == spec
    assert "eps" not in text.lower() or spec.definition.fixed_eps is None


def test_the_time_that_an_error_takes_grows_with_the_name():
    """Not with its square: twice the length takes far less than four times as long, by the least of some tries."""

    def least(text):
        times = []
        for _ in range(3):
            began = time.process_time()
            with pytest.raises(ValueError, match="activation name"):
                parse(text)
            times.append(time.process_time() - began)
        return min(times)

    for pattern in ("9", "_e", "e ", "egem_", ".1em"):
        short, long = (least("egem_eps" + pattern * count + "!") for count in (5_000, 50_000))
        assert long < 30 * short + 0.05


@given(st.integers() | st.floats() | st.text(max_size=5), st.floats() | st.integers() | st.none() | st.text(max_size=5))
@example(10**5000, 1.0)
@example(1, 10**5000)
@example(True, 1.0)
def test_any_parameters_are_a_spec_or_a_short_error(n, eps):
    for family in sorted(FAMILIES):
        spec = short_error(GemSpec, family, n, eps)
        if spec is not None:
            assert 1 <= spec.n <= MAX_N
            assert check_eps(spec.eps, spec.n) == spec.eps


# ---- the functions

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1),
    "every second": lambda x: x[..., ::2],
    "expanded": lambda x: x.unsqueeze(0).expand(2, *x.shape),
    "from an offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "flipped": lambda x: x.flip(0),
}


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31)))) * draw(
        st.sampled_from([1e-3, 1.0, 1e3])
    )
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](values.to(dtype))


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(tensors(), st.sampled_from(["gem", "egem", "segem", "dgem"]), st.sampled_from([1, 2]), st.floats(1e-6, 10.0))
def test_an_element_does_not_depend_on_what_is_around_it(x, family, n, eps):
    """Values and gradients are those of each element by itself, in the layout of torch, by formulas and by kernels."""
    eps = None if family == "gem" else eps
    before = x.clone()
    alone = torch.stack([activation(v.view(1), family, n, eps) for v in x.flatten()]) if x.numel() else x.flatten()
    for backend in ("eager", "compiled"):
        if backend == "compiled" and (family, n) == ("dgem", 1):
            continue  # no other test has it built
        leaf = x.detach().requires_grad_()
        with hf_gem.kernels(backend):
            y = activation(leaf, family, n, eps)
            (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        assert torch.equal(y.flatten(), alone.flatten())
        assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, torch.relu(x).stride())
        assert (grad.dtype, grad.shape) == (x.dtype, x.shape)
    assert torch.equal(x, before)


@given(st.floats(width=32, allow_nan=False), st.integers(1, 4), st.floats(-8, 2))
def test_values_lie_where_the_function_does(x, n, log_eps):
    """Between zero and x, by rounding perhaps a little farther from zero, and within the bound of the exact value."""
    eps = 10**log_eps
    point = torch.tensor([x])
    y, z = (activation(point, family, n, eps).item() for family in ("egem", "segem"))
    beyond = (4 * n + 7) * oracle.unit_roundoff(torch.float32) * abs(x) + oracle.min_normal(torch.float32)
    assert 0 <= y <= max(x, 0) + beyond
    assert min(x, 0) - beyond <= z <= max(x, 0)
    assume(math.isfinite(x))
    exact = oracle.egem(oracle.Fraction(x), n, oracle.Fraction(eps))
    allowed = (2 * n + 4) * oracle.unit_roundoff(torch.float32) * max(exact, oracle.min_normal(torch.float32))
    assert abs(oracle.Fraction(y) - exact) <= allowed
