"""Objectives: modules whose forward returns the summed loss of a batch, which the caller can then normalise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..modules import GemActivation
from .pde import Problem

CHUNK_SIZE = 4096  # tokens: 0.8 GB of float32 logits with a vocabulary of 50k
IGNORE = -100  # a label that is not a target, as in torch and transformers

# SDPA for sequences that are neither padded nor packed. It is registered without a mask function, so transformers does
# not check for padding or packing. The check waits for the device. A compiler cannot check, and makes a mask that flash
# attention does not support.
WHOLE_SEQUENCES = "sdpa_whole_sequences"
AttentionInterface.register(WHOLE_SEQUENCES, sdpa_attention_forward)


class Output(NamedTuple):
    """The output of an objective for a batch.

    Attributes:
        loss: Sum over all targets, a float32 scalar.
        predictions: The most likely class of each sample (int64) for a classifier, or the value at each point for a
            field.
        losses: The loss of each target in evaluation, float32 in the shape of the labels; 0 where there is no target.
    """

    loss: Tensor
    predictions: Tensor | None = None
    losses: Tensor | None = None

    @classmethod
    def evaluated(cls, losses: Tensor, labels: Tensor, predictions: Tensor | None = None) -> Output:
        """Makes the output of an evaluation from the loss of each target."""
        return cls(losses.sum(), predictions, losses.view(labels.shape))


def chunked_cross_entropy(
    hidden: Tensor, head: nn.Module, labels: Tensor, chunk_size: int, reduction: Literal["sum", "none"] = "sum"
) -> Tensor:
    """Computes the cross-entropy of `head(hidden)` in float32, with the logits of one chunk in memory at a time.

    The backward pass recomputes the logits of each chunk, so the full logits and their float32 copy never exist. If one
    chunk holds everything, nothing is recomputed.

    Args:
        hidden: Last hidden states, (tokens, width).
        head: Maps (tokens, width) to logits (tokens, vocabulary).
        labels: Labels, int64 of shape (tokens,). Labels equal to `IGNORE` are left out.
        chunk_size: Tokens in a chunk; 0 takes all tokens at once.
        reduction: Whether to return the sum, or the loss of each token.

    Returns:
        A float32 scalar, or (tokens,).
    """

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), labels, ignore_index=IGNORE, reduction=reduction)

    if chunk_size == 0 or len(labels) <= chunk_size:
        return loss(hidden, labels)
    if reduction == "none":
        return torch.cat([loss(*part) for part in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)])
    total = torch.zeros((), device=hidden.device)
    for part, target in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
        total = total + checkpoint(loss, part, target, use_reentrant=False, preserve_rng_state=False)
    return total


@contextlib.contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Lets SDPA assume in a `with` block that no sequence is padded. Generation afterwards needs padding again."""
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, name in before:  # a model before its parts, since its config sets those of its parts
            config._attn_implementation = WHOLE_SEQUENCES if name == "sdpa" else name
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _token_losses(objective: nn.Module, hidden: Tensor, head: nn.Module, labels: Tensor, chunk_size: int) -> Output:
    """Makes the output of an objective from hidden states (batch, length, width) and labels (batch, length)."""
    parts = hidden.flatten(0, 1), head, labels.flatten(), chunk_size
    if objective.training:
        return Output(chunked_cross_entropy(*parts))
    return Output.evaluated(chunked_cross_entropy(*parts, "none"), labels)


class CausalLMLoss(nn.Module):
    """Next-token loss of a transformers causal language model on sequences that are neither padded nor packed.

    Args:
        model: The model. Its decoder and output embeddings are called separately.
        chunk_size: Tokens in a chunk of `chunked_cross_entropy`. With auto, training sets a number later; until then
            `CHUNK_SIZE` is used.
    """

    def __init__(self, model: PreTrainedModel, chunk_size: int | Literal["auto"] = 0) -> None:
        super().__init__()
        self.model = model
        self.chunk_size: Any = chunk_size

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        """Computes the loss. `labels[b, i]` is the token after `input_ids[b, i]`; both are (batch, length)."""
        with whole_sequences(self.model):
            hidden = self.model.get_decoder()(input_ids=input_ids, use_cache=False)[0]
        head = self.model.get_output_embeddings()
        size = CHUNK_SIZE if self.chunk_size == "auto" else self.chunk_size
        return _token_losses(self, hidden, head, labels, size)


class MaskedLMLoss(nn.Module):
    """Loss of a masked language model at the chosen positions. Only their logits are computed.

    Its sequences are neither padded nor packed.

    Args:
        model: A transformers model.
        head: Name of the submodule that maps hidden states (tokens, width) to logits.
    """

    def __init__(self, model: PreTrainedModel, head: str) -> None:
        super().__init__()
        self.model = model
        self.head = head

    def forward(self, input_ids: Tensor, positions: Tensor, labels: Tensor) -> Output:
        """Computes the loss. `labels[b, k]` is the true token at `input_ids[b, positions[b, k]]`."""
        with whole_sequences(self.model):
            hidden = self.model.base_model(input_ids=input_ids)[0]
        chosen = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        return _token_losses(self, chosen, self.model.get_submodule(self.head), labels, 0)


class ClassificationLoss(nn.Module):
    """Cross-entropy of a transformers image classifier. Smoothing and mixing apply only in training.

    Args:
        model: The classifier.
        label_smoothing: Share of the target that is spread over all classes.
        mixup: A `timm.data.Mixup`, which then also does the smoothing, or None. It draws from numpy's global state,
            which is seeded here from torch's.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0, mixup: Any = None) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.multiple_of = 1 if mixup is None else 2  # of images in a micro-batch: mixing works on pairs

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Output:
        """Computes the loss of `pixel_values` (batch, channels, height, width) and `labels` (batch,)."""
        if self.training and self.mixup is not None:
            pixel_values, labels = self._mix(pixel_values, labels)
        with whole_sequences(self.model):
            logits = self.model(pixel_values=pixel_values).logits.float()
        if not self.training:
            losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
            return Output.evaluated(losses, labels, logits.argmax(-1))
        smoothing = self.label_smoothing if self.mixup is None else 0.0
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
        return Output(loss, logits.argmax(-1))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not say what it returns
    def _mix(self, pixel_values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        np.random.seed(int(torch.randint(2**31, ())))
        mixed: tuple[Tensor, Tensor] = self.mixup(pixel_values.clone(), labels)  # it works in place
        return mixed


class ResidualLoss(nn.Module):
    """Loss of a physics-informed network: squared residuals of the equation plus squared errors on the boundary.

    The boundary conditions are a penalty, as in Raissi, Perdikaris and Karniadakis 2019 (arXiv 1711.10561). They are
    not built into the model, so the model itself is the field. Derivatives use `torch.autograd.grad`, which on a CPU
    took 0.2 to 0.4 of the time of the fastest torch.func version. In evaluation the loss is the squared error of the
    field.

    Args:
        model: A `CoordinateMLPModel`.
        problem: The boundary value problem to solve.
        boundary_weight: Weight of the squared errors on the boundary.
    """

    def __init__(self, model: nn.Module, problem: Problem, boundary_weight: float) -> None:
        super().__init__()
        self.model = model
        self.problem = problem
        self.boundary_weight = boundary_weight
        for module in model.modules():
            if isinstance(module, GemActivation):
                module.save = "input"  # for a second derivative, recovering the input from the output takes longer

    def forward(self, points: Tensor, labels: Tensor, boundary: Tensor | None = None) -> Output:
        """Computes the loss. `labels` (batch,) is the solution at `boundary` (batch, 2), or else at `points`."""
        if not self.training:  # the inputs of activations are measured like this on training points
            at = points if boundary is None else torch.cat([points, boundary])
            values = self.model(at).field.float()[-len(labels) :]
            return Output.evaluated((values - labels).square(), labels, values)
        points = points.detach().requires_grad_()
        residual = self.problem.residual(self.model(points).field, points)
        error = self.model(boundary).field - labels
        return Output((residual.square() + self.boundary_weight * error.square()).sum())
