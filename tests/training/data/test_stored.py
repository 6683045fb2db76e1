"""Prepared data of any origin: a folder somebody has sent, or a cache that others can write to."""

import json
import shutil

import numpy as np
import pytest
import torch

from hf_gem.training.data.images import VisionConfig, read_splits
from hf_gem.training.data.normalisation import Preprocessing
from hf_gem.training.data.resident import prepare_resident
from hf_gem.training.data.stored import read_array
from hf_gem.training.data.text import TextConfig, prepare_text
from hf_gem.training.errors import DataError
from tests.helpers import TouchesWhenUnpickled, save_bytes_tokenizer, write_corpus


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of prepared text."""
    root = tmp_path_factory.mktemp("prepared")
    corpus = write_corpus(root / "corpus.txt", lines=60)
    tokenizer = save_bytes_tokenizer(root / "tokenizer")
    config = TextConfig(
        dataset=str(corpus), tokenizer=tokenizer, cache_dir=str(root / "cache"), block_size=8, min_validation_tokens=0
    )
    prepare_text(config)
    (folder,) = (path for path in (root / "cache" / "text").iterdir() if path.is_dir())
    return folder


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "copy")


def read(folder):
    return prepare_text(TextConfig(dataset=str(folder), block_size=8, min_validation_tokens=0))


def change(folder, **content):
    """Changes what is known of a folder; None removes it."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["content"] = {key: value for key, value in {**meta["content"], **content}.items() if value is not None}
    meta["bytes"] = {name: (folder / name).stat().st_size for name in meta["bytes"]}
    (folder / "meta.json").write_text(json.dumps(meta))


def test_what_was_prepared_is_read(folder):
    data = read(folder)
    assert data.train.tokens.dtype == np.uint16
    assert data.validation.ends[-1] == len(data.validation.tokens)


@pytest.mark.parametrize(
    "dtype", ["object", "O", "V8", "float64", "uint8", "int64", "M8", "uint16,uint16", 3, None, []]
)
def test_token_ids_have_one_of_two_types(folder, dtype):
    """With `object` every id would be a pointer that the file chooses."""
    change(folder, dtype=dtype)
    with pytest.raises(DataError, match=r"meta\.json: content.*dtype"):
        read(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"dtype": "uint32"}, r"cannot read the tokens in .*train\.bin: it has \d+ bytes"),
        ({"num_tokens": {"train": 10**12, "validation": 5}}, r"tokens take \d+\. Copy"),
        ({"num_tokens": {"train": -1, "validation": 5}}, "has -1 tokens"),
        ({"num_tokens": {"train": "9", "validation": 5}}, r"num_tokens\['train'\] must be a whole number"),
        ({"num_tokens": {"train": 9}}, "do not fit its tokenizer"),
        ({"num_tokens": []}, "num_tokens must be a mapping"),
        ({"vocab_size": 10**12}, "do not fit its tokenizer"),
        ({"vocab_size": "256"}, "vocab_size must be a whole number"),
        ({"shares": {"validation": "x"}}, r"shares\['validation'\] must be a number"),
        ({"hash": 3}, "hash must be text"),
        ({"hash": None}, "hash is missing"),
    ],
)
def test_what_is_known_of_text_is_checked(folder, content, message):
    change(folder, **content)
    with pytest.raises(DataError, match=message):
        read(folder)


@pytest.mark.parametrize(
    "ends", [[], [3], [0, 9], [5, 5], [9, 3], [[1, 2]], [1.0, 2.0], [-1], "pickle", "empty", "huge"]
)
def test_ends_of_documents_are_checked(folder, tmp_path, ends):
    path = folder / "validation.documents.npy"
    if ends == "pickle":
        evil = np.empty(1, dtype=object)
        evil[0] = TouchesWhenUnpickled(tmp_path / "touched")
        np.save(path, evil, allow_pickle=True)
    elif ends == "empty":
        path.write_bytes(b"")
    elif ends == "huge":
        np.save(path, np.zeros(2, dtype=np.int64))
        path.write_bytes(path.read_bytes().replace(b"(2,)", b"(2" + b"0" * 12 + b",)"))
    else:
        np.save(path, np.array(ends, dtype=None if ends else np.int64))
    change(folder)
    with pytest.raises(DataError, match=r"validation\.documents\.npy"):
        read(folder)
    assert not (tmp_path / "touched").exists()


def test_files_elsewhere_are_not_looked_at(folder, tmp_path):
    (tmp_path / "secret").write_text("x")
    for name in ("../secret", str(tmp_path / "secret")):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, "bytes": {**meta["bytes"], name: 1}}))
        with pytest.raises(DataError, match=r"is missing or cut short\. Copy the folder again"):
            read(folder)


def test_a_tokenizer_brings_no_code(folder, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\nclass Evil: pass\n")
    change(folder)
    with pytest.raises(DataError, match="trust_remote_code"):
        read(folder)
    assert not (tmp_path / "touched").exists()


def test_images_in_a_shared_cache(tmp_path):
    config = VisionConfig(cache_dir=str(tmp_path))

    def prepare():
        return prepare_resident(config, read_splits(config), 0, torch.device("cpu"), Preprocessing())

    good = prepare()
    (folder,) = (path for path in (tmp_path / "images").iterdir() if path.is_dir())
    images = np.load(folder / "train.npy")
    for planted in (images[:-1], images.astype(np.float32), images[:, :, 0], np.repeat(images, 2, axis=1)):
        np.save(folder / "train.npy", planted)
        change(folder)
        with pytest.raises(DataError, match=r"train\.npy"):
            prepare()
    change(folder, mean=["x"])  # then it is no prepared folder, and is built again
    assert torch.equal(prepare().train.images, good.train.images)


def test_arrays_are_read_as_they_are(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.int64).reshape(2, 3))
    assert read_array(tmp_path / "a.npy", np.int64, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(DataError, match=r"cannot read .* as int32 in 2 dimensions: it holds int64 in 2"):
        read_array(tmp_path / "a.npy", np.int32, 2)
    with pytest.raises(DataError, match="cannot read"):
        read_array(tmp_path / "none.npy", np.int32, 2)
