"""Pretrains GPT-2 from scratch with any activation: accelerate launch recipes/gpt2_pretrain.py --preset demo"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from hf_gem.init import init_feed_forward_, std_like_width
from hf_gem.training.config import TrainConfig, at_least, option, parse_config, require
from hf_gem.training.data.text import TextConfig, prepare_text
from hf_gem.training.initial import new_task
from hf_gem.training.launch import make_accelerator
from hf_gem.training.loop import train
from hf_gem.training.loss import CausalLMLoss
from hf_gem.training.report import print_summary, save_results, text_card
from hf_gem.training.signals import run_recipe
from hf_gem.training.task import Task
from hf_gem.training.throughput import decoder_flops_per_token

PRESETS: dict[str, dict[str, Any]] = {
    # 1.3M parameters, on the standard library's source: minutes on two CPU cores.
    "demo": {
        "n_layer": 4, "n_embd": 128, "n_head": 4, "block_size": 128,
        "vocab_size": 4096, "validation_fraction": 0.02, "min_validation_tokens": 30_000,
        "steps": 400, "global_batch_size": 32, "micro_batch_size": 32, "warmup_steps": 50, "learning_rate": 3e-3,
        "eval_every": 100, "save_every": 100, "log_every": 10,
    },
    # 0.14M parameters, with activation inputs of the same scale as in GPT-2 small: for studies on CPUs.
    "narrow": {
        "n_layer": 2, "n_embd": 64, "n_head": 2, "block_size": 64, "init_like_width": 768,
        "vocab_size": 512, "validation_fraction": 0.05, "test_fraction": 0.08,
        "steps": 600, "global_batch_size": 32, "micro_batch_size": 32, "warmup_steps": 60, "learning_rate": 5e-3,
        "eval_every": 300, "save_every": 0, "log_every": 20,
    },
    # GPT-2 small as in nanoGPT: 0.5M tokens per step, dropout 0, vocabulary 50257 padded to 50304.
    "gpt2-124m": {
        "n_layer": 12, "n_embd": 768, "n_head": 12, "block_size": 1024,
        "dataset": "HuggingFaceFW/fineweb-edu", "dataset_config": "sample-10BT", "tokenizer": "openai-community/gpt2",
        "validation_fraction": 0.0005,
        "steps": 19000, "global_batch_size": 512, "micro_batch_size": 16, "warmup_steps": 700, "learning_rate": 6e-4,
        "mixed_precision": "bf16", "compile": True, "eval_every": 250, "save_every": 1000, "log_every": 10,
    },
}  # fmt: skip


@dataclass
class Config(TextConfig, TrainConfig):
    """The config of this recipe."""

    runtime: ClassVar[frozenset[str]] = frozenset({"loss_chunk_size", "prompt"})

    n_layer: int = option(12, "Number of transformer blocks.")
    n_embd: int = option(768, "Width of the hidden states.")
    n_head: int = option(12, "Number of attention heads.")
    dropout: float = option(0.0, "Dropout rate of all layers.")
    own_gain: bool = option(
        False, "Draw the weights of feed-forward layers so that each activation preserves the scale of its input."
    )
    init_like_width: int = option(
        0, "Draw the weights so that activations get inputs of the scale in a model of this width; 0: std 0.02."
    )
    pad_vocab_to_multiple_of: int = option(
        64, "Round the rows of the embedding up to a multiple of this; 50257 becomes 50304."
    )
    loss_chunk_size: int | Literal["auto"] = option(
        "auto", "Tokens whose logits are in memory at once; 0: all; auto: all if a GPU has room for them, else 4096."
    )
    prompt: str = option("def ", "Start of the text that is generated at the end.")

    def validate(self) -> None:
        """Raises ValueError, naming the field, if a value makes no sense."""
        TextConfig.validate(self)
        TrainConfig.validate(self)
        at_least(self, 1, "n_layer", "n_embd", "n_head", "pad_vocab_to_multiple_of")
        at_least(self, 0, "loss_chunk_size", "init_like_width")
        require(self.n_embd % self.n_head == 0, "n_embd", self.n_embd, f"a multiple of n_head = {self.n_head}")
        both = self.own_gain and self.init_like_width
        require(not both, "init_like_width", self.init_like_width, "0 with --own_gain, which draws the same weights")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")


def build_model(config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> GPT2LMHeadModel:
    """Builds GPT-2. transformers initialises the residual projections with std 0.02 / sqrt(2 n_layer)."""
    multiple = config.pad_vocab_to_multiple_of
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=-(-vocab_size // multiple) * multiple,
            n_positions=config.block_size,
            n_layer=config.n_layer,
            n_embd=config.n_embd,
            n_head=config.n_head,
            activation_function=config.hidden_act,
            initializer_range=std_like_width(config.n_embd, config.init_like_width),
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=True,
        )
    )
    if config.own_gain:
        residual = 1 / math.sqrt(2 * config.n_layer)
        for block in model.transformer.h:
            mlp: Any = block.mlp
            init_feed_forward_(mlp.c_fc.weight, mlp.c_proj.weight, config.n_embd, ACT2FN[config.hidden_act], residual)
    return model


@torch.no_grad()
def sample(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> str:
    """Generates text that continues `prompt`, with a fixed seed."""
    torch.manual_seed(0)
    room = model.config.n_positions - length
    ids = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt")["input_ids"][:, -room:].to(model.device)
    unused = sorted(set(range(model.config.vocab_size)) - set(tokenizer.get_vocab().values()))
    ids = model.eval().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=True,
        top_k=50,
        suppress_tokens=unused or None,  # ids that only pad the vocabulary
        pad_token_id=0,
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def card_values(config: Config, record: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of the model card that are not in the record."""
    return text_card(
        record,
        title=f"GPT-2 {record['preset']}, {config.hidden_act}",
        architecture="GPT-2",
        pipeline_tag="text-generation",
        auto_class="AutoModelForCausalLM",
        loss_unit="nats per token",
        limits="This is a base language model. It continues text, does not follow instructions, and can repeat its "
        f"training data. Its context is {config.block_size} tokens.",
    )


def main(argv: list[str] | None = None) -> None:
    config, preset = parse_config(Config, PRESETS, "demo", argv)
    config.output_dir = config.output_dir or f"runs/gpt2-{preset}-{config.act_label}-seed{config.seed}"
    data = prepare_text(config)
    accelerator = make_accelerator(config)

    def make() -> Task:
        model = build_model(config, data.tokenizer, data.vocab_size)
        return Task(
            name="gpt2_pretrain",
            preset=preset,
            model=model,
            objective=CausalLMLoss(model, config.loss_chunk_size),
            train=data.train,
            validation=data.validation,
            test=data.test,
            data=data.facts,
            units_per_sample=config.block_size,
            flops_per_unit=decoder_flops_per_token(model, config.block_size),
        )

    task = new_task(make, config)
    record = train(task, config, accelerator)
    if accelerator.is_main_process:
        save_results(task.model, data.tokenizer, record, **card_values(config, record))
        print(f"\nSample:\n{sample(task.model, data.tokenizer, config.prompt, min(100, config.block_size // 2))}\n")
        print_summary(record)


if __name__ == "__main__":
    run_recipe(main)
