"""From text to blocks of tokens: sources, splits, cache, errors."""

import json
import os
import shutil
import threading

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_gem.training.data import text as data_text
from hf_gem.training.data.text import STDLIB, TextConfig, TokenBlocks, prepare_text
from hf_gem.training.errors import DataError
from hf_gem.training.loss import IGNORE
from tests.helpers import save_bytes_tokenizer, write_corpus


@pytest.fixture
def prepare(tmp_path):
    def run(dataset, **fields):
        defaults = {"block_size": 16, "vocab_size": 300, "validation_fraction": 0.2, "cache_dir": str(tmp_path / "c")}
        defaults["min_validation_tokens"] = 0
        return prepare_text(TextConfig(dataset=str(dataset), **{**defaults, **fields}))

    return run


@pytest.fixture
def bytes_tokenizer(tmp_path):
    return save_bytes_tokenizer(tmp_path / "bytes")


DOCUMENTS = [f"document {i} has its own number {i * i}\n" * 3 for i in range(150)]


def write_documents(folder, kind, split="train", documents=DOCUMENTS):
    folder.mkdir(exist_ok=True)
    path = folder / f"{split}.{kind}"
    if kind == "parquet":
        datasets = pytest.importorskip("datasets", reason="parquet is written by it")
        datasets.Dataset.from_dict({"text": documents}).to_parquet(path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    else:
        path.write_text("".join(documents))
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_files_and_folders_give_all_their_text(prepare, tmp_path, bytes_tokenizer, kind, as_folder):
    path = write_documents(tmp_path / "data", kind)
    data = prepare(path.parent if as_folder else path, tokenizer=bytes_tokenizer)
    size = sum(len(d) for d in DOCUMENTS) + (len(DOCUMENTS) if kind != "txt" else 2)  # one end for each document
    assert len(data.train.tokens) + len(data.validation.tokens) == size
    assert data.facts["held_out"] == ("end" if kind == "txt" else "hash")
    share = len(data.validation.tokens) / size
    assert 0.1 < share < 0.3


def test_a_validation_split_is_used_where_there_is_one(prepare, tmp_path, bytes_tokenizer):
    write_documents(tmp_path / "data", "jsonl")
    write_documents(tmp_path / "data", "jsonl", "validation", ["held out by hand, and long enough"])
    data = prepare(tmp_path / "data", tokenizer=bytes_tokenizer)
    assert len(data.train.tokens) == sum(map(len, DOCUMENTS)) + len(DOCUMENTS)
    assert data.tokenizer.decode(data.validation.tokens[:-1]) == "held out by hand, and long enough"


def test_documents_are_separated_and_splits_do_not_overlap(prepare, tmp_path, bytes_tokenizer):
    data = prepare(write_documents(tmp_path / "data", "jsonl"), tokenizer=bytes_tokenizer)
    train, validation = (
        set(data.tokenizer.decode(blocks.tokens).split("<|endoftext|>")) - {""}
        for blocks in (data.train, data.validation)
    )
    assert train | validation == set(DOCUMENTS)
    assert not train & validation


def test_long_texts_are_tokenised_in_pieces_without_a_trace(prepare, tmp_path, monkeypatch):
    path = write_corpus(tmp_path / "corpus.txt")  # with a trained tokenizer, whose merges a cut could break
    whole = prepare(path, cache_dir=str(tmp_path / "c1"))
    monkeypatch.setattr(data_text, "_PIECE", 100)
    pieces = prepare(path, cache_dir=str(tmp_path / "c2"))
    assert pieces.facts["hash"] == whole.facts["hash"]


def test_stdlib_is_source_without_tests(prepare, monkeypatch):
    files = data_text.stdlib_files()
    names = [name for name, _ in files]
    assert names == sorted(names)
    assert {"abc.py", "json/decoder.py"} <= set(names)
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    monkeypatch.setattr(data_text, "stdlib_files", lambda: files[::20])  # a part of them, which is quickly read
    data = prepare(STDLIB, max_train_tokens=20000)
    assert len(data.train.tokens) == 20000
    assert len(data.validation.tokens) > 1000


def test_a_second_start_does_not_tokenise(prepare, tmp_path, monkeypatch):
    path = write_corpus(tmp_path / "corpus.txt")
    first = prepare(path)
    monkeypatch.setattr(data_text, "_build", lambda *_: pytest.fail("tokenised again"))
    second = prepare(path, block_size=8)  # other blocks of the same tokens
    assert isinstance(second.train.tokens, np.memmap)
    assert second.facts["hash"] == first.facts["hash"]
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()


def test_a_folder_of_the_cache_is_a_dataset(prepare, tmp_path, monkeypatch):
    """As on another machine: the text, its tokenizer and the rest of the cache are not there."""
    path = write_corpus(tmp_path / "corpus.txt")
    first = prepare(path, cache_dir=str(tmp_path / "here"))
    (folder,) = (p for p in (tmp_path / "here" / "text").iterdir() if p.is_dir())
    copy = shutil.move(folder, tmp_path / "copy")
    path.unlink()
    monkeypatch.setattr(data_text, "_build", lambda *_: pytest.fail("tokenised again"))
    second = prepare(copy, cache_dir=str(tmp_path / "there"), tokenizer="of/no-meaning")
    assert second.facts == {**first.facts, "held_out": "split"}
    assert np.array_equal(second.train.tokens, first.train.tokens)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    (copy / "train.bin").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"'train\.bin' is missing or cut short\. Copy the folder again"):
        prepare(copy)


def test_what_changes_the_tokens_changes_the_cache(prepare, tmp_path):
    path = write_corpus(tmp_path / "corpus.txt")
    changes = ({}, {"vocab_size": 310}, {"validation_fraction": 0.3}, {"max_train_tokens": 900})
    hashes = {prepare(path, **change).facts["hash"] for change in changes}
    write_corpus(path, lines=301)
    assert len({*hashes, prepare(path).facts["hash"]}) == 5


def test_a_changed_tokenizer_folder_is_noticed(prepare, tmp_path, bytes_tokenizer):
    path = write_corpus(tmp_path / "corpus.txt")
    before = prepare(path, tokenizer=bytes_tokenizer)
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "[UNK]": 1, "gate": 900}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(bytes_tokenizer)
    after = prepare(path, tokenizer=bytes_tokenizer)
    assert len(after.train.tokens) < len(before.train.tokens)
    assert (len(after.tokenizer), after.vocab_size) == (3, 901)  # the largest id counts, not their number


@pytest.mark.parametrize("damage", ["half", "one id less", "no meta", "empty meta"])
def test_a_damaged_cache_is_built_again(prepare, tmp_path, damage):
    path = write_corpus(tmp_path / "corpus.txt")
    good = prepare(path)
    (folder,) = (p for p in (tmp_path / "c" / "text").iterdir() if p.is_dir())
    size = (folder / "train.bin").stat().st_size
    if "meta" in damage:
        (folder / "meta.json").write_text("") if "empty" in damage else (folder / "meta.json").unlink()
    else:
        os.truncate(folder / "train.bin", size // 2 if damage == "half" else size - 2)
    again = prepare(path)
    assert again.facts == good.facts
    assert len(again.train.tokens) * 2 == size


def test_processes_that_start_at_once_build_once(prepare, tmp_path, monkeypatch):
    path = write_corpus(tmp_path / "corpus.txt")
    builds = []
    build = data_text._build
    monkeypatch.setattr(data_text, "_build", lambda *a: builds.append(1) or build(*a))
    threads = [threading.Thread(target=prepare, args=(path,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_a_trained_tokenizer_is_reproducible_and_lossless(prepare, tmp_path):
    path = write_corpus(tmp_path / "corpus.txt")
    one, two = (prepare(path, cache_dir=str(tmp_path / name)) for name in "ab")
    assert one.facts["hash"] == two.facts["hash"]
    assert len(one.tokenizer) == 300
    text = "Größe 数 \n\t x"
    assert one.tokenizer.decode(one.tokenizer(text)["input_ids"]) == text


def test_streaming_stops_at_the_token_limit(prepare, tmp_path, bytes_tokenizer):
    write_documents(tmp_path / "data", "jsonl")
    write_documents(tmp_path / "data", "jsonl", "validation", DOCUMENTS[:2])
    data = prepare(tmp_path / "data", tokenizer=bytes_tokenizer, streaming=True, max_train_tokens=500)
    assert len(data.train.tokens) == 500
    assert data.tokenizer.decode(data.train.tokens[: len(DOCUMENTS[0])]) == DOCUMENTS[0]


def test_a_stream_is_read_no_further_than_needed(prepare, tmp_path, monkeypatch):
    read = []
    documents = data_text._Corpus._named

    def counted(self, split):
        for name, text in documents(self, split):
            read.append(split)
            yield name, text

    monkeypatch.setattr(data_text._Corpus, "_named", counted)
    path = write_documents(tmp_path / "data", "jsonl", documents=DOCUMENTS * 20)
    data = prepare(path, streaming=True, max_train_tokens=500)
    assert len(data.train.tokens) == 500
    assert len(data.validation.tokens) == 100  # the held-out share of the limit
    assert len(read) < 150


def test_a_test_split_of_a_stream_is_limited_as_validation_is(prepare, tmp_path, bytes_tokenizer):
    for split in ("train", "test"):
        write_documents(tmp_path / "data", "jsonl", split)
    data = prepare(
        tmp_path / "data", tokenizer=bytes_tokenizer, streaming=True, max_train_tokens=500, test_split="test"
    )
    assert len(data.test.tokens) == len(data.validation.tokens) == 100


def test_too_short_a_stream_is_refused_before_it_is_read():
    fields = {"streaming": True, "validation_fraction": 0.25, "min_validation_tokens": 100}
    TextConfig(**fields, max_train_tokens=400).validate()
    with pytest.raises(ValueError, match=r"--max_train_tokens must be larger .* validation text is 99 tokens.*got 399"):
        TextConfig(**fields, max_train_tokens=399, block_size=64).validate()
    with pytest.raises(ValueError, match=r"--max_train_tokens must be larger .* test text is 80 tokens.*got 400"):
        TextConfig(**fields, max_train_tokens=400, block_size=64, test_fraction=0.2).validate()
    TextConfig(**{**fields, "streaming": False}, max_train_tokens=9).validate()


@pytest.mark.parametrize("text", ["one line without an end " * 20, ("long last line " * 30).join("\n\n")])
def test_few_documents_keep_their_beginnings_for_training(prepare, tmp_path, bytes_tokenizer, text):
    documents = [f"{i} {text}" for i in range(5)]
    data = prepare(write_documents(tmp_path / "data", "jsonl", documents=documents), tokenizer=bytes_tokenizer)
    begins = data.tokenizer.decode(data.train.tokens).split("<|endoftext|>")[:-1]
    ends = data.tokenizer.decode(data.validation.tokens).split("<|endoftext|>")[:-1]
    assert [a + b for a, b in zip(begins, ends, strict=True)] == documents
    assert all(len(a) > len(b) for a, b in zip(begins, ends, strict=True))


def test_all_files_of_a_folder_count_and_whole_names_tell_their_splits(prepare, tmp_path, bytes_tokenizer):
    for name in ("a", "part/b", "train-1", "test-1", "validation/c", "README"):
        file = tmp_path / "data" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text of {name}, long enough for a block\n")
    data = prepare(tmp_path / "data", tokenizer=bytes_tokenizer)
    train, validation = (data.tokenizer.decode(b.tokens) for b in (data.train, data.validation))
    assert [name in train for name in ("of a,", "of part/b,", "of train-1,", "test-1", "README")] == [1, 1, 1, 0, 0]
    assert validation.startswith("text of validation/c,")
    assert data.facts["held_out"] == "split"


def test_words_inside_the_names_of_files_name_no_split(prepare, tmp_path, bytes_tokenizer):
    names = ("chapter [1]", "my dev notes", "the test of time", "letters/test/3", "validation rules")
    for name in names:
        file = tmp_path / "my test" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text of {name}, long enough for a block\n")
    data = prepare(tmp_path / "my test", tokenizer=bytes_tokenizer)
    train = data.tokenizer.decode(data.train.tokens)
    assert all(f"text of {name}" in train for name in names)
    assert data.facts["held_out"] == "end"


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"),
        ("train-00000-of-00001-a09b74b3ef9c3b56.parquet", "test-00000-of-00001-cd19b3f37b6f1b3a.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
    ],
)
def test_files_are_laid_out_as_on_the_hub(prepare, tmp_path, bytes_tokenizer, train, test):
    for name, documents in ((train, DOCUMENTS), (test, DOCUMENTS[:30])):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_documents(tmp_path / "made", "parquet", documents=documents).rename(path)
    data = prepare(tmp_path / "set", tokenizer=bytes_tokenizer, test_split="test")
    assert data.facts["num_documents"]["train"] + data.facts["num_documents"]["validation"] == len(DOCUMENTS)
    assert data.facts["num_documents"]["test"] == 30


def test_columns_of_other_types_are_an_error_and_gaps_are_not(prepare, tmp_path, bytes_tokenizer):
    rows = [{"text": d, "number": i} for i, d in enumerate(DOCUMENTS)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": None, "number": 1}]))
    with pytest.raises(DataError, match=r"'number' of .* holds int, not text\. The columns are text, number\. "):
        prepare(path, tokenizer=bytes_tokenizer, text_column="number")
    assert len(prepare(path, tokenizer=bytes_tokenizer).train.tokens) > 0


def test_a_validation_set_too_small_names_its_share(prepare, tmp_path):
    with pytest.raises(DataError, match=r"validation text.*Raise --validation_fraction \(now 1e-09\)"):
        prepare(write_documents(tmp_path / "data", "jsonl"), validation_fraction=1e-9)


def test_validation_and_test_text_are_documents_of_their_own(prepare, tmp_path, bytes_tokenizer):
    path = write_documents(tmp_path / "data", "jsonl")
    data = prepare(path, tokenizer=bytes_tokenizer, test_fraction=0.3)
    parts = [data.train, data.validation, data.test]
    found = [data.tokenizer.decode(part.tokens).split("<|endoftext|>")[:-1] for part in parts]
    assert sorted(text for part in found for text in part) == sorted(DOCUMENTS)
    assert 0.1 < len(found[1]) / 150 < 0.3 < len(found[2]) / 150 + 0.1 < 0.5
    assert data.facts["num_documents"] == dict(zip(("train", "validation", "test"), map(len, found), strict=True))
    assert prepare(path, tokenizer=bytes_tokenizer).train.tokens.size == data.train.tokens.size + data.test.tokens.size


def test_every_label_knows_its_document(prepare, tmp_path, bytes_tokenizer):
    data = prepare(write_documents(tmp_path / "data", "jsonl"), tokenizer=bytes_tokenizer)
    batch = data.validation.batch(np.arange(len(data.validation)))
    counted = batch["labels"] != IGNORE
    units, ids = batch["units"][counted].numpy(), batch["labels"][counted].numpy()
    sizes = np.bincount(units)
    assert sizes.sum() == len(data.validation.tokens) - 1  # the first token is no target
    assert np.array_equal(np.flatnonzero(ids == data.tokenizer.eos_token_id) + 1, np.cumsum(sizes))
    assert "units" not in data.train.batch(np.arange(2), np.arange(2))


def test_three_parts_of_one_document(prepare, tmp_path):
    corpus = write_corpus(tmp_path / "corpus.txt")
    data = prepare(corpus, test_fraction=0.1)
    parts = [data.tokenizer.decode(part.tokens).replace("<|endoftext|>", "")
             for part in (data.train, data.validation, data.test)]  # fmt: skip
    assert "".join(parts) == corpus.read_text()
    assert data.facts["held_out"] == "end"


def test_a_test_split_of_the_dataset(prepare, tmp_path, bytes_tokenizer):
    folder = tmp_path / "data"
    write_documents(folder, "jsonl")
    write_documents(folder, "jsonl", split="test", documents=["the test\n"])
    data = prepare(folder, tokenizer=bytes_tokenizer, test_split="test")
    assert data.tokenizer.decode(data.test.tokens) == "the test\n<|endoftext|>"
    with pytest.raises(
        DataError, match=r"has no split 'exam'\. --test_split must be one of its splits\. Name one, or hold out"
    ):
        prepare(folder, tokenizer=bytes_tokenizer, test_split="exam")


def test_few_tokens_of_validation_have_to_be_asked_for(prepare, tmp_path):
    corpus = write_corpus(tmp_path / "corpus.txt")
    count = len(prepare(corpus).validation.tokens)
    assert len(prepare(corpus, min_validation_tokens=count).validation.tokens) == count
    with pytest.raises(DataError, match=r"min_validation_tokens is 200,000\. Raise --validation_fraction \(now"):
        prepare(corpus, min_validation_tokens=200_000)


def test_a_validation_set_is_too_small_only_for_what_is_evaluated(prepare, tmp_path):
    corpus = write_corpus(tmp_path / "corpus.txt")
    count = len(prepare(corpus).validation.tokens)
    fields = {"block_size": 16, "vocab_size": 300, "validation_fraction": 0.2, "cache_dir": str(tmp_path / "c")}
    config = TextConfig(dataset=str(corpus), min_validation_tokens=0, **fields)
    assert len(prepare_text(config, count).validation.tokens) == count
    with pytest.raises(DataError, match=f"has {count} tokens. One block of 16 needs {count + 1}. "):
        prepare_text(config, count + 1)


def test_a_cache_that_cannot_be_written_is_an_error(prepare, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot cache"):
        prepare(write_corpus(tmp_path / "corpus.txt"), cache_dir=str(tmp_path / "file" / "cache"))


def test_large_vocabularies_get_wide_ids(prepare, tmp_path):
    words = {"<|endoftext|>": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 70000)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "words"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    (tmp_path / "corpus.txt").write_text("w69999 w2\n" * 100)
    data = prepare(tmp_path / "corpus.txt", tokenizer=str(folder))
    assert data.train.tokens.dtype == np.uint32
    assert data.train.tokens[:2].tolist() == [69999, 2]


def test_blocks_cover_every_target_once():
    tokens = np.arange(24, dtype=np.uint16)
    blocks = TokenBlocks(tokens, block_size=10, partial=True)
    batch = blocks.batch(np.arange(len(blocks)))
    assert len(blocks) == 3
    targets = batch["labels"][batch["labels"] != IGNORE]
    assert targets.tolist() == list(range(1, 24))
    inputs = batch["input_ids"][batch["labels"] != IGNORE]
    assert inputs.tolist() == list(range(23))
    assert len(TokenBlocks(tokens, block_size=10)) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["no text"]),
        ("short\n", ["block of 16", "--block_size"]),
    ],
)
def test_too_little_text_is_an_error(prepare, tmp_path, content, words):
    (tmp_path / "corpus.txt").write_text(content)
    with pytest.raises(DataError) as error:
        prepare(tmp_path / "corpus.txt")
    assert all(word in str(error.value) for word in [*words, "corpus.txt"]), error.value


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("bad.parquet", b"not parquet", r"ArrowInvalid: Parquet .*\. Fix the data\.$"),
        ("bad.jsonl", b'{"text": "good"}\n{"text": \n', r"ArrowInvalid: JSON parse error.*\. Fix the data\.$"),
        ("bad.txt", b"not utf-8 \xff" * 100, r"UnicodeDecodeError: .* 0xff in position 10.*\. Fix the data\.$"),
        ("bad.docx", b"", "has the suffix '.docx'. It can be .parquet, .jsonl, .json, .txt"),
        ("empty/nothing", b"", r"empty holds these kinds of files: none\. It must hold one kind of .parquet, .jsonl"),
    ],
)
def test_unreadable_sources_are_errors_that_say_why(prepare, tmp_path, name, content, cause):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(DataError, match=cause):
        prepare(path.parent if "/" in name else path)
    assert not list((tmp_path / "c" / "text").glob(".*"))


@pytest.mark.parametrize(
    ("kind", "content", "cause"),
    [
        ("txt", b"not utf-8 \xff", "UnicodeDecodeError"),
        ("jsonl", b'{"text": "not utf-8 \xff"}\n', "UnicodeDecodeError"),
        ("jsonl", b'{"text": "good"}\n{"text": \n', "JSON parse error"),
        ("jsonl", b'{"content": "another column"}\n', "column names don't match"),
        ("jsonl", b'{"text": [1, 2]}\n', "Couldn't cast"),
        ("parquet", b"not parquet", "ArrowInvalid"),
        ("parquet", None, "column names don't match"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_the_bad_file_of_a_folder_is_named(prepare, tmp_path, monkeypatch, kind, content, cause, streaming):
    monkeypatch.chdir(tmp_path)  # a relative path is found too
    good = write_documents(tmp_path / "data", kind)
    shutil.copy(good, tmp_path / "data" / f"zebra.{kind}")
    bad = tmp_path / "data" / f"middle.{kind}"
    if content is None:
        datasets = pytest.importorskip("datasets", reason="parquet is written by it")
        datasets.Dataset.from_dict({"content": ["another column"]}).to_parquet(bad)
    else:
        bad.write_bytes(content)
    good.rename(tmp_path / "data" / f"first.{kind}")
    with pytest.raises(DataError, match=rf"^cannot read data/middle\.{kind}: .*{cause}.*Repair the file, or move it"):
        prepare("data", streaming=streaming, max_train_tokens=10**6 if streaming else None)


def test_a_dataset_that_is_nowhere_may_have_a_wrong_name(prepare):
    with pytest.raises(DataError, match=r"'no/such-dataset': .* local folder or file \(.parquet, .*Check the name\.$"):
        prepare("no/such-dataset")


def test_a_wrong_column_split_or_tokenizer_names_the_choices(prepare, tmp_path, bytes_tokenizer):
    path = write_documents(tmp_path / "data", "jsonl")
    with pytest.raises(DataError, match=r"'content'\. Its columns are text\. .*--text_column"):
        prepare(path, tokenizer=bytes_tokenizer, text_column="content")
    with pytest.raises(DataError, match=r"'dev'\. Its splits are train\. .*--train_split"):
        prepare(path, tokenizer=bytes_tokenizer, train_split="dev")
    with pytest.raises(DataError, match=r"cannot load the tokenizer '.*nowhere': "):
        prepare(path, tokenizer=str(tmp_path / "nowhere"))
