"""Text: from a dataset, a file or the standard library's source to memory-mapped blocks of tokens.

Documents are tokenised once, each followed by the end-of-text token, and written one after the other to a flat file of
token ids. The files live in a cache folder named by what they were made from; a second start only maps them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .config import option, require
from .errors import DataError
from .loss import IGNORE

STDLIB = "stdlib"
END_OF_TEXT = "<|endoftext|>"
_CACHE_FORMAT = 1  # raise it when the files' content changes
_PIECE = 1 << 20  # characters handed to the tokenizer at once: its memory grows with the length of a text
_FEW = 100  # documents
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


@dataclass
class TextConfig:
    """Where text comes from and how it becomes blocks of tokens."""

    runtime: ClassVar = frozenset({"cache_dir"})

    dataset: str = option(
        STDLIB,
        "Hub dataset id, local folder or file (parquet, jsonl, txt), or stdlib: the source of Python's own library.",
    )
    dataset_config: str | None = option(None, "Configuration name of a Hub dataset.")
    dataset_revision: str | None = option(None, "Revision of a Hub dataset.")
    text_column: str = option("text", "Column that holds the text.")
    train_split: str = option("train", "Split to train on.")
    validation_split: str = option(
        "validation", "Split to evaluate on; where there is none, part of train is held out."
    )
    validation_fraction: float = option(0.05, "Share of documents held out when the dataset has no validation split.")
    streaming: bool = option(False, "Read the dataset as a stream and keep only its tokens; needs --max_train_tokens.")
    max_train_tokens: int | None = option(None, "Stop reading training documents after this many tokens.")
    tokenizer: str | None = option(None, "Tokenizer name or folder; by default byte-level BPE trained on the corpus.")
    vocab_size: int = option(4096, "Vocabulary of the trained tokenizer.")
    block_size: int = option(128, "Tokens in a sample.")
    cache_dir: str | None = option(None, "Cache of tokenised data; by default $HF_GEM_CACHE or ~/.cache/hf_gem.")

    def validate(self) -> None:
        """Raises ValueError, naming the field, when a value makes no sense."""
        require(self.block_size >= 2, "block_size", self.block_size, "at least 2")
        require(self.vocab_size > 256, "vocab_size", self.vocab_size, "above 256, the number of bytes")
        require(0 < self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "between 0 and 1")
        require(self.max_train_tokens is None or self.max_train_tokens > 0, "max_train_tokens", None, "at least 1")
        require(
            not self.streaming or self.max_train_tokens is not None, "max_train_tokens", None, "given with --streaming"
        )


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

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels` of some blocks, int64 of shape (len(indices), block_size)."""
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
    """Tokenised data: the two splits, the tokenizer, and a SHA-256 over all token ids."""

    train: TokenBlocks
    validation: TokenBlocks
    tokenizer: PreTrainedTokenizerBase
    data_hash: str


def prepare_text(config: TextConfig) -> TextData:
    """Tokenises the dataset of `config`, or finds it in the cache. Processes that ask at once wait for the first.

    Raises:
        DataError: the dataset or tokenizer cannot be read, is empty, or is too small for one block.
    """
    root = Path(config.cache_dir or os.environ.get("HF_GEM_CACHE") or Path.home() / ".cache" / "hf_gem")
    folder = root / "text" / _cache_key(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "meta.json").exists():
            _build(config, folder)
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = _load_tokenizer(str(folder))

    def blocks(split: str, partial: bool) -> TokenBlocks:
        size = meta["num_tokens"][split]
        if size <= config.block_size and not (partial and size >= 2):
            raise DataError(
                f"the {split} split of {config.dataset!r} has {size} tokens, less than one block of "
                f"{config.block_size} and its target; give more text or a smaller --block_size"
            )
        array = np.memmap(folder / f"{split}.bin", dtype=meta["dtype"], mode="r")
        return TokenBlocks(array, config.block_size, partial)

    return TextData(blocks("train", False), blocks("validation", True), tokenizer, meta["data_hash"])


def _cache_key(config: TextConfig) -> str:
    """A hash over all that decides the tokens. Files count by size and time of change, Hub datasets by revision."""
    if config.dataset == STDLIB:
        source: Any = [sys.version, [name for name, _ in _stdlib_files()]]
    elif (path := Path(config.dataset)).exists():
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        source = [str(path.resolve()), [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]]
    else:
        source = [config.dataset, config.dataset_config, config.dataset_revision]
    fields = (
        *(config.text_column, config.train_split, config.validation_split, config.validation_fraction),
        *(config.max_train_tokens, config.tokenizer, None if config.tokenizer else config.vocab_size),
    )
    return hashlib.sha256(json.dumps([_CACHE_FORMAT, source, fields]).encode()).hexdigest()[:24]


def _build(config: TextConfig, folder: Path) -> None:
    work = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    work.mkdir()
    try:
        corpus = _Corpus(config)
        if config.tokenizer:
            tokenizer = _load_tokenizer(config.tokenizer)
        else:
            tokenizer = _train_tokenizer(corpus.documents("train"), config.vocab_size)
        dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
        digest = hashlib.sha256()
        limits = {"train": config.max_train_tokens, "validation": None}
        counts = {
            split: _write_tokens(
                corpus.documents(split), tokenizer, work / f"{split}.bin", dtype, digest, limits[split]
            )
            for split in limits
        }
        if counts["train"] == 0:
            raise DataError(f"the dataset {config.dataset!r} holds no text in column {config.text_column!r}")
        tokenizer.save_pretrained(work)
        meta = {"num_tokens": counts, "dtype": np.dtype(dtype).name, "data_hash": digest.hexdigest()}
        (work / "meta.json").write_text(json.dumps(meta, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    except OSError as error:
        raise DataError(f"the tokens of {config.dataset!r} cannot be cached in {folder.parent}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
    end: np.ndarray = np.array([tokenizer.eos_token_id], dtype=dtype)
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
    """The documents of the two splits, held out by a hash where the dataset has one split only."""

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.splits: dict[str, Any] = {} if config.dataset == STDLIB else self._load()
        self.holds_out = config.validation_split not in self.splits

    def documents(self, split: str) -> Iterator[str]:
        """Texts of `train` or `validation`."""
        for key, text in self._keyed(split):
            if text and not (key and self.holds_out and self._is_held_out(key) != (split == "validation")):
                yield text

    def _keyed(self, split: str) -> Iterator[tuple[str, str]]:
        """Texts with the key that decides where they belong; an empty key where that is settled."""
        config = self.config
        if config.dataset == STDLIB:
            for name, path in _stdlib_files():
                with tokenize.open(path) as file:  # reads the encoding that the source declares
                    yield name, file.read()
            return
        rows = self.splits[config.train_split if self.holds_out or split == "train" else config.validation_split]
        if rows.column_names and config.text_column not in rows.column_names:
            raise DataError(
                f"{config.dataset!r} has no column {config.text_column!r}; --text_column can be one of "
                f"{', '.join(rows.column_names)}"
            )
        # Few documents, such as one big text file, cannot be drawn from: the end of each is held out instead.
        few = self.holds_out and not config.streaming and len(rows) < _FEW
        try:
            for row in rows.select_columns(config.text_column):
                text = row[config.text_column] or ""
                yield ("", self._end_or_rest(text, split)) if few else (text, text)
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{config.dataset!r} cannot be read: {error}") from error

    def _end_or_rest(self, text: str, split: str) -> str:
        cut = text.find("\n", int(len(text) * (1 - self.config.validation_fraction))) + 1
        return text[cut:] if split == "validation" else text[:cut]

    def _is_held_out(self, key: str) -> bool:
        draw = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")
        return draw < self.config.validation_fraction * 2**64

    def _load(self) -> dict[str, Any]:
        from datasets import DatasetDict, IterableDatasetDict, load_dataset

        config = self.config
        path = Path(config.dataset)
        try:
            if path.exists():
                loaded = load_dataset(**_local_arguments(path), streaming=config.streaming)
            else:
                loaded = load_dataset(
                    *(config.dataset, config.dataset_config),
                    revision=config.dataset_revision,
                    streaming=config.streaming,
                )
        except DataError:
            raise
        except Exception as error:  # datasets raises whatever its readers do
            raise DataError(
                f"the dataset {config.dataset!r} cannot be read: {type(error).__name__}: {error}. --dataset takes a "
                f"Hub dataset id, a local folder or file ({', '.join(_BUILDERS)}), or {STDLIB!r}"
            ) from error
        assert isinstance(loaded, (DatasetDict, IterableDatasetDict))
        if config.train_split not in loaded:
            raise DataError(
                f"{config.dataset!r} has no split {config.train_split!r}; --train_split can be {' or '.join(loaded)}"
            )
        return dict(loaded)


def _local_arguments(path: Path) -> dict[str, Any]:
    """How `load_dataset` opens a local file or folder. A text file is one document, not one a line."""
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise DataError(f"{path} has suffix {path.suffix!r}; a file can be one of {', '.join(_BUILDERS)}")
        arguments = {"path": _BUILDERS[path.suffix], "data_files": str(path)}
    else:
        suffixes = {p.suffix for p in path.rglob("*") if p.suffix in _BUILDERS}
        if len(suffixes) != 1:
            raise DataError(
                f"the folder {path} must hold files of one kind out of {', '.join(_BUILDERS)}; found "
                f"{', '.join(sorted(suffixes)) or 'none'}"
            )
        arguments = {"path": _BUILDERS[suffixes.pop()], "data_dir": str(path)}
    return {**arguments, "sample_by": "document"} if arguments["path"] == "text" else arguments


def _stdlib_files() -> list[tuple[str, Path]]:
    """The modules of the running Python's standard library without tests, by name; build records are left out too."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*.py")}
    return [
        (name, files[name])
        for name in sorted(files)
        if not skipped & set(name.split("/")) and not name.startswith(("_sysconfigdata", "config-"))
    ]


def _train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the Hub client, JSON and the tokenizers' own reader each raise their own
        raise DataError(
            f"the tokenizer {name!r} cannot be loaded: {type(error).__name__}: {error}. --tokenizer takes the name or "
            "folder of one that transformers opens; without it, one is trained on the corpus"
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer {name!r} has no end-of-text token, which separates documents")
    return tokenizer
