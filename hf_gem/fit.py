"""Choosing n and eps, so that the output of a layer changes as little as possible when its activation is replaced.

`Histogram` counts the values that reach the activation. `fit` minimises `E[(g(x) - f(x))^2]` over them, where f is the
activation to replace and g is the member of the family. It considers only the output of this one layer, and gives every
value the same weight.

`match_eps` needs no other activation. It sets the half point of the gate according to the scale of the values.

GELU and SiLU satisfy f(x) = x + f(-x), and segem(x) = x + egem(-x). So SE-GEM fits them on x as well as E-GEM does on
-x: if the inputs are symmetric about 0, both are equally close, and if they are mostly negative, SE-GEM is closer.
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
from .files import shown

# Grid step in log eps. A value x contributes x^2 (gate - c)^2 to the error. Its gate is a logistic function of log eps,
# whose poles are pi away for every x and n, so a ripple with a period of two steps is below 1e-8 of the error.
_GRID_STEP = 0.5
_TOLERANCE = 1e-6  # in log eps
EPS_RANGE = (1e-6, 10.0)  # default limits of the eps that `fit` chooses
# Default half point of the gate, in units of the root mean square of its inputs. A study may change it.
MATCH_C = 1.0
_TIE = 1e-12  # relative to E[f^2]: a root mean square of 1e-6, which is barely visible in float32 outputs
_CHUNK = 2**20  # number of elements binned at a time: limits memory, and is faster on a CPU than all at once


class Histogram:
    """Counts values after rounding each to the nearest bfloat16.

    This is exact for bfloat16 values. For others, it amounts to 128 bins per octave for each sign, so a value changes
    by at most 2^-8 of itself. The changes average out: over 10^5 values or more, they change `E[(g - f)^2]` by less
    than 1e-3. If a few values cause all of the error, they change it by about 1/20 of what drawing other values would.

    Memory and the cost of fitting do not grow with the number of values, since there are always 65,536 counts. The
    counts are integers, so they do not depend on the order of the values or on how they are split into batches.

    Attributes:
        counts: int64 tensor of shape (65536,). The index is the bit pattern read as int16, plus 32768. It is on the
            device of the values counted last. All-reduce it to combine processes.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2**16, dtype=torch.int64, device="cpu")

    def update(self, x: Tensor) -> None:
        """Counts the elements of x, a floating-point tensor of any shape, on its own device.

        NaN and infinity are counted separately, in `num_nonfinite`. So are values that round to infinity, those beyond
        3.39e38.

        Raises:
            TypeError: x is not a floating-point tensor.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"x of {x.dtype}" if isinstance(x, Tensor) else f"x of type {type(x).__name__}"
            raise TypeError(f"got {got}. x must be a floating-point tensor. Pass the input of the activation.")
        counts = self.counts.to(x.device)
        for part in x.detach().to(torch.bfloat16).reshape(-1).split(_CHUNK):
            # Not in place, since a tensor made in inference mode cannot be modified outside it.
            counts = counts + torch.bincount(part.view(torch.int16).to(torch.int32).add_(2**15), minlength=2**16)
        self.counts = counts

    def __add__(self, other: Histogram) -> Histogram:
        """Returns the histogram of the values of both. `sum(histograms, Histogram())` pools several."""
        if not isinstance(other, Histogram):
            return NotImplemented
        pooled = Histogram()
        pooled.counts = self.counts + other.counts.to(self.counts.device)
        return pooled

    @property
    def num_values(self) -> int:
        """The number of finite values counted."""
        return int(self.points()[1].sum())

    @property
    def num_nonfinite(self) -> int:
        """The number of NaN and infinite values."""
        return int(self.counts.sum()) - self.num_values

    @property
    def rms(self) -> float:
        """The root mean square of the values. It is NaN if there are none, or if any of them is NaN or infinite."""
        values, counts = self.points()
        shares = counts.to(torch.float64) / counts.sum()
        return math.nan if self.num_nonfinite or not len(values) else math.sqrt(_mean_square(values, shares))

    def points(self) -> tuple[Tensor, Tensor]:
        """Returns the distinct finite values (float64) and their counts (int64), both on the CPU."""
        values = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cpu").view(torch.bfloat16)
        counts = self.counts.cpu()
        kept = (counts > 0) & values.isfinite()
        return values[kept].to(torch.float64), counts[kept]


@dataclass(frozen=True)
class Fit:
    """The result of `fit`.

    Attributes:
        spec: The best member of the family. Its eps has three significant digits.
        error: The error `E[(g - f)^2]` of that member, in squared units of the activation's output.
        relative_error: The error divided by `E[f^2]`. It is inf if f is zero on all values and g is not.
        at_edge: Whether eps is at an end of the searched range, so that a wider range may contain a better member. A
            target such as ReLU leads to the lower end.
    """

    spec: GemSpec
    error: float
    relative_error: float
    at_edge: bool


Target = Callable[[Tensor], Tensor]


def match_eps(rms: float, n: int, c: float = MATCH_C) -> float:
    """Returns `(c rms)^(2n)`, the eps for which the gate `x^(2n) / (x^(2n) + eps)` is half open at c times the rms.

    Args:
        rms: Root mean square of the inputs of the activation.
        n: The paper's N.
        c: Half point of the gate in units of the rms.

    Returns:
        eps, rounded to two significant digits. Rounding moves the half point by at most 5 % / 2n, and gives the same
        eps on machines whose rms differs in the last digits.

    Raises:
        ValueError: rms or c is not positive and finite, or n or the resulting eps is out of range.
    """
    n = check_n(n)
    for name, value in (("rms", rms), ("c", c)):
        if not 0 < value < math.inf:
            raise ValueError(
                f"got {name}={shown(value)}. {name} must be positive and finite, since eps is (c rms)^(2n). Measure "
                "the rms on data that reaches the activation, or set eps yourself."
            )
    try:
        eps = (c * rms) ** (2 * n)
    except OverflowError:  # from a power of floats, where a product would be infinite
        eps = math.inf
    return check_eps(float(f"{eps:.2g}"), n)


def fit(
    histogram: Histogram,
    target: Target,
    family: str,
    *,
    n: int | None = None,
    eps_range: tuple[float, float] = EPS_RANGE,
    ns: Iterable[int] = (1, 2, 3),
) -> Fit:
    """Finds the n and eps of `family` with the smallest `E[(g(x) - f(x))^2]` over the values of `histogram`.

    The error can have several minima in log eps, one for each scale at which there are values. A grid finds them, and a
    golden-section search refines each. This takes 15 to 40 ms on one CPU core. Ties, within 1e-12 of `E[f^2]`, go to
    the smallest n. If eps makes no difference, as for E-GEM on negative values, the result is 1e-4, or the end of the
    range closest to it.

    Args:
        histogram: Histogram of the inputs of the activation.
        target: The activation f to approximate: an elementwise function of a float64 tensor on the CPU, such as
            `torch.nn.functional.gelu`. For a module with parameters, pass a float64 copy.
        family: Name of the family. If it has a fixed eps, as `gem` does, only n is chosen.
        n: The paper's N. By default it is chosen from `ns`.
        eps_range: Smallest and largest eps to consider.
        ns: Values of N to choose from.

    Returns:
        The best member, with its eps rounded to three significant digits, and the error of that member.

    Raises:
        TypeError: n or an end of the range is not a number.
        ValueError: The family is unknown, n or eps_range is out of range, the histogram has no finite values, or the
            target is not elementwise or not finite on these values.
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
    """Like `fit`, but finds one member to replace several activations. All values have the same weight.

    Args:
        samples: A (histogram, target) pair for each activation.
        family: Name of the family; see `fit`.
        n: The paper's N. By default it is chosen from `ns`.
        eps_range: Smallest and largest eps to consider.
        ns: Values of N to choose from.

    Returns:
        The best member and its error; see `fit`.

    Raises:
        TypeError: An argument has the wrong type; see `fit`.
        ValueError: An argument is out of range; see `fit`.
    """
    fixed = family_named(family).fixed_eps
    orders = sorted({check_n(order) for order in (ns if n is None else (n,))})
    if not orders:
        raise ValueError("got an empty ns. ns must contain at least one integer. The paper uses ns=(1, 2, 3).")
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
    """Computes `E[(g(x) - f(x))^2]` over the values of `histogram`, for one member g of a family.

    Args:
        spec: The member g, or its name. If its eps is learnable, the initial eps is used.
        histogram: Histogram of the inputs of the activation.
        target: The activation f; see `fit`.
        relative: Whether to divide by `E[f^2]`.

    Returns:
        The error. A relative error is inf if f is zero on all values and g is not.

    Raises:
        ValueError: The name is malformed, the histogram has no finite values, or the target is not elementwise or not
            finite on these values.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    points = _pool([(histogram, target)])
    found = _cost(spec.family, spec.n, *points)(spec.eps)
    return _ratio(found, _mean_square(points[1], points[2])) if relative else found


def _check_range(eps_range: tuple[float, float], orders: list[int]) -> tuple[float, float]:
    low, high = (check_eps(end, orders[0]) for end in eps_range)
    if low > high:
        raise ValueError(
            f"got eps_range={shown(eps_range)}. It must be (smallest, largest). Write for example (1e-6, 10.0)."
        )
    return low, high


def _pool(samples: Iterable[tuple[Histogram, Target]]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the distinct values of all samples, the target at each of them, and their shares of the total count."""
    values, wanted, counts = map(torch.cat, zip(*(_evaluate(*sample) for sample in samples), strict=True))
    return values, wanted, counts / counts.sum()


def _evaluate(histogram: Histogram, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the distinct values, the target at each of them, and their counts, all in float64."""
    values, counts = histogram.points()
    if not len(values):
        raise ValueError(
            f"the histogram contains no finite values, and {histogram.num_nonfinite} that are NaN or infinite. At "
            "least one finite value is required. Update it with the inputs of the activation."
        )
    with torch.no_grad():
        wanted = target(values.clone())  # a clone, since a target may work in place
    if not isinstance(wanted, Tensor) or wanted.shape != values.shape:
        got = f"shape {tuple(wanted.shape)}" if isinstance(wanted, Tensor) else type(wanted).__name__
        raise ValueError(
            f"target returned {got} for an input of shape {tuple(values.shape)}. It must be elementwise. Pass a "
            "function such as torch.nn.functional.gelu."
        )
    wanted = wanted.to(values)
    if not wanted.isfinite().all():
        x = values[~wanted.isfinite()][0].item()
        raise ValueError(
            f"target is not finite at x = {x}. It must be finite on all values counted. Fit another target, or count "
            "only values on which it is finite."
        )
    return values, wanted, counts.to(torch.float64)  # torch divides integers in the default dtype


def _cost(family: str, n: int, values: Tensor, wanted: Tensor, shares: Tensor) -> Callable[[float], float]:
    definition = family_named(family)
    return lambda eps: _mean_square(forward(definition, n, eps, values) - wanted, shares)


def _mean_square(y: Tensor, shares: Tensor) -> float:
    return float((y * y * shares).sum())


def _ratio(found: float, scale: float) -> float:
    return found / scale if scale > 0 else (math.inf if found > 0 else 0.0)


def _minimise(cost: Callable[[float], float], low: float, high: float, tie: float) -> tuple[float, float]:
    """Returns the eps with the lowest cost, and that cost. Among equal costs on the grid, the smallest eps wins."""
    width = math.log(high) - math.log(low)  # the quotient may overflow
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
    """Golden-section search in a..b: returns the minimum of a function with one local minimum, and its location."""
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
