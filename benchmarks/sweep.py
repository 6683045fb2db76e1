"""Times activations by size, forward with backward, in eager mode: python -m benchmarks.sweep

Sizes start at 2^4 elements. Also times torch's own activations, torch.compile of all, xIELU of transformers, a copy,
and on a GPU Liger's gated kernels. For the share of the copy's bandwidth, an activation moves five tensors, a gated one
eight, and the copy two. On a GPU, times below 2^20 elements include the launch by Python.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.activation import FAMILY, GATED, STOCK, copy_of, liger_glu, slowest
from benchmarks.common import (
    LAUNCH_BOUND,
    Contestant,
    Goal,
    built_kernels,
    make_parser,
    pick_device,
    race,
    random_batches,
    write,
)


def xielu(dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Contestant], str | None]:
    """Returns xIELU of transformers, with its CUDA kernel if that is installed, or why it does not take part."""
    try:
        from transformers.activations import XIELUActivation
    except ImportError as error:
        return {}, f"xIELU is not installed ({error}); run pip install transformers"
    module = XIELUActivation(dtype=dtype).to(device).requires_grad_(False)
    exact = copy.deepcopy(module).double()
    return {"xielu": Contestant(module, exact._xielu_python, num_roundings=8)}, None


def contestants(
    dtype: torch.dtype, device: torch.device, compiled: bool
) -> tuple[dict[str, Contestant], dict[str, Contestant], list[str]]:
    """Returns the contestants of one tensor, those of gate and up, and the reasons why others do not take part."""
    other, no_xielu = xielu(dtype, device)
    liger, no_liger = liger_glu(device)
    plain = {**FAMILY, **STOCK, "mish": Contestant(F.mish, F.mish), **other}
    if compiled:
        plain |= {
            f"torch.compile({name})": Contestant(
                torch.compile(one.function, dynamic=True), one.exact, one.num_roundings
            )
            for name, one in plain.items()
        }
    return plain, {**GATED, **liger}, [reason for reason in (no_xielu, no_liger) if reason]


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Goal], list[str]]:
    device = pick_device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    largest = arguments.largest or (24 if device.type == "cpu" else 28)
    if arguments.quick:
        largest = 6
    if not 4 <= largest <= 32:
        raise ValueError(f"--largest must be from 4 to 32 (2^4 to 2^32 elements), got {largest}")
    plain, gated, skipped = contestants(dtype, device, arguments.compiled and not arguments.quick)
    points = []
    with built_kernels(device):
        for power in range(4, largest + 1, arguments.step):
            point: dict[str, Any] = {"elements": 2**power}
            for kind, group, num_inputs, tensors in (("plain", plain, 1, 5), ("gated", gated, 2, 8)):
                batches = random_batches((2**power,), dtype, device, num_inputs)
                timings = race(group, batches, device, arguments.rounds, beside={"copy": copy_of(batches)})
                shares = {
                    name: tensors / 2 / ratio["median"]
                    for name, ratio in timings.ratios("copy").items()
                    if name != "copy"
                }
                point[kind] = {"median_seconds": timings.medians(), "share_of_copy_bandwidth": shares}
                if kind == "plain":
                    point[kind]["ratios"] = {"gelu": timings.ratios("gelu")}
            points.append(point)
            egem, gelu = (1e6 * point["plain"]["median_seconds"][name] for name in ("egem", "gelu"))
            print(f"  2^{power} elements: egem {egem:.1f} us, gelu {gelu:.1f} us", flush=True)
    goals = []
    if device.type != "cpu":
        goals = [
            slowest(p["plain"]["ratios"]["gelu"], f"gelu, 2^{p['elements'].bit_length() - 1} elements", limit)
            for p in points
            for limit in [1.5 if p["elements"] < LAUNCH_BOUND else 1.0]
        ]
    return {"dtype": str(dtype).removeprefix("torch."), "points": points}, goals, skipped


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--largest", type=int, help="power of two of the largest size; by default 24, on a GPU 28")
    parser.add_argument("--step", type=int, default=1, help="step between the powers of two (default: 1)")
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, default=True, help="also time torch.compile of all"
    )
    arguments = parser.parse_args(argv)
    write("sweep", arguments, argv, *run(arguments))


if __name__ == "__main__":
    main()
