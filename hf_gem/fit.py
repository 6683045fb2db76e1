"""Choosing n and eps: the member of a family that changes a layer's output least in place of another activation.

`Histogram` counts the values that reach the activation; `fit` minimises `E[(g(x) - f(x))^2]` over them, f being the
activation replaced and g the member. Only this one layer's output is looked at, every value with the same weight.

`match_eps` needs no other activation: it puts the half point of the gate where the values are.

GELU and SiLU satisfy f(x) = x + f(-x), and segem(x) = x + egem(-x). So SE-GEM replaces them on x as well as E-GEM does
on -x: on inputs symmetric about 0 the two are equally close, and where inputs are mostly negative SE-GEM is closer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .family.formulas import forward
from .family.names import GemSpec, check_eps, check_n, parse
from .family.table import DEFAULT_EPS, family_named

# In log eps. A value x enters the error as x^2 (gate - c)^2, and its gate is a logistic function of log eps with the
# poles pi away whatever x and n are: a ripple with a period of two steps has less than 1e-8 of the error's size.
_GRID_STEP = 0.5
_TOLERANCE = 1e-6  # in log eps
EPS_RANGE = (1e-6, 10.0)  # of what is chosen, unless asked otherwise
# Half point of the gate over the root mean square of its inputs, where nothing else is asked for. A study may move it.
MATCH_C = 1.0
_TIE = 1e-12  # of E[f^2]: a root mean square of 1e-6, which float32 outputs hardly show
_CHUNK = 2**20  # elements binned at a time: bounds the memory, and is faster on a CPU than all at once


class Histogram:
    """Counts how often each bfloat16 occurs among the values it is given, each rounded to the nearest.

    Exact for bfloat16 values; of others, 128 bins per octave of either sign, so that a value moves by at most 2^-8 of
    itself. Such moves average out: of `E[(g - f)^2]` over 10^5 values or more they change less than 1e-3, and where a
    few values carry all of the error about 1/20 of what drawing other values would change.

    Memory and the cost of fitting do not grow with what is counted: 65,536 integers. As these are integers, they do
    not depend on the order of the values or on how they are cut into batches.

    Attributes:
        counts: int64 of shape (65536,), indexed by the bit pattern read as int16, plus 32768; on the device of the
            values counted last. All-reduce it to pool processes.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2**16, dtype=torch.int64, device="cpu")

    def update(self, x: Tensor) -> None:
        """Counts the elements of x, a floating-point tensor of any shape, on its own device.

        NaN and infinity are counted apart, as `num_nonfinite`, with what rounds to infinity: beyond 3.39e38.

        Raises:
            TypeError: x is not a floating-point tensor.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {got}; count what enters the activation")
        counts = self.counts.to(x.device)
        for part in x.detach().to(torch.bfloat16).reshape(-1).split(_CHUNK):
            # Not in place: counts made in inference mode could not be written to outside it.
            counts = counts + torch.bincount(part.view(torch.int16).to(torch.int32).add_(2**15), minlength=2**16)
        self.counts = counts

    def __add__(self, other: Histogram) -> Histogram:
        """The histogram of the values of both; `sum(histograms, Histogram())` pools many."""
        if not isinstance(other, Histogram):
            return NotImplemented
        pooled = Histogram()
        pooled.counts = self.counts + other.counts.to(self.counts.device)
        return pooled

    @property
    def num_values(self) -> int:
        """How many finite values were counted."""
        return int(self.points()[1].sum())

    @property
    def num_nonfinite(self) -> int:
        """How many NaN and infinities were met."""
        return int(self.counts.sum()) - self.num_values

    @property
    def rms(self) -> float:
        """Root mean square of what was counted; NaN where that is nothing, or has a NaN or an infinity in it."""
        values, counts = self.points()
        shares = counts.to(torch.float64) / counts.sum()
        return math.nan if self.num_nonfinite or not len(values) else math.sqrt(_mean_square(values, shares))

    def points(self) -> tuple[Tensor, Tensor]:
        """The distinct finite values, float64, and how often each was counted, int64; both on the CPU."""
        values = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cpu").view(torch.bfloat16)
        counts = self.counts.cpu()
        kept = (counts > 0) & values.isfinite()
        return values[kept].to(torch.float64), counts[kept]


@dataclass(frozen=True)
class Fit:
    """What `fit` found.

    Attributes:
        spec: The member; its eps has three significant digits.
        error: `E[(g - f)^2]` of that member, in squared units of the activation's output.
        relative_error: The same divided by `E[f^2]`; inf where f is zero on all values and g is not.
        at_edge: Whether eps is an end of the range searched, so that a wider one may hold a better member. At the lower
            end that is the case of a target like ReLU.
    """

    spec: GemSpec
    error: float
    relative_error: float
    at_edge: bool


Target = Callable[[Tensor], Tensor]


def match_eps(rms: float, n: int, c: float = MATCH_C) -> float:
    """`(c rms)^(2n)`, the eps with which the gate `x^(2n) / (x^(2n) + eps)` is half open at c times the rms.

    Args:
        rms: Root mean square of what the activation is given, in its units.
        n: The paper's N.
        c: The half point in units of the rms.

    Returns:
        eps, rounded to two significant digits: the half point moves by at most 5 % / 2n, and where the rms comes out
        otherwise in its last digits, on another machine, eps is the same.

    Raises:
        ValueError: rms or c is not positive and finite, n is out of range, or eps would be.
    """
    n = check_n(n)
    for name, value in (("rms", rms), ("c", c)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value!r}; eps is (c rms)^(2n)")
    return check_eps(float(f"{(c * rms) ** (2 * n):.2g}"), n)


def fit(
    histogram: Histogram,
    target: Target,
    family: str,
    *,
    n: int | None = None,
    eps_range: tuple[float, float] = EPS_RANGE,
    ns: Iterable[int] = (1, 2, 3),
) -> Fit:
    """The n and eps of `family` with the smallest `E[(g(x) - f(x))^2]` over the values of `histogram`.

    The error can have several minima in log eps, one for each scale on which there are values: a grid finds them, and
    golden section follows each down, in 15 to 40 ms of one CPU core. Ties, within 1e-12 of `E[f^2]`, go to the smallest
    n. Where eps makes no difference, as for E-GEM on negative values, it is 1e-4, or the end of the range next to that.

    Args:
        histogram: Of the values that enter the activation.
        target: f, an elementwise function of a float64 tensor on the CPU, such as `torch.nn.functional.gelu`; of a
            module with parameters, a float64 copy.
        family: By name; of one with a fixed eps, such as `gem`, only n is chosen.
        n: The paper's N, if it is not to be chosen.
        eps_range: Smallest and largest eps.
        ns: The values of N to choose from.

    Returns:
        The member with its eps rounded to three significant digits, and the error of that one.

    Raises:
        TypeError: n or an end of the range is not a number.
        ValueError: unknown family; n or eps_range out of range; a histogram without finite values; a target that is
            not elementwise or not finite on these values.
    """
    return fit_together([(histogram, target)], family, n=n, eps_range=eps_range, ns=ns)


def fit_together(
    samples: Iterable[tuple[Histogram, Target]],
    family: str,
    *,
    n: int | None = None,
    eps_range: tuple[float, float] = EPS_RANGE,
    ns: Iterable[int] = (1, 2, 3),
) -> Fit:
    """`fit` for one member in place of several activations: every value counts the same, whichever it enters.

    Args:
        samples: (histogram, target) of each. The others, what is returned and what is raised are as for `fit`.
    """
    fixed = family_named(family).fixed_eps
    orders = sorted({check_n(order) for order in (ns if n is None else (n,))})
    if not orders:
        raise ValueError("ns must hold at least one integer, got none; the paper uses ns=(1, 2, 3)")
    low, high = _check_range(eps_range, orders)
    points = _pool(samples)
    scale = _mean_square(points[1], points[2])
    best: tuple[float, int, float] | None = None
    for order in orders:
        cost = _cost(family, order, *points)
        eps, value = (fixed, cost(fixed)) if fixed is not None else _minimise(cost, low, high, _TIE * scale)
        if best is None or value < best[0] - _TIE * scale:
            best = value, order, eps
    assert best is not None
    _, order, eps = best
    if fixed is None:
        eps = min(max(float(f"{eps:.3g}"), low), high)
    found = _cost(family, order, *points)(eps)
    spec = GemSpec(family, order, eps)
    return Fit(spec, found, _ratio(found, scale), fixed is None and eps in (low, high))


def error(spec: GemSpec | str, histogram: Histogram, target: Target, *, relative: bool = False) -> float:
    """`E[(g(x) - f(x))^2]` over the values of `histogram`, for one member g.

    Args:
        spec: The member, or its name. A learnable one counts with its initial eps.
        histogram: Of the values that enter the activation.
        target: f, as for `fit`.
        relative: Divides by `E[f^2]`.

    Returns:
        The error; if relative, inf where f is zero on all values and g is not.

    Raises:
        ValueError: the name is malformed, or histogram or target are such as `fit` refuses.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    points = _pool([(histogram, target)])
    found = _cost(spec.family, spec.n, *points)(spec.eps)
    return _ratio(found, _mean_square(points[1], points[2])) if relative else found


def _check_range(eps_range: tuple[float, float], orders: list[int]) -> tuple[float, float]:
    low, high = (check_eps(end, orders[0]) for end in eps_range)
    if low > high:
        raise ValueError(f"eps_range must be (smallest, largest), got {eps_range}; write for example (1e-6, 10.0)")
    return low, high


def _pool(samples: Iterable[tuple[Histogram, Target]]) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct values of each sample, the targets' of them, and their shares of all."""
    values, wanted, counts = map(torch.cat, zip(*(_evaluate(*sample) for sample in samples), strict=True))
    return values, wanted, counts / counts.sum()


def _evaluate(histogram: Histogram, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct values, f of them, and how often each was counted, all float64."""
    values, counts = histogram.points()
    if not len(values):
        raise ValueError(
            f"the histogram holds no finite value, and {histogram.num_nonfinite} that are NaN or infinite; "
            "fit needs at least one: update it with what enters the activation"
        )
    with torch.no_grad():
        wanted = target(values.clone())  # which an in-place target overwrites
    if not isinstance(wanted, Tensor) or wanted.shape != values.shape:
        got = f"shape {tuple(wanted.shape)}" if isinstance(wanted, Tensor) else type(wanted).__name__
        raise ValueError(f"target must be elementwise: it made {got} of a tensor of shape {tuple(values.shape)}")
    wanted = wanted.to(values)
    if not wanted.isfinite().all():
        x = values[~wanted.isfinite()][0].item()
        raise ValueError(f"target must be finite on the values counted, but it is not at x = {x}; no member fits that")
    return values, wanted, counts.to(torch.float64)  # integers would be divided in the default dtype


def _cost(family: str, n: int, values: Tensor, wanted: Tensor, shares: Tensor) -> Callable[[float], float]:
    definition = family_named(family)
    return lambda eps: _mean_square(forward(definition, n, eps, values) - wanted, shares)


def _mean_square(y: Tensor, shares: Tensor) -> float:
    return float((y * y * shares).sum())


def _ratio(found: float, scale: float) -> float:
    return found / scale if scale > 0 else (math.inf if found > 0 else 0.0)


def _minimise(cost: Callable[[float], float], low: float, high: float, tie: float) -> tuple[float, float]:
    """The eps of the lowest cost, with that cost; of equal ones on the grid, the smaller eps."""
    width = math.log(high / low)
    steps = max(1, math.ceil(width / _GRID_STEP))
    grid = [math.log(low) + width * i / steps for i in range(steps + 1)]
    costs = [cost(math.exp(u)) for u in grid]
    if max(costs) - min(costs) <= tie:
        eps = min(max(DEFAULT_EPS, low), high)
        return eps, cost(eps)
    found = list(zip(costs, grid, strict=True))
    for i, value in enumerate(costs):
        left, right = max(i - 1, 0), min(i + 1, steps)
        if value <= costs[left] and value <= costs[right]:
            found.append(_golden(lambda u: cost(math.exp(u)), grid[left], grid[right]))
    value, u = min(found)
    return min(max(math.exp(u), low), high), value


def _golden(function: Callable[[float], float], a: float, b: float) -> tuple[float, float]:
    """Golden-section search: the lowest value of a function with one minimum in a..b, and where it is."""
    ratio = (math.sqrt(5) - 1) / 2
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    at_c, at_d = function(c), function(d)
    while b - a > _TOLERANCE:
        if at_c <= at_d:
            b, d, at_d = d, c, at_c
            c = b - ratio * (b - a)
            at_c = function(c)
        else:
            a, c, at_c = c, d, at_d
            d = a + ratio * (b - a)
            at_d = function(d)
    return min((at_c, c), (at_d, d))
