"""A sample of the sweeps, small and of every kind, and the page they are written to."""

from collections import Counter

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")

from tests.helpers import fails_with
from tests.sweeps import timm_models, transformers_models
from tests.sweeps.look import SILENT
from tests.sweeps.pool import run
from tests.sweeps.table import TABLE

# What comes of the name, the functions that stay and those that stay after `convert` -> where it does.
FAMILIES = {
    "all": """
        albert bart bert camembert clip convbert convnext
        deberta-v2 dinov2 distilbert electra falcon gemma gemma2 gpt2 gpt_neo gpt_neox
        llama mistral mixtral mobilenet_v2
        openai-gpt opt phi phi3 pvt qwen2 qwen3_moe resnet roberta segformer siglip squeezebert t5 timm_wrapper vit
        xglm xlnet yolos
    """,
    "partly; stays gelu": "focalnet hubert wav2vec2",
    "partly; stays gelu; still gelu": "moonshine whisper",
    "partly; stays quick_gelu": "git",
    "partly; stays relu": "regnet swinv2 textnet",
    "partly; stays silu; still silu": "mamba qwen3_next",
    "none, and says so; stays gelu": "cpmant mpt xlm",
    "none, and says so; stays gelu_tanh": "bloom",
    "none, and says so; stays hardswish": "levit",
    "none, and says so; stays relu": "ctrl",
    "none, and says so; stays silu": "step3p5",
    "none, and says so; stays silu; still silu": "gpt_oss minimax_m3_vl_text",
    "raises": "ibert neomme pe_video",
    "has no activation": "inkling_audio",
    "part of another model": "sam_mask_decoder",
}
MODULES = {
    "all": """
        byoanet cait convnext cspnet cspnext deit edgenext efficientnet fasternet gemma4_vit hardcorenas
        hieradet_sam2 inception_v3 lcnetv2 levit mobilenetv3 mobilevit naflexvit nest rdnet regnet resnet resnetv2
        starnet tiny_vit vgg vision_transformer vision_transformer_sam vovnet xception_aligned xcit
    """,
    "partly; stays gelu": "cpubone inception_next lowformer mambaout",
    "partly; stays hardswish relu": "efficientvit_mit",
    "partly; stays relu": """
        byobnet dpn efficientformer fastvit resnest sknet swiftformer vision_transformer_relpos
    """,
    "raises; stays gelu": "coat convit davit focalnet hiera pit pvt_v2 swin_transformer",
    "raises; stays gelu relu": "visformer",
    "raises; stays gelu silu": "maxxvit",
    "raises; stays relu": "dla hgnet selecsls senet",
    "raises; stays silu": "eva mlp_mixer",
}
# Of every outcome at least one that takes no time; the others are slow.
QUICK = """
    bert clip gpt2 llama mixtral hubert moonshine git textnet mamba cpmant xlm bloom levit ctrl step3p5 gpt_oss ibert
    inkling_audio sam_mask_decoder
    starnet vgg mobilenetv3 vision_transformer cpubone efficientvit_mit byobnet resnest coat visformer maxxvit selecsls
    mlp_mixer
"""


def sampled(table):
    old = fails_with("transformers", "5.17", "has this type only as a part")
    return [
        pytest.param(
            key,
            outcome,
            id=key,
            marks=([] if key in QUICK.split() else [pytest.mark.slow]) + ([old] if key == "inkling_audio" else []),
        )
        for outcome, keys in table.items()
        for key in keys.split()
    ]


@pytest.mark.parametrize("table", [FAMILIES, MODULES], ids=["transformers", "timm"])
def test_every_outcome_has_a_quick_one(table):
    assert [outcome for outcome, keys in table.items() if not {*QUICK.split()} & {*keys.split()}] == []


def outcome_of(row):
    left = {"stays": row.get("stays", []), "still": row.get("after_convert", [])}
    functions = [
        f"{word} {' '.join(sorted({entry[0] for entry in entries}))}" for word, entries in left.items() if entries
    ]
    return "; ".join([row["outcome"], *functions])


@pytest.mark.parametrize(("model_type", "outcome"), sampled(FAMILIES))
def test_model_types_of_transformers(model_type, outcome):
    if model_type not in transformers_models.names():
        pytest.skip(f"this version of transformers has no {model_type}")
    assert outcome_of(transformers_models.sweep(model_type)) == outcome


@pytest.mark.parametrize(("module", "outcome"), sampled(MODULES))
def test_modules_of_timm(module, outcome):
    if module not in timm_models.names():
        pytest.skip(f"this version of timm has no {module}")
    assert outcome_of(timm_models.sweep(module)) == outcome


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_the_page_counts_its_own_rows_and_has_no_silent_one(library):
    (section,) = [part for part in TABLE.read_text().split("\n## ")[1:] if part.startswith(library)]
    lines = [
        line.removeprefix("| ").removesuffix(" |").split(" | ")
        for line in section.splitlines()
        if line.startswith("| ")
    ]
    heads = [i for i, cells in enumerate(lines) if set(cells) == {"---"}]
    tables = [lines[start + 1 : end] for start, end in zip(heads, [*(i - 1 for i in heads[1:]), None], strict=True)]
    summary, *rows = tables
    results = Counter()
    for cells in (cells for table in rows for cells in table):
        result = cells[2] if len(cells) > 3 else cells[1]
        results[result.removesuffix(" °")] += len(cells[0].split(", "))
    assert {cells[0]: int(cells[1]) for cells in summary if cells[1] != "0"} == results
    assert results[SILENT] == 0
    assert sum(results.values()) > 90


def test_what_crashes_or_takes_too_long_gets_a_row(tmp_path, monkeypatch):
    (tmp_path / "fake_models.py").write_text(
        "import os, time\n"
        "def sweep(key):\n"
        "    {'crash': lambda: os._exit(1), 'slow': lambda: time.sleep(60), 'fail': lambda: {}['x']}.get(key, int)()\n"
        "    return {'outcome': key}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = {}
    run("fake_models", ["fine", "crash", "slow", "fail", "fine too"], 1, 3.0, rows.__setitem__)
    assert rows == {
        "fine": {"outcome": "fine"},
        "crash": {"error": "the process died"},
        "slow": {"error": "took longer than 3 s"},
        "fail": {"error": "KeyError: 'x'"},
        "fine too": {"outcome": "fine too"},
    }
