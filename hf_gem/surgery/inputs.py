"""Makes up inputs for a transformers or timm model, from its config and the signature of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .fields import nested_configs

_TOKENS, _FRAMES = 16, 96


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Makes up the inputs of a forward pass: one sample, as short as the model allows.

    Args:
        model: A timm model, or a transformers model: any model with `config` and `main_input_name`.

    Returns:
        Keyword arguments of `model`, on the device and in the dtype of its first floating-point parameter.

    Raises:
        ValueError: The inputs of such a model, or one input that it requires, are not known.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    inside = getattr(model, "get_base_model", lambda: model)()  # the forward of a PEFT model may be (*args, **kwargs)
    signature = inspect.signature(inside.forward).parameters
    timm_config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if timm_config and "input_size" in timm_config:
        size = _timm_size(model, timm_config)
        return {next(iter(signature)): torch.zeros(1, *size, device=first.device, dtype=first.dtype)}
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise ValueError(
            f"no inputs can be made up for {type(model).__name__}. This is only possible for transformers and timm "
            "models. Pass the inputs as you would pass them to the model: audit(model, x) or audit(model, "
            "input_ids=ids)."
        )
    found = _Config(config)
    wanted = _wanted({main} if isinstance(main, str) else set(main), signature, found)
    if not wanted:
        raise ValueError(
            f"the forward of {type(model).__name__} does not name its inputs, so none can be made up. Pass all inputs "
            "yourself: audit(model, input_ids=ids, ...)."
        )
    if unknown := [name for name in wanted if name not in _MAKERS]:
        raise ValueError(
            f"{type(model).__name__} needs {', '.join(unknown)}, which cannot be made up. Only common inputs such as "
            "token ids and images can. Pass all inputs yourself: audit(model, input_ids=ids, ...)."
        )
    with first.device:
        made = {name: _MAKERS[name](found) for name in wanted}
    return {name: value.to(first.dtype) if value.is_floating_point() else value for name, value in made.items()}


class _Config:
    """Reads a field from a config, or from the first of its sub-configs that has it."""

    def __init__(self, config: Any) -> None:
        self._configs = list(nested_configs(config).values())

    def get(self, *names: str, default: Any = None) -> Any:
        values = (getattr(config, name, None) for name in names for config in self._configs)
        return next((value for value in values if value is not None), default)

    def has(self, *names: str) -> bool:
        return self.get(*names) is not None


def _timm_size(model: nn.Module, timm_config: Any) -> tuple[int, ...]:
    """Returns the input size that a model was built for, which may differ from that of its pretrained weights."""
    channels, *size = timm_config["input_size"]
    stem = timm_config.get("first_conv")
    if isinstance(stem, str):
        channels = getattr(model.get_submodule(stem), "in_channels", channels)
    return channels, *(getattr(getattr(model, "patch_embed", None), "img_size", None) or size)


def _wanted(main: set[str], signature: Mapping[str, inspect.Parameter], config: _Config) -> list[str]:
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    wanted = {*main, *(name for name, p in signature.items() if p.default is p.empty and p.kind is positional)}
    # Two towers, as in CLIP. If images replace tokens, only the processor knows the number of these tokens.
    if main <= _TOWERS and not config.has("image_token_id", "image_token_index", "audio_token_id", "audio_token_index"):
        wanted |= _TOWERS
    if config.get("is_encoder_decoder"):
        wanted.add("decoder_input_ids")
    if "input_ids" in wanted & signature.keys():
        wanted |= {"attention_mask", "bbox"}
    return [name for name in signature if name in wanted]


def _ids(config: _Config, length: int = _TOKENS) -> Tensor:
    ids = torch.ones(1, length, dtype=torch.long)
    end = config.get("eos_token_id")
    ids[0, -1] = end if isinstance(end, int) else 1  # BART and similar models classify at the end-of-text token
    return ids


def _image(config: _Config) -> tuple[int, ...]:
    size = config.get("image_size", "img_size", "input_size", default=224)
    if isinstance(size, dict):
        size = tuple(size.values())
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return config.get("num_channels", "in_channels", "in_chans", default=3), height, width


def _pixels(config: _Config) -> Tensor:
    frames = config.get("num_frames", "frames_per_clip")
    return torch.zeros(1, *_image(config)) if frames is None else torch.zeros(1, frames, *_image(config))


def _samples(config: _Config) -> Tensor:
    """Returns a waveform, with a channel dimension for codecs, or a spectrogram for models that read one."""
    bins, length = config.get("num_mel_bins"), config.get("max_length")
    if bins and length:
        return torch.zeros(1, length, bins)
    channels = config.get("audio_channels", default=1 if config.has("codebook_size") else None)
    return torch.zeros(1, 19200) if channels is None else torch.zeros(1, channels, 19200)


def _features(config: _Config) -> Tensor:
    bins, positions = config.get("num_mel_bins"), config.get("max_source_positions")
    if bins and positions and not config.has("input_feat_per_channel"):  # the convolutions of Whisper
        return torch.zeros(1, bins, 2 * positions)
    names = ("input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins", "input_dim")
    return torch.zeros(1, _FRAMES, config.get(*names, default=80))


_MAKERS: dict[str, Callable[[_Config], Tensor]] = {
    "input_ids": _ids,
    "attention_mask": lambda config: torch.ones(1, _TOKENS, dtype=torch.long),
    "bbox": lambda config: torch.zeros(1, _TOKENS, 4, dtype=torch.long),
    "decoder_input_ids": lambda config: _ids(config, 4),
    "pixel_values": _pixels,
    "pixel_values_videos": lambda config: torch.zeros(1, config.get("num_frames", default=8), *_image(config)),
    "input_values": _samples,
    "input_features": _features,
    "input_features_mask": lambda config: torch.ones(1, _FRAMES, dtype=torch.long),
}
_TOWERS = {"input_ids", "pixel_values", "input_values", "input_features"}
