"""`hf-gem audit`, `convert` and `choose`."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DPRConfig,
    DPRContextEncoder,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    ViTConfig,
)

import hf_gem as package
from hf_gem.cli import models
from hf_gem.cli.choosing import caveat, findings, profile
from hf_gem.cli.loading import build, find
from hf_gem.training.coordinate_models import CoordinateMLPConfig, CoordinateMLPModel
from tests.helpers import is_version, save_bytes_tokenizer

SMALL = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 257, "n_positions": 32}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder with a small GPT-2 and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**SMALL, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    save_bytes_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder as timm saves a model."""
    folder = tmp_path_factory.mktemp("models") / "vit"
    timm.models.save_for_hf(timm.create_model("test_vit"), str(folder), safe_serialization=True)
    return folder


def test_audit_of_a_model_type(hf_gem):
    code, out, _ = hf_gem("audit", "gpt2", "--json")
    found = json.loads(out)
    assert (code, found["num_gem"], found["num_other"], found["complete"]) == (0, 0, 12, False)
    assert found["calls"][0]["function"] == "gelu_new"
    assert hf_gem("audit", "gpt2", "--check")[0] == 3
    code, out, _ = hf_gem("audit", "gpt2", "--act", "gem_n2", "--check")
    assert (code, out) == (0, "12 of 12 activation calls are GEM: 12 x gem_n2\n")


def test_audit_of_a_timm_model(hf_gem):
    for name in ("test_vit", "timm/test_vit"):
        assert hf_gem("audit", name)[1].startswith("0 of 6 activation calls are GEM")
    code, out, _ = hf_gem("audit", "test_vit", "--act", "gem", "--check")
    assert code == 0
    assert "6 x gem" in out


@pytest.mark.parametrize("flags", [(), ("--pretrained",)])
def test_audit_of_folders(hf_gem, gpt2, vit, flags):
    for folder in (gpt2, vit):
        code, out, err = hf_gem("audit", folder, *flags)
        assert code == 0, err
        assert out.startswith("0 of ")
        assert hf_gem("audit", folder, "--act", "segem", "--check", *flags)[0] == 0
        assert "  relu  " in hf_gem("audit", folder, "--act", "relu", *flags)[1]


@pytest.mark.filterwarnings("default")
def test_audit_converts_what_takes_no_activation(hf_gem):
    for model in ("bloom", "swin_tiny_patch4_window7_224"):
        if model.startswith("swin") and is_version("timm", "1.0.26"):
            continue  # takes act_layer and ignores it, with a warning
        code, out, err = hf_gem("audit", model, "--act", "gem_n2", "--check")
        assert (code, err) == (0, f"warning: {model} cannot be built with gem_n2, so it was converted afterwards.\n")
        assert "x gem_n2" in out
        assert hf_gem("audit", model, "--act", "gem_n0")[2].startswith("error: got activation name 'gem_n0'.")
    err = hf_gem("audit", "bloom", "--act", "relu")[2]  # which convert does not take
    assert "no field that selects an activation. Use an activation of the family" in err


def test_convert_saves_what_it_says(hf_gem, gpt2, tmp_path):
    out = tmp_path / "out"
    code, text, err = hf_gem("convert", gpt2, out, "--to", "egem_n2", "--eps", "1e-3")
    assert code == 0, err
    assert "2 activations replaced" in text
    assert text.endswith(f"Model: {out}\n")
    loaded = AutoModel.from_pretrained(out)
    assert loaded.h[1].mlp.act.spec.name == "egem_n2_eps0.001"
    assert (out / "tokenizer.json").exists()
    assert hf_gem("audit", out, "--check", "--pretrained")[0] == 0
    assert hf_gem("convert", gpt2, out, "--to", "egem")[0] == 1  # the folder is not empty


BERT = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 8}


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT2DoubleHeadsModel(GPT2Config(**SMALL)),  # no Auto class builds these
        lambda: DPRContextEncoder(DPRConfig(**BERT)),
        lambda: BertModel(BertConfig(**BERT)),
        lambda: BertModel(BertConfig(**BERT), add_pooling_layer=False),
        lambda: BertForMaskedLM(BertConfig(**BERT)),
    ],
    ids=["two heads", "dpr", "bert", "without a pooler", "with a head"],
)
@pytest.mark.filterwarnings("ignore:there is no tokenizer")
def test_convert_keeps_every_weight(hf_gem, tmp_path, model):
    model = model()
    model.save_pretrained(tmp_path / "model")
    code, out, err = hf_gem("convert", tmp_path / "model", tmp_path / "out", "--to", "gem_n2")
    assert code == 0, err
    assert out.startswith(f"{type(model).__name__}: ")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.filterwarnings("ignore:there is no tokenizer")
def test_convert_loads_a_model_without_a_pooler_once(hf_gem, tmp_path, monkeypatch):
    BertModel(BertConfig(**BERT), add_pooling_layer=False).save_pretrained(tmp_path / "model")
    loaded, once = [], BertModel.from_pretrained
    monkeypatch.setattr(BertModel, "from_pretrained", lambda *args, **kw: loaded.append(1) or once(*args, **kw))
    assert hf_gem("convert", tmp_path / "model", tmp_path / "out", "--to", "gem_n2")[0] == 0
    assert len(loaded) == 1


def test_half_a_pooler_is_not_thrown_away(hf_gem, tmp_path):
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["pooler.dense.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    code, _, err = hf_gem("convert", tmp_path, tmp_path / "out", "--to", "gem_n2")
    assert code == 1
    assert "lacks 1 weight, such as 'pooler.dense.bias'" in err


@pytest.mark.parametrize(
    ("named", "lost", "words"),
    [
        (["FancyGPT2"], "nothing", "names 'FancyGPT2' under architectures in its config.json. transformers has no"),
        (["pipeline"], "nothing", "names 'pipeline' under architectures"),
        (["BertModel"], "nothing", "names 'BertModel' under architectures"),
        (
            ["GPT2ForSequenceClassification"],
            "mlp.c_fc",
            "lacks 4 weights, such as 'transformer.h.0.mlp.c_fc.b",
        ),
        ([], "nothing", "is not the checkpoint of a GPT2Model: it has in addition 1 weight, such as 'score"),
    ],
)
def test_convert_writes_no_other_model(hf_gem, tmp_path, named, lost, words):
    source = tmp_path / "model"
    GPT2ForSequenceClassification(GPT2Config(**SMALL)).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": named}))
    weights = load_file(source / "model.safetensors")
    kept = {key: weight for key, weight in weights.items() if lost not in key}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    code, out, err = hf_gem("convert", source, tmp_path / "out", "--to", "gem_n2")
    assert (code, out) == (1, "")
    assert words in err
    assert not (tmp_path / "out").exists()
    assert hf_gem("audit", source, "--pretrained")[0] == 0


@pytest.mark.parametrize("eps", ["fit", "match"])
def test_convert_by_text(hf_gem, gpt2, tmp_path, eps):
    text = tmp_path / "text.txt"
    text.write_text("the gate of a smooth unit opens slowly. " * 40)
    flags = ("--data", text, "--batch-size", "4", "--num-batches", "2", "--json")
    code, out, err = hf_gem("convert", gpt2, tmp_path / "out", "--to", "egem_n1", "--eps", eps, *flags)
    assert code == 0, err
    report = json.loads(out)
    (name,) = {entry["new"] for entry in report["replaced"]}
    assert name != "egem"
    assert (report["rms"] is not None) == (eps == "match")
    assert AutoModel.from_pretrained(report["folder"]).h[0].mlp.act.spec.name == name


@pytest.mark.filterwarnings("default")
def test_a_tokenizer_is_copied_if_there_is_one(hf_gem, gpt2, tmp_path):
    """Without its files, transformers makes up a tokenizer of special tokens, and all words are unknown to it."""
    source = tmp_path / "bert"
    BertForMaskedLM(BertConfig(**BERT, max_position_embeddings=8)).save_pretrained(source)
    code, _, err = hf_gem("convert", source, tmp_path / "without", "--to", "gem")
    without = f"there is no tokenizer or image processor in {source}"
    assert (code, err) == (0, f"warning: {without}. So {tmp_path / 'without'} has none either.\n")
    assert not list((tmp_path / "without").glob("*token*"))
    (tmp_path / "data.txt").write_text("the gate " * 99)
    by_text = ("--to", "egem", "--eps", "match", "--data", tmp_path / "data.txt")
    code, out, err = hf_gem("convert", source, tmp_path / "with", *by_text)
    assert (code, out) == (1, "")
    assert f"there is no tokenizer in {source}. A text file needs one. Put its tokenizer there, or give an .npz" in err
    (source / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\ngate\n")
    assert hf_gem("convert", source, tmp_path / "with", *by_text)[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "with")("the gate", add_special_tokens=False).input_ids == [5, 6]


def test_convert_by_arrays(hf_gem, gpt2, tmp_path):
    np.savez(tmp_path / "ids.npz", input_ids=np.arange(8 * 16).reshape(8, 16))
    flags = ("--data", tmp_path / "ids.npz", "--per-layer", "--skip", "*.h.0.*")
    code, out, err = hf_gem("convert", gpt2, tmp_path / "out", "--to", "egem", "--eps", "match", *flags)
    assert code == 0, err
    assert "1 activation replaced" in out


def test_convert_by_images(hf_gem, vit, tmp_path):
    draw = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(draw.integers(0, 255, (170, 170, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    flags = ("--data", tmp_path, "--batch-size", "2")
    code, out, err = hf_gem("convert", vit, tmp_path / "out", "--to", "segem", "--eps", "match", *flags)
    assert code == 0, err
    assert "6 activations replaced" in out
    saved = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert package.audit(saved).complete
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert "import hf_gem" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--to", "egem", "--eps", "fit"), "--eps fit needs --data"),
        (("--to", "egem", "--data", "x.txt"), "--data needs --eps fit or match"),
        (("--to", "egem", "--per-layer"), "--per-layer needs --eps fit or match"),
        (("--to", "egem", "--eps", "-1"), "got --eps -1.0. eps must be positive"),
        (("--to", "gelu"), "not one of the family"),
        (("--to", "egem", "--eps", "fit", "--data", "nowhere.txt"), "there is no data at nowhere.txt"),
        (("--to", "egem", "--eps", "fit", "--data", __file__, "--batch-size", "999"), "less than one batch"),
        (("--to", "egem", "--skip", "nothing"), "--replace takes newgelu, and --skip takes patterns of paths such as"),
        (("--to", "egem", "--replace", "nothing"), "got 'nothing', which matches no activation"),
        (("--to", "egem", "--skip", "*"), "newgelu (excluded by --skip). Change --replace or --skip."),
        (("--to", "gem", "--eps", "match", "--data", __file__), "got --eps match for gem, which has a fixed eps"),
    ],
)
def test_convert_says_what_is_wrong(hf_gem, gpt2, tmp_path, flags, words):
    code, out, err = hf_gem("convert", gpt2, tmp_path / "out", *flags)
    assert (code, out) == (1, "")
    assert words in err
    assert "=" not in err.replace("[_n<N>]", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Exclude it with skip='h.0.act', or", "Exclude it with --skip h.0.act, or"),
        ("Exclude it with skip='h.*.act'.", "Exclude it with --skip 'h.*.act'."),
        ("got per_layer=True with eps=1e-4.", "got --per-layer with --eps 1e-4."),
        ("Change replace= or skip=. Set eps='fit'.", "Change --replace or --skip. Set --eps fit."),
    ],
)
def test_arguments_in_messages_are_options(message, expected):
    assert models._in_flags(message) == expected


def test_a_folder_of_something_else(hf_gem, tmp_path):
    assert "has no config.json" in hf_gem("audit", tmp_path)[2]
    (tmp_path / "config.json").write_text("[]")
    assert "neither of transformers nor of timm" in hf_gem("audit", tmp_path)[2]
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    assert "cannot be built" in hf_gem("audit", tmp_path)[2]
    assert "has no weights" in hf_gem("audit", "gpt2", "--pretrained")[2]
    assert "The nearest name is gpt2." in hf_gem("audit", "gtp2")[2]
    assert "The nearest name" not in hf_gem("audit", "nosuchmodel")[2]


def meta(config):
    with torch.device("meta"):
        return profile(AutoModel.from_config(config))


def test_choose_goes_by_the_kind_and_the_scale():
    wide, narrow = meta(GPT2Config(n_layer=1)), meta(GPT2Config(**SMALL))
    assert (wide.kind, narrow.kind) == ("transformer", "small-scale transformer")
    assert wide.rms == pytest.approx(0.02 * 768**0.5)
    assert (wide.matched, narrow.matched) == ("egem_n2_eps0.094", None)
    assert wide.activations == ("gelu_new",)
    assert meta(BertConfig(num_hidden_layers=1)).kind == "BERT"
    for config in (LlamaConfig(num_hidden_layers=1, vocab_size=8), ViTConfig(num_hidden_layers=1)):
        assert "no study" in meta(config).kind
        assert not meta(config).findings
    assert profile(timm.create_model("test_resnet")).kind == "ResNet"
    assert profile(CoordinateMLPModel(CoordinateMLPConfig())).kind == "physics-informed network"
    kinds = {"small-scale transformer", "transformer", "BERT", "ResNet", "plain CNN", "physics-informed network"}
    assert {row["kind"] for row in findings()} == kinds


def test_choose_says_what_is_not_known(hf_gem):
    out = hf_gem("choose", "resnet18")[1]
    assert "use: ReLU or GELU" in out
    assert "-4.66 points (-5.61 to -3.73)" in out
    assert "use: not known" in out
    assert "Use: not known." in hf_gem("choose", "llama")[1]
    assert "hf-gem convert resnet18 OUT" in out
    values = json.loads(hf_gem("choose", "resnet18", "--json")[1])
    assert values["findings"] == [row for row in findings() if row["kind"] == "ResNet"]
    assert {None, "ReLU or GELU"} < {row["use"] for row in values["findings"]}


def test_choose_claims_what_was_studied(hf_gem):
    """Each claim is in choosing.yaml, which a test compares with the records."""
    for model, matched in (("gpt2", True), ("bert", False), ("llama", False)):
        out = hf_gem("choose", model)[1]
        assert ("matched here: egem_n2_eps0.094, whose gate is half open at that rms" in out) == matched
        claims = [line for line in out.splitlines() if line.startswith(("  use: ", "  evidence: ", "These"))]
        rows = profile(build(find(model))).findings
        known = [text for row in rows for text in (f"  use: {row['use'] or 'not known'}", f"  evidence: {row['why']}")]
        assert claims == known + [caveat()] * bool(rows)
        assert "hf-gem convert" not in out  # a model type has no weights
