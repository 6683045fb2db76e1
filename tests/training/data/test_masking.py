"""Masks are what BERT has, and a function of the draw."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_gem.training.data.masking import MaskedBlocks
from hf_gem.training.errors import DataError
from hf_gem.training.loss import IGNORE

SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
WORDS = 1000
SIZE = 42  # 40 tokens, of which 6 are chosen


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: i for i, word in enumerate([*SPECIAL.values(), *(f"w{i}" for i in range(WORDS))])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")), **SPECIAL)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    ids = np.random.default_rng(0).integers(5, 5 + WORDS, 40 * 500).astype(np.uint16)
    ids[::17] = tokenizer.sep_token_id
    return ids


@pytest.fixture(scope="module")
def blocks(tokens, tokenizer):
    return MaskedBlocks(tokens, SIZE, tokenizer)


def test_what_a_block_is(blocks, tokens, tokenizer):
    indices = np.array([3, 0, 499])
    batch = blocks.batch(indices, np.arange(3))
    ids, positions, labels = batch["input_ids"], batch["positions"], batch["labels"]
    assert len(blocks) == 500
    assert ids.dtype == positions.dtype == labels.dtype == torch.int64
    assert ids.shape == (3, SIZE)
    assert positions.shape == labels.shape == (3, 6)
    original = torch.from_numpy(np.stack([tokens[i * 40 : (i + 1) * 40] for i in indices]).astype(np.int64))
    assert torch.equal(ids.scatter(1, positions, labels)[:, 1:-1], original)
    assert (ids[:, 0] == tokenizer.cls_token_id).all()
    assert (ids[:, -1] == tokenizer.sep_token_id).all()
    assert (positions.diff(dim=1) > 0).all()
    assert not torch.isin(labels, torch.tensor(tokenizer.all_special_ids)).any()


def test_what_is_shown(blocks, tokenizer):
    batch = blocks.batch(np.arange(500), np.arange(500))
    shown = batch["input_ids"].gather(1, batch["positions"])
    masked = (shown == tokenizer.mask_token_id).double().mean().item()
    kept = (shown == batch["labels"]).double().mean().item()
    # 3,000 draws: five standard deviations.
    assert masked == pytest.approx(0.8, abs=5 * (0.8 * 0.2 / 3000) ** 0.5)
    assert kept == pytest.approx(0.1 + 0.1 / WORDS, abs=5 * (0.1 * 0.9 / 3000) ** 0.5)
    other = shown[(shown != tokenizer.mask_token_id) & (shown != batch["labels"])]
    assert (other >= 5).all()
    where = batch["positions"].double()
    assert where.mean().item() == pytest.approx(20.5, abs=5 * (40**2 / 12 / 3000) ** 0.5)


def test_a_function_of_seed_and_draw(blocks, tokens, tokenizer):
    def same(a, b):
        return all(torch.equal(a[name], b[name]) for name in a)

    together = blocks.batch(np.array([1, 2]), np.array([70, 71]))
    alone = blocks.batch(np.array([2]), np.array([71]))
    assert same({name: rows[1:] for name, rows in together.items()}, alone)
    assert not same(alone, blocks.batch(np.array([2]), np.array([72])))
    other = MaskedBlocks(tokens, SIZE, tokenizer, seed=1)
    assert not same(alone, other.batch(np.array([2]), np.array([71])))
    # Evaluation is frozen, whatever the seed, and no training draw.
    assert same(blocks.batch(np.array([2])), other.batch(np.array([2])))
    assert not same(blocks.batch(np.array([2])), blocks.batch(np.array([2]), np.array([2])))


def test_a_block_of_little_but_separators(tokenizer):
    ids = np.full(40, tokenizer.sep_token_id)
    ids[[5, 9]] = 100
    batch = MaskedBlocks(ids, SIZE, tokenizer).batch(np.array([0]), np.array([0]))
    assert sorted(batch["labels"][0].tolist()) == [IGNORE] * 4 + [100, 100]
    rest = batch["labels"] == IGNORE
    assert torch.isin(batch["input_ids"].gather(1, batch["positions"])[rest], torch.tensor([2, 3])).all()


def test_a_tokenizer_without_a_mask(tokens):
    words = Tokenizer(models.WordLevel({"a": 0, "[SEP]": 1, "[UNK]": 2}, "[UNK]"))
    with pytest.raises(DataError, match=r"has no cls_token, mask_token\. .*made for BERT"):
        MaskedBlocks(tokens, SIZE, PreTrainedTokenizerFast(tokenizer_object=words, sep_token="[SEP]"))
