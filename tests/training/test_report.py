"""Pictures and cards are made from the record."""

import ast
from unittest.mock import MagicMock

import pytest
from huggingface_hub import ModelCard

from hf_gem.training.errors import CheckpointError
from hf_gem.training.report import save_results, write_card

MarkdownIt = pytest.importorskip("markdown_it", reason="pages are read by it").MarkdownIt

SESSION = {
    "command": "accelerate launch recipes/gpt2_pretrain.py",
    "commit": "0123abc",
    "dirty": False,
    "versions": {"python": "3.12.3", "torch": "2.11.0"},
    "hardware": {"cpu": "a processor", "gpus": []},
    **{
        "num_processes": 1,
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 1234.5,
        "first_step": 11,
        "last_step": 20,
    },
}
RECORD = {
    "recipe": "gpt2_pretrain",
    "preset": "demo",
    "status": "finished",
    "step": 20,
    "sessions": [SESSION],
    "num_parameters": 1334016,
    "mixed_precision": "no",
    "data": {"hash": "d" * 64, "num_tokens": {"train": 3000000, "validation": 100000}, "held_out": "hash"},
    "init_hash": "e" * 64,
    "config": {
        "hidden_act": "gem_n2",
        "dataset": "stdlib",
        **{
            "train_split": "train",
            "validation_split": "validation",
            "output_dir": "runs/demo",
            "push_to_hub": None,
            "license": "mit",
        },
        "validation_fraction": 0.05,
        **{"seed": 7, "data_seed": 8, "global_batch_size": 32, "block_size": 128, "learning_rate": 3e-3},
        **{"warmup_steps": 5, "min_lr_ratio": 0.1, "weight_decay": 0.1, "grad_clip": 1.0},
        **{"optimizer": "adamw", "adam_beta1": 0.9, "adam_beta2": 0.95, "lr_schedule": "cosine", "ema_decay": 0.0},
    },
    "result": {
        "initial_validation_loss": 8.3,
        "validation_loss": 4.25,
        "validation_perplexity": 70.105,
        "unit": "tokens",
        "units_per_second": 5612.0,
        "mfu": None,
    },
    "curves": {"loss": [[1, 8.2], [20, 4.1]], "validation_loss": [[0, 8.3], [20, 4.25]]},
}
MORE = {
    "title": "GPT-2 demo",
    "architecture": "GPT-2",
    "pipeline_tag": "text-generation",
    "auto_class": "AutoModelForCausalLM",
    "processor_class": "AutoTokenizer",
    "loss_unit": "nats per token",
    "imported": "hf_gem",
    "limits": "It is small.",
}


@pytest.mark.parametrize("act", ["gem_n2", "gelu"])
def test_a_card_states_what_the_record_holds(tmp_path, act):
    record = {**RECORD, "config": {**RECORD["config"], "hidden_act": act}}
    write_card(record, tmp_path / "README.md", **MORE, on_hub=False)
    text = (tmp_path / "README.md").read_text()
    for fact in ("4.2500", "70.11", "1,334,016", "0123abc", "torch 2.11.0", "a processor", "5,612", "Python 3.12.3"):
        assert fact in text
    for fact in (
        "2026-01-02T03:04:05",
        "1,234 s",
        "3,000,000 tokens",
        "100,000 for evaluation",
        "drawn by a hash",
        act,
    ):
        assert fact in text
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert act in card.data.tags
    for ours in (
        "import hf_gem",
        "trust_remote_code",
        "KeyError",
        "2604.21677",
        "- hf_gem",
    ):  # a card of GELU claims nothing of GEM
        assert (ours in text) == (act == "gem_n2"), ours
    assert not any(mark in text for mark in ("{{", "}}", "{%", "None", "TODO", "More Information Needed"))


def test_a_card_of_several_sessions_says_which_one_it_describes(tmp_path):
    record = {**RECORD, "sessions": [{**SESSION, "commit": "older"}, SESSION]}
    write_card(record, tmp_path / "README.md", **MORE, on_hub=False)
    text = (tmp_path / "README.md").read_text()
    assert "the last of 2 sessions, steps 11 to 20" in text
    assert "older" not in text


def test_a_card_says_what_was_evaluated_on(tmp_path):
    sizes = {"train": 3000000, "validation": 300000, "test": 250000}
    record = {
        **RECORD,
        "data": {**RECORD["data"], "num_tokens": sizes},
        "result": {**RECORD["result"], "test_loss": 4.5},
    }
    write_card(record, tmp_path / "README.md", **MORE, on_hub=False)
    card = (tmp_path / "README.md").read_text()
    assert "| test loss | 4.5000 nats per token, on 250,000 tokens that were not used for any choice |" in card
    assert "too few" not in card
    write_card(RECORD, tmp_path / "README.md", **MORE, on_hub=False)
    assert "| validation text | 100,000 tokens, too few to compare models |" in (tmp_path / "README.md").read_text()


def test_a_missing_value_is_an_error_and_not_a_gap(tmp_path):
    record = {key: value for key, value in RECORD.items() if key != "data"}
    with pytest.raises(Exception, match="data"):
        write_card(record, tmp_path / "README.md", **MORE, on_hub=False)


def test_a_loss_past_all_bounds_has_a_card(tmp_path):
    record = {**RECORD, "result": {**RECORD["result"], "validation_loss": 800.0}}
    write_card(record, tmp_path / "README.md", **MORE, on_hub=False)
    assert "800.0000" in (tmp_path / "README.md").read_text()


def test_a_full_disk_at_the_end_is_explained(tmp_path):
    class Model:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    class Processor:
        def save_pretrained(self, folder):
            raise Exception("No space left on device (os error 28)")  # as the tokenizers library does

    record = {**RECORD, "config": {**RECORD["config"], "hidden_act": "gelu", "output_dir": str(tmp_path)}}
    for broken in ((Model(), None), (MagicMock(), Processor())):
        with pytest.raises(CheckpointError, match=r"No space left.*last checkpoint is complete.*same command again"):
            save_results(*broken, record)


PAYLOAD = (
    "`|x|` ``` <script>alert(1)</script> <!-- [a](http://evil) ![b](http://evil) & --- # h\n\n```\n# h\n---\n{{ 1 }}"
)


def shown(text):
    """The kinds of things that Markdown makes of a text, and what links, pictures and headings say."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    for token in parser.parse(text):
        for part in (token, *(token.children or ())):
            yield part.type, part


@pytest.mark.parametrize("act", ["gem_n2", "gelu"])
def test_nothing_in_a_record_brings_markdown_html_or_yaml_into_a_card(tmp_path, act):
    def card(text):
        config = {**RECORD["config"], "hidden_act": act, "dataset": text, "license": text, "output_dir": text}
        session = {
            **SESSION,
            "command": text,
            "commit": text,
            "started": text,
            "versions": {"python": text, text: text},
        }
        session["hardware"] = {"cpu": text, "gpus": [text]}
        record = {
            **{**RECORD, "config": config, "sessions": [session], "preset": text, "recipe": text, "conversion": text},
            "data": {**RECORD["data"], "hash": text},
        }
        write_card(record, tmp_path / "README.md", **{**MORE, "title": text}, on_hub=True)
        content = ModelCard.load(tmp_path / "README.md")
        return content.data.to_dict(), content.text

    data, text = card(PAYLOAD)
    harmless, expected = card("harmless")
    assert data["datasets"] == [PAYLOAD]
    assert data["license"] == PAYLOAD
    assert data.keys() == harmless.keys()
    assert not any("alert" in part.content for kind, part in shown(text) if kind in ("html_block", "html_inline"))
    blocks = ("html_block", "html_inline", "hr", "heading_open", "table_open", "tr_open", "td_open", "fence")
    for kind in (*blocks, "list_item_open", "link_open", "image"):
        assert [k for k, _ in shown(text)].count(kind) == [k for k, _ in shown(expected)].count(kind), kind
    python = next(part.content for kind, part in shown(text) if kind == "fence" and part.info == "python")
    calls = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
    assert {call.args[0].value for call in calls} == {PAYLOAD}  # all that is called, is called with the folder


@pytest.mark.parametrize("folder", ['runs/"my" run', "runs/it's \\ a", 'x"); import os; os.system("x', "a\nb"])
def test_the_snippet_of_a_card_loads_the_folder_whatever_it_is_called(tmp_path, folder):
    record = {**RECORD, "config": {**RECORD["config"], "output_dir": folder}}
    write_card(record, tmp_path / "README.md", **MORE, on_hub=False)
    python = next(
        part.content
        for kind, part in shown((tmp_path / "README.md").read_text())
        if kind == "fence" and part.info == "python"
    )
    calls = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
    assert [call.args[0].value for call in calls] == [folder, folder]
