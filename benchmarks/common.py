"""Code that the benchmarks share: timing, goals, and the JSON record of a run.

Every figure is a ratio of times that were taken in turns in one process, so that changes in the machine's speed affect
all contestants alike. Every contestant is first compared with float64. If one is wrong, nothing is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import hf_gem
from hf_gem._kernels import cpu
from hf_gem._torch import wait_on_device
from hf_gem.files import write_atomically
from hf_gem.training.environment import environment, hardware

RESULTS = Path(__file__).resolve().parent / "results"
QUICK_RESULTS = RESULTS.parent.parent / "build" / "benchmarks"
LAUNCH_BOUND = 2**20  # with fewer elements, a GPU waits for Python to launch kernels
_LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # the load of the machine before the benchmark
_CHUNK = 2**22  # elements compared in float64 at a time
_SLEEP = 400_000  # GPU cycles per call, about 200 us: longer than Python takes to launch one on most machines
_MOST_DOUBLINGS = 5  # of this, on slower machines


def slope_size(slope: Tensor, value: Tensor, x: Tensor) -> Tensor:
    """Returns the sizes whose ulp is the unit for errors of a slope, in float64: the larger of the slope and f(x) / x.

    Near its zeros, a slope is a difference of such terms, and no arithmetic computes it to an ulp of its own.
    """
    return slope.abs().fmax((value / x).abs())


class WrongResultError(RuntimeError):
    """A contestant computes wrong results."""


@dataclass(frozen=True)
class Contestant:
    """An elementwise function to time.

    Attributes:
        function: The function of one tensor, or of several with the same shape.
        exact: The same function in plain torch, for float64.
        num_roundings: Number of its steps that round to the dtype of the inputs, for half types.
    """

    function: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    num_roundings: int = 1


@dataclass(frozen=True)
class Batch:
    """Inputs of one shape, and the gradient of the output."""

    inputs: tuple[Tensor, ...]
    grad: Tensor


@dataclass(frozen=True)
class Goal:
    """A value that must stay below a limit, or above it with `at_least`.

    Attributes:
        name: What is measured, and what it is compared with.
        value: The measured value.
        limit: The limit.
        at_least: Whether it is a lower limit.
        low: Lower quartile of the value over the rounds, if there are rounds.
        high: Upper quartile of the value over the rounds, if there are rounds.
    """

    name: str
    value: float
    limit: float
    at_least: bool = False
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, name: str, ratio: Mapping[str, float], limit: float) -> Goal:
        """Makes a goal for a ratio from `Timings.ratios`."""
        return cls(name, ratio["median"], limit, low=ratio["low"], high=ratio["high"])

    @property
    def missed_by(self) -> float:
        """How far the value is beyond the limit, relative to it (absolute for a limit of 0); 0 if the goal is met."""
        beyond = self.limit - self.value if self.at_least else self.value - self.limit
        return max(0.0, beyond / (abs(self.limit) or 1.0))

    @property
    def verdict(self) -> str:
        """`pass`, or `fail by` an amount."""
        if self.value != self.value:
            return "fail: not a number"
        if self.missed_by == 0:
            return "pass"
        return f"fail by {self.missed_by:.1%}" if self.limit else f"fail by {self.missed_by:g}"


@dataclass(frozen=True)
class Timings:
    """Seconds of one call of each contestant, with one value per round."""

    seconds: dict[str, list[float]]

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(seconds) for name, seconds in self.seconds.items()}

    def ratio(self, name: str, to: str) -> dict[str, float]:
        """Returns the median and the quartiles of the ratios of `name` to `to`, round by round."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return {"median": middle, "low": low, "high": high}

    def ratios(self, to: str) -> dict[str, dict[str, float]]:
        """Returns the ratios of all contestants to one, as JSON."""
        return {name: self.ratio(name, to) for name in self.seconds}

    def summary(self, baselines: Sequence[str]) -> dict[str, Any]:
        """Returns the medians, and the ratios of all contestants to each baseline that took part, as JSON."""
        return {
            "median_seconds": self.medians(),
            "ratios": {to: self.ratios(to) for to in baselines if to in self.seconds},
        }


def time_together(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int = 25,
    seconds: float = 0.02,
    ahead: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Times calls in turns. The order is random in each round, so that no call always follows the same one.

    Args:
        calls: Name -> the call.
        device: The device of the calls. A GPU is synchronised, and timed with its own events.
        rounds: Number of turns of each call.
        seconds: Length of a turn. A turn has at least one call.
        ahead: Whether a GPU only starts when all calls of a turn are queued, as in the training of a large model. This
            measures the time of the device. Otherwise the time of small calls includes the launch by Python.
        clock: Returns the time on a CPU.
    """
    counts = {}
    for name, call in calls.items():
        _timed(call, 3, device, clock)  # warm-up: caches, compilers
        once = min(_timed(call, 1, device, clock) for _ in range(3))
        counts[name] = max(1, min(50 if ahead else 10_000, round(seconds / max(once, 1e-9))))
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    draw = random.Random(0)
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in draw.sample(names, len(names)):
                taken[name].append(_timed(calls[name], counts[name], device, clock, ahead) / counts[name])
    finally:
        if collects:
            gc.enable()
    return Timings(taken)


def _timed(
    call: Callable[[], Any], count: int, device: torch.device, clock: Callable[[], float], ahead: bool = False
) -> float:
    if device.type == "cuda":
        for doublings in range(_MOST_DOUBLINGS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            if ahead:
                wait_on_device(_SLEEP * count << doublings)
            start.record()
            for _ in range(count):
                call()
            end.record()
            started_early = start.query()  # before all calls were queued
            end.synchronize()
            if not (ahead and started_early):
                break
        return start.elapsed_time(end) / 1000
    synchronize(device)
    began = clock()
    for _ in range(count):
        call()
    synchronize(device)
    return clock() - began


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def random_batches(shape: Sequence[int], dtype: torch.dtype, device: torch.device, num_inputs: int = 1) -> list[Batch]:
    """Draws normal inputs: one batch on a CPU; on CUDA so many batches that each one is evicted from the L2 cache."""
    count = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        batch_bytes = (num_inputs + 1) * dtype.itemsize * torch.Size(shape).numel()
        # If this takes more than 16 batches, the tensors would be in the cache in a real model too.
        count = max(1, min(16, -(-4 * cache // batch_bytes)))

    def draw() -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    return [Batch(tuple(draw() for _ in range(num_inputs)), draw()) for _ in range(count)]


def passes(
    function: Callable[..., Tensor], batches: Sequence[Batch], what: Literal["forward", "backward", "both"] = "both"
) -> Callable[[], Any]:
    """Returns a call that runs a function as in training: forward under autograd, backward from a given gradient."""
    # Copies, because Liger's backward passes write into the inputs.
    leaves = [[x.clone().requires_grad_() for x in batch.inputs] for batch in batches]
    turns = itertools.cycle(zip(leaves, (batch.grad for batch in batches), strict=True))

    def forward() -> Any:
        return function(*next(turns)[0])

    def both() -> Any:
        inputs, grad = next(turns)
        return torch.autograd.grad(function(*inputs), inputs, grad)

    if what == "forward":
        return forward
    if what == "both":
        return both
    done = itertools.cycle([(function(*x), x, batch.grad) for x, batch in zip(leaves, batches, strict=True)])

    def backward() -> Any:
        y, inputs, grad = next(done)
        return torch.autograd.grad(y, inputs, grad, retain_graph=True)

    return backward


def race(
    contestants: Mapping[str, Contestant],
    batches: Sequence[Batch],
    device: torch.device,
    rounds: int = 25,
    what: Literal["forward", "backward", "both"] = "both",
    beside: Mapping[str, Callable[[], Any]] | None = None,
    ahead: bool | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Checks all contestants, then times them together with other calls.

    Args:
        contestants: Name -> the contestant to check and time.
        batches: Inputs that each contestant uses in turn.
        device: The device of the inputs.
        rounds: Number of turns of each contestant.
        what: The passes to time.
        beside: Further calls to time, without a check.
        ahead: See `time_together`; by default True for `LAUNCH_BOUND` elements or more on a GPU.
        clock: Returns the time on a CPU.

    Raises:
        WrongResultError: A contestant is wrong. Nothing has been timed.
    """
    for name, contestant in contestants.items():
        require_right(name, contestant, batches[0])
    calls = {name: passes(contestant.function, batches, what) for name, contestant in contestants.items()}
    if ahead is None:
        ahead = device.type == "cuda" and batches[0].grad.numel() >= LAUNCH_BOUND
    return time_together({**calls, **(beside or {})}, device, rounds, ahead=ahead, clock=clock)


def require_right(name: str, contestant: Contestant, batch: Batch) -> None:
    """Compares value and gradients with those in float64, element by element.

    The tolerance is 64 roundings of float32, relative to the larger of 1 and the exact result. A half type adds its
    spacing relative to the exact result, for one rounding of the inputs and one of the result. A contestant that rounds
    between its steps may be off by that many spacings of the larger of 1 and the exact result.

    Raises:
        WrongResultError: They differ by more, or in shape or dtype.
    """
    dtype = batch.grad.dtype
    several = contestant.num_roundings > 1
    half = contestant.num_roundings * torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0
    leaves = [x.clone().requires_grad_() for x in batch.inputs]
    y = contestant.function(*leaves)
    if (y.shape, y.dtype) != (batch.grad.shape, dtype):
        raise WrongResultError(f"{name} returns {tuple(y.shape)} {y.dtype} for {tuple(batch.grad.shape)} {dtype}")
    results = [t.detach().reshape(-1) for t in (y, *torch.autograd.grad(y, leaves, batch.grad))]
    for start in range(0, batch.grad.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        exact_leaves = [x.detach().reshape(-1)[part].double().requires_grad_() for x in batch.inputs]
        exact_y = contestant.exact(*exact_leaves)
        exact_grads = torch.autograd.grad(exact_y, exact_leaves, batch.grad.reshape(-1)[part].double())
        for kind, got, exact in zip(
            ("value", *["gradient"] * len(leaves)), results, (exact_y.detach(), *exact_grads), strict=True
        ):
            size = exact.abs()
            allowed = 64 * torch.finfo(torch.float32).eps * size.clamp(min=1.0)
            allowed += half * (size.clamp(min=1.0) if several else size)
            error = (got[part].double() - exact).abs()
            worst = int((error / allowed).argmax())  # argmax treats NaN as the largest
            if not error[worst] <= allowed[worst]:
                raise WrongResultError(
                    f"{name} is wrong and was not timed: the {kind} is off by {error[worst]:.3g}, the exact result is "
                    f"{exact[worst]:.3g}, and the tolerance is {allowed[worst]:.3g}"
                )


@contextlib.contextmanager
def built_kernels(
    device: torch.device, names: Sequence[str] = ("egem", "egem_n2", "segem", "segem_n2")
) -> Iterator[None]:
    """Uses the kernels that users get. On a CPU they are built for some activations before anything is timed.

    Raises:
        RuntimeError: The kernels cannot be built, so only the formulas could be timed.
    """
    with hf_gem.kernels("compiled"):
        specs = [hf_gem.parse(name) for name in names]
        if device.type == "cpu" and not all(cpu.library(s.definition.kernels, s.n).ready(0, wait=True) for s in specs):
            raise RuntimeError(
                "the C++ kernels cannot be built here, so there is nothing to time. The warning above says why."
            )
        yield


def machine(device: torch.device) -> str:
    """Returns a short name of the machine that is usable as a folder name."""
    if device.type == "cpu":
        found = hardware()
        name = f"{found['cpu']} {found['torch_threads']} threads"
    else:
        name = torch.get_device_module(device).get_device_name(device)
    return slug(name)


def slug(name: str) -> str:
    """Converts `Intel(R) Xeon(R) CPU @ 2.20GHz 2 threads` to `intel-xeon-2-threads`."""
    name = re.sub(r"\((r|tm)\)|@\s*[\d.]+\s*ghz|\bcpu\b|\bprocessor\b", " ", name.lower())
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-.")


def make_parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Makes a parser with the flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda ...; by default a GPU if there is one")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of each contestant (default: {rounds})")
    parser.add_argument("--quick", action="store_true", help="only test that it runs; the figures mean nothing")
    parser.add_argument("--results", type=Path, help="folder of the records (benchmarks/results; build/ for --quick)")
    return parser


def pick_device(name: str | None) -> torch.device:
    """Returns the requested device, or by default a GPU if there is one.

    Raises:
        ValueError: The device does not exist.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda needs a CUDA GPU, but torch finds none. Use --device=cpu.")
    return device


def _dirty() -> bool:
    """Returns whether the code differs from the commit, ignoring records that earlier runs wrote."""
    made = [f":(exclude){path}" for path in ("benchmarks/results", "benchmarks/README.md")]
    command = ["git", "status", "--porcelain", "--", ".", *made]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent.parent, check=False)
    return bool(done.stdout.strip())


def write(
    benchmark: str,
    arguments: argparse.Namespace,
    argv: Sequence[str] | None,
    results: Any,
    goals: Sequence[Goal],
    skipped: Sequence[str] = (),
    part: str = "",
) -> Path:
    """Writes `RESULTS/MACHINE/BENCHMARK.json`, and prints the goals and what was skipped.

    Args:
        benchmark: Name of the script.
        arguments: Parsed flags of the script.
        argv: Flags as they were given; by default those of the process.
        results: Measured results, as JSON.
        goals: Goals of the project that the script can judge.
        skipped: What could not be measured here, and why.
        part: Suffix of the file name, for a script that writes several records.
    """
    device = pick_device(arguments.device)
    folder = arguments.results or (QUICK_RESULTS if arguments.quick else RESULTS)
    path = folder / machine(device) / f"{benchmark}{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = environment()
    flags = sys.argv[1:] if argv is None else argv
    stamp["command"] = shlex.join(["python", "-m", f"benchmarks.{benchmark}", *flags])
    stamp["hardware"]["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    stamp["dirty"] = _dirty() if stamp["commit"] else None
    stamp["hardware"]["load_average_at_start"] = _LOAD
    record = {
        "benchmark": benchmark,
        "device": device.type,
        "quick": arguments.quick,
        "environment": stamp,
        "goals": [{**asdict(goal), "verdict": goal.verdict} for goal in goals],
        "skipped": list(skipped),
        "results": results,
    }
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    for goal in goals:
        sign = ">=" if goal.at_least else "<="
        print(f"  {goal.name:72} {goal.value:7.3f}  {sign} {goal.limit:4.2f}  {goal.verdict}")
    for reason in skipped:
        print(f"  skipped: {reason}")
    print(f"-> {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}", flush=True)
    return path
