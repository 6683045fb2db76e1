"""Turns text from a dataset, a file or the standard library's source into memory-mapped blocks of tokens.

Documents are tokenised once, each followed by the end-of-text token, and written one after another to a flat file of
token ids. The files live in a cache folder, named by a hash of what they were made from. Later runs only map them.
"""

from __future__ import annotations

import hashlib
import math
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...files import save_pretrained, shown
from ..config import at_least, option, require
from ..errors import DataError, reason
from ..loss import IGNORE
from .source import (
    SourceConfig,
    cached,
    checked,
    file_state,
    fingerprint,
    is_prepared,
    load_splits,
    read_column,
    source_state,
)
from .stdlib import stdlib_files
from .stored import ENDS, TextContent, read_ends, read_tokens

STDLIB = "stdlib"
END_OF_TEXT = "<|endoftext|>"
_CACHE_FORMAT = 6  # increment when the content of the files changes
_PIECE = 1 << 20  # characters given to the tokenizer at once: its memory grows with the length of a text
_BATCH = 1 << 22  # characters of whole documents that are tokenised together
_FEW = 100  # documents: fewer are too few to draw from
_TOKENIZER_CHARACTERS = 1 << 27  # the most characters to train a tokenizer on


@dataclass
class TextConfig(SourceConfig):
    """Where text comes from and how it becomes blocks of tokens."""

    runtime: ClassVar[frozenset[str]] = frozenset(
        ("text_column", "streaming", "max_train_tokens", "tokenizer", "vocab_size", "min_validation_tokens")
    )
    builtin: ClassVar[str] = STDLIB
    builders: ClassVar[dict[str, str]] = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
    # Special tokens of a tokenizer that is trained here, by role.
    special_tokens: ClassVar[dict[str, str]] = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}

    dataset: str = option(
        STDLIB,
        "Hub dataset id, local folder or file (parquet, jsonl, txt), stdlib: the source of Python's own library, or a "
        "folder text/... of a cache, whose tokens and tokenizer are used as they are.",
    )
    text_column: str = option("text", "Column with the text.")
    streaming: bool = option(
        False, "Stream the dataset, reading only --max_train_tokens and a matching share for validation."
    )
    max_train_tokens: int | None = option(None, "Stop reading training documents after this many tokens.")
    tokenizer: str | None = option(None, "Tokenizer name or folder; by default byte-level BPE trained on the corpus.")
    vocab_size: int = option(4096, "Vocabulary size of a tokenizer trained on the corpus.")
    block_size: int = option(128, "Tokens in a sample.")
    min_validation_tokens: int = option(
        200_000,
        "Refuse to run with fewer tokens of validation or test text: differences would come from a few documents.",
    )

    def validate(self) -> None:
        """Raises ValueError, naming the field, if a value makes no sense."""
        super().validate()
        at_least(self, 2, "block_size")
        at_least(self, 0, "min_validation_tokens")
        require(self.vocab_size > 256, "vocab_size", self.vocab_size, "above 256, the number of bytes")
        if self.max_train_tokens is None:
            require(not self.streaming, "max_train_tokens", None, "a number with --streaming")
        else:
            at_least(self, 1, "max_train_tokens")
            for split in ("validation", "test"):
                limit, least = self.most_tokens(split), self.min_validation_tokens
                allowed = f"larger with --streaming: the share of {split} text is {limit} tokens, but "
                allowed += f"--min_validation_tokens is {least}"
                require(limit is None or limit >= least, "max_train_tokens", self.max_train_tokens, allowed)

    def most_tokens(self, split: str) -> int | None:
        """Returns the number of tokens of a split after which no more are read, or None."""
        if split == "train" or self.max_train_tokens is None:
            return self.max_train_tokens
        if not self.streaming:
            return None
        share = (split == "test" and self.test_fraction) or self.validation_fraction
        return max(self.block_size, int(self.max_train_tokens * share))


@dataclass
class TokenBlocks:
    """Consecutive blocks of a flat array of token ids.

    Attributes:
        tokens: All token ids, uint16 or uint32, usually memory-mapped.
        block_size: Tokens in a block.
        partial: Whether to include a last, shorter block. Its missing labels are `IGNORE`.
        ends: The position where each document ends, int64, ascending.
    """

    tokens: np.ndarray
    block_size: int
    partial: bool = False
    ends: np.ndarray | None = None

    def __len__(self) -> int:
        targets = max(0, len(self.tokens) - 1)
        return -(-targets // self.block_size) if self.partial else targets // self.block_size

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """Returns `input_ids` and `labels` of some blocks, int64 (len(indices), block_size). Nothing is random.

        In evaluation it also returns `units`, the number of the document that each label belongs to.
        """
        size = self.block_size
        ids = np.zeros((len(indices), size + 1), dtype=np.int64)
        labels = np.full((len(indices), size), IGNORE, dtype=np.int64)
        for row, index in enumerate(indices):
            window = self.tokens[index * size : (index + 1) * size + 1]
            ids[row, : len(window)] = window
            labels[row, : len(window) - 1] = window[1:]
        batch = {"input_ids": torch.from_numpy(ids[:, :-1].copy()), "labels": torch.from_numpy(labels)}
        if draws is None and self.ends is not None:
            places = indices[:, None] * size + np.arange(1, size + 1)
            batch["units"] = torch.from_numpy(documents_at(self.ends, places))
        return batch


def documents_at(ends: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Finds the documents that tokens are in, int64 of the same shape. Positions past the end belong to the last one.

    Args:
        ends: The position where each document ends.
        places: Positions of tokens.
    """
    return np.minimum(np.searchsorted(ends, places, side="right"), len(ends) - 1)


@dataclass
class TextData:
    """Tokenised data.

    Attributes:
        train: Blocks to train on.
        validation: Blocks to evaluate on. The last one may be shorter.
        test: Blocks to evaluate on once, at the end, or None.
        tokenizer: The tokenizer that made the tokens.
        vocab_size: One more than the tokenizer's largest id.
        facts: Facts for the record: number of tokens, how validation text was chosen, and a SHA-256 of all ids, `hash`.
    """

    train: TokenBlocks
    validation: TokenBlocks
    test: TokenBlocks | None
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    facts: dict[str, Any]


def prepare_text(config: TextConfig, smallest_sample: int = 2) -> TextData:
    """Tokenises the dataset of `config`, or reads it from the cache. Other processes wait for the one that tokenises.

    Args:
        config: The config with the dataset and the tokenizer.
        smallest_sample: Smallest number of tokens that can be evaluated.

    Raises:
        DataError: The dataset or tokenizer cannot be read, the text is empty or too short for one block, or the cache
            cannot be written.
    """
    folder, meta = cached(config, "text", _key(config), TextContent, lambda folder: _build(config, folder))
    if "num_documents" not in meta:
        raise DataError(f"{folder} was prepared by an older version of hf_gem, without documents. Prepare it again.")
    tokenizer = _load_tokenizer(str(folder))
    if meta["vocab_size"] != _vocab_size(tokenizer) or not {"train", "validation"} <= meta["num_tokens"].keys():
        raise DataError(f"the tokens in {folder} do not fit its tokenizer. Copy or prepare the folder again.")

    def blocks(split: str, partial: bool, least: int) -> TokenBlocks:
        size = meta["num_tokens"][split]
        fix = "Give more text"
        if split in shares and not is_prepared(config):
            fix = f"Raise --{split}_fraction (now {getattr(config, f'{split}_fraction')})"
        if size < least:
            fix = fix if split in shares else f"{fix}, or use a smaller --block_size"
            raise DataError(
                f"the {split} text of {shown(config.dataset)} has {size} tokens. One block of {config.block_size} "
                f"needs {least}. {fix}."
            )
        if partial and size < config.min_validation_tokens:
            raise DataError(
                f"the {split} text of {shown(config.dataset)} has {size:,} tokens. --min_validation_tokens is "
                f"{config.min_validation_tokens:,}. {fix}, or lower --min_validation_tokens."
            )
        tokens = read_tokens(folder, split, meta)
        return TokenBlocks(tokens, config.block_size, partial, read_ends(folder, split, meta) if partial else None)

    shares = meta["shares"]
    held_out = meta["held_out"] if "validation" in shares and not is_prepared(config) else "split"
    facts = {"on_hub": config.on_hub, "held_out": held_out}
    facts |= {key: meta[key] for key in ("hash", "num_tokens", "num_documents")}
    train = blocks("train", False, config.block_size + 1)
    validation, *test = [
        blocks(split, True, smallest_sample) for split in ("validation", "test") if split in meta["num_tokens"]
    ]
    return TextData(train, validation, test[0] if test else None, tokenizer, meta["vocab_size"], facts)


def _key(config: TextConfig) -> list[Any]:
    """Returns everything that determines the tokens: size and modification time of files, or a Hub revision."""
    source: Any = source_state(config)
    if config.dataset == STDLIB:
        fractions = [config.validation_fraction, config.test_fraction]
        source = [sys.version, fractions, *(file_state(path) for _, path in stdlib_files())]
    tokenizer: Any = [config.vocab_size, config.special_tokens]
    if config.tokenizer:
        tokenizer = fingerprint(config.tokenizer) or config.tokenizer
    return [_CACHE_FORMAT, source, tokenizer, config.text_column, config.streaming, config.max_train_tokens]


def _build(config: TextConfig, folder: Path) -> dict[str, Any]:
    corpus = _Corpus(config)
    if config.tokenizer:
        tokenizer = _load_tokenizer(config.tokenizer)
    else:
        tokenizer = _train_tokenizer(corpus.documents("train"), config)
    vocab_size = _vocab_size(tokenizer)
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    digest = hashlib.sha256()
    counts, documents = {}, {}
    for split in corpus.splits:
        limit = config.most_tokens(split)
        ends = _write_tokens(corpus.documents(split), tokenizer, folder / f"{split}.bin", dtype, digest, limit)
        counts[split], documents[split] = (int(ends[-1]) if len(ends) else 0), len(ends)
        if split != "train":
            np.save(folder / ENDS.format(split), ends)
    if counts["train"] == 0:
        column = shown(config.text_column)
        raise DataError(f"column {column} of {shown(config.dataset)} has no text. Name another --text_column.")
    save_pretrained(tokenizer, folder)
    return {
        "hash": digest.hexdigest(),
        "num_tokens": counts,
        "num_documents": documents,
        "held_out": corpus.held_out,
        "shares": corpus.shares,
        "vocab_size": vocab_size,
        "dtype": np.dtype(dtype).name,
    }


def _write_tokens(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    dtype: type,
    digest: Any,
    limit: int | None,
) -> np.ndarray:
    """Writes all ids to `path`, feeds them to `digest`, and returns the position where each document ends, int64."""
    count = 0
    ends: list[int] = []
    end: np.ndarray = np.array([_separator(tokenizer)], dtype=dtype)
    with path.open("wb") as file, tqdm(desc=f"Tokenising {path.stem}", unit=" tokens", unit_scale=True) as bar:
        for texts in _batches(documents, min(_BATCH, limit or _BATCH)):  # a token is about four characters
            pieces = [(piece, last) for text in texts for piece, last in _pieces(text)]
            # verbose=False: packing handles texts longer than the model's context
            ids = tokenizer([piece for piece, _ in pieces], add_special_tokens=False, verbose=False)["input_ids"]
            for piece_ids, (_, last) in zip(ids, pieces, strict=True):
                array: np.ndarray = np.asarray(piece_ids, dtype=dtype)
                data = (np.concatenate([array, end]) if last else array).tobytes()
                file.write(data)
                digest.update(data)
                count += len(piece_ids) + last
                if last:
                    ends.append(count)
            bar.update(count - bar.n)
            if limit is not None and count >= limit:
                break
        if limit is not None and count > limit:
            count = limit
            file.truncate(limit * np.dtype(dtype).itemsize)
            ends = [*(end for end in ends if end < limit), limit]
    digest.update(str(count).encode())
    return np.array(ends, dtype=np.int64)


def _batches(documents: Iterable[str], characters: int) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Cuts a text at line ends into pieces of about a megabyte. True marks the last piece."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _PIECE) + 1 or len(text)
        yield text[start:stop], stop == len(text)
        start = stop


class _Corpus:
    """The documents of each split.

    Attributes:
        splits: `train`, `validation`, and `test` if requested.
        shares: The parts that are held out of the training text -> their share of it.
        held_out: How text is held out. `hash` draws documents by a hash of their name or text. `end` takes the end of
            each document, if there are too few documents to draw from.
    """

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self._rows = {} if config.dataset == STDLIB else load_splits(config, config.streaming)
        self.shares = config.held_out(self._rows)
        own = config.own_splits(self.shares)
        self.splits = [part for part in ("train", "validation", "test") if part in {"train", *self.shares, *own}]
        many = config.dataset == STDLIB or config.streaming or len(self._rows[config.train_split]) >= _FEW
        self.held_out = "hash" if many else "end"

    def documents(self, split: str) -> Iterator[str]:
        """Yields the texts of a split."""
        whole = not self.shares if split == "train" else split not in self.shares
        for name, text in checked(self._named(split)):
            if not whole and self.held_out == "end":
                text = self._part(text, split)
            if text and (whole or self.held_out == "end" or self._drawn_for(name) == split):
                yield text

    def _named(self, split: str) -> Iterator[tuple[str, str]]:
        """Yields (name, text) pairs. The name decides the draw: the path of a module, or the text itself."""
        config = self.config
        if config.dataset == STDLIB:
            for name, path in stdlib_files():
                with tokenize.open(path) as file:  # reads the encoding that the source declares
                    yield name, file.read()
            return
        rows = self._rows[config.own_splits(self.shares).get(split, config.train_split)]
        if rows.column_names and config.text_column not in rows.column_names:
            raise DataError(
                f"{shown(config.dataset)} has no column {shown(config.text_column)}. Its columns are "
                f"{', '.join(rows.column_names)}. Name one with --text_column."
            )
        for text in read_column(config, rows, config.text_column):
            if not isinstance(text, str | None):
                raise DataError(
                    f"column {shown(config.text_column)} of {shown(config.dataset)} holds {type(text).__name__}, "
                    f"not text. The columns are {', '.join(rows.column_names or ['not known'])}. Name one with "
                    "--text_column."
                )
            yield text or "", text or ""

    def _part(self, text: str, split: str) -> str:
        """Returns the part of a text that belongs to a split. The held-out parts are at its end."""
        end, parts = len(text), {}
        for name, share in reversed(self.shares.items()):
            at = end - math.ceil(len(text) * share)
            newline = text.rfind("\n", 0, at)
            cut = newline + 1 if newline >= at // 2 else at  # at a line end, unless lines are very long
            parts[name], end = text[cut:end], cut
        return parts.get(split, text[:end])

    def _drawn_for(self, name: str) -> str:
        """Draws the split of a document."""
        draw = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
        upto = 0.0
        for split, share in self.shares.items():
            upto += share
            if draw < upto * 2**64:
                return split
        return "train"


def _train_tokenizer(documents: Iterable[str], config: TextConfig) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    # A token is about four characters. A sample of a large corpus gives the same merges.
    limit = min(_TOKENIZER_CHARACTERS, 4 * (config.max_train_tokens or _TOKENIZER_CHARACTERS))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(dict.fromkeys(config.special_tokens.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_first_characters(documents, limit), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **config.special_tokens)


def _first_characters(documents: Iterable[str], limit: int) -> Iterator[str]:
    for text in documents:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the Hub client, JSON and the tokenizers' own reader each raise their own
        raise DataError(
            f"cannot load the tokenizer {shown(name)}: {reason(error)}. --tokenizer must be a name or folder that "
            "transformers can open. Check it, or leave it out to train a tokenizer."
        ) from error
    if _separator(tokenizer) is None:
        raise DataError(
            f"the tokenizer {shown(name)} has neither an end-of-text nor a [SEP] token. One is needed to separate "
            "documents. Use another --tokenizer."
        )
    return tokenizer


def _vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    return 1 + max(tokenizer.get_vocab().values())  # ids may have gaps


def _separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the token that follows each document: end of text, or BERT's [SEP]."""
    separator: int | None = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return separator
