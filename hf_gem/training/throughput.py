"""Computes the share of a device's peak that training reaches."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel

# Dense bf16 tensor-core peak in FLOP/s, from the vendors' data sheets, by a part of torch's device name.
_PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
    "MI300X": 1307e12,
}
FLOP_COUNT = "6 N + 12 layers * width * context per token (PaLM, appendix B; N parameters without positions)"


def peak_flops(device: torch.device) -> float | None:
    """Returns the dense bf16 peak of a device in FLOP/s, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # Match whole words: an L4 is not an L40, and unlisted devices, such as laptop GPUs, have no known peak.
    return next((peak for key, peak in _PEAK_BF16.items() if re.search(rf"\b{key}\b(?! Laptop| NVL)", name)), None)


def decoder_flops_per_token(model: PreTrainedModel, block_size: int) -> float:
    """Computes the training FLOPs per token of a transformers decoder, by `FLOP_COUNT`."""
    layers: int = model.config.num_hidden_layers
    width: int = model.config.hidden_size
    positions = getattr(model.base_model, "wpe", None)
    parameters = sum(p.numel() for p in model.parameters()) - (positions.weight.numel() if positions else 0)
    return 6.0 * parameters + 12.0 * layers * width * block_size
