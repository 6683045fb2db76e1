"""Text: from a dataset, a file or the standard library's source to memory-mapped blocks of tokens.

Documents are tokenised once, each followed by the end-of-text token, and written one after the other to a flat file of
token ids. The files live in a cache folder named by what they were made from; a second start only maps them.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...files import save_pretrained
from ..config import at_least, option, require
from ..errors import DataError
from ..loss import IGNORE
from .source import SourceConfig, cached, checked, file_state, fingerprint, is_prepared, load_splits, source_state

STDLIB = "stdlib"
END_OF_TEXT = "<|endoftext|>"
_CACHE_FORMAT = 4  # raise it when the files' content changes
_PIECE = 1 << 20  # characters handed to the tokenizer at once: its memory grows with the length of a text
_FEW = 100  # documents
_TOKENIZER_CHARACTERS = 1 << 27  # that a tokenizer is trained on, at most


@dataclass
class TextConfig(SourceConfig):
    """Where text comes from and how it becomes blocks of tokens."""

    runtime: ClassVar[frozenset[str]] = frozenset(
        ("text_column", "streaming", "max_train_tokens", "tokenizer", "vocab_size")
    )
    builtin: ClassVar[str] = STDLIB
    builders: ClassVar[dict[str, str]] = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
    # Of a tokenizer that is trained here, by their roles.
    special_tokens: ClassVar[dict[str, str]] = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}

    dataset: str = option(
        STDLIB,
        "Hub dataset id, local folder or file (parquet, jsonl, txt), stdlib: the source of Python's own library, or a "
        "folder text/... of a cache, whose tokens and tokenizer are taken as they are.",
    )
    text_column: str = option("text", "Column that holds the text.")
    streaming: bool = option(
        False, "Read the dataset as a stream, and of it no more than --max_train_tokens and its share for validation."
    )
    max_train_tokens: int | None = option(None, "Stop reading training documents after this many tokens.")
    tokenizer: str | None = option(None, "Tokenizer name or folder; by default byte-level BPE trained on the corpus.")
    vocab_size: int = option(4096, "Vocabulary of the trained tokenizer.")
    block_size: int = option(128, "Tokens in a sample.")

    def validate(self) -> None:
        """Raises ValueError, naming the field, when a value makes no sense."""
        super().validate()
        at_least(self, 2, "block_size")
        require(self.vocab_size > 256, "vocab_size", self.vocab_size, "above 256, the number of bytes")
        if self.max_train_tokens is None:
            require(not self.streaming, "max_train_tokens", None, "given with --streaming")
        else:
            at_least(self, 1, "max_train_tokens")


@dataclass
class TokenBlocks:
    """Consecutive blocks of a flat array of token ids.

    Attributes:
        tokens: All ids, uint16 or uint32, usually memory-mapped.
        block_size: Tokens in a block.
        partial: Whether a last, shorter block counts too; its missing labels are `IGNORE`.
    """

    tokens: np.ndarray
    block_size: int
    partial: bool = False

    def __len__(self) -> int:
        targets = max(0, len(self.tokens) - 1)
        return -(-targets // self.block_size) if self.partial else targets // self.block_size

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels` of some blocks, int64 of shape (len(indices), block_size). Nothing is random."""
        size = self.block_size
        ids = np.zeros((len(indices), size + 1), dtype=np.int64)
        labels = np.full((len(indices), size), IGNORE, dtype=np.int64)
        for row, index in enumerate(indices):
            window = self.tokens[index * size : (index + 1) * size + 1]
            ids[row, : len(window)] = window
            labels[row, : len(window) - 1] = window[1:]
        return {"input_ids": torch.from_numpy(ids[:, :-1].copy()), "labels": torch.from_numpy(labels)}


@dataclass
class TextData:
    """Tokenised data.

    Attributes:
        train: Blocks to train on.
        validation: Blocks to evaluate on, the last one possibly shorter.
        tokenizer: What made them.
        vocab_size: One more than the largest id that the tokenizer knows.
        facts: For the record: number of tokens, how validation text was chosen, and a SHA-256 over all ids, `hash`.
    """

    train: TokenBlocks
    validation: TokenBlocks
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    facts: dict[str, Any]


def prepare_text(config: TextConfig, min_validation_tokens: int = 2) -> TextData:
    """Tokenises the dataset of `config`, or finds it in the cache. Processes that ask at once wait for the first.

    Args:
        config: Which, and how.
        min_validation_tokens: As many as the smallest sample has that is evaluated.

    Raises:
        DataError: the dataset or tokenizer cannot be read, is empty, or is too small for one block; or the cache
            cannot be written.
    """
    folder, meta = cached(config, "text", _key(config), lambda folder: _build(config, folder))
    tokenizer = _load_tokenizer(str(folder))
    held_out = "split" if is_prepared(config) else meta["held_out"]

    def blocks(split: str, partial: bool, least: int) -> TokenBlocks:
        size = meta["num_tokens"][split]
        if size < least:
            fix = "give more text or a smaller --block_size"
            if split == "validation" and held_out != "split":
                fix = f"raise --validation_fraction, now {config.validation_fraction}"
            raise DataError(
                f"the {split} text of {config.dataset!r} has {size} tokens, less than one block of "
                f"{config.block_size} needs, {least}; {fix}"
            )
        array = np.memmap(folder / f"{split}.bin", dtype=meta["dtype"], mode="r")
        return TokenBlocks(array, config.block_size, partial)

    facts = {"on_hub": config.on_hub, "held_out": held_out, **{key: meta[key] for key in ("hash", "num_tokens")}}
    train = blocks("train", False, config.block_size + 1)
    validation = blocks("validation", True, min_validation_tokens)
    return TextData(train, validation, tokenizer, meta["vocab_size"], facts)


def _key(config: TextConfig) -> list[Any]:
    """All that decides the tokens. Files count by size and time of change, Hub datasets by revision."""
    source: Any = source_state(config)
    if config.dataset == STDLIB:
        source = [sys.version, config.validation_fraction, *(file_state(path) for _, path in _stdlib_files())]
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
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids may have holes
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    digest = hashlib.sha256()
    limits: dict[str, int | None] = {"train": config.max_train_tokens, "validation": None}
    if config.streaming and config.max_train_tokens:
        limits["validation"] = max(config.block_size, int(config.max_train_tokens * config.validation_fraction))
    counts = {
        split: _write_tokens(corpus.documents(split), tokenizer, folder / f"{split}.bin", dtype, digest, limit)
        for split, limit in limits.items()
    }
    if counts["train"] == 0:
        raise DataError(f"the dataset {config.dataset!r} holds no text in column {config.text_column!r}")
    save_pretrained(tokenizer, folder)
    return {
        "hash": digest.hexdigest(),
        "num_tokens": counts,
        "held_out": corpus.held_out,
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
) -> int:
    """Writes all ids to `path`, feeds them to `digest`, and returns how many there are."""
    count = 0
    end: np.ndarray = np.array([_separator(tokenizer)], dtype=dtype)
    with path.open("wb") as file, tqdm(desc=f"Tokenising {path.stem}", unit=" tokens", unit_scale=True) as bar:
        for texts in _batches(documents):
            pieces = [(piece, last) for text in texts for piece, last in _pieces(text)]
            # verbose=False: texts longer than the model's context are what packing is for
            ids = tokenizer([piece for piece, _ in pieces], add_special_tokens=False, verbose=False)["input_ids"]
            for piece_ids, (_, last) in zip(ids, pieces, strict=True):
                array: np.ndarray = np.asarray(piece_ids, dtype=dtype)
                data = (np.concatenate([array, end]) if last else array).tobytes()
                file.write(data)
                digest.update(data)
            added = sum(map(len, ids)) + sum(last for _, last in pieces)
            count += added
            bar.update(added)
            if limit is not None and count >= limit:
                break
        if limit is not None and count > limit:
            count = limit
            file.truncate(limit * np.dtype(dtype).itemsize)
    digest.update(str(count).encode())
    return count


def _batches(documents: Iterable[str], characters: int = 1 << 22) -> Iterator[list[str]]:
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
    """Cuts a text at ends of lines into pieces of about a megabyte; True marks the last."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _PIECE) + 1 or len(text)
        yield text[start:stop], stop == len(text)
        start = stop


class _Corpus:
    """The documents of the two splits.

    Attributes:
        held_out: Where validation text comes from: `split`, one of the dataset's own; `hash`, documents drawn by a
            hash of their name or text; `end`, the end of each document, where they are too few to draw from.
    """

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.splits = {} if config.dataset == STDLIB else load_splits(config, config.streaming)
        if config.validation_split in self.splits:
            self.held_out = "split"
        elif config.dataset == STDLIB or config.streaming or len(self.splits[config.train_split]) >= _FEW:
            self.held_out = "hash"
        else:
            self.held_out = "end"

    def documents(self, split: str) -> Iterator[str]:
        """Texts of `train` or `validation`."""
        for name, text in checked(self._named(split)):
            if self.held_out == "end":
                text = self._end_or_rest(text, split)
            if text and (self.held_out != "hash" or self._is_drawn(name) == (split == "validation")):
                yield text

    def _named(self, split: str) -> Iterator[tuple[str, str]]:
        """Texts with what they are drawn by: the path of a module, or the text itself."""
        config = self.config
        if config.dataset == STDLIB:
            for name, path in _stdlib_files():
                with tokenize.open(path) as file:  # reads the encoding that the source declares
                    yield name, file.read()
            return
        own = split == "validation" and self.held_out == "split"
        rows = self.splits[config.validation_split if own else config.train_split]
        if rows.column_names and config.text_column not in rows.column_names:
            raise DataError(
                f"{config.dataset!r} has no column {config.text_column!r}; --text_column can be one of "
                f"{', '.join(rows.column_names)}"
            )
        try:
            for row in rows.select_columns(config.text_column):
                text = row[config.text_column]
                if not isinstance(text, str | None):
                    raise DataError(
                        f"column {config.text_column!r} of {config.dataset!r} holds {type(text).__name__}, not text; "
                        f"--text_column can be one of {', '.join(rows.column_names or ['those of the dataset'])}"
                    )
                yield text or "", text or ""
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{config.dataset!r} cannot be read: {error}") from error

    def _end_or_rest(self, text: str, split: str) -> str:
        at = int(len(text) * (1 - self.config.validation_fraction))
        newline = text.rfind("\n", 0, at)
        cut = newline + 1 if newline >= at // 2 else at  # at the end of a line, unless lines are very long
        return text[cut:] if split == "validation" else text[:cut]

    def _is_drawn(self, name: str) -> bool:
        draw = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
        return draw < self.config.validation_fraction * 2**64


def _stdlib_files() -> list[tuple[str, Path]]:
    """The modules of the running Python's standard library without tests, by name; build records are left out too."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - skipped  # to look into what is installed takes longer than all else here
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files |= {path.relative_to(root).as_posix(): path for path in paths}
    return [(name, files[name]) for name in sorted(files) if not name.startswith(("_sysconfigdata", "config-"))]


def _train_tokenizer(documents: Iterable[str], config: TextConfig) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    # A token is about four characters; a sample of a large corpus gives the same merges.
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
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the Hub client, JSON and the tokenizers' own reader each raise their own
        raise DataError(
            f"the tokenizer {name!r} cannot be loaded: {type(error).__name__}: {error}. --tokenizer takes the name or "
            "folder of one that transformers opens; without it, one is trained on the corpus"
        ) from error
    if _separator(tokenizer) is None:
        raise DataError(f"the tokenizer {name!r} has no end-of-text or [SEP] token, which separates documents")
    return tokenizer


def _separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What follows each document: the end of text, or the [SEP] of BERT."""
    separator: int | None = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return separator
