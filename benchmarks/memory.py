"""Measures the memory that activations hold for the backward pass: python -m benchmarks.memory

Hooks on the tensors that autograd saves count the bytes held: each storage once, without parameters and inputs. The
counts are the same on every machine. Those of a whole model come from fake tensors, which have shapes but no memory. On
a GPU, the peak of a real training step is measured too.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Goal, built_kernels, make_parser, pick_device, write
from benchmarks.models import Size, build
from hf_gem import EGEM, GEM, SEGEM
from hf_gem._torch import FakeTensorMode
from hf_gem.modules import GemActivation

HEIGHT, WIDTH = 512, 768
LAYERS: dict[str, Callable[[], nn.Module]] = {
    'egem, save="output"': partial(EGEM, save="output"),
    'gem_n2, save="output"': partial(GEM, 2, save="output"),
    'egem, save="input"': partial(EGEM, save="input"),
    "segem": SEGEM,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
}
GPT2_GOALS = {"gelu_new": 0.88, "gelu_pytorch_tanh": 0.92}
GPT2_ACTIVATIONS = ("gem_n2", "egem", "relu", "gelu_pytorch_tanh", "gelu_new")


def held_bytes(function: Callable[[], Any], besides: Iterable[Tensor] = ()) -> int:
    """Counts the bytes that the graph built by `function` keeps for the backward pass, without those of `besides`."""
    outside = {tensor.untyped_storage()._cdata for tensor in besides}
    held: dict[int, Any] = {}  # keeps the storages alive, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in outside:
            held[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # the graph lives until its bytes are counted
        total = sum(storage.nbytes() for storage in held.values())
        del result
    return total


def extra_bytes_per_element(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> float:
    """Measures what an activation adds to the memory held by two linear layers, in bytes per output element."""
    first, second = (nn.Linear(WIDTH, WIDTH, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(HEIGHT, WIDTH, device=device, dtype=dtype)
    besides = [x, *first.parameters(), *second.parameters()]
    with_it, without = (
        held_bytes(lambda act=act: second(act(first(x))), besides)  # type: ignore[misc]
        for act in (make(), nn.Identity())
    )
    return (with_it - without) / (HEIGHT * WIDTH)


def gpt2(activation: str, batch: int, tiny: bool, save: str) -> Any:
    """Builds GPT-2 124M, or a tiny one, whose activations of the family keep their input or output."""
    size = Size(batch, 64, 2, 32, 512) if tiny else Size(batch, 1024, vocabulary=50257)
    model = build("gpt2", activation, size)
    for module in model.modules():
        if isinstance(module, GemActivation):
            module.save = save
    return model


def gpt2_loss(model: Any, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        return model(ids, labels=ids).loss


def gpt2_held_bytes(activation: str, batch: int, tiny: bool = False, fake: bool = True) -> int:
    """Counts the bytes held for the backward pass of GPT-2 in bf16 autocast, without parameters."""
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
        # On a CPU "auto" keeps the input, because that is faster. This counts what a GPU would keep.
        model = gpt2(activation, batch, tiny, save="output")
        ids = torch.zeros(batch, model.config.n_positions, dtype=torch.long)
        return held_bytes(lambda: gpt2_loss(model, ids), [*model.parameters(), *model.buffers(), ids])


def gpt2_peak_bytes(activation: str, batch: int, device: torch.device, tiny: bool = False) -> int:
    """Measures the peak memory of tensors during a training step with AdamW on a GPU."""
    model = gpt2(activation, batch, tiny, save="auto").to(device)  # what users get
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(model.config.vocab_size, (batch, model.config.n_positions), device=device)
    for step in range(3):
        if step == 2:
            torch.cuda.reset_peak_memory_stats(device)
        gpt2_loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated(device)
    del model, optimizer, ids
    torch.cuda.empty_cache()
    return peak


def gpt2_largest_batch(activation: str, device: torch.device, tiny: bool = False) -> int:
    """Finds the largest batch, a multiple of 4, whose training step fits into a GPU's free memory."""
    fits, fails = 0, 8 if tiny else 256
    while fails - fits > 4:
        batch = (fits + fails) // 8 * 4
        try:
            gpt2_peak_bytes(activation, batch, device, tiny)
            fits = batch
        except torch.OutOfMemoryError:
            fails = batch
        gc.collect()
        torch.cuda.empty_cache()
    return fits


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Goal], list[str]]:
    device = pick_device(arguments.device)
    tiny, batch = arguments.quick, 2 if arguments.quick else arguments.batch
    with built_kernels(device):
        layers = {
            str(dtype).removeprefix("torch."): {
                name: extra_bytes_per_element(make, dtype, device) for name, make in LAYERS.items()
            }
            for dtype in (torch.float32, torch.bfloat16)
        }
        peaks, largest = {}, {}
        if device.type == "cuda":
            peaks = {name: gpt2_peak_bytes(name, batch, device, tiny) for name in GPT2_ACTIVATIONS}
            largest = {name: gpt2_largest_batch(name, device, tiny) for name in ("gem_n2", *GPT2_GOALS)}
    held = {name: gpt2_held_bytes(name, batch, tiny) for name in GPT2_ACTIVATIONS}
    goals = [
        Goal(f"bytes an element that {name} adds before a linear layer, {dtype}", values[name], 0.0)
        for dtype, values in layers.items()
        for name in LAYERS
        if name.endswith('"output"')
    ]
    model = f"GPT-2 124M, {batch} x 1024 tokens" if not tiny else "tiny GPT-2"
    for what, values in (("bytes held", held), ("peak memory", peaks)):
        if values:
            goals += [
                Goal(f"{what} of {model}: gem_n2 / {to}", values["gem_n2"] / values[to], limit)
                for to, limit in GPT2_GOALS.items()
            ]
    skipped = [] if peaks else ["measuring the peak memory of a training step needs a GPU"]
    results = {"extra_bytes_per_element": layers, "batch": batch, "gpt2_held_bytes": held, "gpt2_peak_bytes": peaks}
    results["gpt2_largest_batch"] = largest
    return results, goals, skipped


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--batch", type=int, default=8, help="number of sequences of 1024 tokens in GPT-2 (default: 8)")
    arguments = parser.parse_args(argv)
    write("memory", arguments, argv, *run(arguments))


if __name__ == "__main__":
    main()
