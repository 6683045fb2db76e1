"""Initialisation: the gain that keeps the second moment, or the variance, of a layer's input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .family.names import parse
from .modules import get_activation

TRANSFORMERS_STD = 0.02  # `initializer_range` of GPT-2, BERT and most others


def gain(activation: str | Callable[[Tensor], Tensor], centered: bool = False) -> float:
    r"""`1 / sqrt(E[f(Z)^2])` for a unit normal Z: He-style initialisation draws weights with std `gain / sqrt(fan_in)`.

    ReLU has sqrt(2). Centered, it is `1 / std(f(Z))`, the gamma by which normaliser-free networks scale weights that
    are standardised to mean 0, over which the mean of f(Z) cancels (arXiv 2101.08692); ReLU has sqrt(2 / (1 - 1/pi)).

    The expectation is a trapezoidal sum over `log|z|`, which converges exponentially because the integrand is analytic
    there and decays on both sides; its error is below 1e-10 unless the moment leaves the range of float64.

    Args:
        activation: A name of the family, or any elementwise function of a float64 tensor, such as
            `torch.nn.functional.gelu`, to compare with. A learnable name counts with its initial eps.
        centered: Whether the mean of f(Z) is taken off first.

    Returns:
        The gain, dimensionless.

    Raises:
        ValueError: the name is malformed, or the function is zero (centered: constant) or not finite on unit normal
            input.
    """
    function = activation if callable(activation) else get_activation(replace(parse(activation), learnable=False).name)
    step = 1 / 512  # the nearest pole in log z lies pi/2n away, so that n = 32 needs a step this small
    z = torch.exp(torch.arange(-40, math.log(40), step, dtype=torch.float64, device="cpu"))
    density = torch.exp(-z * z / 2) * z * (step / math.sqrt(2 * math.pi))
    with torch.no_grad():
        values = torch.stack((function(z), function(-z)))
        mean = (values * density).sum() if centered else 0.0
        moment = float(((values - mean) ** 2 * density).sum())
    if not (math.isfinite(moment) and moment > 0):
        kind = "variance" if centered else "second moment"
        raise ValueError(f"{activation!r} has {kind} {moment} on unit normal input: no gain keeps it")
    return 1 / math.sqrt(moment)


def std_like_width(width: int, like_width: int) -> float:
    """The std of initial weights with which a model of one width gives its activations the inputs of one of another.

    Transformers draws every weight with std 0.02, so that a layer of `width` inputs of second moment 1 has outputs with
    a root mean square of `0.02 sqrt(width)`: 0.55 at 768, 0.16 at 64. This is `0.02 sqrt(like_width / width)`.

    Args:
        width: Of the model.
        like_width: Of the one that it stands for; 0 for the 0.02 of transformers.
    """
    return TRANSFORMERS_STD * math.sqrt((like_width or width) / width)


def init_feed_forward_(
    up: Tensor, down: Tensor, width: int, activation: str | Callable[[Tensor], Tensor], scale: float = 1.0
) -> None:
    """Draws the weights of the two layers around an activation so that its own gain makes up for what it takes off.

    Where the input has a second moment of 1, as behind a normalisation, so have the activation's inputs, and the output
    has `scale^2`, whatever the activation. Transformers draws with a fixed std of 0.02 instead, which in small models
    gives activations inputs so small that they differ in scale more than in shape.

    Args:
        up: Weight of the first layer, of any layout.
        down: Weight of the second.
        width: Inputs of the first.
        activation: As in `gain`.
        scale: Of the output.
    """
    nn.init.normal_(up, std=1 / math.sqrt(width))
    nn.init.normal_(down, std=scale * gain(activation) * math.sqrt(width / up.numel()))
