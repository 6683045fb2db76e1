"""Pretrains BERT from scratch with any activation: accelerate launch recipes/bert_pretrain.py --preset demo"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from hf_gem.init import init_feed_forward_, std_like_width
from hf_gem.training.config import TrainConfig, at_least, option, parse_config, require
from hf_gem.training.data.masking import MaskedBlocks
from hf_gem.training.data.text import TextConfig, prepare_text
from hf_gem.training.initial import new_task
from hf_gem.training.launch import make_accelerator
from hf_gem.training.loop import train
from hf_gem.training.loss import MaskedLMLoss
from hf_gem.training.report import print_summary, save_results, text_card
from hf_gem.training.signals import run_recipe
from hf_gem.training.task import Task

_SMALL: dict[str, Any] = {
    "n_layer": 4, "n_embd": 512, "n_head": 8, "n_inner": 2048, "block_size": 128,
    "dataset": "wikimedia/wikipedia", "dataset_config": "20231101.en", "tokenizer": "google-bert/bert-base-uncased",
    "validation_fraction": 0.001, "streaming": True,
    "global_batch_size": 256, "micro_batch_size": 256, "learning_rate": 5e-4, "dropout": 0.1,
    "mixed_precision": "bf16", "compile": True, "log_every": 20,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    # 1.0M parameters, on the standard library's source: minutes on two CPU cores.
    "demo": {
        "n_layer": 2, "n_embd": 128, "n_head": 4, "n_inner": 512, "block_size": 64,
        "vocab_size": 4096, "validation_fraction": 0.02, "min_validation_tokens": 30_000,
        "steps": 300, "global_batch_size": 64, "micro_batch_size": 64, "warmup_steps": 18, "learning_rate": 3e-3,
        "eval_every": 100, "save_every": 100, "log_every": 10,
    },
    # The size of google/bert_uncased_L-4_H-512_A-8, 28.8M parameters; 33k tokens per step.
    "bert-small": {
        **_SMALL, "steps": 100_000, "warmup_steps": 6000, "max_train_tokens": 2_000_000_000,
        "eval_every": 2000, "save_every": 5000,
    },
    # As short as in arXiv 2604.21677.
    "bert-small-paper": {
        **_SMALL, "steps": 3000, "warmup_steps": 180, "max_train_tokens": 100_000_000, "validation_fraction": 0.0025,
        "eval_every": 250, "save_every": 500,
    },
}  # fmt: skip


@dataclass
class Config(TextConfig, TrainConfig):
    """The config of this recipe."""

    runtime: ClassVar[frozenset[str]] = frozenset({"prompt"})
    special_tokens: ClassVar[dict[str, str]] = {
        f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")
    }

    adam_beta2: float = option(0.98, "AdamW beta 2.")
    lr_schedule: Literal["cosine", "linear", "step"] = option(
        "linear", "Decay of the learning rate after the warm-up; step divides it by 10 at 1/2 and at 3/4 of all steps."
    )
    min_lr_ratio: float = option(0.0, "Final learning rate as a fraction of the peak.")
    weight_decay: float = option(0.01, "Weight decay of matrices; nothing else is decayed.")

    n_layer: int = option(4, "Number of transformer blocks.")
    n_embd: int = option(512, "Width of the hidden states.")
    n_head: int = option(8, "Number of attention heads.")
    n_inner: int = option(2048, "Width of the feed-forward layers.")
    dropout: float = option(0.0, "Dropout rate of all layers.")
    own_gain: bool = option(
        False, "Draw the weights around each activation, also in the head, so that it preserves the scale of its input."
    )
    init_like_width: int = option(
        0, "Draw the weights so that activations get inputs of the scale in a model of this width; 0: std 0.02."
    )
    mask_probability: float = option(0.15, "Share of tokens to predict.")
    prompt: str = option("import [MASK]", "Text whose masked tokens are filled in at the end.")

    def validate(self) -> None:
        """Raises ValueError, naming the field, if a value makes no sense."""
        TextConfig.validate(self)
        TrainConfig.validate(self)
        at_least(self, 1, "n_layer", "n_embd", "n_head", "n_inner")
        at_least(self, 3, "block_size")
        at_least(self, 0, "init_like_width")
        require(self.n_embd % self.n_head == 0, "n_embd", self.n_embd, f"a multiple of n_head = {self.n_head}")
        both = self.own_gain and self.init_like_width
        require(not both, "init_like_width", self.init_like_width, "0 with --own_gain, which draws the same weights")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        require(0 < self.mask_probability < 1, "mask_probability", self.mask_probability, "between 0 and 1")


def build_model(config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> BertForMaskedLM:
    """Builds BERT without next-sentence prediction."""
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            intermediate_size=config.n_inner,
            hidden_act=config.hidden_act,
            initializer_range=std_like_width(config.n_embd, config.init_like_width),
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            max_position_embeddings=max(512, config.block_size),
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if config.own_gain:
        layers: Any = model.bert.encoder.layer
        for layer in layers:
            up, down = layer.intermediate.dense.weight, layer.output.dense.weight
            init_feed_forward_(up, down, config.n_embd, ACT2FN[config.hidden_act])
        # The input of the activation in the head gets a second moment of 1 too. A normalisation follows it.
        torch.nn.init.normal_(model.cls.predictions.transform.dense.weight, std=config.n_embd**-0.5)
    return model


@torch.no_grad()
def fill_in(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Replaces the masks in a prompt with the most likely tokens."""
    cls, sep, mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
    text = tokenizer(prompt, add_special_tokens=False)["input_ids"][: model.config.max_position_embeddings - 2]
    ids = torch.tensor([[cls, *text, sep]], device=model.device)
    best = model.eval()(input_ids=ids).logits.argmax(-1)
    return str(tokenizer.decode(torch.where(ids == mask, best, ids)[0, 1:-1]))


def card_values(config: Config, record: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of the model card that are not in the record."""
    return text_card(
        record,
        title=f"BERT {record['preset']}, {config.hidden_act}",
        architecture="BERT",
        pipeline_tag="fill-mask",
        auto_class="AutoModelForMaskedLM",
        loss_unit="nats per masked token",
        limits="This encoder fills in masked tokens. It was trained without next-sentence prediction, on sequences of "
        f"{config.block_size} tokens. For other tasks it needs fine-tuning.",
    )


def main(argv: list[str] | None = None) -> None:
    config, preset = parse_config(Config, PRESETS, "demo", argv)
    config.output_dir = config.output_dir or f"runs/bert-{preset}-{config.act_label}-seed{config.seed}"
    data = prepare_text(config, smallest_sample=config.block_size - 2)  # without [CLS] and [SEP]
    accelerator = make_accelerator(config)

    def masked(blocks: Any) -> MaskedBlocks:
        sizes = config.block_size, data.tokenizer, config.mask_probability, config.data_seed
        return MaskedBlocks(blocks.tokens, *sizes, blocks.ends)

    def make() -> Task:
        model = build_model(config, data.tokenizer, data.vocab_size)
        return Task(
            name="bert_pretrain",
            preset=preset,
            model=model,
            objective=MaskedLMLoss(model, head="cls"),
            train=masked(data.train),
            validation=masked(data.validation),
            test=data.test and masked(data.test),
            data=data.facts,
            units_per_sample=config.block_size,
        )

    task = new_task(make, config)
    record = train(task, config, accelerator)
    if accelerator.is_main_process:
        save_results(task.model, data.tokenizer, record, **card_values(config, record))
        print(f"\nFilled in: {fill_in(task.model, data.tokenizer, config.prompt)}\n")
        print_summary(record)


if __name__ == "__main__":
    run_recipe(main)
