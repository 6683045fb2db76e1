"""A model that is saved and loaded again is the same function, bit for bit, or loading it fails: nothing in between."""

import contextlib
import copy
import importlib
import json
import re
import threading
import warnings

import pytest
import torch
from torch import nn

import hf_gem

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from timm.models._hub import save_for_hf  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlavaConfig,
    T5EncoderModel,
)

IDS = torch.arange(8)[None]
TEXT = {"input_ids": IDS}
BOTH_SIDES = {"input_ids": IDS, "decoder_input_ids": IDS}
IMAGE = {"pixel_values": torch.linspace(-2, 2, 3 * 32 * 32).sin().view(1, 3, 32, 32)}
SOUND = {"input_values": torch.linspace(-2, 2, 400).sin()[None]}

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {**SIZES, "vocab_size": 32, "max_position_embeddings": 64}
PIXELS = {**SIZES, "image_size": 32, "patch_size": 16}
GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 32}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 32, "max_position_embeddings": 16}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 2, 1, 1]}
CONVS = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
CONVS |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
CLIP = {"text_config": {**WORDS, "eos_token_id": 7, "projection_dim": 8}}
CLIP |= {"vision_config": {**PIXELS, "projection_dim": 8}, "projection_dim": 8}

# Class of the model, fields of its config, inputs, and how it gets its activations: a name for set_activation, or
# arguments of convert, one after the other.
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", GPT2, TEXT, "egem_n2_eps0.25_learnable"),
    "bert": ("BertForMaskedLM", WORDS, TEXT, "segem_eps0.5"),
    "distilbert": ("DistilBertForMaskedLM", {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}, TEXT, "egem"),
    "llama": ("LlamaForCausalLM", {**WORDS, "num_key_value_heads": 2}, TEXT, "segem_learnable"),
    "mixtral": ("MixtralForCausalLM", {**WORDS, "num_key_value_heads": 2, "num_local_experts": 2}, TEXT, "gem_n3"),
    "gated t5": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, BOTH_SIDES, "egem_learnable"),
    "vit": ("ViTForImageClassification", PIXELS, IMAGE, "gem_n2"),
    "resnet": ("ResNetForImageClassification", RESNET, IMAGE, "egem_learnable"),
    "wav2vec2": ("Wav2Vec2ForCTC", {**SIZES, **CONVS, "vocab_size": 32}, SOUND, "segem_n2_learnable"),
    "clip": ("CLIPModel", CLIP, TEXT | IMAGE, "gem_n2"),
    "timm": ("TimmWrapperForImageClassification", {"architecture": "resnet10t"}, IMAGE, "egem_learnable"),
    "converted gpt2": (
        "GPT2LMHeadModel",
        GPT2,
        TEXT,
        [{"name": "gem_n3", "skip": "*.1.*"}, {"name": "egem_learnable", "skip": "*.0.*"}],
    ),
    "converted bert": ("BertForMaskedLM", WORDS, TEXT, [{"name": "gem"}]),
    "converted bart": ("BartForConditionalGeneration", BART, BOTH_SIDES, [{"name": "gem_n2", "skip": "*.encoder.*"}]),
    "converted t5": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu"},
        BOTH_SIDES,
        [{"name": "egem_learnable", "skip": "decoder.block.0"}],
    ),
    "converted bloom": ("BloomForCausalLM", {**GPT2, "hidden_size": 16}, TEXT, [{"name": "segem_learnable"}]),
    "converted llama": (
        "LlamaForCausalLM",
        {**WORDS, "num_key_value_heads": 2},
        TEXT,
        [{"name": "segem", "skip": "*.0.*"}],
    ),
    "converted vit": ("ViTForImageClassification", PIXELS, IMAGE, [{"name": "egem_n2_eps0.5_learnable"}]),
    "converted convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 2, 1]},
        IMAGE,
        [
            {"name": "segem", "skip": "*stages.2*"},
            {"name": "segem_learnable", "replace": "segem", "skip": "*stages.1*"},
        ],
    ),
    "converted resnet": (
        "ResNetForImageClassification",
        RESNET,
        IMAGE,
        [{"name": "egem_learnable", "skip": "*stages.1*"}, {"name": "gem_n2", "replace": "relu"}],
    ),
    "converted clip": ("CLIPModel", CLIP, TEXT | IMAGE, [{"name": "egem_learnable", "skip": "*.layers.0.*"}]),
    "converted timm": (
        "TimmWrapperForImageClassification",
        {"architecture": "resnet10t"},
        IMAGE,
        [{"name": "egem_learnable", "skip": "*layer1*"}],
    ),
}
NO_FIELD = {"converted bloom"}  # its config names no activation, so transformers alone cannot stop at one


def build(family):
    class_name, fields, inputs, how = FAMILIES[family]
    cls = getattr(transformers, class_name)
    config = cls.config_class(**fields)
    if isinstance(how, str):
        hf_gem.set_activation(config, how)
    model = cls(config)
    for arguments in how if isinstance(how, list) else []:
        hf_gem.convert(model, inputs=inputs, **arguments)
    return disturb(model), inputs


def disturb(model):
    """Other weights than any initialisation gives, eps included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def run(model, inputs):
    """Every tensor that a model returns, from weights at addresses of their own.

    A file is mapped into memory as it is laid out, and matrix products of unaligned weights round in another order.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        return [t for t in torch.utils._pytree.tree_leaves(dict(model(**inputs))) if isinstance(t, torch.Tensor)]


def same(one, two, inputs):
    a, b = run(one, inputs), run(two.eval(), inputs)
    assert a
    return len(a) == len(b) and all(map(torch.equal, a, b)) and activations(one) == activations(two)


def activations(model):
    return {path: module.spec.name for path, module in model.named_modules() if hasattr(module, "spec")}


def saved(model, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)
    return folder


def auto_class(cls):
    kind = re.search(r"For\w+|$", cls.__name__)[0].replace("LMHeadModel", "ForCausalLM")
    names = {"ForConditionalGeneration": "ForSeq2SeqLM", "": "", "Model": ""}
    return getattr(transformers, f"AutoModel{names.get(kind, kind)}")


@contextlib.contextmanager
def without_hf_gem():
    hf_gem.unregister()
    try:
        yield
    finally:
        hf_gem.register()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_transformers(family, tmp_path):
    model, inputs = build(family)
    folder = saved(model, tmp_path / "saved")
    auto = AutoModelForCausalLM if family.endswith("gpt2") else auto_class(type(model))
    loaded = auto.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert same(model, loaded, inputs)
    assert same(model, type(model).from_pretrained(saved(loaded, tmp_path / "again"), device_map="cpu"), inputs)
    half = auto.from_pretrained(folder, dtype=torch.bfloat16)
    expected = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16).eval()
    expected.load_state_dict(model.state_dict())
    assert same(expected, half, inputs)
    assert activations(auto.from_config(model.config)) == activations(model)
    assert activations(type(model)(type(model.config).from_dict(json.loads(model.config.to_json_string())))) == (
        activations(model)
    )


NO_BASE = {"clip", "t5", "timm"}  # the same layout with and without a head


@pytest.mark.parametrize("family", [f for f in FAMILIES if not NO_BASE & set(f.split())])
def test_the_model_without_its_head(family, tmp_path):
    model, inputs = build(family)
    bare = AutoModel.from_pretrained(saved(model, tmp_path / "head"))
    assert torch.equal(run(model.base_model, inputs)[0], run(bare, inputs)[0])  # further ones are of a new pooler
    assert activations(bare) == activations(model.base_model)
    told = (
        pytest.warns(UserWarning, match="converted BertModel did not have")
        if family == "converted bert"
        else contextlib.nullcontext()
    )
    with told:  # its head has an activation, which the bare model does not
        again = type(model).from_pretrained(saved(bare, tmp_path / "base"))
    assert torch.equal(run(again.base_model, inputs)[0], run(bare, inputs)[0])
    assert activations(again.base_model) == activations(bare)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in NO_FIELD])
def test_transformers_alone_stops(family, tmp_path):
    model, _ = build(family)
    folder = saved(model, tmp_path)
    with without_hf_gem(), pytest.raises(KeyError, match="gem"):
        type(model).from_pretrained(folder)


# ---- timm

VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM = {  # model, its arguments, how it gets its activations
    "resnet10t": ({"act_layer": "egem_n2_learnable"}, []),
    "vit_tiny_patch16_224": ({**VIT, "act_layer": "segem_eps0.5"}, []),
    "mobilenetv3_small_050": ({"act_layer": "egem_learnable"}, []),
    "starnet_s050": ({"act_layer": "gem_n3"}, []),
    "regnetx_002": ({"act_layer": "segem_learnable"}, []),
    "resnet14t": ({}, [{"name": "gem_n2", "skip": "*layer1*"}, {"name": "egem_learnable", "replace": "relu"}]),
    "vit_tiny_patch16_384": (VIT, [{"name": "segem_learnable", "skip": "blocks.0"}]),
    "lcnet_050": ({"act_layer": "gem"}, [{"name": "egem_learnable", "skip": "*.1.*"}]),
    "ghostnet_050": ({}, [{"name": "egem"}]),
    "edgenext_xx_small": ({}, [{"name": "segem_n2_learnable", "skip": "*stages.1*"}]),
}


@pytest.mark.parametrize("name", list(TIMM))
def test_timm(name, tmp_path):
    arguments, conversions = TIMM[name]
    x = IMAGE["pixel_values"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* did not pick up act_layer=", module="hf_gem")
        model = timm.create_model(name, num_classes=3, **arguments)
        for conversion in conversions:
            hf_gem.convert(model, inputs=x, **conversion)
        disturb(model)
        save_for_hf(model, tmp_path, model_args=arguments if "depth" in arguments else None, safe_serialization=True)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert activations(loaded) == activations(model) != {}
    for tensor in [*loaded.parameters(), *model.parameters()]:
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    with without_hf_gem(), pytest.raises((KeyError, TypeError), match=r"gem|'str' object is not callable"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_timm_by_hand(tmp_path):
    x = IMAGE["pixel_values"]
    model = timm.create_model("resnet10t", act_layer="gem_n2", num_classes=3)
    model.layer1[0].act2 = hf_gem.SEGEM(learnable=True)
    by_class = timm.create_model("resnet10t", act_layer=hf_gem.GEM, num_classes=3)
    for net, arguments in ((model, None), (by_class, {"act_layer": "relu"})):  # timm asks for something in JSON there
        save_for_hf(disturb(net), tmp_path, model_args=arguments, safe_serialization=True)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert activations(loaded) == activations(net)
        with torch.no_grad():
            assert torch.equal(loaded(x), net(x))
    model.act1 = hf_gem.EGEM(learnable=True, num_parameters=64)
    with pytest.warns(UserWarning, match=r"act1 has num_parameters=64\. A config can only store one eps"):
        save_for_hf(model, tmp_path / "channels", safe_serialization=True)


# ---- parts of models


def clip():
    return transformers.CLIPModel(CLIPConfig(**CLIP))


def test_parts_of_a_composite_checkpoint_load_alone(tmp_path):
    model = clip()
    hf_gem.convert(model, "egem_learnable", skip="*.layers.0.*", inputs=TEXT | IMAGE)
    folder = saved(disturb(model), tmp_path)
    assert same(model.vision_model, CLIPVisionModel.from_pretrained(folder), IMAGE)
    assert same(model.text_model, CLIPTextModel.from_pretrained(folder), TEXT)


def test_one_part_of_a_composite_model_is_converted(tmp_path):
    model = clip()
    hf_gem.convert(model.vision_model, "gem_n2", inputs=IMAGE["pixel_values"])
    folder = saved(disturb(model), tmp_path)
    assert same(model, AutoModel.from_pretrained(folder), TEXT | IMAGE)
    assert same(model.text_model, CLIPTextModel.from_pretrained(folder), TEXT)
    assert same(model.vision_model, CLIPVisionModel.from_pretrained(folder), IMAGE)
    assert same(model.vision_model, CLIPVisionModel.from_pretrained(saved(model.vision_model, tmp_path / "v")), IMAGE)


def test_parts_that_are_converted_one_after_the_other(tmp_path):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**PIXELS),
        text_config=LlamaConfig(**WORDS, num_key_value_heads=2),
        **{"image_token_index": 31, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        image_seq_length=5,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    inputs = {"input_ids": torch.tensor([[1, *[31] * 5, 2, 3]]), **IMAGE}
    auto = transformers.AutoModelForImageTextToText
    hf_gem.convert(model.model.vision_tower, "segem_learnable", inputs=IMAGE["pixel_values"])
    disturb(model)
    assert same(model, auto.from_pretrained(saved(model, tmp_path)), inputs)
    assert same(model.model, AutoModel.from_pretrained(tmp_path), inputs)
    hf_gem.convert(model, "gem", inputs=inputs)
    assert same(model, auto.from_pretrained(saved(model, tmp_path)), inputs)
    hf_gem.revert(model.model.vision_tower)
    assert same(model, auto.from_pretrained(saved(model, tmp_path)), inputs)
    hf_gem.revert(model)
    assert same(model, auto.from_pretrained(saved(model, tmp_path)), inputs)
    assert "gem" not in (tmp_path / "config.json").read_text()


def test_a_model_made_of_converted_ones(tmp_path):
    encoder = BertModel(BertConfig(**WORDS))
    decoder = transformers.BertLMHeadModel(BertConfig(**WORDS, is_decoder=True, add_cross_attention=True))
    hf_gem.convert(encoder, "egem_learnable", inputs=IDS)
    hf_gem.convert(decoder, "segem", inputs=IDS)
    model = EncoderDecoderModel(encoder=disturb(encoder), decoder=disturb(decoder)).eval()
    assert same(model, EncoderDecoderModel.from_pretrained(saved(model, tmp_path / "both")), BOTH_SIDES)
    folders = saved(encoder, tmp_path / "encoder"), saved(decoder, tmp_path / "decoder")
    assert same(model, EncoderDecoderModel.from_encoder_decoder_pretrained(*folders), BOTH_SIDES)
    assert activations(EncoderDecoderModel(copy.deepcopy(model.config))) == activations(model)


def test_classes_that_have_less_of_the_model(tmp_path):
    t5, _ = build("converted t5")
    assert same(t5.encoder, T5EncoderModel.from_pretrained(saved(t5, tmp_path / "t5")).encoder, TEXT)
    bart = transformers.BartForConditionalGeneration(BartConfig(**BART))
    hf_gem.convert(bart, "gem_n2", inputs=BOTH_SIDES)
    decoder = transformers.BartForCausalLM.from_pretrained(saved(bart, tmp_path / "bart"))
    assert activations(decoder) == {f"model.decoder.layers.{i}.activation_fn": "gem_n2" for i in (0, 1)}
    bert, _ = build("converted bert")
    pretraining = transformers.BertForPreTraining.from_pretrained(saved(bert, tmp_path / "bert"))
    assert activations(pretraining) == activations(bert)  # the head too, which they share


def test_a_part_saved_alone_leaves_the_whole_as_it_was(tmp_path):
    model, _ = build("converted bart")
    plan = model.config.hf_gem
    saved(model.model.decoder, tmp_path)
    assert model.config.hf_gem == plan


# ---- activations put in by hand


def by_hand(name="gem_n2"):
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    for block in model.transformer.h:
        block.mlp.act = hf_gem.get_activation(name)
    return disturb(model)


@pytest.mark.parametrize("name", ["gem_n2", "segem_learnable"])
def test_put_in_by_hand(name, tmp_path):
    model = by_hand(name)
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "saved"))
    assert not hasattr(model.config, "hf_gem")
    assert same(model, loaded, TEXT)
    assert same(model.transformer, GPT2Model.from_pretrained(tmp_path / "saved"), TEXT)
    loaded.transformer.h[0].mlp.act = hf_gem.EGEM(3)  # over a conversion
    assert same(loaded, GPT2LMHeadModel.from_pretrained(saved(loaded, tmp_path / "again")), TEXT)
    with without_hf_gem(), pytest.raises(KeyError, match="gem"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "saved")


def test_by_hand_and_converted(tmp_path):
    model = by_hand()
    model.transformer.h[1].mlp.act = nn.ReLU()
    report = hf_gem.convert(model, "gem_n2", inputs=IDS)
    assert [r.path for r in report.replaced] == ["transformer.h.1.mlp.act"]
    assert same(model, GPT2LMHeadModel.from_pretrained(saved(model, tmp_path)), TEXT)
    assert hf_gem.revert(model) == ["transformer.h.1.mlp.act"]
    assert model.config.hf_gem["activations"] == {"gem_n2": ["transformer.h.0.mlp.act"]}


def test_by_hand_where_the_config_names_the_same_elsewhere(tmp_path):
    model = disturb(BertModel(BertConfig(**WORDS, hidden_act="gem_n2")))
    saved(model, tmp_path / "by name")
    assert "hf_gem" not in json.loads((tmp_path / "by name" / "config.json").read_text())
    model.pooler.activation = hf_gem.GEM(2)
    assert same(model, BertModel.from_pretrained(saved(model, tmp_path / "by hand")), TEXT)


def test_by_hand_in_parts(tmp_path):
    model = clip()
    model.vision_model.encoder.layers[0].mlp.activation_fn = hf_gem.GEM(2)
    folder = saved(disturb(model), tmp_path / "clip")
    assert same(model, AutoModel.from_pretrained(folder), TEXT | IMAGE)
    assert same(model.text_model, CLIPTextModel.from_pretrained(folder), TEXT)
    assert same(model.vision_model, CLIPVisionModel.from_pretrained(folder), IMAGE)
    encoder = BertModel(BertConfig(**WORDS))
    decoder = transformers.BertLMHeadModel(BertConfig(**WORDS, is_decoder=True, add_cross_attention=True))
    encoder.encoder.layer[0].intermediate.intermediate_act_fn = hf_gem.GEM(2)  # before it becomes a part
    model = disturb(EncoderDecoderModel(encoder=encoder, decoder=decoder))
    assert same(model, EncoderDecoderModel.from_pretrained(saved(model, tmp_path / "both")), BOTH_SIDES)


def test_by_hand_where_nothing_was(tmp_path):
    model = by_hand()
    model.transformer.ln_f = nn.Sequential(model.transformer.ln_f, hf_gem.GEM())
    saved(model, tmp_path)
    with pytest.raises(ValueError, match=r"no activation at 'transformer\.ln_f\.1'"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"n": 3}, {"init_eps": 0.5}])
def test_changed_after_it_was_built(change, tmp_path):
    model = disturb(GPT2LMHeadModel(GPT2Config(**GPT2, hidden_act="egem_eps0.01")))
    for name, value in change.items():
        setattr(model.transformer.h[1].mlp.act, name, value)
    assert same(model, GPT2LMHeadModel.from_pretrained(saved(model, tmp_path)), TEXT)


class Doubled(hf_gem.GEM):
    def forward(self, x, inplace=False):
        return 2 * super().forward(x)


def test_by_hand_with_a_forward_of_its_own(tmp_path):
    model = by_hand()
    model.transformer.h[1].mlp.act = Doubled()
    told = r"h\.1\.mlp\.act is a Doubled, whose forward is not that of gem"
    with pytest.raises(ValueError, match=told):
        hf_gem.save_for_hub(model, tmp_path / "hub")
    with pytest.warns(UserWarning, match=told):
        saved(model, tmp_path)


def test_by_hand_with_an_eps_for_each_channel(tmp_path):
    """No training is lost by an error when it saves, and nothing is loaded as something else."""
    model = by_hand()
    model.transformer.h[1].mlp.act = hf_gem.EGEM(learnable=True, num_parameters=64, channel_dim=-1)
    told = r"h\.1\.mlp\.act has num_parameters=64\. A config can only store one eps"
    with pytest.raises(ValueError, match=told):
        hf_gem.save_for_hub(model, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    with pytest.warns(UserWarning, match=told):
        saved(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"log_ratio.*size|size.*log_ratio|mismatch"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


class InItsCode(GPT2LMHeadModel):
    """Has an activation of the family whatever the config says."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h:
            block.mlp.act = hf_gem.EGEM(learnable=True)


class InItsCodeWithChannels(InItsCode):
    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h:
            block.mlp.act = hf_gem.EGEM(learnable=True, num_parameters=64, channel_dim=-1)
        self.post_init()


class InAPartOfItsOwn(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        self.extra = nn.Sequential(nn.Linear(32, 32), hf_gem.GEM(2))

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.extra(out.logits)
        return out


@pytest.mark.parametrize("cls", [InItsCode, InItsCodeWithChannels, InAPartOfItsOwn])
def test_in_the_code_of_a_class(cls, tmp_path):
    model = disturb(cls(GPT2Config(**GPT2)))
    assert same(model, cls.from_pretrained(saved(model, tmp_path)), TEXT)


# ---- configs that change


def gpt2(name="egem_learnable"):
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    hf_gem.convert(model, name, inputs=IDS)
    return disturb(model)


def test_converted_again_and_reverted(tmp_path):
    model = gpt2()
    for name in ("segem_eps0.5", "egem_n2_learnable"):
        hf_gem.convert(model, name, inputs=IDS)
        loaded = GPT2LMHeadModel.from_pretrained(saved(model, tmp_path))
        assert same(model, loaded, TEXT)
        model = loaded
    assert hf_gem.revert(model) == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    assert same(model, GPT2LMHeadModel.from_pretrained(saved(model, tmp_path)), TEXT)
    assert "gem" not in (tmp_path / "config.json").read_text()
    assert model.config.activation_function == "gelu_new"


@pytest.mark.parametrize("skip", [None, "*.0.*"], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["config", "timm", "timm in transformers"])
def test_from_one_member_of_the_family_to_another(kind, skip, tmp_path):
    wrapped = transformers.TimmWrapperConfig(architecture="resnet10t", model_args={"act_layer": "gem_n2"})
    make = {
        "config": lambda: BertModel(BertConfig(**WORDS, hidden_act="gem_n2")),
        "timm": lambda: timm.create_model("resnet10t", act_layer="gem_n2", num_classes=3),
        "timm in transformers": lambda: transformers.TimmWrapperForImageClassification(wrapped),
    }
    model = make[kind]()
    hf_gem.convert(model, "segem", skip=skip)
    names = set(activations(disturb(model)).values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was replaced had taken effect
        if kind == "timm":
            save_for_hf(model, tmp_path, safe_serialization=True)
            loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        else:
            loaded = type(model).from_pretrained(saved(model, tmp_path))
    assert activations(loaded) == activations(model)
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    if kind != "timm":
        config = json.loads((tmp_path / "config.json").read_text())
        named = config["model_args"]["act_layer"] if "model_args" in config else config["hidden_act"]
        assert named == min(names)  # gem_n2 only where some of it is left
        assert kind != "config" or same(model, loaded, TEXT)


def test_another_activation_for_a_converted_model(tmp_path):
    model = gpt2()
    saved(model, tmp_path)
    for asked in ({"activation_function": "relu"}, {"hidden_act": "gem_n3"}):
        with pytest.raises(ValueError, match=r"got activation_function=.* of a model that was converted to 'egem_lea"):
            GPT2LMHeadModel.from_pretrained(tmp_path, **asked)
    assert same(model, GPT2LMHeadModel.from_pretrained(tmp_path, hidden_act="egem_learnable"), TEXT)
    for config in (copy.deepcopy(model.config), GPT2Config.from_pretrained(tmp_path)):
        hf_gem.set_activation(config, "gem_n3")
        with pytest.raises(ValueError, match=r"Remove the conversion first with `del config\.hf_gem`"):
            GPT2Model(config)
        del config.hf_gem
        assert set(activations(GPT2Model(config)).values()) == {"gem_n3"}
    model.config.activation_function = "relu"  # of a model that is built
    assert same(model, GPT2LMHeadModel.from_pretrained(saved(model, tmp_path)), TEXT)


def plan(config):
    return config["hf_gem"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c: plan(c)["activations"].update(egem_learnable=["transformer.h.0.mlp.fn"]),
            r"no activation at .*\.fn'",
        ),
        (lambda c: plan(c).update(version=2), r"This hf_gem reads version 1\. Upgrade hf_gem, or remove the key"),
        (lambda c: plan(c).update(activations={}), "cannot read the conversion"),
        (lambda c: plan(c).pop("fields"), "cannot read the conversion"),
        (lambda c: plan(c).update(fields="relu"), "cannot read the conversion"),
        (lambda c: c.update(hf_gem=["gem"]), "cannot read the conversion"),
        (lambda c: c.update(hf_gem="gem"), "cannot read the conversion"),
        (lambda c: plan(c).update(activations={"gem_n0": ["transformer.h.0.mlp.act"]}), "got activation name 'gem_n0'"),
        (lambda c: plan(c).update(activations={"gelu": ["transformer.h.0.mlp.act"]}), "got activation name 'gelu'"),
        (
            lambda c: c.update(activation_function="gelu"),
            "got activation_function='gelu' in a GPT2Config of a model th",
        ),
    ],
)
def test_a_config_that_was_edited(edit, message, tmp_path):
    saved(gpt2(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def test_a_config_that_two_models_share(tmp_path):
    first = GPT2Model(GPT2Config(**GPT2)).eval()
    second = GPT2Model(first.config).eval()
    hf_gem.convert(first, "gem", inputs=IDS)
    assert same(second, GPT2Model.from_pretrained(saved(second, tmp_path / "second")), TEXT)
    assert same(first, GPT2Model.from_pretrained(saved(first, tmp_path / "first")), TEXT)


# ---- ways to save and load


def test_ways_to_save(tmp_path):
    model = gpt2()
    model.resize_token_embeddings(40)
    assert same(model, GPT2LMHeadModel.from_pretrained(saved(model, tmp_path / "resized")), TEXT)
    saved(model, tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same(model, GPT2LMHeadModel.from_pretrained(tmp_path / "shards"), TEXT)
    other = gpt2()
    other.resize_token_embeddings(40)
    saved(model, tmp_path / "state", state_dict=dict(other.state_dict()))
    assert same(other, GPT2LMHeadModel.from_pretrained(tmp_path / "state"), TEXT)
    torch.save(model, tmp_path / "pickled.pt")
    pickled = torch.load(tmp_path / "pickled.pt", weights_only=False)
    assert same(model, pickled, TEXT)
    assert same(model, GPT2LMHeadModel.from_pretrained(saved(pickled, tmp_path / "from_pickle")), TEXT)
    assert len(hf_gem.revert(pickled)) == 2
    compiled = torch.compile(model, backend="eager")
    assert same(model, GPT2LMHeadModel.from_pretrained(saved(compiled, tmp_path / "compiled")), TEXT)


def test_the_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = gpt2()
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    transformers.Trainer(model=model, args=arguments).save_model()
    assert same(model, GPT2LMHeadModel.from_pretrained(tmp_path), TEXT)


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    base = saved(gpt2(), tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    model = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config).eval()
    folder = saved(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), folder)
    assert same(model, loaded, TEXT)
    assert same(model, peft.AutoPeftModelForCausalLM.from_pretrained(folder), TEXT)  # which finds the base by its name
    merged = model.merge_and_unload()
    assert same(merged, GPT2LMHeadModel.from_pretrained(saved(merged, tmp_path / "merged")), TEXT)


def test_models_built_at_the_same_time():
    models = [gpt2(), build("converted t5")[0]]
    found = []

    def work(model):
        found.extend(activations(type(model)(copy.deepcopy(model.config))) == activations(model) for _ in range(5))

    threads = [threading.Thread(target=work, args=(model,)) for model in models * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20


# ---- classes that others write


class Unfinished(GPT2LMHeadModel):
    """Adds a part and does not call post_init after it."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = nn.Sequential(nn.Linear(32, 32), nn.ReLU())

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.extra(out.logits)
        return out


class Finished(Unfinished):
    def __init__(self, config):
        super().__init__(config)
        self.post_init()


@pytest.mark.parametrize("cls", [Unfinished, Finished])
def test_a_subclass_with_parts_of_its_own(cls, tmp_path):
    model = cls(GPT2Config(**GPT2))
    hf_gem.convert(model, "egem_learnable", inputs=IDS)
    saved(disturb(model), tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    if cls is Finished:
        assert same(model, loaded, TEXT)
    else:
        with pytest.raises(
            ValueError, match=r"Unfinished was saved with .* at 'extra\.1'.* self\.post_init\(\) restores"
        ):
            loaded(IDS)
    assert same(model.base_model, GPT2Model.from_pretrained(tmp_path), TEXT)
    assert len(activations(GPT2LMHeadModel.from_pretrained(tmp_path))) == 2


class Teacher(transformers.PreTrainedModel):
    """Loads another model while it is built itself, as a part or out of sight."""

    config_class = GPT2Config

    def __init__(self, config, folder, how):
        super().__init__(config)
        teacher = GPT2LMHeadModel.from_pretrained(folder)
        self.student = nn.Linear(2, 2)
        if how == "hidden":
            self.teacher = [teacher]
        else:
            self.part = teacher
            self.teacher = (teacher,)
        if how != "no post_init":
            self.post_init()

    def _init_weights(self, module):
        pass


@pytest.mark.parametrize("how", ["part", "hidden", "no post_init"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_another_loads_while_it_is_built(how, wrapped, tmp_path, monkeypatch):
    teacher = GPT2LMHeadModel(GPT2Config(**GPT2))
    hf_gem.convert(teacher, "egem_learnable", inputs=IDS)
    saved(disturb(teacher), tmp_path)
    if wrapped:
        original = transformers.PreTrainedModel.from_pretrained.__func__

        def theirs(cls, *args, **kwargs):
            return original(cls, *args, **kwargs)

        monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(theirs))
    model = Teacher(GPT2Config(**GPT2), tmp_path, how)
    assert same(teacher, model.teacher[0], TEXT)


THEIR_CODE = """
import hf_gem
from torch import nn
from transformers import GPT2LMHeadModel

class Theirs(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        self.extra = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
        self.post_init()

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.extra(out.logits)
        return out
"""


def test_remote_code(tmp_path, monkeypatch):
    (tmp_path / "their_code.py").write_text(THEIR_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    cls = importlib.import_module("their_code").Theirs
    cls.register_for_auto_class("AutoModelForCausalLM")
    model = cls(GPT2Config(**GPT2))
    hf_gem.convert(model, "egem_learnable", inputs=IDS)
    folder = saved(disturb(model), tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded) is not cls
    assert same(model, loaded, TEXT)


def test_a_convolutional_backbone_of_timm_in_a_detector(tmp_path):
    backbone = transformers.TimmBackboneConfig(backbone="resnet10t", use_pretrained_backbone=False, out_indices=[4])
    sizes = {key: value for key, value in BART.items() if key not in ("vocab_size", "max_position_embeddings")}
    config = transformers.DetrConfig(use_timm_backbone=False, backbone_config=backbone, num_queries=3, **sizes)
    model = transformers.DetrForObjectDetection(config)
    hf_gem.convert(model, "egem_learnable", skip="*.layer1.*", inputs=IMAGE["pixel_values"])
    loaded = transformers.AutoModelForObjectDetection.from_pretrained(saved(disturb(model), tmp_path))
    assert same(model, loaded, IMAGE)


def test_what_the_documentation_warns_of(tmp_path):
    model, _ = build("converted bloom")
    saved(model, tmp_path)
    with without_hf_gem():
        assert not activations(transformers.BloomForCausalLM.from_pretrained(tmp_path))


def test_a_head_that_the_converted_model_did_not_have(tmp_path):
    model = BertModel(BertConfig(**WORDS))
    hf_gem.convert(model, "egem")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"BertForMaskedLM has 1 activation .* gelu at cls\.predictions\.transform"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transformers.BertForSequenceClassification.from_pretrained(tmp_path)
