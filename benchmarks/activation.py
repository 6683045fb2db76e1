"""Times activations alone in eager mode, forward and backward: python -m benchmarks.activation

Compares them with torch's own activations, and in gated MLPs with `silu(gate) * up` and Liger's SwiGLU. On a GPU, also
compares them with torch.compile of the formulas and with a copy. The share of the copy's bandwidth counts one tensor
read and one written forward, and two read and one written backward.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F

import hf_gem
from benchmarks.common import (
    LAUNCH_BOUND,
    Batch,
    Contestant,
    Goal,
    built_kernels,
    make_parser,
    pick_device,
    race,
    random_batches,
    write,
)
from hf_gem._torch import reset_compiler
from hf_gem.family.egem import EGEM
from hf_gem.family.formulas import forward
from hf_gem.family.segem import SEGEM
from hf_gem.family.table import family_named
from hf_gem.functional import activation, egem, gem, gem_glu, segem

FAMILY = {
    "egem": Contestant(egem, lambda x: forward(EGEM, 1, 1e-4, x)),
    "gem_n2": Contestant(lambda x: gem(x, 2), lambda x: forward(EGEM, 2, 1.0, x)),
    "segem": Contestant(segem, lambda x: forward(SEGEM, 1, 1e-4, x)),
}
STOCK = {f.__name__: Contestant(f, f) for f in (F.gelu, F.relu, F.silu)}
PLAIN_SWIGLU = "silu(gate) * up"
GATED = {
    "gem_glu": Contestant(
        lambda gate, up: gem_glu(gate, up, "gem", 2), lambda gate, up: forward(EGEM, 2, 1.0, gate) * up
    ),
    "gem(gate) * up": Contestant(
        lambda gate, up: gem(gate, 2) * up, lambda gate, up: forward(EGEM, 2, 1.0, gate) * up, num_roundings=4
    ),
    PLAIN_SWIGLU: Contestant(lambda gate, up: F.silu(gate) * up, lambda gate, up: F.silu(gate) * up, num_roundings=4),
}
ORDERS = (1, 2, 3)
LARGE = 8192 * 3072  # elements from which only bandwidth matters

# (shape, dtype) -> limits of the ratios to gelu and relu
CPU_GOALS: dict[tuple[tuple[int, ...], torch.dtype], dict[str, float]] = {
    ((1024, 3072), torch.float32): {"gelu": 0.60, "relu": 1.0},
    ((1024, 3072), torch.bfloat16): {"gelu": 0.75},
    ((64, 3072), torch.float32): {"gelu": 1.0},
    ((8, 16), torch.float32): {"gelu": 1.3},
}
GPU_SHAPES: list[tuple[int, ...]] = [(32768, 3072), (8192, 3072), (1024, 3072), (64, 3072), (8, 16)]


def liger_glu(device: torch.device) -> tuple[dict[str, Contestant], str | None]:
    """Returns Liger's gated kernels, or the reason why they do not take part."""
    if device.type != "cuda":
        return {}, f"Liger's kernels need a GPU, but the device is {device.type}"
    try:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError as error:
        return {}, f"Liger's kernels are not installed ({error}); run pip install liger-kernel"
    return {
        "Liger SwiGLU": Contestant(LigerSiLUMulFunction.apply, lambda gate, up: F.silu(gate) * up, 4),
        "Liger GEGLU": Contestant(
            LigerGELUMulFunction.apply, lambda gate, up: F.gelu(gate, approximate="tanh") * up, 4
        ),
    }, None


def copy_of(batches: list[Batch]) -> Any:
    """Returns a call that copies one tensor, from a different batch each time."""
    out = torch.empty_like(batches[0].grad)
    turns = itertools.cycle(batch.inputs[0] for batch in batches)
    return lambda: out.copy_(next(turns))


def measure(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """Times all activations on one shape, forward with backward.

    On a GPU these are times of the device alone, and forward and backward are also timed separately. For small tensors,
    `launched` has times that include the launch by Python.
    """
    batches = random_batches(shape, dtype, device)
    contestants = {**FAMILY, **STOCK}
    beside = {"copy": copy_of(batches)}
    result: dict[str, Any] = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
    if device.type == "cpu":
        result["both"] = race(contestants, batches, device, rounds, beside=beside).summary(["gelu", "relu", "copy"])
        return result
    reset_compiler()  # so that each shape is compiled separately, as in a model with one shape
    compiled = {
        f"torch.compile({name})": Contestant(torch.compile(ours.function, dynamic=False), ours.exact)
        for name, ours in FAMILY.items()
    }
    timings = race({**contestants, **compiled}, batches, device, rounds, beside=beside, ahead=True)
    result["both"] = timings.summary(["gelu", "relu", "copy"])
    result["both"]["ratios"]["torch.compile"] = {name: timings.ratio(name, f"torch.compile({name})") for name in FAMILY}
    passes: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    for what in passes:
        timings = race(contestants, batches, device, rounds, what, beside, ahead=True)
        result[what] = timings.summary(["gelu", "relu", "copy"])
    if batches[0].grad.numel() < LAUNCH_BOUND:
        result["launched"] = race({**contestants, **compiled}, batches, device, rounds, ahead=False).summary(["gelu"])
    return result


def member(name: str, n: int, save: str) -> Contestant:
    """Makes a contestant of a family for one n, which keeps its input or output for the backward pass."""
    family = family_named(name)
    function = partial(activation, family=name, n=n, save=save)
    return Contestant(function, lambda x: forward(family, n, family.default_eps, x))


def measure_orders(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, rounds: int, orders: Sequence[int]
) -> dict[str, Any]:
    """Times all families for several n: forward, and backward from the input and from the output."""
    batches = random_batches(shape, dtype, device)
    relu, beside = {"relu": STOCK["relu"]}, {"copy": copy_of(batches)}
    names = {f"{name}, n={n}": (name, n) for name in ("gem", "egem", "segem") for n in orders}
    saves = {
        f"{label}, from the {save}": member(name, n, save)
        for label, (name, n) in names.items()
        for save in ("input", "output")
        if save == "input" or family_named(name).slope_at is not None
    }
    forwards = {label: member(name, n, "input") for label, (name, n) in names.items()}
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "forward": race({**forwards, **relu}, batches, device, rounds, "forward", beside).summary(["relu", "copy"]),
        "backward": race({**saves, **relu}, batches, device, rounds, "backward", beside).summary(["relu", "copy"]),
    }


def measure_gated(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """Times `activation(gate) * up` on one shape."""
    liger, _ = liger_glu(device)
    timings = race({**GATED, **liger}, random_batches(shape, dtype, device, num_inputs=2), device, rounds)
    summary = timings.summary([PLAIN_SWIGLU, "Liger SwiGLU"])
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "both": summary}


def slowest(ratios: Mapping[str, Any], goal: str, limit: float) -> Goal:
    """Makes the goal that the slowest of the family must meet."""
    name = max(FAMILY, key=lambda name: ratios[name]["median"])
    return Goal.of(f"{name} / {goal}", ratios[name], limit)


def cpu_goals(result: dict[str, Any]) -> list[Goal]:
    shape, dtype = tuple(result["shape"]), result["dtype"]
    limits = CPU_GOALS.get((shape, getattr(torch, dtype)), {})
    return [slowest(result["both"]["ratios"][to], f"{to}, {shape} {dtype}", limit) for to, limit in limits.items()]


def gpu_goals(result: dict[str, Any]) -> list[Goal]:
    shape = tuple(result["shape"])
    both = result["both"]["ratios"]
    goals = [
        slowest(both["gelu"], f"gelu, {shape}", 1.0),
        slowest(both["torch.compile"], f"torch.compile of it, {shape}", 1.0),
    ]
    if "launched" in result:
        goals.append(slowest(result["launched"]["ratios"]["gelu"], f"gelu, {shape}, launched from Python", 1.5))
    if torch.Size(shape).numel() >= LARGE:
        goals.append(slowest(both["relu"], f"relu, {shape}", 1.02))
        for what, tensors in (("forward", 2), ("backward", 3)):
            found = slowest(result[what]["ratios"]["copy"], f"{what}, {shape}", 0)
            share = tensors / 2 / found.value  # a copy moves two tensors
            name = f"bandwidth of {found.name.replace(' / ', ' ')} / copy"
            goals.append(Goal(name, share, 0.9, at_least=True))
    return goals


def gated_goals(result: dict[str, Any]) -> list[Goal]:
    return [
        Goal.of(f"gem_glu / {to}, {tuple(result['shape'])} {result['dtype']}", ratios["gem_glu"], 1.0)
        for to, ratios in result["both"]["ratios"].items()
    ]


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Goal], list[str]]:
    device = pick_device(arguments.device)
    cases = list(CPU_GOALS) if device.type == "cpu" else [(shape, torch.bfloat16) for shape in GPU_SHAPES]
    gated = [((1024, 3072), torch.float32), ((1024, 3072), torch.bfloat16)]
    order_case = ((1024 if device.type == "cpu" else 8192, 3072), torch.bfloat16)
    if device.type != "cpu":
        gated = [((8192, 11008), torch.bfloat16)]
    if arguments.quick:
        cases, gated, order_case = cases[-1:], [((8, 16), torch.float32)], ((8, 16), torch.float32)
    skipped = [reason for reason in (liger_glu(device)[1],) if reason]
    if device.type == "cpu":
        skipped.append("the goals for GPUs need one")
    orders = ORDERS[:1] if arguments.quick else ORDERS
    every = [hf_gem.parse(f"{name}_n{n}").name for name in ("egem", "segem") for n in orders]
    with built_kernels(device, (*every, "egem_n2")):
        activations = [measure(shape, dtype, device, arguments.rounds) for shape, dtype in cases]
        glus = [measure_gated(shape, dtype, device, arguments.rounds) for shape, dtype in gated]
        by_order = measure_orders(*order_case, device, arguments.rounds, orders)
    goals = [goal for a in activations for goal in (cpu_goals if device.type == "cpu" else gpu_goals)(a)]
    goals += [goal for result in glus for goal in gated_goals(result)]
    return {"activations": activations, "orders": [by_order], "gated": glus}, goals, skipped


def main(argv: list[str] | None = None) -> None:
    arguments = make_parser(__doc__, rounds=25).parse_args(argv)
    write("activation", arguments, argv, *run(arguments))


if __name__ == "__main__":
    main()
