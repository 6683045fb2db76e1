"""Builds the models that the benchmarks train, from their configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_gem.training.loss import WHOLE_SEQUENCES


@dataclass(frozen=True)
class Size:
    """The size of a model and its batch. `length` is the length of a sequence, or the side of an image."""

    batch: int
    length: int
    layers: int = 12
    width: int = 768
    vocabulary: int = 50304


def build(model: str, activation: str, size: Size) -> nn.Module:
    """Builds a model from its config, with random weights that do not depend on the activation."""
    torch.manual_seed(0)
    heads = max(1, size.width // 64)
    if model == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        gpt2 = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size.vocabulary, n_positions=size.length, n_embd=size.width, n_layer=size.layers,
                n_head=heads, activation_function=activation, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                use_cache=False, bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
        return _on_whole_sequences(gpt2)
    if model == "bert":
        from transformers import BertConfig, BertForMaskedLM

        bert = BertForMaskedLM(
            BertConfig(
                vocab_size=size.vocabulary, max_position_embeddings=size.length, hidden_size=size.width,
                num_hidden_layers=size.layers, num_attention_heads=heads, intermediate_size=4 * size.width,
                hidden_act=activation, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip
        return _on_whole_sequences(bert)
    import timm

    return timm.create_model("resnet50", act_layer=activation)


def _on_whole_sequences(model: Any) -> nn.Module:
    model.set_attn_implementation(WHOLE_SEQUENCES)
    return model
