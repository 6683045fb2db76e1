"""Checks all 2^32 float32 inputs against the formulas in float64: python -m benchmarks.exhaustive --name egem

Checks the value, the slope, and for E-GEM the slope from the rounded output, of the kernels and of the formulas in
float32. Measures the worst error in ulp (units in the last place) where the exact result is a normal number, and the
worst absolute error below that. `common.slope_size` defines the ulp of a slope. On a CPU, also compares kernels and
formulas bit by bit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Goal, built_kernels, make_parser, pick_device, slope_size, write
from hf_gem import _kernels, parse
from hf_gem._kernels import plain
from hf_gem.family.formulas import slope_at

TINY = 2.0**-126  # the smallest normal number
_CHUNKS = {"cpu": 2**16, "cuda": 2**24}  # inputs at a time; on a CPU they fit into the cache


class Errors:
    """The worst errors of one quantity so far, and where they occur."""

    def __init__(self, smallest: float = TINY) -> None:
        self.smallest = smallest
        self.max_ulp, self.at = 0.0, 0.0
        self.max_absolute_below, self.at_below = 0.0, 0.0
        self.wrong_specials = 0

    def update(self, x: Tensor, got: Tensor, exact: Tensor, size: Tensor) -> None:
        """Adds float32 results, with exact results in float64 and the sizes that determine the ulp."""
        error = (got.double() - exact).abs_()
        if not torch.isfinite(error.sum()):
            rounded = exact.float()
            special = ~torch.isfinite(got) | ~torch.isfinite(rounded)
            agree = (got == rounded) | (torch.isnan(got) & torch.isnan(rounded))
            self.wrong_specials += int((special & ~agree).sum())
            error = error.masked_fill(special, 0.0)
            size = size.masked_fill(special, 1.0)
        normal = size >= self.smallest
        # The power of two of each exact result, from its exponent bits.
        unit = (size.view(torch.int64) & (0x7FF << 52)).view(torch.float64).mul_(2.0**-23)
        ulp, at = torch.where(normal, error / unit, 0.0).max(0)
        if ulp > self.max_ulp:
            self.max_ulp, self.at = ulp.item(), x[at].item()
        below, at = error.masked_fill_(normal, 0.0).max(0)
        if below > self.max_absolute_below:
            self.max_absolute_below, self.at_below = below.item(), x[at].item()

    def merge(self, other: Errors) -> None:
        """Adds the errors at other inputs."""
        if other.max_ulp > self.max_ulp:
            self.max_ulp, self.at = other.max_ulp, other.at
        if other.max_absolute_below > self.max_absolute_below:
            self.max_absolute_below, self.at_below = other.max_absolute_below, other.at_below
        self.wrong_specials += other.wrong_specials

    def json(self) -> dict[str, Any]:
        return {
            "max_ulp": self.max_ulp,
            "at": self.at,
            "smallest_in_ulp": self.smallest,
            "max_absolute_below": self.max_absolute_below,
            "at_below": self.at_below,
            "wrong_infinities_and_nans": self.wrong_specials,
        }


class Check:
    """One function of the family, and its errors at the inputs so far."""

    def __init__(self, name: str, device: torch.device) -> None:
        spec = parse(name)
        self.device, self.family, self.n = device, spec.definition, spec.n
        assert not isinstance(spec.eps, Tensor)
        self.eps = eps = float(spec.eps)
        self.smallest = {"value": TINY, "slope": TINY}
        if self.family.slope_at is not None and self.family.invertible(self.n, eps, torch.float32):
            # The slope from outputs below 2^-40 eps^(1/2n) is too small. Errors are in ulp from twice the slope there.
            y = torch.tensor(2.0**-40 * eps ** (1 / (2 * self.n)), dtype=torch.float64)
            self.smallest["slope from the output"] = 2 * slope_at(self.family, self.n, eps, y).item()
        self.errors = {side: {q: Errors(s) for q, s in self.smallest.items()} for side in ("kernels", "formulas")}
        self.differing = dict.fromkeys(self.smallest, 0)
        self.inputs = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Evaluates some inputs."""
        wide = x.double()
        truths, sizes = self._exact(wide)
        kernels, formulas = (self._results(run, x) for run in (_kernels.run, plain.run))
        for quantity in self.smallest:
            got, expected = kernels[quantity], formulas[quantity]
            exact, size = (of[quantity.partition(" ")[0]] for of in (truths, sizes))
            self.errors["kernels"][quantity].update(x, got, exact, size)
            self.errors["formulas"][quantity].update(x, expected, exact, size)
            # All NaNs count as the same result.
            same = (got.view(torch.int32) == expected.view(torch.int32)) | (got.isnan() & expected.isnan())
            self.differing[quantity] += x.numel() - int(same.sum())
        self.inputs += x.numel()

    def merge(self, other: Check) -> None:
        """Adds the errors at other inputs."""
        for side, errors in self.errors.items():
            for quantity, found in errors.items():
                found.merge(other.errors[side][quantity])
        for quantity in self.differing:
            self.differing[quantity] += other.differing[quantity]
        self.inputs += other.inputs

    def _exact(self, wide: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Computes value and slope in float64, and the sizes that determine the ulp."""
        truths = {
            "value": plain.run("forward", self.family, self.n, self.eps, wide),
            "slope": plain.run("backward", self.family, self.n, self.eps, torch.ones_like(wide), wide),
        }
        return truths, {"value": truths["value"].abs(), "slope": slope_size(truths["slope"], truths["value"], wide)}

    def _results(self, run: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
        y, one = run("forward", self.family, self.n, self.eps, x), torch.ones_like(x)
        results = {"value": y, "slope": run("backward", self.family, self.n, self.eps, one, x)}
        if "slope from the output" in self.smallest:
            results["slope from the output"] = run("backward_at", self.family, self.n, self.eps, one, y)
        return results


def bit_patterns(stride: int, chunk: int, part: int, parts: int) -> Iterator[range]:
    """Yields every stride-th float32 bit pattern in chunks, which are distributed over the parts in turn."""
    for start in range(part * chunk * stride, 2**32, parts * chunk * stride):
        yield range(start, min(2**32, start + chunk * stride), stride)


def check(name: str, stride: int, device: torch.device) -> dict[str, Any]:
    """Checks one function at all inputs, including NaNs and infinities."""
    # On a CPU each chunk gets one thread, because chunks are too small to split.
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    chunk = _CHUNKS.get(device.type, 2**20)
    checks = [Check(name, device) for _ in range(workers)]
    total = len(range(0, 2**32, stride))
    began = time.monotonic()

    def work(part: int) -> None:
        said = began
        for bits in bit_patterns(stride, chunk, part, workers):
            patterns = torch.arange(bits.start - 2**31, bits.stop - 2**31, stride, dtype=torch.int64, device=device)
            checks[part].update(patterns.to(torch.int32).view(torch.float32))
            if part == 0 and time.monotonic() - said > 10:
                said = time.monotonic()
                share = sum(c.inputs for c in checks) / total
                print(f"  {name}: {share:6.1%}, {said - began:.0f} s of {(said - began) / share:.0f}", flush=True)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, range(workers)))
    finally:
        torch.set_num_threads(threads)
    found = checks[0]
    for other in checks[1:]:
        found.merge(other)
    assert found.inputs == total
    seconds = time.monotonic() - began
    return {
        "name": parse(name).name,
        "stride": stride,
        "inputs": total,
        "seconds": seconds,
        "projected_seconds_of_all": seconds * stride,
        **{side: {quantity: e.json() for quantity, e in errors.items()} for side, errors in found.errors.items()},
        "differing_bits": found.differing,
    }


def run(name: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Goal], list[str]]:
    device = pick_device(arguments.device)
    stride = 1_000_003 if arguments.quick else arguments.stride
    if not 1 <= stride < 2**31:
        raise ValueError(f"--stride must be from 1 (all inputs) to 2^31 - 1, got {stride}")
    with built_kernels(device, [name]):
        result = check(name, stride, device)
    goals = []
    for quantity, found in result["kernels"].items():
        what = f"{result['name']}, {quantity}"
        goals.append(Goal(f"wrong infinities and NaNs: {what}", found["wrong_infinities_and_nans"], 0))
        if device.type == "cpu":
            goals.append(Goal(f"results unlike those of the formulas: {what}", result["differing_bits"][quantity], 0))
        print(
            f"  {what}: {found['max_ulp']:.3f} ulp at {found['at']:g}, below {found['smallest_in_ulp']:.3g} "
            f"{found['max_absolute_below']:.3g} at {found['at_below']:g}"
        )
    sampled = (
        f"{result['name']} was checked only at every {stride}th input; --stride 1 checks all, in about "
        f"{result['projected_seconds_of_all']:.0f} s"
    )
    return result, goals, [sampled] if stride > 1 else []


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--name", nargs="+", default=["egem"], help="names of the functions (default: egem)")
    parser.add_argument("--stride", type=int, default=1, help="check every STRIDE-th input (default: 1, all)")
    arguments = parser.parse_args(argv)
    for name in arguments.name:
        write("exhaustive", arguments, argv, *run(name, arguments), part=f"-{parse(name).name}")


if __name__ == "__main__":
    main()
