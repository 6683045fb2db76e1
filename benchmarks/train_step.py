"""Times training steps of whole models, eager and compiled: python -m benchmarks.train_step

A step is forward, backward and AdamW, on random data. The models are GPT-2, BERT and ResNet-50, and only their
activation changes. On a GPU, they are GPT-2 124M, BERT-base and ResNet-50 on 224 x 224 in bf16 autocast. On a CPU, they
are small ones in float32, where linear layers take nearly all of the time. Before anything is timed, each loss and the
norm of its gradient are compared with those of the plain formulas.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_gem
from benchmarks.common import (
    Goal,
    WrongResultError,
    built_kernels,
    make_parser,
    pick_device,
    synchronize,
    time_together,
    write,
)
from benchmarks.memory import held_bytes
from benchmarks.models import Size, build
from hf_gem._torch import explain, reset_compiler

FAMILY = ("gem_n2", "egem")
MODES = ("eager", "compiled")
# In GPT-2, gelu is the tanh version: it computes the same as gelu_new, but in one kernel.
ACTIVATIONS = {
    "gpt2": (*FAMILY, "gelu_pytorch_tanh", "gelu_new", "relu", "silu"),
    "bert": (*FAMILY, "gelu", "gelu_new", "relu", "silu"),
    "resnet50": (*FAMILY, "gelu", "relu", "silu"),
}
BASELINES = {"gpt2": "gelu_pytorch_tanh", "bert": "gelu", "resnet50": "gelu"}
UNITS = {"gpt2": "tokens", "bert": "tokens", "resnet50": "images"}


GPU_SIZES = {"gpt2": Size(8, 1024), "bert": Size(32, 512, vocabulary=30522), "resnet50": Size(128, 224)}
CPU_SIZES = {
    "gpt2": Size(4, 128, 2, 256, 1024),
    "bert": Size(4, 128, 2, 256, 1024),
    "resnet50": Size(2, 64),
}
QUICK_SIZES = {"gpt2": Size(1, 8, 1, 16, 64), "bert": Size(1, 8, 1, 16, 64), "resnet50": Size(2, 32)}


class Objective(nn.Module):
    """The loss of a model on a batch, which torch.compile compiles as a whole."""

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.model(inputs)
        logits = output if isinstance(output, Tensor) else output.logits
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def random_data(model: str, size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    if model == "resnet50":
        images = torch.randn(size.batch, 3, size.length, size.length, device=device)
        if device.type != "cpu":  # the layout of fast convolutions
            images = images.to(memory_format=torch.channels_last)
        return images, torch.randint(1000, (size.batch,), device=device)
    inputs, targets = torch.randint(size.vocabulary, (2, size.batch, size.length), device=device)
    return inputs, targets


def make_step(objective: Callable[..., Tensor], parameters: list[nn.Parameter], data: tuple[Tensor, Tensor]) -> Any:
    """Returns a call that does one training step."""
    # With a learning rate of 0, a step costs the same, and all steps compute the same loss.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, foreach=True)

    def step() -> None:
        objective(*data).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def loss_and_norm(objective: Callable[..., Tensor], model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Computes the loss and the norm of its gradient, in float64."""
    loss = objective(*data)
    grads = torch.autograd.grad(
        loss, list(model.parameters()), allow_unused=True
    )  # some of BERT's last layers are unused
    return torch.stack([loss.detach(), torch.nn.utils.get_total_norm([g for g in grads if g is not None])]).double()


def require_right(name: str, objective: Callable[..., Tensor], plain: Objective, data: tuple[Tensor, Tensor]) -> None:
    """Compares loss and gradient with those of the formulas in eager mode.

    Raises:
        WrongResultError: They differ by more than the order of summation, and bf16 with autocast, can explain.
    """
    with hf_gem.kernels("eager"):
        expected = loss_and_norm(plain, plain, data)
    got = loss_and_norm(objective, plain, data)
    allowed = 5e-2 if plain.autocast else 1e-3
    if not torch.allclose(got, expected, rtol=allowed, atol=0.0):  # NaN is never close
        raise WrongResultError(
            f"{name} is wrong and was not timed: loss and norm of the gradient are {got.tolist()}, the formulas give "
            f"{expected.tolist()}, and the tolerance is {allowed:.1%}"
        )


def num_graph_breaks(activation: str, device: torch.device) -> int:
    """Counts the graph breaks of an activation when it is compiled."""
    from transformers.activations import ACT2FN

    reset_compiler()
    explained = explain(ACT2FN[activation], torch.randn(8, 16, device=device, requires_grad=True))
    return int(explained.graph_break_count)


def measure(
    model: str, mode: str, activations: Sequence[str], size: Size, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Times one model with each of the activations.

    It also measures the memory held for the backward pass in eager mode, and on a GPU the peak memory of tensors.

    Raises:
        WrongResultError: A loss differs from that of the formulas. Nothing has been timed.
    """
    data = random_data(model, size, device)
    steps, peaks, held = {}, {}, {}
    for activation in activations:
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        plain = Objective(build(model, activation, size).to(device).train(), autocast=device.type != "cpu")
        objective = torch.compile(plain) if mode == "compiled" else plain
        require_right(f"{mode} {model} with {activation}", objective, plain, data)
        if mode == "eager":
            besides = [*plain.parameters(), *plain.buffers(), *data]
            held[activation] = held_bytes(lambda plain=plain: plain(*data), besides)  # type: ignore[misc]
        steps[activation] = make_step(objective, list(plain.parameters()), data)
        if device.type == "cuda":
            for _ in range(3):  # compiles, and gives the optimizer its memory
                steps[activation]()
            torch.cuda.reset_peak_memory_stats(device)
            steps[activation]()
            synchronize(device)
            peaks[activation] = torch.cuda.max_memory_allocated(device) - before
    timings = time_together(steps, device, rounds, seconds=0.0)
    units = size.batch * (1 if UNITS[model] == "images" else size.length)
    return {
        "model": model,
        "mode": mode,
        "size": vars(size),
        f"{UNITS[model]}_per_second": {name: units / seconds for name, seconds in timings.medians().items()},
        "held_bytes": held,
        "peak_bytes": peaks,
        **timings.summary([BASELINES[model], "gelu_new"]),
    }


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Goal], list[str]]:
    device = pick_device(arguments.device)
    sizes = QUICK_SIZES if arguments.quick else CPU_SIZES if device.type == "cpu" else GPU_SIZES
    steps = []
    with built_kernels(device):
        breaks = {name: num_graph_breaks(name, device) for name in FAMILY}
        for model in arguments.models:
            for mode in arguments.modes:
                reset_compiler()
                wanted = {*(arguments.activations or ACTIVATIONS[model]), BASELINES[model]}
                chosen = [name for name in ACTIVATIONS[model] if name in wanted]
                if (model, mode, device.type) == ("resnet50", "compiled", "cpu"):
                    chosen = [
                        name for name in chosen if name in (*FAMILY, BASELINES[model])
                    ]  # each takes more than a minute to compile there
                steps.append(measure(model, mode, chosen, sizes[model], device, arguments.rounds))
                rates = steps[-1][f"{UNITS[model]}_per_second"]
                print(
                    f"  {model}, {mode}, {UNITS[model]} per second: "
                    + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()),
                    flush=True,
                )
                gc.collect()
    goals = [Goal(f"graph breaks in {name}", count, 0) for name, count in breaks.items()]
    for step in steps:
        baseline = BASELINES[step["model"]]
        ratios = step["ratios"][baseline]
        family = [name for name in FAMILY if name in ratios]
        if step["mode"] == "compiled" and family:
            slowest = max(family, key=lambda name: ratios[name]["median"])
            size = "" if device.type != "cpu" else "small "
            goals.append(Goal.of(f"{size}{step['model']} compiled: {slowest} / {baseline}", ratios[slowest], 1.02))
    skipped = []
    if device.type == "cpu":
        skipped.append(
            "timing GPT-2 124M, BERT-base and ResNet-50 at full size, and measuring their peak memory, needs a GPU"
        )
    return {"steps": steps, "graph_breaks": breaks}, goals, skipped


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, rounds=15)
    parser.add_argument("--models", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS), help="by default all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="by default both")
    known = sorted({name for names in ACTIVATIONS.values() for name in names})
    parser.add_argument("--activations", nargs="+", choices=known, help="by default all; baselines always take part")
    arguments = parser.parse_args(argv)
    write("train_step", arguments, argv, *run(arguments))


if __name__ == "__main__":
    main()
