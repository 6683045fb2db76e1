"""How exact the family is beside PyTorch's activations, and what its tests try: python -m benchmarks.verify

Every check is a row: cases, failures, greatest error; docs/verification.md says what each one is. Truth is float64,
whose results err by some 1e-15 of their size, and exact fractions for the smoothness. The functions are taken as users
get them, with their kernels. With --tests, pytest is run too, and counted. --device cuda takes the Triton kernels.
A run on a CPU with --tests writes the table of docs/verification.md.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Goal, built_kernels, make_parser, pick_device, slope_size, write
from hf_gem import _kernels, activation
from hf_gem._kernels import plain
from hf_gem.family.table import family_named
from hf_gem.files import markdown_table, replace_between

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "verification.md"
EPSILONS = (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 10.0, 100.0)
ORDERS = (1, 2, 3, 4)
HALF = (torch.bfloat16, torch.float16)
_SMALLEST = 2.0**-100
_SMALLEST_FROM_OUTPUT = 2.0**-5
# Kind of test -> arguments of pytest.
TESTS = {
    "values and slopes against exact fractions": ["tests/family", "tests/test_functional.py"],
    "every kind of derivative": ["tests/opinfo"],
    "kernels, builds, load": ["tests/kernels"],
    "properties, by hypothesis": ["tests/test_properties.py"],
    "ways to save and load": ["tests/integrations/test_ways_to_save.py", "tests/integrations/test_round_trips.py"],
    "hostile files and secrets": [
        *("tests/test_files.py", "tests/compare/test_hostile.py", "tests/training/test_secrets.py"),
        *("tests/training/test_sharded.py", "tests/training/data/test_stored.py"),
    ],
}


@dataclass(frozen=True)
class Row:
    """The result of one check.

    Attributes:
        what: The function or group that was checked.
        check: Name of the check.
        cases: Number of cases.
        failures: Number of failures.
        greatest: Largest error in ulp of the dtype, or None if it does not apply.
    """

    what: str
    check: str
    cases: int
    failures: int
    greatest: float | None = None


@dataclass(frozen=True)
class Function:
    """An activation, with its value and slope in float64.

    Attributes:
        name: Name of the function.
        call: The function itself.
        value: Its value in float64.
        slope: Its slope in float64.
        keeping: The function with its output kept for the backward pass, if that is possible in some dtype.
        can_keep: Whether it is possible in a dtype.
    """

    name: str
    call: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    keeping: Callable[[Tensor], Tensor] | None = None
    can_keep: Callable[[torch.dtype], bool] = lambda dtype: True


def _normal(x: Tensor) -> Tensor:
    """Computes the normal distribution function, which is exact far below 0 too."""
    return 0.5 * torch.special.erfc(-x / math.sqrt(2))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(math.tau)


def _mish_slope(x: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return t + x * (1 - t * t) * torch.sigmoid(x)


BASELINES = (
    Function(
        "torch gelu",
        F.gelu,
        lambda x: torch.where(x == -math.inf, 0.0, x * _normal(x)),
        lambda x: torch.where(x.isinf(), (x > 0).double(), _normal(x) + x * _density(x)),
    ),
    Function(
        "torch silu",
        F.silu,
        lambda x: torch.where(x == -math.inf, 0.0, x * torch.sigmoid(x)),
        lambda x: torch.where(x.isinf(), (x > 0).double(), torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))),
    ),
    Function(
        "torch mish",
        F.mish,
        lambda x: torch.where(x == -math.inf, 0.0, x * torch.tanh(F.softplus(x))),
        lambda x: torch.where(x.isinf(), (x > 0).double(), _mish_slope(x)),
    ),
)


def member(family: str, n: int, eps: float) -> Function:
    """Makes a member of the family. Its reference is the formula in float64, which the tests compare with fractions."""
    definition = family_named(family)

    def slope(x: Tensor) -> Tensor:
        return plain.run("backward", definition, n, eps, torch.ones_like(x), x)

    given = None if definition.fixed_eps is not None else eps
    return Function(
        f"{family}, n = {n}, eps = {eps:g}",
        lambda x: activation(x, family, n, given, save="input"),
        lambda x: plain.run("forward", definition, n, eps, x),
        slope,
        None if definition.slope_at is None else lambda x: activation(x, family, n, given, save="output"),
        lambda dtype: definition.invertible(n, eps, dtype),
    )


def groups(quick: bool) -> Iterator[tuple[str, dict[str, list[Function]]]]:
    """Yields the families with their members by n, and torch's activations."""
    orders, epsilons = (ORDERS[:1], EPSILONS[2:3]) if quick else (ORDERS, EPSILONS)
    for family, title, those in (("gem", "GEM", (1.0,)), ("egem", "E-GEM", epsilons), ("segem", "SE-GEM", epsilons)):
        yield title, {f"{title}, n = {n}": [member(family, n, eps) for eps in those] for n in orders}
    yield from ((function.name, {function.name: [function]}) for function in BASELINES)


def value_and_slope(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach(), slope


def every_half(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns all numbers of a half type, without NaNs."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[~x.isnan()].to(device)


def spacing(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes the ulp of a dtype at float64 numbers; near 0 it is that of subnormal numbers."""
    info = torch.finfo(dtype)
    size = exact.abs().clamp(min=info.smallest_normal, max=info.max)
    return torch.exp2(torch.floor(torch.log2(size))) * info.eps


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float64 numbers once, ties to even. (torch rounds to a half type in two steps, via float32.)"""
    unit = spacing(exact, dtype)
    nearest = torch.where(exact.isfinite(), torch.round(exact / unit) * unit, exact)
    beyond = nearest.abs() > torch.finfo(dtype).max
    return torch.where(beyond, torch.copysign(torch.tensor(math.inf, dtype=torch.float64), nearest), nearest)


def judge(got: Tensor, exact: Tensor, size: Tensor, rounds: bool) -> tuple[int, float]:
    """Counts wrong results, and finds the largest error in the ulp of `size`; `compare` says what is wrong."""
    result, nearest = got.double(), rounded(exact, got.dtype)
    same = (result == nearest) | (result.isnan() & nearest.isnan())
    finite = result.isfinite() & nearest.isfinite()
    wrong = ~same if rounds else ~same & ~finite
    error = torch.where(finite, (result - exact).abs() / spacing(size, got.dtype), 0.0).max().item()
    return int(wrong.sum()), error


def compare(functions: list[Function], x: Tensor, what: str, check: str, rounds: bool) -> list[Row]:
    """Compares value and slope with float64. With `rounds`, a result that is not correctly rounded is a failure.

    The ulp of a slope is that of its `slope_size`. Below `_SMALLEST` it is the ulp at `_SMALLEST`, since intermediate
    results may underflow.
    """
    rows = []
    found = {"value": (0, 0, 0.0), "slope": (0, 0, 0.0)}
    wide = x.double()
    for function in functions:
        exacts = function.value(wide), function.slope(wide)
        for kind, got, exact in zip(found, value_and_slope(function.call, x), exacts, strict=True):
            cases, failures, greatest = found[kind]
            size = exact.abs() if kind == "value" else slope_size(exact, exacts[0], wide)
            wrong, error = judge(got, exact, size.clamp(min=_SMALLEST), rounds)
            found[kind] = cases + x.numel(), failures + wrong, max(greatest, error)
    for kind, (cases, failures, greatest) in found.items():
        rows.append(Row(what, f"{check}, {kind}", cases, failures, greatest))
    return rows


def slope_from_output(functions: list[Function], x: Tensor, what: str, check: str) -> Iterator[Row]:
    """Compares the slope from a kept output with float64.

    Slopes below `_SMALLEST_FROM_OUTPUT` are in its ulp, since the output of a small input underflows before the slope.
    """
    cases, failures, greatest = 0, 0, 0.0
    wide = x.double()
    for function in functions:
        if function.keeping is None or not function.can_keep(x.dtype):
            continue
        exact = function.slope(wide)
        size = slope_size(exact, function.value(wide), wide).clamp(min=_SMALLEST_FROM_OUTPUT)
        wrong, error = judge(value_and_slope(function.keeping, x)[1], exact, size, rounds=False)
        cases, failures, greatest = cases + x.numel(), failures + wrong, max(greatest, error)
    if cases:
        yield Row(what, f"{check}, slope from the output", cases, failures, greatest)


def float32_numbers(count: int, device: torch.device) -> Tensor:
    """Returns float32 numbers that are evenly spaced by their bits, so all exponents are covered equally; no NaNs."""
    step = 2**32 // count + 1  # odd, because otherwise the last bits would always be the same
    x = torch.arange(-(2**31), 2**31, step, dtype=torch.int64).to(torch.int32).view(torch.float32)
    return x[~x.isnan()].to(device)


def edges(functions: list[Function], what: str, device: torch.device) -> Row:
    """Checks that results are infinite, NaN or finite exactly where the reference is."""
    cases = failures = 0
    for dtype in (*HALF, torch.float32, torch.float64):
        info = torch.finfo(dtype)
        points = [0.0, math.inf, math.nan, info.max, info.smallest_normal, info.smallest_normal * info.eps, 1.0]
        x = torch.tensor([*points, *(-p for p in points)], dtype=dtype, device=device)
        for function in functions:
            y, slope = value_and_slope(function.call, x)
            number = ~x.isnan()  # the slope at NaN is undefined
            for got, exact in ((y, function.value(x.double())), (slope[number], function.slope(x.double())[number])):
                wrong = (got.isnan() != exact.isnan()) | (got.isinf() != rounded(exact, dtype).isinf())
                cases += got.numel()
                failures += int(wrong.sum())
    return Row(what, "infinities, NaN, zeros, largest and smallest numbers", cases, failures)


def order(functions: list[Function], what: str, device: torch.device, count: int) -> list[Row]:
    """Checks that the functions increase between neighbouring inputs above 0."""
    rows = []
    for dtype in (*HALF, torch.float32):
        if dtype == torch.float32:
            first = torch.arange(1, 0x7F7FFFFF, 0x7F7FFFFF // count + 1, dtype=torch.int32)
            pairs = torch.stack([first, first + 1]).view(dtype).to(device)
        else:
            x = every_half(dtype, device)
            x = x[(x > 0) & x.isfinite()].sort().values
            pairs = torch.stack([x[:-1], x[1:]])
        cases = failures = 0
        drop = 0.0
        for function in functions:
            low, high = function.call(pairs).double()
            falls = low > high
            cases, failures = cases + falls.numel(), failures + int(falls.sum())
            drop = max(drop, ((low - high) / spacing(low, dtype)).max().item())
        rows.append(Row(what, f"increases, {str(dtype).removeprefix('torch.')}", cases, failures, max(drop, 0.0)))
    return rows


def smoothness() -> Row:
    """Compares k-th difference quotients at 0 from both sides, in fractions.

    With steps of h, they must differ by no more than about h for k up to 2n, and by more for k = 2n + 1.
    """
    cases = failures = 0
    h = Fraction(1, 2**100)
    for family in ("gem", "egem", "segem"):
        exact = family_named(family).exact
        for n in ORDERS:
            for eps in (Fraction(1), Fraction(1, 10_000)) if family != "gem" else (Fraction(1),):
                for k in range(1, 2 * n + 2):
                    right, left = (
                        sum((-1) ** (k - i) * math.comb(k, i) * exact(i * step, n, eps) for i in range(k + 1)) / step**k
                        for step in (h, -h)
                    )
                    agree = abs(right - left) < Fraction(1, 2**30)
                    cases += 1
                    failures += agree != (k <= 2 * n)
    return Row("all", "2n derivatives at 0, and not one more", cases, failures)


def bits(device: torch.device, quick: bool) -> list[Row]:
    """Compares the kernels with the formulas bit by bit, for all half numbers and as many of float32."""
    rows = []
    for family in ("egem", "segem"):
        cases = failures = 0
        greatest = 0.0
        for n in ORDERS[:1] if quick else ORDERS:
            for x in (*(every_half(dtype, device) for dtype in HALF), float32_numbers(2**16, device)):
                grad = torch.linspace(-2, 2, x.numel(), device=device).to(x.dtype)
                for operation, inputs in (("forward", (x,)), ("backward", (grad, x)), ("glu", (x, grad))):
                    got, expected = (
                        run(operation, family_named(family), n, 0.01, *inputs) for run in (_kernels.run, plain.run)
                    )
                    same = (got == expected) | (got.isnan() & expected.isnan())
                    cases, failures = cases + x.numel(), failures + int((~same).sum())
                    finite = got.isfinite() & expected.isfinite()
                    off = (got.double() - expected.double()).abs() / spacing(expected.double(), x.dtype)
                    greatest = max(greatest, torch.where(finite, off, 0.0).max().item())
        rows.append(Row(f"{family} kernels", "the bits of the formulas", cases, failures, greatest))
    return rows


def tests() -> list[Row]:
    """Runs pytest for each kind of test, including slow ones."""
    rows = []
    for kind, paths in TESTS.items():
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *paths]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=ROOT, env=env, check=False, stdout=subprocess.DEVNULL)
            (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
        number = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
        rows.append(Row("tests", kind, number["tests"] - number["skipped"], number["failures"] + number["errors"]))
    return rows


def all_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    count = 2**12 if quick else 2**20
    for what, members in groups(quick):
        print(f"  {what}", flush=True)
        functions = [function for some in members.values() for function in some]
        for dtype in HALF:
            name = str(dtype).removeprefix("torch.")
            x = every_half(dtype, device)
            yield from compare(functions, x, what, f"{name}, rounded correctly", rounds=True)
            yield from slope_from_output(functions, x, what, name)
        for part, some in members.items():
            x = float32_numbers(count, device)
            yield from compare(some, x, part, "float32", rounds=False)
            yield from slope_from_output(some, x, part, "float32")
        yield edges(functions, what, device)
        if not what.startswith("torch"):
            yield from order(functions, what, device, count // 4)
    yield smoothness()
    yield from bits(device, quick)


def table(rows: list[Row]) -> str:
    cells = [
        (r.what, r.check, f"{r.cases:,}", f"{r.failures:,}", "" if r.greatest is None else f"{r.greatest:.4g}")
        for r in rows
    ]
    return markdown_table(["what", "check", "cases", "failures", "largest error, ulp"], cells)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--tests", action="store_true", help="also run the tests of each kind, including slow ones")
    arguments = parser.parse_args(argv)
    device = pick_device(arguments.device)
    names = [f"{family}{f'_n{n}' if n > 1 else ''}" for family in ("egem", "segem") for n in ORDERS]
    with built_kernels(device, names[:1] if arguments.quick else names):
        rows = list(all_rows(device, arguments.quick))
    if arguments.tests:
        rows += tests()
    print(table(rows))
    # The divisions of GPU kernels are faster and less accurate than those of the formulas.
    counted = ("rounded correctly", "increases", *(["the bits"] if device.type != "cpu" else []))
    goals = [
        Goal(f"failures: {row.what}, {row.check}", row.failures, 0)
        for row in rows
        if not row.what.startswith("torch") and not any(check in row.check for check in counted)
    ]
    path = write("verify", arguments, argv, [asdict(row) for row in rows], goals)
    if arguments.tests and device.type == "cpu" and not arguments.quick and arguments.results is None:
        stamp = f"{datetime.now(timezone.utc):%Y-%m-%d}, torch {torch.__version__}, {path.parent.name}."
        text = PAGE.read_text(encoding="utf-8")
        content = f"\n{stamp}\n\n{table(rows)}\n"
        PAGE.write_text(replace_between(text, "<!-- checks -->\n", "<!-- end of checks -->", content), encoding="utf-8")


if __name__ == "__main__":
    main()
