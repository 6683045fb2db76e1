"""`hf-gem bench`: times activations on this machine, next to those of torch."""

from __future__ import annotations

import logging
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ..training.errors import ConfigError
from .common import AsJson, show, user_errors

_DTYPES = ("float32", "bfloat16", "float16")
_SECONDS = 0.02  # target time of one measurement
_KERNELS = "compiled"  # on a CPU, waits until they are built


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Activations; by default gem_n2, egem and segem.")
    ] = None,
    shape: Annotated[str, typer.Option(help="Shape of the tensor.")] = "1024x3072",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(_DTYPES)}.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Device of torch. By default a GPU, if there is one.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Number of measurements of each activation.")] = 15,
    as_json: AsJson = False,
) -> None:
    """Time activations next to GELU, ReLU and SiLU.

    Times include the forward and the backward pass. Ratios are medians over rounds, with quartiles. Below 1 is faster.
    Run it while the machine does nothing else.
    """
    import torch

    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    chosen = device or (there or torch.device("cpu")).type
    sizes = _sizes(shape)
    with user_errors():
        if dtype not in _DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r:.80}.")
        if torch.device(chosen).type == "meta":
            raise ConfigError("--device must be a device that computes, such as cpu or cuda, got 'meta'.")
        x = torch.randn(sizes, device=chosen, dtype=getattr(torch, dtype), requires_grad=True)
        rows = _measure(names or ["gem_n2", "egem", "segem"], x, rounds)
    head = f"{shape}, {dtype}, on {chosen}, {torch.get_num_threads()} threads; forward with backward"
    lines = [head, f"{'':20}{'microseconds':>14}  {'/ gelu':>20}  {'/ relu':>20}"]
    for row in rows:
        ratios = ["{:.2f} ({:.2f} to {:.2f})".format(*row[f"to_{base}"]) for base in ("gelu", "relu")]
        lines.append(f"{row['name']:<20}{row['microseconds']:>14.1f}  {ratios[0]:>20}  {ratios[1]:>20}")
    show({"shape": sizes, "dtype": dtype, "device": chosen, "rows": rows}, "\n".join(lines), as_json)


def _sizes(shape: str) -> list[int]:
    if not re.fullmatch(r"0*[1-9]\d*(x0*[1-9]\d*)*", shape.lower(), re.ASCII):
        raise ConfigError(f"--shape must be sizes above 0 with x between them, such as 1024x3072, got {shape!r:.80}.")
    return [int(size) for size in shape.lower().split("x")]


def _measure(names: Sequence[str], x: Any, rounds: int) -> list[dict[str, Any]]:
    import torch
    import torch.nn.functional as F

    # Its import warns that there is no GPU if there is a CUDA toolkit.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    from .. import get_activation, kernels

    grad = torch.randn_like(x)

    def timer(function: Callable[..., Any]) -> Timer:
        statement = "torch.autograd.grad(function(x), x, grad)"
        scope = {"torch": torch, "function": function, "x": x, "grad": grad}
        return Timer(statement, globals=scope, num_threads=torch.get_num_threads())

    functions: dict[str, Callable[..., Any]] = {name: get_activation(name).to(x.device) for name in names}
    functions |= {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
    timers = {name: timer(function) for name, function in functions.items()}
    with kernels(_KERNELS):
        calls = {name: max(1, int(_SECONDS / one.timeit(3).median)) for name, one in timers.items()}
        times: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(rounds):
            for name, one in timers.items():
                times[name].append(one.timeit(calls[name]).median)
    return [
        {
            "name": name,
            "microseconds": 1e6 * statistics.median(taken),
            **{f"to_{base}": _ratio(taken, times[base]) for base in ("gelu", "relu")},
        }
        for name, taken in times.items()
    ]


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Computes the median and the quartiles of the ratios of all rounds."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high
