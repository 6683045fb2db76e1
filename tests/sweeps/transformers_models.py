"""One model type of transformers: what `Config(hidden_act="gem_n2")` does to a model built from it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import pkgutil
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

import hf_gem
from hf_gem.surgery.fields import activation_fields
from tests.sweeps.look import (
    ALL,
    NAME,
    NO_BUILD,
    NO_MODEL,
    NOTHING,
    PARTLY,
    RAISES,
    SAYS_SO,
    SILENT,
    Look,
    first_line,
    look,
)

_DEPTH = re.compile(r"((num|n|en|de)\w*_)?(layers?|blocks|depth)|\w+_depth|num_\w+_layers")
_MAX_DEPTH = 4
# What a config needs beside its defaults before a model can be built from it.
_DENSE_AND_SPARSE = {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 10}
_DIFFUSION = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
_FORECAST = {"prediction_length": 24}
_HEADS = {"head_dim": 64}
_INDEXER = {"indexer_budget": 64, "indexer_compress_ratio": 4, "indexer_n_heads": 4, "indexer_kv_heads": 1}
_INDEXER |= {"indexer_head_dim": 256, "output_gate_type": "silu"}
_NO_DROPOUT = {"dropout_rate": 0.0}
_ROPE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
_SHARED = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 64}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _FORECAST),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral"), _HEADS),
    **dict.fromkeys(("t5gemma2_text", "t5gemma2_decoder"), _NO_DROPOUT),
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cohere_compass": {"text_config": {"rope_parameters": _ROPE}},
    "cohere_compass_text": {"rope_parameters": _ROPE},
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "deepseek_ocr2": {"text_config": _DENSE_AND_SPARSE},
    "deepseek_ocr2_text": _DENSE_AND_SPARSE,
    "diffusion_gemma": {"text_config": _DIFFUSION},
    "diffusion_gemma_text": _DIFFUSION,
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 4, "<image>": 5}},
    "esm": {"vocab_size": 33},
    "gemma4_assistant": {"text_config": {**_SHARED, "num_hidden_layers": 30, "num_kv_shared_layers": 30}},
    "granite4_vision": {"deepstack_layer_map": [[1, 1]], "downsample_rate": "1/2"},
    "hunyuan_vl": {"text_config": _HEADS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"num_key_value_heads": 8},
    "perception_lm": {"vision_config": {"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 192}}},
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2, "text_config": _SHARED_EXPERT}},
    "qwen3_omni_moe_talker_text": _SHARED_EXPERT,
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "t5gemma2_encoder": {"text_config": _NO_DROPOUT},
    "timm_backbone": {"backbone": "resnet18"},
    "vitmatte": {"fusion_hidden_sizes": [256, 128, 64, 32]},
}


class NoModelError(Exception):
    """A config from which no model is built."""


def names() -> list[str]:
    return sorted(configuration_auto.CONFIG_MAPPING_NAMES)


def sweep(model_type: str) -> dict[str, Any]:
    """The row of one model type."""
    start = time.perf_counter()
    row = _sweep(model_type)
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def _sweep(model_type: str) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = _config(model_type, hidden_act=NAME)
        fields = [field.path for field in activation_fields(config) if _is_set(field.value)]
        model, seen = build(model_type, {"hidden_act": NAME})
    except Exception as error:
        return _not_built(model_type, error)
    said = seen.said
    unused_names = [config for text in said for config in re.findall(r"(\w+) has \w+='", text)]
    row = {"fields": fields, "gem": seen.gem, "said": said, "unused": seen.unused, "not_run": seen.not_run}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = _after_convert(model)
        row |= {"stays": _stays(model_type, config, seen, after), "after_gem": after.gem}
        row["after_convert"] = sorted(map(list, after.others))
        row |= _other_arm(model_type, fields)
    if seen.gem and not seen.others:  # what runs there is not recognised
        row["stays"] = [["its own", config, "call"] for config in unused_names]
        row["after_convert"] = [["its own", config] for config in unused_names]
    body = [entry for entry in row["stays"] if not entry[2].startswith("field ")]
    if seen.gem:
        outcome = PARTLY if body else ALL
    elif said:
        outcome = SAYS_SO
    else:
        outcome = SILENT if seen.others or fields else NOTHING
    return {"outcome": outcome, **row}


def _is_set(value: str) -> bool:
    return value.removeprefix("gated-") == NAME


def _not_built(model_type: str, error: Exception) -> dict[str, Any]:
    """Whose fault it is: a model that cannot be built without the name either is out of reach of any."""
    try:
        build(model_type, {}, run=False)
    except NoModelError as stock:
        return {"outcome": NO_MODEL, "why": str(stock)}
    except Exception as stock:
        return {"outcome": NO_BUILD, "why": first_line(stock)}
    return {"outcome": RAISES, "why": first_line(error)}


def build(
    model_type: str, fields: dict[str, Any], edit: Callable[[Any], Any] = lambda config: None, run: bool = True
) -> tuple[PreTrainedModel, Look]:
    """A model on the meta device and what it runs; shallow, unless it is built or runs only as its defaults are.

    Args:
        model_type: As in a config.
        fields: For the config's constructor.
        edit: Changes the config afterwards.
        run: Whether to look at all.
    """
    built: list[tuple[PreTrainedModel, Look]] = []
    errors: list[Exception] = []
    for shallow in (True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = _config(model_type, **fields)
            if shallow:
                shrink(config)
            edit(config)
            for cls in model_classes(model_type, config):
                try:
                    with torch.device("meta"):
                        model = cls(config)
                except Exception as error:
                    errors.append(error)
                    continue
                said = sorted({str(w.message) for w in caught if NAME in str(w.message)})
                seen = look(model, _is_model) if run else Look()
                built.append((model, dataclasses.replace(seen, said=said)))
                break
        if built and not built[-1][1].not_run:
            return built[-1]
    if not built:
        raise errors[0]
    return built[0]


def _is_model(module: torch.nn.Module) -> bool:
    return isinstance(module, PreTrainedModel)


def _config(model_type: str, **fields: Any) -> Any:
    return AutoConfig.for_model(model_type, **_ARGUMENTS.get(model_type, {}), **fields)


def shrink(config: Any) -> None:
    """Makes a config, and the configs in it, shallow: at most 4 layers, and the lists that have an entry for each."""
    depths = set()
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            shrink(value)
        elif type(value) is int and value > _MAX_DEPTH and _DEPTH.fullmatch(name):
            depths.add(value)
            _try_to_set(config, name, _MAX_DEPTH)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) in depths:
            _try_to_set(config, name, value[:_MAX_DEPTH])
        elif name == "depths" and isinstance(value, (list, tuple)):
            _try_to_set(config, name, [min(depth, 2) for depth in value])


def _try_to_set(config: Any, name: str, value: Any) -> None:
    with contextlib.suppress(Exception):  # a field that depends on others
        setattr(config, name, value)


def model_classes(model_type: str, config: Any) -> Iterator[type[PreTrainedModel]]:
    """The base model, then whichever classes an Auto class builds from this config, else the first that takes it.

    Raises:
        NoModelError: there is none, since the config belongs to a part of another model.
    """
    tables = [table for name, table in sorted(vars(modeling_auto).items()) if re.fullmatch(r"MODEL_\w+_NAMES", name)]
    package = f"transformers.models.{configuration_auto.model_type_to_module_name(model_type)}"
    names = [table[model_type] for table in (modeling_auto.MODEL_MAPPING_NAMES, *tables) if model_type in table]
    known = (name if isinstance(name, str) else name[0] for name in names)
    folder = importlib.import_module(package)
    found = [getattr(folder, name, None) or getattr(transformers, name, None) for name in dict.fromkeys(known)]
    if any(found):
        yield from filter(None, found)
        return
    for info in pkgutil.iter_modules(folder.__path__):
        if info.name.startswith("modeling_"):
            for name, cls in vars(importlib.import_module(f"{package}.{info.name}")).items():
                is_model = inspect.isclass(cls) and issubclass(cls, PreTrainedModel)
                if is_model and not name.endswith("PreTrainedModel") and cls.config_class is type(config):
                    yield cls
                    return
    raise NoModelError(f"{type(config).__name__} belongs to a part of another model")


def _stays(model_type: str, config: Any, seen: Look, after: Look) -> list[list[str]]:
    """[function, place, why] of the activations that are not GEM."""
    fields = [field.path for field in activation_fields(config) if not field.is_body]
    by_field: set[tuple[str, str]] = set()
    if fields and seen.others:
        with contextlib.suppress(Exception):  # a field that takes no other value
            edit = lambda config: hf_gem.set_activation(config, NAME, fields=fields)  # noqa: E731
            by_field = seen.others - build(model_type, {"hidden_act": NAME}, edit)[1].others
    other_body = [field.path for field in activation_fields(config) if field.is_body and not _is_set(field.value)]
    by_body: set[tuple[str, str]] = set()
    if other_body and seen.others:
        with contextlib.suppress(Exception):
            edit = lambda config: hf_gem.set_activation(config, NAME, fields=other_body)  # noqa: E731
            by_body = seen.others - build(model_type, {"hidden_act": NAME}, edit)[1].others
    stays = []
    for other in sorted(seen.others):
        if other in by_field:
            why = "field " + ", ".join(fields)
        elif other in by_body:
            why = "body field " + ", ".join(other_body)
        else:
            why = "call" if other in after.others else "module"
        stays.append([*other, why])
    return stays


def _after_convert(model: PreTrainedModel) -> Look:
    try:
        hf_gem.convert(model, NAME)
    except ValueError as error:
        if not re.search("nothing to replace|no activation modules", str(error)):
            raise
    return look(model, _is_model)


def _other_arm(model_type: str, fields: list[str]) -> dict[str, Any]:
    """`set_activation` on the default config, where it sets other fields than `hidden_act` does."""
    config = _config(model_type)
    try:
        changed = [change.path for change in hf_gem.set_activation(config, NAME)]
    except ValueError:
        changed = []
    if set(changed) == set(fields):
        return {}
    row: dict[str, Any] = {"set_activation": changed}
    if changed:
        try:
            _, seen = build(model_type, {}, lambda config: hf_gem.set_activation(config, NAME))
        except Exception as error:
            return row | {"set_activation_raises": first_line(error)}
        row |= {"set_activation_gem": seen.gem, "set_activation_others": sorted(map(list, seen.others))}
    return row
