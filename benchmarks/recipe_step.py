"""Times GPT-2 124M as its recipe trains it, and with one thing changed: python -m benchmarks.recipe_step

A variant is a command line of recipes/gpt2_pretrain.py. The recipe's own code makes its model, objective, optimizer and
precision, and an optimizer step runs as in its loop, on random tokens. The variants take turns. Finally, the loop
itself trains as shipped, with its data, logs and evaluation.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import hf_gem
from benchmarks.common import (
    Goal,
    WrongResultError,
    built_kernels,
    machine,
    make_parser,
    pick_device,
    time_together,
    write,
)
from hf_gem._torch import expect_compilations
from hf_gem.modules import GemActivation
from hf_gem.training.config import parse_config
from hf_gem.training.data.text import TokenBlocks
from hf_gem.training.launch import make_accelerator
from hf_gem.training.loop import train
from hf_gem.training.loss import CausalLMLoss
from hf_gem.training.memory import fit_to_memory, fixed_micro_batch_size
from hf_gem.training.optim import make_optimizer
from hf_gem.training.task import Task
from hf_gem.training.throughput import decoder_flops_per_token, peak_flops
from recipes.gpt2_pretrain import PRESETS, Config, build_model

# A quarter of the shipped batch. This makes a turn shorter, but the optimizer's share is four times as large.
COMMON = ("--preset=gpt2-124m", "--report_to=none", "--global_batch_size=128", "--micro_batch_size=16")
QUICK = (
    *("--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=16", "--compile=no"),
    *("--global_batch_size=4", "--micro_batch_size=2"),
)
SHIPPED = "as shipped"
# Tokens per second on an H100: the goal, and a stretch goal. llm.c, written in CUDA, reaches 463,000.
H100_GOALS = (330_000, 420_000)


@dataclass(frozen=True)
class Variant:
    """A change of the recipe.

    Attributes:
        flags: Flags of its command line.
        save: What activations of the family keep for the backward pass.
        masked: Whether attention gets a mask.
    """

    flags: tuple[str, ...] = ()
    save: str = "auto"
    masked: bool = False


VARIANTS = {  # the most important first, in case time is short
    SHIPPED: Variant(),
    "gelu_pytorch_tanh": Variant(("--hidden_act=gelu_pytorch_tanh",)),
    "eager": Variant(("--compile=no",)),
    'eager, save="input"': Variant(("--compile=no",), save="input"),
    "eager, gelu_pytorch_tanh": Variant(("--compile=no", "--hidden_act=gelu_pytorch_tanh")),
    "attention with a mask": Variant(masked=True),
    "logits of 4096 tokens at once": Variant(("--loss_chunk_size=4096",)),
    "micro-batches of 32": Variant(("--micro_batch_size=32",)),
    "relu": Variant(("--hidden_act=relu",)),
}
_SHARE = 0.65  # share of the time for compiling the variants
_attention = F.scaled_dot_product_attention


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, is_causal: bool = False, **more: Any
) -> Any:
    if is_causal:
        more["attn_mask"] = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return _attention(query, key, value, *args, **more)


@contextlib.contextmanager
def masks() -> Iterator[None]:
    """Gives attention a mask instead of `is_causal=True`, so that it cannot use the flash kernels."""
    with mock.patch.object(F, "scaled_dot_product_attention", _masked_attention):
        yield


class Step:
    """A call that takes one optimizer step of a variant, as `training.loop` does."""

    def __init__(self, variant: Variant, quick: bool, *more: str) -> None:
        flags = (*COMMON, *variant.flags, *(QUICK if quick else ()), *more)
        self.config, _ = parse_config(Config, PRESETS, "gpt2-124m", flags)
        self.accelerator = make_accelerator(self.config)
        self.variant, device = variant, self.accelerator.device
        torch.manual_seed(self.config.seed)
        vocabulary = 256 if quick else 50257
        self.model = build_model(self.config, SimpleNamespace(bos_token_id=0, eos_token_id=0), vocabulary)  # type: ignore[arg-type]
        for module in self.model.modules():
            if isinstance(module, GemActivation):
                module.save = variant.save
        self.loss = CausalLMLoss(self.model, self.config.loss_chunk_size)
        tokens = np.random.default_rng(0).integers(vocabulary, size=2**20 if not quick else 2**10).astype(np.uint16)
        length, micro_batch = self.config.block_size, fixed_micro_batch_size(self.config)
        blocks = TokenBlocks(tokens, length)
        self.task = Task(
            name="gpt2_pretrain", preset="gpt2-124m", model=self.model, objective=self.loss, train=blocks,
            validation=TokenBlocks(tokens[: micro_batch * length + 1], length), data={"hash": "random"},
            units_per_sample=length,
        )  # fmt: skip
        rows = np.arange(self.config.global_batch_size) % len(blocks)
        self.batches = [
            {name: tensor.to(device) for name, tensor in blocks.batch(part).items()}
            for part in np.split(rows, self.config.global_batch_size // micro_batch)
        ]
        self.tokens_a_step = rows.size * self.config.block_size

    def prepare(self) -> None:
        """Moves model and optimizer to the device, and compiles."""
        if self.config.compile:
            self.loss.compile()
        self.loss.to(self.accelerator.device)
        fit_to_memory(self.task, self.config, self.accelerator)
        optimizer = make_optimizer(self.loss, self.config)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # a step costs the same, and all of them compute the same loss
        self.objective, self.optimizer = self.accelerator.prepare(self.loss, optimizer)
        self.objective.train()

    def __call__(self) -> Tensor:
        total = torch.zeros((), device=self.accelerator.device)
        with masks() if self.variant.masked else contextlib.nullcontext():
            for batch in self.batches:
                loss = self.objective(**batch).loss
                self.accelerator.backward(loss / self.tokens_a_step)
                total += loss.detach()
        self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total / self.tokens_a_step

    def plain_loss(self) -> Tensor:
        """Computes the same loss with the plain formulas, in eager mode."""
        losses = []
        with hf_gem.kernels("eager"), torch.compiler.set_stance("force_eager"), torch.no_grad():
            for batch in self.batches:
                losses.append(self.objective(**batch).loss)
        return torch.stack(losses).sum() / self.tokens_a_step


def prepared(name: str, variant: Variant, device: torch.device, quick: bool) -> tuple[Step, int]:
    """Returns a compiled step whose loss was checked, and its peak memory.

    Raises:
        WrongResultError: Its loss differs from that of the formulas.
        torch.OutOfMemoryError: It does not fit.
    """
    step = Step(variant, quick)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step.prepare()
    got, expected = step().item(), step.plain_loss().item()
    if not abs(got - expected) <= 1e-2 * expected:  # bf16 sums in a different order; NaN is wrong too
        raise WrongResultError(
            f"{name} is wrong and was not timed: its loss is {got}, but the formulas give {expected}"
        )
    if device.type != "cuda":
        return step, 0
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return step, torch.cuda.max_memory_allocated(device) - before


def loop_rate(quick: bool) -> float:
    """Returns the tokens per second that the loop reports for the recipe as shipped, on random tokens."""
    with tempfile.TemporaryDirectory() as folder:
        steps = 4 if quick else 30
        more = (f"--steps={steps}", "--warmup_steps=0", "--eval_every=0", "--save_every=0", f"--log_every={steps // 3}")
        step = Step(VARIANTS[SHIPPED], quick, *more, f"--output_dir={folder}")
        return train(step.task, step.config, step.accelerator)["result"]["units_per_second"]


def prepare_all(
    names: Sequence[str], device: torch.device, quick: bool, until: float
) -> tuple[dict[str, Step], dict[str, int], list[str]]:
    """Returns steps and peaks of the variants, and the reasons why some do not take part: memory or time."""
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    skipped = []
    for name in names:
        if time.monotonic() > until:
            skipped.append(f"no time was left for the variant {name}")
            continue
        try:
            steps[name], peaks[name] = prepared(name, VARIANTS[name], device, quick)
            print(f"  {name}: ready", flush=True)
        except torch.OutOfMemoryError as error:
            skipped.append(f"the variant {name} does not fit: {str(error).splitlines()[0]}")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return steps, peaks, skipped


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Goal], list[str]]:
    device, until = pick_device(arguments.device), time.monotonic() + 60 * arguments.minutes * _SHARE
    expect_compilations(4 * len(VARIANTS))
    with built_kernels(device, ("gem_n2",)):
        steps, peaks, skipped = prepare_all(arguments.variants, device, arguments.quick, until)
        timings, peak = time_together(dict(steps), device, arguments.rounds, seconds=0.0), peak_flops(device)
        variants: dict[str, dict[str, Any]] = {}
        for name, seconds in timings.medians().items():
            rate = steps[name].tokens_a_step / seconds
            flops = decoder_flops_per_token(steps[name].model, steps[name].config.block_size)
            variants[name] = {
                "flags": list(VARIANTS[name].flags),
                "tokens_per_second": rate,
                "mfu": rate * flops / peak if peak else None,
                "peak_bytes": peaks[name],
            }
        steps.clear()
        gc.collect()
        in_loop = loop_rate(arguments.quick) if SHIPPED in variants else None
    goals = []
    if SHIPPED in variants and re.search("h100|h200", machine(device)):
        shipped = variants[SHIPPED]["tokens_per_second"] / 1000
        goals = [Goal("thousand tokens a second, GPT-2 124M", shipped, g / 1000, at_least=True) for g in H100_GOALS]
    ratios = timings.summary([SHIPPED, "gelu_pytorch_tanh", "eager"])["ratios"]
    results = {"variants": variants, "ratios": ratios, "tokens_per_second_of_the_loop": in_loop}
    return results, goals, skipped


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--minutes", type=float, default=8.0, help="total time (default: 8)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="by default all")
    arguments = parser.parse_args(argv)
    write("recipe_step", arguments, argv, *run(arguments))


if __name__ == "__main__":
    main()
