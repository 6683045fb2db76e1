"""Initialisation: the gain of an activation, which preserves the second moment or the variance across layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .family.names import parse
from .files import shown
from .modules import get_activation

TRANSFORMERS_STD = 0.02  # `initializer_range` of GPT-2, BERT and most others


def gain(activation: str | Callable[[Tensor], Tensor], centered: bool = False) -> float:
    r"""Returns the gain of an activation f, `1 / sqrt(E[f(Z)^2])` for a unit normal Z.

    He-style initialisation draws weights with std `gain / sqrt(fan_in)`. The gain of ReLU is sqrt(2).

    The centered gain is `1 / std(f(Z))`. Normalizer-free networks standardise their weights to mean 0, which cancels
    the mean of f(Z), and scale them by this gain, called gamma (arXiv 2101.08692). For ReLU it is
    sqrt(2 / (1 - 1/pi)).

    The expectation is a trapezoidal sum over `log|z|`. It converges exponentially, because the integrand is analytic
    there and decays on both sides. Its error is below 1e-10 unless the moment leaves the range of float64.

    Args:
        activation: A name of the family, or any elementwise function of a float64 tensor, such as
            `torch.nn.functional.gelu`. For a learnable name, the gain is that of the initial eps.
        centered: Whether to subtract the mean of f(Z) first.

    Returns:
        The gain, dimensionless.

    Raises:
        ValueError: The name is malformed, or the function is zero (centered: constant) or not finite on unit normal
            input.
    """
    function = activation if callable(activation) else get_activation(replace(parse(activation), learnable=False).name)
    step = 1 / 512  # the nearest pole in log z is pi/2n away, so n = 32 needs a step as small as this
    z = torch.exp(torch.arange(-40, math.log(40), step, dtype=torch.float64, device="cpu"))
    density = torch.exp(-z * z / 2) * z * (step / math.sqrt(2 * math.pi))
    with torch.no_grad():
        values = torch.stack((function(z.clone()), function(-z)))  # it may work in place
        mean = (values * density).sum() if centered else 0.0
        moment = float(((values - mean) ** 2 * density).sum())
    if not (math.isfinite(moment) and moment > 0):
        kind = "variance" if centered else "second moment"
        raise ValueError(
            f"{shown(activation)} has a {kind} of {moment} on unit normal input. The {kind} must be positive and "
            "finite. Choose another activation, or set the std of the weights yourself."
        )
    return 1 / math.sqrt(moment)


def std_like_width(width: int, like_width: int) -> float:
    """Returns the std of initial weights that gives a narrow model activation inputs as large as those of a wider one.

    Transformers draws every weight with std 0.02. A layer with `width` inputs of second moment 1 then has outputs with
    a root mean square of `0.02 sqrt(width)`, which is 0.55 at width 768 and 0.16 at width 64. This function returns
    `0.02 sqrt(like_width / width)`.

    Args:
        width: Width of the model.
        like_width: Width of the model whose activation inputs to reproduce. 0 means the std of transformers, 0.02.
    """
    return TRANSFORMERS_STD * math.sqrt((like_width or width) / width)


def init_feed_forward_(
    up: Tensor, down: Tensor, width: int, activation: str | Callable[[Tensor], Tensor], scale: float = 1.0
) -> None:
    """Initialises the two layers around an activation, using its gain.

    If the input has a second moment of 1, as it does after a normalisation layer, then so do the inputs of the
    activation, and the output has a second moment of `scale^2`, whatever the activation. Transformers draws weights
    with a fixed std of 0.02 instead. In small models the inputs of activations are then so small that activations
    differ more in scale than in shape.

    Args:
        up: Weight of the first layer, in any layout.
        down: Weight of the second layer.
        width: Number of inputs of the first layer.
        activation: A name of the family, or an elementwise function; see `gain`.
        scale: Root mean square of the output.
    """
    nn.init.normal_(up, std=1 / math.sqrt(width))
    nn.init.normal_(down, std=scale * gain(activation) * math.sqrt(width / up.numel()))
