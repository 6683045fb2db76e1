"""Masked language modelling: blocks with some tokens hidden, as in BERT (arXiv 1810.04805, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..loss import IGNORE
from .order import uniforms
from .text import documents_at


@dataclass
class MaskedBlocks:
    """Blocks `[CLS] tokens [SEP]`, with a fixed share of the tokens chosen for prediction.

    The tokens of a block are consecutive in a flat array of documents, so nothing is padded. 80 % of the chosen tokens
    are replaced by `[MASK]`, 10 % by a random token, and 10 % are kept. The choice depends only on the seed and the
    number of the draw, and in evaluation only on the block.

    Attributes:
        tokens: All token ids, with a separator after each document.
        block_size: Tokens in a block, including the two at its ends.
        tokenizer: The tokenizer, which knows the special tokens.
        probability: Share of tokens that are chosen.
        seed: Seed of the choice in training.
        ends: The position where each document ends.
    """

    tokens: np.ndarray
    block_size: int
    tokenizer: PreTrainedTokenizerBase
    probability: float = 0.15
    seed: int = 0
    ends: np.ndarray | None = None

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        missing = [name for name in ("cls_token", "sep_token", "mask_token") if getattr(tokenizer, name) is None]
        if missing:
            raise DataError(
                f"the tokenizer has no {', '.join(missing)}. Masked language modelling needs these tokens. Use a "
                "tokenizer made for BERT, or leave out --tokenizer to train one."
            )
        self._special = np.array(sorted(tokenizer.all_special_ids))
        self._ordinary = np.setdiff1d(np.array(sorted(set(tokenizer.get_vocab().values()))), self._special)
        self._body = self.block_size - 2
        self.num_chosen = max(1, round(self.probability * self._body))

    def __len__(self) -> int:
        return len(self.tokens) // self._body

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """Makes a batch of blocks.

        Returns:
            `input_ids`, int64 of shape (blocks, block_size), and the chosen `positions` and their `labels`, int64 of
            shape (blocks, num_chosen). If a block has fewer ordinary tokens, the remaining labels are `IGNORE`. In
            evaluation also `units`, the number of the document that each label belongs to.
        """
        ids = np.empty((len(indices), self.block_size), dtype=np.int64)
        ids[:, 0], ids[:, -1] = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        for row, index in enumerate(indices):
            ids[row, 1:-1] = self.tokens[index * self._body : (index + 1) * self._body]
        random = self._random(indices, draws)
        rank, action, other = random[:, 0], random[:, 1], random[:, 2]
        rank[np.isin(ids, self._special)] = 2.0  # after all others
        positions = np.sort(np.argpartition(rank, self.num_chosen - 1, axis=1)[:, : self.num_chosen], axis=1)
        labels = np.take_along_axis(ids, positions, 1)
        ordinary = np.take_along_axis(rank, positions, 1) < 2
        action, other = (np.take_along_axis(part, positions, 1) for part in (action, other))
        anything = self._ordinary[(other * len(self._ordinary)).astype(np.int64)]
        shown = np.where(action < 0.8, self.tokenizer.mask_token_id, np.where(action < 0.9, anything, labels))
        np.put_along_axis(ids, positions, np.where(ordinary, shown, labels), 1)
        labels = np.where(ordinary, labels, IGNORE)
        arrays = {"input_ids": ids, "positions": positions, "labels": labels}
        if draws is None and self.ends is not None:
            arrays["units"] = documents_at(self.ends, indices[:, None] * self._body + positions - 1)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _random(self, indices: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
        """Draws three uniform numbers for each token."""
        key, counters = ((self.seed, 0), draws) if draws is not None else ((0, 1), indices)
        return uniforms(key, counters, (3, self.block_size))
