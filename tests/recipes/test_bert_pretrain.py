"""The BERT recipe as a person meets it."""

import json
import re

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_gem import gain
from hf_gem.training.errors import DataError
from recipes import bert_pretrain
from recipes.bert_pretrain import PRESETS, Config, build_model
from tests.helpers import BERT, finish, launch, losses, run_here, save_bytes_tokenizer, start, write_corpus

TINY = (
    *("--n_layer=1", "--n_embd=16", "--n_head=2", "--n_inner=32", "--block_size=16", "--vocab_size=300"),
    *(
        "--validation_fraction=0.2",
        "--min_validation_tokens=0",
        "--steps=6",
        "--global_batch_size=8",
        "--micro_batch_size=8",
        "--warmup_steps=2",
    ),
    *("--learning_rate=0.01", "--log_every=1", "--eval_every=3", "--save_every=2"),
)
# Rounding of float32 sums taken in another order, carried through six steps of a model this small.
REORDERED = 2000 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return (*TINY, f"--dataset={write_corpus(folder / 'corpus.txt')}", f"--cache_dir={folder / 'cache'}")


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    return folder, run_here(bert_pretrain, folder, *flags)


def test_a_run_leaves_everything_and_says_where(reference):
    folder, printed = reference
    assert {p.name for p in folder.iterdir()} >= {
        *("config.json", "model.safetensors", "tokenizer.json", "README.md", "loss_curve.png", "record.json"),
    }
    first, last = map(float, re.search(r"Validation loss ([\d.]+) -> ([\d.]+)", printed).groups())
    assert last < first
    assert "Filled in: import" in printed
    assert "[MASK]" not in printed.split("Filled in: ")[1].splitlines()[0]
    record = json.loads((folder / "record.json").read_text())
    assert (record["status"], record["recipe"], record["result"]["unit"]) == ("finished", "bert_pretrain", "tokens")
    layers = record["activation_inputs"]["layers"]
    assert [path.rpartition(".")[2] for path in layers] == ["intermediate_act_fn", "transform_act_fn"]
    assert list(layers.values()) == pytest.approx([0.02 * 16**0.5] * 2, rel=0.2)
    card = (folder / "README.md").read_text()
    assert f"{last:.4f} nats per masked token" in card
    assert "pipeline_tag: fill-mask" in card
    assert "linear decay to 0.0 times the peak" in card


def test_the_saved_model_loads(reference):
    model = AutoModelForMaskedLM.from_pretrained(reference[0])
    tokenizer = AutoTokenizer.from_pretrained(reference[0])
    assert type(model.bert.encoder.layer[0].intermediate.intermediate_act_fn).__name__ == "GEM"
    assert tokenizer.mask_token == "[MASK]"
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_an_eps_that_matches(flags, tmp_path):
    run_here(bert_pretrain, tmp_path / "match", *flags, "--hidden_act=egem_n2", "--eps=match", "--init_like_width=768")
    record = json.loads((tmp_path / "match" / "record.json").read_text())
    name = record["config"]["hidden_act"]
    assert record["match"]["rms"] == pytest.approx(0.02 * 768**0.5, rel=0.1)
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "match").config.hidden_act == name
    run_here(bert_pretrain, tmp_path / "plain", *flags, f"--hidden_act={name}", "--init_like_width=768")
    plain = json.loads((tmp_path / "plain" / "record.json").read_text())
    assert (plain["init_hash"], plain["samples_hash"]) == (record["init_hash"], record["samples_hash"])
    assert losses(tmp_path / "plain") == losses(tmp_path / "match")


@pytest.mark.parametrize("num_processes", [2, 4])
def test_the_launcher_gives_the_same_run(reference, flags, tmp_path, num_processes):
    command = (*flags, f"--output_dir={tmp_path}", "--micro_batch_size=4")
    code, output = launch(num_processes, *command, recipe=BERT)
    assert code == 0, output
    assert losses(tmp_path) == pytest.approx(losses(reference[0]), rel=REORDERED)
    assert losses(tmp_path, "validation_loss") == pytest.approx(losses(reference[0], "validation_loss"), rel=REORDERED)


def test_presets_are_valid_and_of_the_size_they_claim():
    for name, preset in PRESETS.items():
        config = Config(**preset)
        config.validate()
        assert config.warmup_steps == round(0.06 * config.steps), name
        assert (config.adam_beta2, config.lr_schedule, config.min_lr_ratio) == (0.98, "linear", 0.0)

    class Tokenizer:
        pad_token_id = 0

    with torch.device("meta"):
        small = build_model(Config(**PRESETS["bert-small"]), Tokenizer(), 30522)
    assert sum(p.numel() for p in small.parameters()) == pytest.approx(28.8e6, rel=0.001)
    assert PRESETS["bert-small-paper"]["steps"] == 3000


def test_each_activation_can_start_at_its_own_gain():
    class Tokenizer:
        pad_token_id = 0

    model = build_model(Config(**PRESETS["demo"], own_gain=True, hidden_act="gem_n2"), Tokenizer(), 4096)
    for layer in model.bert.encoder.layer:
        near = {"rel": 6 / (2 * 65536) ** 0.5}  # six deviations of the deviation of 65536 normal draws
        assert layer.intermediate.dense.weight.std().item() == pytest.approx(128**-0.5, **near)
        assert layer.output.dense.weight.std().item() == pytest.approx(gain("gem_n2") / 512**0.5, **near)
    head = model.cls.predictions.transform.dense.weight
    assert head.std().item() == pytest.approx(128**-0.5, rel=6 / (2 * 16384) ** 0.5)


def test_a_validation_text_without_a_whole_block_names_its_share(flags, tmp_path):
    small = ("--block_size=128", "--validation_fraction=0.001")
    with pytest.raises(
        DataError, match=r"validation text .* of 128 needs 126\. Raise --validation_fraction \(now 0.001\)"
    ):
        run_here(bert_pretrain, tmp_path / "run", *flags, *small)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_mask(flags, tmp_path):
    tokenizer = save_bytes_tokenizer(tmp_path / "tokenizer")
    code, output = finish(start(*flags, f"--tokenizer={tokenizer}", f"--output_dir={tmp_path / 'run'}", recipe=BERT))
    assert code == 1
    assert "error: the tokenizer has no cls_token, sep_token, mask_token" in output
    assert "Traceback" not in output
