"""Runs transformers' `ModelTesterMixin` for small models of many types with the activation PEERS_ACT.

run.py runs this in the folder of transformers' sources, so `tests` is their package.
"""

from __future__ import annotations

import os
import unittest
from types import SimpleNamespace
from typing import Any

import torch
import transformers

import hf_gem  # noqa: F401  # registers the names
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask

ACT = os.environ["PEERS_ACT"]
_BATCH, _LENGTH, _WIDTH, _HEADS, _VOCABULARY, _IMAGE, _PATCH = 3, 7, 32, 4, 99, 32, 8
_TOKENS = {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_USUAL = {
    **_TOKENS,
    "hidden_size": _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": _HEADS,
    "intermediate_size": 32,  # grouped products of experts need multiples of 16 bytes
    "max_position_embeddings": 64,
}
_DECODER = {**_USUAL, "num_key_value_heads": 2}
_VISION = {"image_size": _IMAGE, "num_channels": 3}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_channels": 3}


def _text() -> dict[str, torch.Tensor]:
    return {
        "input_ids": ids_tensor([_BATCH, _LENGTH], _VOCABULARY - 3) + 3,
        "attention_mask": random_attention_mask([_BATCH, _LENGTH]),
    }


def _pair() -> dict[str, torch.Tensor]:
    return {**_text(), **{f"decoder_{name}": tensor for name, tensor in _text().items()}}


def _image() -> dict[str, torch.Tensor]:
    return {"pixel_values": floats_tensor([_BATCH, 3, _IMAGE, _IMAGE])}


# Type -> its field for the activation, the other fields of a small config, its classes and its inputs.
_TYPES: dict[str, tuple[str, dict[str, Any], list[str], Any]] = {
    "Bert": ("hidden_act", _USUAL, ["Model", "ForMaskedLM", "ForSequenceClassification"], _text),
    "Roberta": ("hidden_act", _USUAL, ["Model", "ForMaskedLM", "ForTokenClassification"], _text),
    "DistilBert": (
        "activation",
        {**_TOKENS, "dim": _WIDTH, "hidden_dim": 37, "n_layers": 2, "n_heads": _HEADS, "max_position_embeddings": 64},
        ["Model", "ForMaskedLM", "ForQuestionAnswering"],
        _text,
    ),
    "GPT2": (
        "activation_function",
        {**_TOKENS, "n_embd": _WIDTH, "n_layer": 2, "n_head": _HEADS, "n_positions": 64},
        ["Model", "LMHeadModel"],
        _text,
    ),
    "OPT": (
        "activation_function",
        {**{k: v for k, v in _USUAL.items() if k != "intermediate_size"}, "ffn_dim": 37, "word_embed_proj_dim": _WIDTH},
        ["Model", "ForCausalLM"],
        _text,
    ),
    "GPTNeoX": ("hidden_act", _USUAL, ["Model", "ForCausalLM"], _text),
    "Phi": ("hidden_act", _DECODER, ["Model", "ForCausalLM"], _text),
    "Llama": ("hidden_act", _DECODER, ["Model", "ForCausalLM", "ForSequenceClassification"], _text),
    "Gemma": ("hidden_act", {**_DECODER, "head_dim": 8}, ["Model", "ForCausalLM"], _text),
    "Mixtral": ("hidden_act", {**_DECODER, "num_local_experts": 4}, ["Model", "ForCausalLM"], _text),
    "T5": (
        "feed_forward_proj",
        {**_TOKENS, "d_model": _WIDTH, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": _HEADS}
        | {"decoder_start_token_id": 0, "eos_token_id": 1},
        ["Model", "ForConditionalGeneration"],
        _pair,
    ),
    "Bart": (
        "activation_function",
        {**_TOKENS, "d_model": _WIDTH, "max_position_embeddings": 64, "decoder_start_token_id": 2}
        | {f"{side}_{name}": v for side in ("encoder", "decoder")
           for name, v in (("layers", 2), ("attention_heads", _HEADS), ("ffn_dim", 37))},
        ["Model", "ForConditionalGeneration"],
        _pair,
    ),
    "ViT": (
        "hidden_act",
        {k: v for k, v in _USUAL.items() if k in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        | {**_VISION, "intermediate_size": 37, "patch_size": _PATCH},
        ["Model", "ForImageClassification"],
        _image,
    ),
    "ResNet": (
        "hidden_act",
        {**_STAGES, "embedding_size": 8, "layer_type": "basic"},
        ["Model", "ForImageClassification"],
        _image,
    ),
    "ConvNext": ("hidden_act", {**_STAGES, "num_stages": 2}, ["Model", "ForImageClassification"], _image),
}  # fmt: skip


def _tester(name: str) -> SimpleNamespace:
    field, fields, _, inputs = _TYPES[name]
    tester = SimpleNamespace(batch_size=_BATCH, seq_length=_LENGTH, hidden_size=_WIDTH, num_attention_heads=_HEADS)
    vars(tester).update(is_training=True, num_hidden_layers=2, image_size=_IMAGE, patch_size=_PATCH)
    vars(tester).update(encoder_seq_length=_LENGTH, decoder_seq_length=_LENGTH, key_length=_LENGTH)
    tester.get_config = lambda: getattr(transformers, f"{name}Config")(**fields, **{field: ACT})
    tester.prepare_config_and_inputs_for_common = lambda: (tester.get_config(), inputs())
    return tester


def _case(name: str) -> type:
    _, _, classes, inputs = _TYPES[name]
    is_convolution = name in ("ResNet", "ConvNext")

    def set_up(self: Any) -> None:
        torch.manual_seed(0)
        self.model_tester = _tester(name)

    attributes = {
        "all_model_classes": tuple(getattr(transformers, name + kind) for kind in classes),
        "is_encoder_decoder": inputs is _pair,
        "has_attentions": not is_convolution,
        "test_resize_embeddings": inputs is not _image,
        "setUp": set_up,
        "__module__": __name__,
    }
    return type(f"{name}ModelTest", (ModelTesterMixin, GenerationTesterMixin, unittest.TestCase), attributes)


globals().update({f"{name}ModelTest": _case(name) for name in _TYPES})
