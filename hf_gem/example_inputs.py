"""Made-up inputs for a model of transformers or timm, from its config and the signature of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 16


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """The inputs a forward pass needs: one sample, as short as the model allows.

    Args:
        model: A model of timm, or of transformers: whatever has `config` and `main_input_name`.

    Returns:
        Keyword arguments of `model`, on the device and in the dtype of its first floating-point parameter.

    Raises:
        ValueError: nothing is known of the inputs of such a model.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    to = {"device": first.device, "dtype": first.dtype}
    signature = inspect.signature(model.forward).parameters
    timm_config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if timm_config and "input_size" in timm_config:
        return {next(iter(signature)): torch.zeros(1, *_timm_size(model, timm_config["input_size"]), **to)}
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise ValueError(
            f"no inputs can be made up for {type(model).__name__}, which is no model of transformers or timm; "
            "pass them as you would to the model: audit(model, x) or audit(model, input_ids=ids)"
        )
    found = _Config(config)
    makers = {**_MAKERS, main: _MAKERS.get(main, _ids)}
    wanted = [name for name, parameter in signature.items() if _is_wanted(name, parameter, main, signature, found)]
    made = {name: makers[name](found) for name in wanted if name in makers}
    return {
        name: value.to(**to) if value.is_floating_point() else value.to(first.device) for name, value in made.items()
    }


class _Config:
    """Reads a field from a config, or from the first of its sub-configs that has it."""

    def __init__(self, config: Any) -> None:
        self._configs = list(_nested(config))

    def get(self, *names: str, default: Any = None) -> Any:
        values = (getattr(config, name, None) for name in names for config in self._configs)
        return next((value for value in values if value is not None), default)

    def has(self, *names: str) -> bool:
        return self.get(*names) is not None


def _nested(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, name, None)) is not None:
            yield from _nested(inner)


def _timm_size(model: nn.Module, default: tuple[int, int, int]) -> tuple[int, ...]:
    """The size a model was built for, which need not be that of its pretrained weights."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) or default[1:]
    stem = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = stem.in_channels * stem.groups // stem.groups if stem is not None else default[0]
    return channels, *size


def _is_wanted(name: str, parameter: inspect.Parameter, main: str, signature: Any, config: _Config) -> bool:
    required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    if name == main or required or name == "bbox":
        return True
    if name == "decoder_input_ids":
        return bool(config.get("is_encoder_decoder", default=False))
    # Two towers, such as CLIP's. Where images take the place of tokens, the number of these is the processor's affair.
    both = {"input_ids", "pixel_values"} <= signature.keys()
    return both and name in ("input_ids", "pixel_values") and not config.has("image_token_id", "image_token_index")


def _ids(config: _Config, length: int = _TOKENS) -> Tensor:
    ids = torch.ones(1, length, dtype=torch.long)
    end = config.get("eos_token_id")
    ids[0, -1] = end if isinstance(end, int) else 1  # BART and its like classify from where it stands
    return ids


def _images(config: _Config) -> Tensor:
    size = config.get("image_size", "img_size", "input_size", default=224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = config.get("num_channels", "in_channels", "in_chans", default=3)
    frames = config.get("num_frames", "frames_per_clip")
    return torch.zeros(1, *([frames] if frames else []), channels, height, width)


def _samples(config: _Config) -> Tensor:
    """A waveform, or a spectrogram for the models that read one."""
    if config.has("num_mel_bins", "max_length"):
        return torch.zeros(1, config.get("max_length"), config.get("num_mel_bins"))
    return torch.zeros(1, *([config.get("audio_channels")] if config.has("audio_channels") else []), 16000)


def _features(config: _Config) -> Tensor:
    if config.has("max_source_positions") and config.has("num_mel_bins"):
        return torch.zeros(1, config.get("num_mel_bins"), 2 * config.get("max_source_positions"))
    width = config.get(
        "input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins", "input_dim", default=80
    )
    return torch.zeros(1, 100, width)


_MAKERS = {
    "input_ids": _ids,
    "decoder_input_ids": lambda config: _ids(config, 4),
    "pixel_values": _images,
    "pixel_values_videos": _images,
    "input_values": _samples,
    "input_features": _features,
    "bbox": lambda config: torch.zeros(1, _TOKENS, 4, dtype=torch.long),
}
