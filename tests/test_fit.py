"""Fits against exhaustive search in numpy, histograms against the values they were made from."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_gem import GemSpec, egem, get_activation
from hf_gem.fit import Fit, Histogram, error, fit

SPREAD = 2**17


def normal(mean=0.0, std=1.0, num=SPREAD):
    """Values that lie as those of a normal distribution do, without its noise: quantiles."""
    z = torch.special.ndtri((torch.arange(num, dtype=torch.float64) + 0.5) / num)
    return (mean + std * z).float()


def histogram(*tensors):
    counted = Histogram()
    for x in tensors:
        counted.update(x)
    return counted


def exact(spec, x, target):
    """E[(g - f)^2] over x itself."""
    x = x.double()
    return float((get_activation(spec.name)(x) - target(x)).square().mean())


# --- Histogram ---


def test_bfloat16_values_are_kept():
    x = torch.tensor([0.0, -0.0, 1.0, 1.0, -2.5, 1e-40, -3e38, 2**-133], dtype=torch.bfloat16)
    values, counts = histogram(x).points()
    assert sorted(values.repeat_interleave(counts).tolist()) == sorted(x.double().tolist())
    assert values.dtype == torch.float64


def test_counts_do_not_depend_on_batches_shape_or_strides():
    x = torch.randn(64, 33, 7)
    whole = histogram(x)
    assert whole.num_values == x.numel()
    assert torch.equal(histogram(*x.split(5)).counts, whole.counts)
    assert torch.equal(histogram(x[:, ::2].transpose(0, 2), x[:, 1::2]).counts, whole.counts)
    assert torch.equal(histogram(x.flip(0), torch.empty(0, 3)).counts, whole.counts)


def test_more_than_a_chunk(monkeypatch):
    x = torch.randn(1000)
    whole = histogram(x)
    monkeypatch.setattr("hf_gem.fit._CHUNK", 77)
    assert torch.equal(histogram(x).counts, whole.counts)


def test_sum_is_the_histogram_of_all():
    parts = torch.randn(3, 500).unbind()
    pooled = sum(map(histogram, parts), Histogram())
    assert torch.equal(pooled.counts, histogram(*parts).counts)
    assert fit(pooled, F.gelu, "segem") == fit(histogram(torch.cat(parts)), F.gelu, "segem")
    with pytest.raises(TypeError):
        pooled + 1


def test_nonfinite_values_are_counted_apart():
    x = torch.tensor([1.0, math.nan, math.inf, -math.inf, 2.0, 1e39], dtype=torch.float64)
    counted = histogram(x)
    assert (counted.num_values, counted.num_nonfinite) == (2, 4)
    assert fit(counted, F.gelu, "egem") == fit(histogram(torch.tensor([1.0, 2.0])), F.gelu, "egem")


def test_inference_mode_and_gradients():
    x = torch.randn(10, requires_grad=True)
    counted = Histogram()
    with torch.inference_mode():
        counted.update(x * 1)
    counted.update(x * 1)
    assert counted.num_values == 20
    assert not counted.counts.requires_grad


@pytest.mark.parametrize("x", [torch.arange(3), [1.0], torch.zeros(2, dtype=torch.complex64)])
def test_only_floating_point_tensors_are_counted(x):
    with pytest.raises(TypeError, match=r"got x of .*x must be a floating-point tensor"):
        Histogram().update(x)


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (-1, 2), (0.5, 0.05), (0, 30)])
@pytest.mark.parametrize("name", ["egem_eps1em6", "segem_eps0.1", "segem_n2_eps0.01", "egem_n3_eps5"])
@pytest.mark.parametrize("target", [F.gelu, F.silu, torch.relu])
def test_error_over_spread_values(mean, std, name, target):
    # A value moves by d, uniform within 2^-8 of it: 2^-16 x^2 / 3 in the mean square. With h = (g - f)^2, that changes
    # E[h] by E[d^2 h''] / 2 <= 2.5e-6 E[x^2 h''], and x^2 h'' is at most some (4n + 2)^2 h: below 5e-4. The first-order
    # term has no mean, and is sqrt(E[(h' d)^2] / 2^17), about 1e-4.
    x = normal(mean, std)
    spec = get_activation(name).spec
    assert error(name, histogram(x), target) == pytest.approx(exact(spec, x, target), rel=1e-3)


@pytest.mark.parametrize("x", [0.3001, 1.0039, -0.7004])
def test_error_over_one_value(x):
    # Nothing averages out: x moves by up to 2^-8 of itself, and g - f by the sum of their largest slopes, 1.13 each.
    x, spec = torch.tensor([x]), GemSpec("segem", 1, 0.1)
    found = error(spec, histogram(x), F.gelu)
    assert abs(math.sqrt(found) - math.sqrt(exact(spec, x, F.gelu))) <= 2.26 * 2**-8 * abs(float(x))


# --- fit ---


@pytest.mark.parametrize(
    "name",
    ["egem_eps0.0123", "egem_n2_eps1.5em5", "egem_n3_eps4.56", "segem", "segem_n2_eps0.3", "segem_n3_eps7.77em4"],
)
def test_a_member_is_recovered(name):
    # The minimum is zero, there alone, and the search ends within 1e-6 of it, far inside the rounding to three digits.
    spec = get_activation(name).spec
    found = fit(histogram(normal()), get_activation(name), spec.family)
    assert found == Fit(spec, 0.0, 0.0, False)
    assert fit(histogram(normal()), get_activation(name), spec.family, n=spec.n) == found


@pytest.mark.parametrize("n", [1, 2, 3])
def test_gem_has_only_n_to_choose(n):
    found = fit(histogram(normal()), get_activation(f"gem_n{n}"), "gem")
    assert found == Fit(GemSpec("gem", n), 0.0, 0.0, False)


@pytest.mark.parametrize("family", ["egem", "segem"])
@pytest.mark.parametrize("target", [F.gelu, F.mish])
def test_exhaustive_search(family, target):
    x = normal(num=1000).to(torch.bfloat16).double().numpy()
    wanted = target(torch.from_numpy(x)).numpy()
    best = math.inf, 0, 0.0
    for n, exponent in itertools.product((1, 2, 3), range(-8, -1)):
        eps = np.array([[float(f"{m}e{exponent}")] for m in range(100, 1000)])  # all of three digits
        t = x ** (2 * n)
        g = np.where(x > 0, x * t / (t + eps), 0) if family == "egem" else np.where(x < 0, x * eps / (t + eps), x)
        errors = np.mean((g - wanted) ** 2, axis=1)
        best = min(best, (errors.min(), n, eps[errors.argmin(), 0]))
    found = fit(histogram(torch.from_numpy(x)), target, family)
    assert found.spec.n == best[1]
    # The minimum rounds to within half a unit of the third digit, and the best such number is next to it on one side.
    unit = 10.0 ** (math.floor(math.log10(best[2])) - 2)
    assert abs(found.spec.eps - best[2]) < 1.01 * unit
    # The same sum over the same bfloat16 values, in another order and from other roundings of g.
    if found.spec.eps == best[2]:
        assert found.error == pytest.approx(best[0], rel=1e-12)
    assert found.relative_error == pytest.approx(found.error / np.mean(wanted**2), rel=1e-12)
    assert not found.at_edge


@pytest.mark.parametrize("family", ["egem", "segem"])
def test_relu_is_the_lower_end(family):
    found = fit(histogram(normal()), torch.relu, family, eps_range=(1e-5, 1.0))
    assert found.spec == GemSpec(family, 1, 1e-5)  # ReLU's distance is eps^(1/2n), least for n = 1
    assert found.at_edge
    # (eps / 4) of ReLU at most, and only near x = sqrt(eps)
    assert 0 < found.error < 1e-5 / 4


@pytest.mark.parametrize("num", [200_000, 100_000])
def test_the_lower_of_two_minima(num):
    # f = x / 2, as g = x / 2 at eps = x^2: each of two values wants its own eps, and where one has it the error of the
    # other is x^2 / 4. They weigh the same for num = (3 / 2^-7)^2 = 147,456.
    x = torch.cat([torch.full((num,), 2.0**-7), torch.tensor([3.0])])
    counted = histogram(x)
    found = fit(counted, lambda x: x / 2, "egem", n=1)
    # The far value pulls log eps by its slope, 7e-6, over the curvature, 1/8: below half a unit of the third digit.
    assert found.spec.eps == (6.10e-5 if num == 200_000 else 9.0)
    costs = [error(GemSpec("egem", 1, eps), counted, lambda x: x / 2) for eps in (6.1e-5, 0.02, 9.0)]
    assert costs[1] > max(costs[0], costs[2])


@pytest.mark.parametrize("target", [F.gelu, F.silu])
def test_segem_replaces_gelu_and_silu_on_x_as_egem_does_on_minus_x(target):
    x = normal(-1, 2)
    one, other = fit(histogram(x), target, "segem"), fit(histogram(-x), target, "egem")
    assert (one.spec.n, one.spec.eps) == (other.spec.n, other.spec.eps)
    # g - f is the same number, from values below 2^4 rounded at 2^-53 each, squared and summed over all bins
    assert one.error == pytest.approx(other.error, rel=1e-10)
    assert fit(histogram(x), target, "egem").error > one.error


def test_the_target_may_work_in_place():
    counted = histogram(normal(num=100))
    assert fit(counted, torch.nn.ReLU(inplace=True), "segem") == fit(counted, torch.relu, "segem")


def test_the_target_may_return_another_dtype():
    counted = histogram(normal(num=100))
    assert fit(counted, lambda x: x > 0, "egem") == fit(counted, lambda x: (x > 0).double(), "egem")


def test_where_eps_makes_no_difference():
    negative = histogram(-normal().abs())
    assert fit(negative, torch.relu, "egem") == Fit(GemSpec("egem"), 0.0, 0.0, False)
    assert fit(negative, F.gelu, "egem").spec == GemSpec("egem")
    assert fit(negative, F.gelu, "egem").relative_error == 1.0
    assert fit(negative, torch.relu, "egem", eps_range=(0.01, 1.0)).spec == GemSpec("egem", 1, 0.01)
    assert fit(histogram(torch.zeros(5)), F.gelu, "segem") == Fit(GemSpec("segem"), 0.0, 0.0, False)
    assert fit(histogram(torch.full((3,), 1e30)), torch.relu, "segem").spec == GemSpec("segem")


def test_a_zero_target_that_is_not_met():
    found = fit(histogram(-normal().abs()), torch.relu, "segem")
    assert found.relative_error == math.inf
    assert found.at_edge


@pytest.mark.parametrize("x", [1.0, 2.0, 0.5])
def test_one_value_is_met_by_every_n_and_the_smallest_is_taken(x):
    # x t / (t + eps) = gelu(x) has one solution for each n
    found = fit(histogram(torch.full((7,), x)), F.gelu, "egem")
    y = float(F.gelu(torch.tensor(x, dtype=torch.float64)))
    assert found.spec == GemSpec("egem", 1, float(f"{x * x * (x / y - 1):.3g}"))
    assert fit(histogram(torch.full((7,), x)), F.gelu, "egem", ns=(8, 2, 1)) == found


def test_huge_and_tiny_values():
    x = torch.cat([normal(num=1000), torch.tensor([3e38, -3e38, 1e-38, -1e-38])])
    found = fit(histogram(x.to(torch.bfloat16)), F.silu, "segem")
    assert math.isfinite(found.error)
    assert found.relative_error >= 0


def test_the_range_of_all_eps():
    found = fit(histogram(normal()), F.gelu, "segem", n=32, eps_range=(1e-300, 1e300))
    assert found.error <= fit(histogram(normal()), F.gelu, "segem", n=32, eps_range=(1e-4, 1.0)).error


def test_a_range_of_one_eps():
    found = fit(histogram(normal()), F.gelu, "segem", eps_range=(0.02345, 0.02345))
    assert found.spec.eps == 0.02345  # not rounded out of the range
    assert found.at_edge


def test_error_of_any_member():
    counted = histogram(normal())
    found = fit(counted, F.gelu, "segem")
    assert error(found.spec, counted, F.gelu) == found.error
    assert error(found.spec.name, counted, F.gelu, relative=True) == found.relative_error
    assert error(found.spec.name + "_learnable", counted, F.gelu) == found.error
    assert error("gem", counted, lambda x: egem(x, 1, 1.0)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "relu"}, "family must be one of gem, egem, segem"),
        ({"n": 0}, "got n=0. n must be an integer from 1 to 32"),
        ({"ns": ()}, "ns must contain at least one integer"),
        ({"eps_range": (0.0, 1.0)}, "eps must be positive"),
        ({"eps_range": (1.0, 0.1)}, r"got eps_range=\(1\.0, 0\.1\)\. It must be \(smallest, largest\)"),
        ({"eps_range": (1e-70, 0.1)}, "eps must be between .* for n=1"),
        ({"target": lambda x: x.sum()}, r"target returned shape \(\) .* It must be elementwise"),
        ({"target": lambda x: 1.0}, r"target returned float .* It must be elementwise"),
        ({"target": torch.log}, r"target is not finite at x = -.* It must be finite on all values counted"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(histogram(normal(num=100)), **{"target": F.gelu, "family": "egem", **arguments})


def test_nothing_finite():
    with pytest.raises(ValueError, match="contains no finite values, and 2 that are NaN or infinite"):
        fit(histogram(torch.tensor([math.nan, math.inf])), F.gelu, "egem")
    with pytest.raises(ValueError, match="contains no finite values, and 0"):
        error("egem", Histogram(), F.gelu)


@pytest.mark.gpu
def test_counting_on_a_gpu():
    x = torch.randn(3, 1000)
    counted = histogram(x[0])
    with torch.inference_mode():
        counted.update(x[1, :500].cuda())
    counted.update(x[1, 500:].cuda())
    assert counted.counts.is_cuda
    assert torch.equal((counted + histogram(x[2])).counts.cpu(), histogram(x).counts)
