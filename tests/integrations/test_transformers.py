"""transformers: every well-formed name, in the registries, in configs, and in checkpoints that come and go."""

import contextlib
import copy
import functools
import json
import pickle
import sys
import warnings
from types import ModuleType

import pytest
import torch
from torch import nn

import hf_gem

pytest.importorskip("transformers")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    BltPatcher,
    CLIPConfig,
    CTRLConfig,
    DbrxConfig,
    DebertaConfig,
    DebertaModel,
    DistilBertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    FlaubertConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GptOssConfig,
    GptOssModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MarianConfig,
    OpenAIGPTConfig,
    OpenAIGPTModel,
    OPTConfig,
    ResNetConfig,
    ResNetForImageClassification,
    RTDetrConfig,
    Swinv2Config,
    Swinv2Model,
    T5Config,
    T5Model,
    TimmWrapperConfig,
    TimmWrapperModel,
    Trainer,
    TrainingArguments,
    XLMConfig,
    XLNetConfig,
    activations,
)

from hf_gem.surgery.fields import activation_fields
from tests.helpers import fails_with

NAMES = ["gem", "gem_n3", "GEM_N2", "egem_n2_eps1em6", "egem_eps0.00001", "segem_eps0.01", "segem_n2_learnable"]
TINY_GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 32}
TINY_GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
TINY_BERT = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
TINY_BERT |= {"vocab_size": 32, "max_position_embeddings": 16}
LEARNABLE = "egem_n2_eps0.25_learnable"


def gpt2(**kwargs):
    return GPT2LMHeadModel(GPT2Config(**TINY_GPT2, **kwargs)).eval()


def learnable_layers(model):
    return [module for module in model.modules() if isinstance(module, hf_gem.EGEM)]


def epsilons(model):
    return [layer.eps.item() for layer in learnable_layers(model)]


def logits(model):
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


# ---- the registries


@pytest.mark.parametrize("name", NAMES)
def test_registries(name):
    spec = hf_gem.parse(name)
    modules = [activations.ACT2FN[name], activations.ACT2CLS[name](), activations.get_activation(name)]
    modules.append(activations.ACT2FN[name])
    assert [module.spec for module in modules] == [spec] * 4
    assert len({id(module) for module in modules}) == 4
    assert len({id(p) for module in modules for p in module.parameters()}) == 4 * spec.learnable
    assert name in activations.ACT2FN
    assert name in activations.ACT2CLS


@pytest.mark.parametrize(
    "lookup",
    [lambda n: activations.ACT2FN[n], lambda n: activations.ACT2CLS[n], activations.get_activation],
    ids=["ACT2FN", "ACT2CLS", "get_activation"],
)
def test_other_names(lookup):
    for malformed, nearest in (("gem_n0", "gem"), ("egem_eps-1", "egem"), ("gem-n2", "gem_n2")):
        with pytest.raises(ValueError, match=f"got activation name '{malformed}'.*Did you mean '{nearest}'"):
            lookup(malformed)
    for unknown in ("gemma", "gleu", ""):
        with pytest.raises(KeyError):
            lookup(unknown)
        assert unknown not in activations.ACT2FN
    assert "gelu" in type(lookup("gelu")).__name__.lower() + getattr(lookup("gelu"), "__name__", "").lower()


def test_iteration_shows_what_was_there():
    for registry in (activations.ACT2FN, activations.ACT2CLS):
        activations.get_activation("gem_n7")
        assert "gelu" in list(registry)
        assert not [name for name in registry if name.startswith(("gem", "egem", "segem"))]
        assert len(list(registry)) == len(registry)


def test_modules_that_hold_the_old_registry():
    hf_gem.unregister()
    holder = ModuleType("imported_act2cls_early")
    holder.ACT2CLS, holder.ACT2FN = activations.ACT2CLS, activations.ACT2FN
    sys.modules[holder.__name__] = holder
    try:
        hf_gem.register()
        assert holder.ACT2CLS is activations.ACT2CLS
        assert isinstance(holder.ACT2CLS["gem_n2"](), hf_gem.GEM)
        assert isinstance(holder.ACT2FN["gem_n2"], hf_gem.GEM)
        hf_gem.unregister()
        assert holder.ACT2CLS is activations.ACT2CLS
        assert "gem_n2" not in holder.ACT2CLS
    finally:
        del sys.modules[holder.__name__]
        hf_gem.register()


# ---- configs


@pytest.mark.parametrize("name", ["gem_n2", "GEM_N2", "egem_eps1e-6", "segem_learnable"])
def test_hidden_act_reaches_gpt2(name, tmp_path):
    config = GPT2Config(**TINY_GPT2, hidden_act=name)
    canonical = hf_gem.parse(name).name
    assert config.activation_function == canonical
    assert not hasattr(config, "hidden_act")
    model = GPT2LMHeadModel(config).eval()
    assert [block.mlp.act.spec.name for block in model.transformer.h] == [canonical] * 2
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["activation_function"] == canonical
    assert "hidden_act" not in stored
    assert GPT2Config.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), **_new_keys(tmp_path)}
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert [block.mlp.act.spec.name for block in loaded.transformer.h] == [canonical] * 2
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(gpt2()), logits(model))


def _new_keys(path):
    """What saving itself adds to a config, whatever its activation."""
    stored = GPT2Config.from_pretrained(path).to_dict()
    return {key: stored[key] for key in ("_name_or_path", "architectures", "dtype") if key in stored}


def test_other_values_of_hidden_act_are_not_ours():
    registered = [GPT2Config(hidden_act=name).to_dict() for name in ("relu", "gelu", "gemma")]
    hf_gem.unregister()
    try:
        assert [GPT2Config(hidden_act=name).to_dict() for name in ("relu", "gelu", "gemma")] == registered
    finally:
        hf_gem.register()
    assert registered[0]["activation_function"] == "gelu_new"


UNREAD = r"GPT2Config has no field hidden_act, and transformers ignores hidden_act='{}'\."


@pytest.mark.parametrize(
    ("name", "hint"), [("relu", ""), ("gelu", ""), ("segm", "Did you mean 'segem'"), ("xyz", "No activation has this")]
)
def test_a_keyword_that_transformers_ignores_is_not_ignored_in_silence(name, hint):
    assigned = GPT2Config(**TINY_GPT2)
    assigned.hidden_act = name
    for config in (GPT2Config(**TINY_GPT2, hidden_act=name), assigned):
        with pytest.warns(UserWarning, match=UNREAD.format(name)) as seen:
            model = GPT2LMHeadModel(config)
        assert len(seen) == 1
        assert "The model runs activation_function='gelu_new'. Set another one with" in str(seen[0].message)
        assert hint in str(seen[0].message)
        assert type(model.transformer.h[0].mlp.act).__name__ == "NewGELUActivation"  # as without hf_gem


def test_a_keyword_that_changes_nothing_needs_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpt2(hidden_act="gelu_new")
        with torch.device("meta"):
            BltPatcher(AutoConfig.for_model("blt_patcher"))  # reads a `hidden_act` that it does not declare


@pytest.mark.parametrize(
    ("config_class", "values", "name"),
    [
        (MarianConfig, {"activation_function": "swish"}, "silu"),
        (T5Config, {"feed_forward_proj": "gated-gelu"}, "gelu_new"),
        (T5Config, {"feed_forward_proj": "gated-gelu"}, "gelu"),  # as the config calls it
        (GPT2Config, {}, "gelu_new"),
        # Only the code of these models says what they run.
        (XLMConfig, {}, "gelu"),
        (FlaubertConfig, {}, "gelu"),
        (CTRLConfig, {}, "relu"),
    ],
)
def test_a_keyword_in_from_dict_that_changes_nothing_needs_no_warning(config_class, values, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_class.from_dict(values, hidden_act=name)
    for other in ("tanh", "xyz") if values else ("xyz",):
        with pytest.warns(UserWarning, match=rf"transformers ignores hidden_act='{other}'"):
            config_class.from_dict(values, hidden_act=other)


@pytest.mark.parametrize(
    ("name", "nearest"), [("gme_n2", "gem_n2"), ("egm_n2", "egem_n2"), ("sgem_eps1", "segem_eps1")]
)
def test_a_misspelled_name_of_the_family_stops(name, nearest, tmp_path):
    message = rf"got activation name '{name}'.*Did you mean '{nearest}'\?"
    with pytest.raises(ValueError, match=message):
        GPT2Config(hidden_act=name)
    config = GPT2Config(**TINY_GPT2)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, hidden_act=name)
    config.hidden_act = name
    with pytest.raises(ValueError, match=message):
        GPT2LMHeadModel(config)


@pytest.mark.parametrize("name", ["gegelu_n2", "gme_n2", "gem_like"])
def test_a_name_that_someone_registered_is_theirs(name, request, tmp_path):
    class Theirs(nn.Tanh):
        pass

    activations.ACT2FN[name] = Theirs
    request.addfinalizer(lambda: activations.ACT2FN.pop(name))
    for config in (GPT2Config(**TINY_GPT2, activation_function=name), GPT2Config(**TINY_GPT2)):
        hf_gem.set_activation(config, name)
        model = GPT2LMHeadModel(config)
        assert type(model.transformer.h[0].mlp.act) is Theirs
        model.save_pretrained(tmp_path)
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
        assert type(loaded.transformer.h[0].mlp.act) is Theirs
    assert BertConfig(hidden_act=name).hidden_act == name
    with pytest.warns(UserWarning, match=UNREAD.format(name)):  # as any other name of transformers
        gpt2(hidden_act=name)


def test_a_word_like_a_family_is_not_ours():
    assert "gemini_n2" not in activations.ACT2FN
    assert BertConfig(act="segment_n3").act == "segment_n3"


def test_a_family_that_nobody_has_registered_is_named():
    with pytest.raises(
        ValueError, match=r"'xgem_n2'\. No family is called 'xgem'.*hf_gem\.register_family or in \$HF_GEM_F"
    ):
        GPT2Config(hidden_act="xgem_n2")


@pytest.mark.parametrize("stray", ["gem_n2", "gme_n2", "relu"])
def test_a_stray_key_in_a_file_changes_no_function(stray, tmp_path):
    """Neither in the config itself nor in one inside it, which does not have the version of transformers."""
    for config, part in ((GPT2Config(), ()), (LlavaConfig(text_config=GPT2Config()), ("text_config",))):
        config.save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        stored = json.loads(file.read_text())
        functools.reduce(dict.__getitem__, part, stored)["hidden_act"] = stray
        file.write_text(json.dumps(stored))
        with contextlib.nullcontext() if stray == "relu" else pytest.warns(UserWarning, match=f"ignoring.*'{stray}'"):
            loaded = type(config).from_pretrained(tmp_path)
        assert functools.reduce(getattr, part, loaded).activation_function == "gelu_new"


def test_two_different_activations_in_one_config():
    with pytest.raises(ValueError, match=r"activation_function='relu' and hidden_act='gem_n2'.*='gem_n2'\.$"):
        GPT2Config(activation_function="relu", hidden_act="gem_n2")
    assert GPT2Config(activation_function="gem_n2", hidden_act="GEM_n2").activation_function == "gem_n2"


def test_a_key_that_had_no_effect_when_the_model_was_trained_has_none_when_it_is_loaded(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stray = {**json.loads(file.read_text()), "hidden_act": "gem_n2"}  # as transformers alone would have saved it
    file.write_text(json.dumps(stray))
    with pytest.warns(UserWarning, match=r"ignoring hidden_act='gem_n2'.*activation_function='gelu_new'"):
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.config.activation_function == "gelu_new"
    assert not hasattr(loaded.config, "hidden_act")


def test_nothing_to_warn_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        T5Config(hidden_act="gelu")
        BertConfig(hidden_act="gem_n2")
        T5Config(hidden_act="gem_n2")


def selected(config):
    return {field.path: field.value for field in activation_fields(config) if field.is_body}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BartConfig, {"activation_function": "gem_n2"}),
        (OPTConfig, {"activation_function": "gem_n2"}),
        (Gemma2Config, {"hidden_activation": "gem_n2"}),
        (XLNetConfig, {"ff_activation": "gem_n2"}),
        (DistilBertConfig, {"activation": "gem_n2"}),
        (T5Config, {"feed_forward_proj": "gem_n2"}),
        (functools.partial(T5Config, feed_forward_proj="gated-gem_n2"), {"feed_forward_proj": "gated-gem_n2"}),
        pytest.param(
            DbrxConfig,
            {"ffn_config.ffn_act_fn.name": "gem_n2"},
            marks=fails_with("transformers", "5.17", "cannot read its own Dbrx configs"),
        ),
        (CLIPConfig, {"text_config.hidden_act": "gem_n2", "vision_config.hidden_act": "gem_n2"}),
        (RTDetrConfig, {"encoder_activation_function": "gem_n2", "decoder_activation_function": "gem_n2"}),
    ],
    ids=lambda value: getattr(getattr(value, "func", value), "__name__", ""),
)
def test_configs_that_call_it_otherwise(config, expected):
    made = config(hidden_act="GEM_n2")
    assert expected.items() <= selected(made).items()
    assert "hidden_act" not in vars(made)
    again = type(made).from_dict(made.to_dict())
    assert selected(again) == selected(made)


def test_t5_configs_keep_what_they_made_of_the_field(tmp_path):
    config = T5Config(hidden_act="gem_n2")
    assert (config.feed_forward_proj, config.dense_act_fn, config.is_gated_act) == ("gem_n2", "gem_n2", False)
    config.save_pretrained(tmp_path)
    assert T5Config.from_pretrained(tmp_path).dense_act_fn == "gem_n2"
    with pytest.raises(ValueError, match=r"got feed_forward_proj='gated-gelu' .*Pass only (.*)\.$") as error:
        T5Config(feed_forward_proj="gated-gelu", hidden_act="gem_n2")
    assert str(error.value).endswith("Pass only feed_forward_proj='gated-gem_n2'.")
    assert T5Config(feed_forward_proj="gated-gem_n2").dense_act_fn == "gem_n2"


def test_a_name_under_another_keyword():
    assert GemmaConfig(hidden_activation="egem").hidden_act == "egem"
    assert GPT2Config(activation="egem").activation_function == "egem"
    with pytest.warns(UserWarning, match=r"ignoring projector_hidden_act='gem', which is not a field of GPT2Config"):
        config = GPT2Config(projector_hidden_act="gem")
    assert config.activation_function == "gelu_new"


def test_an_assigned_name_takes_effect_when_a_model_is_built():
    config = GPT2Config(**TINY_GPT2)
    config.hidden_act = "gem_n2"
    model = GPT2LMHeadModel(config)
    assert [block.mlp.act.spec.name for block in model.transformer.h] == ["gem_n2"] * 2
    assert config.activation_function == "gem_n2"
    assert "hidden_act" not in vars(config)


def test_a_name_given_while_loading(tmp_path):
    gpt2().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, hidden_act="gem_n2").activation_function == "gem_n2"
    for cls in (GPT2LMHeadModel, AutoModelForCausalLM):
        model = cls.from_pretrained(tmp_path, hidden_act="gem_n2")
        assert [block.mlp.act.spec.name for block in model.transformer.h] == ["gem_n2"] * 2
    with pytest.warns(UserWarning, match=UNREAD.format("relu")):
        assert AutoConfig.from_pretrained(tmp_path, hidden_act="relu").activation_function == "gelu_new"  # not ours


def test_a_model_with_a_registry_of_its_own():
    model = OpenAIGPTModel(OpenAIGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=32, hidden_act="gem_n2"))
    assert [block.mlp.act.spec.name for block in model.h] == ["gem_n2"] * 2
    assert model.h[0].mlp.act is not model.h[1].mlp.act  # a learnable eps belongs to one layer
    hf_gem.unregister()
    try:
        with pytest.raises(KeyError, match="gem_n2"):
            OpenAIGPTModel(OpenAIGPTConfig(afn="gem_n2"))
    finally:
        hf_gem.register()


@pytest.mark.parametrize("model_args", [None, {"depth": 1}])
def test_a_model_of_timm_in_transformers(model_args):
    config = TimmWrapperConfig(architecture="test_vit", model_args=model_args, hidden_act="gem_n2")
    assert config.model_args == {**(model_args or {}), "act_layer": "gem_n2"}
    assert hf_gem.audit(TimmWrapperModel(config)).complete
    with pytest.raises(ValueError, match=r"act_layer='relu' and hidden_act='gem_n2'\. Both set the same"):
        TimmWrapperConfig(architecture="test_vit", model_args={"act_layer": "relu"}, hidden_act="gem_n2")


def test_configs_that_replace_the_name():
    config = AutoConfig.for_model("step3p5")
    hf_gem.set_activation(config, "gem_n2")
    with pytest.warns(UserWarning, match="replaces hidden_act='gem_n2' by 'silu' whenever it is created or loaded"):
        again = type(config).from_dict(config.to_dict())
    assert (config.hidden_act, again.hidden_act) == ("gem_n2", "silu")


def test_a_model_whose_config_replaces_the_name_is_saved_with_it(tmp_path):
    """With a plan, as after a conversion, since loading it reads nothing from the field."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32}
    config = AutoConfig.for_model("step3p7", text_config=text, vision_config={**sizes, "image_size": 28})
    hf_gem.set_activation(config, "gem_n2")
    model = AutoModel.from_config(config)
    hf_gem.save_for_hub(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = type(model).from_pretrained(tmp_path)
        loaded.save_pretrained(tmp_path / "again")
        again = type(model).from_pretrained(tmp_path / "again")
    for there in (model, loaded, again):
        (layer,) = there.language_model.layers
        assert layer.mlp.act_fn.spec.name == "gem_n2"
    assert again.config.text_config.hidden_act == "silu"


@pytest.mark.parametrize("model_type", ["hgnet_v2", "resnet", "uvdoc"])
def test_what_is_hard_coded_beside_the_name_follows_it(model_type):
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(model_type, hidden_act="gem_n2"))
        assert not [module for module in model.modules() if type(module) is torch.nn.ReLU]
        stock = AutoModel.from_config(AutoConfig.for_model(model_type))
    assert [module for module in stock.modules() if type(module) is torch.nn.ReLU]


TINY_BLOOM = {"n_layer": 1, "n_head": 2, "hidden_size": 16, "vocab_size": 32}


def test_a_model_that_takes_its_activation_from_nowhere(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = BloomConfig(**TINY_BLOOM, hidden_act="gem_n2")
    with pytest.warns(UserWarning, match=r"BloomConfig has hidden_act='gem_n2', but BloomForCausalLM does not") as seen:
        model = BloomForCausalLM(config)
    assert len(seen) == 1  # for the model and its parts
    assert "hf_gem.convert(model, 'gem_n2')" in str(seen[0].message)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    assert "hidden_act" not in stored  # it had no effect
    hf_gem.convert(model, "gem_n2").audit.complete  # noqa: B018
    model.save_pretrained(tmp_path / "converted")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hf_gem.audit(BloomForCausalLM.from_pretrained(tmp_path)).num_gem == 0
        assert hf_gem.audit(BloomForCausalLM.from_pretrained(tmp_path / "converted")).complete
    file.write_text(json.dumps({**stored, "hidden_act": "gem_n2"}))  # as transformers alone would have saved it
    with pytest.warns(
        UserWarning, match=r"ignoring hidden_act='gem_n2', which is not a field of BloomConfig\. The saved"
    ):
        BloomForCausalLM.from_pretrained(tmp_path)


def test_a_model_built_from_the_config_of_a_converted_one_is_not_converted():
    config = BertConfig(**TINY_BERT)
    model = BertModel(config)
    hf_gem.convert(model, "egem")
    assert hf_gem.audit(BertModel(config)).num_gem == 0
    assert hf_gem.audit(BertModel(model.config)).complete
    assert model.encoder.layer[0].attention.self.config is model.config is not config


@pytest.mark.filterwarnings("error:::hf_gem")
def test_a_larger_model_from_the_config_of_a_converted_one(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(**TINY_GPT2))
    hf_gem.convert(model, "gem_n2")
    model.save_pretrained(tmp_path)
    config = GPT2Config.from_pretrained(tmp_path)
    GPT2Model(config)
    config.n_layer += 2
    for cls in (GPT2LMHeadModel, GPT2Model):
        with pytest.warns(UserWarning, match="has 2 activations that the converted GPT2LMHeadModel did not have"):
            cls(config)


def test_the_trainer_does_not_decay_a_learnable_eps(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = BertModel(BertConfig(**TINY_BERT, hidden_act=LEARNABLE))
    trainer = Trainer(model, TrainingArguments(tmp_path, report_to="none", use_cpu=True))
    decayed = trainer.get_decay_parameter_names(model)
    assert "encoder.layer.0.intermediate.dense.weight" in decayed
    assert not [name for name in decayed if name.endswith("log_ratio")]


def test_a_constructor_without_self(tmp_path):
    class Unusual(BertModel):
        def __init__(this, config):  # noqa: N805
            super().__init__(config)
            this.extra = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU())
            this.post_init()

    model = Unusual(BertConfig(**TINY_BERT))
    hf_gem.convert(model, "egem")
    model.save_pretrained(tmp_path)
    assert Unusual.from_pretrained(tmp_path).extra[1].spec.name == "egem"


def test_a_declared_field_that_the_model_does_not_read():
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GptOssConfig(**sizes, num_key_value_heads=2, vocab_size=32, num_local_experts=2, hidden_act="gem_n2")
    with pytest.warns(UserWarning, match="GptOssConfig has hidden_act='gem_n2', but GptOssModel does not"):
        GptOssModel(config)


def test_a_model_that_the_name_does_not_reach_everywhere():
    sizes = {"image_size": 16, "patch_size": 4, "window_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2]}
    with pytest.warns(UserWarning, match=r"Swinv2Model has 1 activation that did not pick up 'gem_n2' from the config"):
        model = Swinv2Model(Swinv2Config(**sizes, hidden_act="gem_n2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Swinv2Model(Swinv2Config(**sizes))
        hf_gem.convert(model, "gem_n2")
        Swinv2Model(model.config)  # all of it now
        # What another field selects is left to that field, and a projector to its own config.
        DebertaModel(DebertaConfig(**TINY_BERT, hidden_act="gem_n2", pooler_hidden_act="gelu"))
        BertModel(BertConfig(**TINY_BERT, hidden_act="gem_n2"))


def test_resnet_gives_all_its_activations():
    config = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8]}  # depths of ResNet-50
    model = ResNetForImageClassification(ResNetConfig(**config, hidden_act="gem_n2"))
    layers = [module for module in model.modules() if isinstance(module, hf_gem.GEM)]
    assert [layer.spec.name for layer in layers] == ["gem_n2"] * 49
    assert not [module for module in model.modules() if isinstance(module, torch.nn.ReLU)]
    assert hf_gem.audit(model).num_gem == 49
    assert "hf_gem" not in model.config.to_dict()  # it follows from hidden_act
    stock = ResNetForImageClassification(ResNetConfig(**config))
    assert len([module for module in stock.modules() if isinstance(module, torch.nn.ReLU)]) == 49


def test_a_malformed_hidden_act():
    with pytest.raises(ValueError, match=r"got activation name 'gem_n0'.*Did you mean 'gem'"):
        GPT2Config(hidden_act="gem_n0")


def test_the_own_field_of_a_config():
    assert GPT2Config(activation_function="gem_n2").activation_function == "gem_n2"
    assert gpt2(activation_function="segem").transformer.h[0].mlp.act.spec.name == "segem"
    config = BertConfig(**TINY_BERT, hidden_act="gem_n2")
    assert config.hidden_act == "gem_n2"
    assert BertModel(config).encoder.layer[0].intermediate.intermediate_act_fn.spec.name == "gem_n2"


def test_t5_splits_names_on_hyphens():
    config = T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=32, feed_forward_proj="gated-egem_n2_eps1em6"
    )
    assert config.is_gated_act
    assert T5Model(config).encoder.block[0].layer[1].DenseReluDense.act.spec == hf_gem.parse("egem_n2_eps1e-6")


# ---- checkpoints and a learnable eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_without_eps(dtype, tmp_path):
    gpt2().to(dtype).save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, activation_function=LEARNABLE, dtype=dtype)
    assert epsilons(loaded) == [0.25, 0.25]
    assert {layer.log_ratio.dtype for layer in learnable_layers(loaded)} == {dtype}
    by_hidden_act = GPT2LMHeadModel.from_pretrained(
        tmp_path, config=GPT2Config(**TINY_GPT2, hidden_act=LEARNABLE), dtype=dtype
    )
    assert epsilons(by_hidden_act) == [0.25, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_with_eps(dtype, tmp_path):
    model = gpt2(hidden_act=LEARNABLE).to(dtype)
    with torch.no_grad():
        for value, layer in zip((-1.0, 2.0), learnable_layers(model), strict=True):
            layer.log_ratio.fill_(value)
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert epsilons(loaded) == epsilons(model) != [0.25, 0.25]
    assert torch.equal(logits(loaded), logits(model))


def test_a_checkpoint_with_some_of_them(tmp_path):
    model = gpt2(hidden_act=LEARNABLE)
    layers = learnable_layers(model)
    with torch.no_grad():
        layers[0].log_ratio.fill_(1.0)
    state = {k: v for k, v in model.state_dict().items() if "h.1.mlp.act" not in k and k != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert epsilons(loaded) == [layers[0].eps.item(), 0.25]


def test_init_weights_leaves_a_trained_eps_of_the_model():
    model = gpt2(hidden_act=LEARNABLE)
    assert epsilons(model) == [0.25, 0.25]
    twin = copy.deepcopy(model)
    assert epsilons(twin) == [0.25, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_composite_checkpoint(dtype, tmp_path):
    def config(act):
        decoder = BertConfig(**TINY_BERT, hidden_act=act, is_decoder=True, add_cross_attention=True)
        return EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**TINY_BERT, hidden_act=act), decoder)

    EncoderDecoderModel(config("gelu")).to(dtype).save_pretrained(tmp_path / "gelu")
    loaded = EncoderDecoderModel.from_pretrained(tmp_path / "gelu", config=config(LEARNABLE), dtype=dtype)
    # Two layers and a prediction head in the decoder, two layers in the encoder.
    assert epsilons(loaded) == [0.25] * 5
    with torch.no_grad():
        for i, layer in enumerate(learnable_layers(loaded)):
            layer.log_ratio.fill_(i + 1.0)
    loaded.save_pretrained(tmp_path / "trained")
    again = EncoderDecoderModel.from_pretrained(tmp_path / "trained", dtype=dtype)
    assert epsilons(again) == epsilons(loaded)
    assert len(set(epsilons(again))) == 5


def test_unregistering_leaves_what_others_have_wrapped(monkeypatch):
    from transformers.configuration_utils import PreTrainedConfig

    ours, calls = PreTrainedConfig.__post_init__, []

    @functools.wraps(ours)
    def theirs(self, **kwargs):
        calls.append(kwargs)
        ours(self, **kwargs)

    monkeypatch.setattr(PreTrainedConfig, "__post_init__", theirs)
    hf_gem.unregister()
    try:
        assert PreTrainedConfig.__post_init__ is theirs
        assert GPT2Config(hidden_act="gem_n2").activation_function == "gelu_new"  # as transformers alone has it
        assert calls
    finally:
        hf_gem.register()
    assert GPT2Config(hidden_act="gem_n2").activation_function == "gem_n2"
    monkeypatch.undo()
    hf_gem.unregister()
    assert PreTrainedConfig.__post_init__ is not ours
    hf_gem.register()
    assert GPT2Config(hidden_act="gem_n2").activation_function == "gem_n2"


@pytest.mark.parametrize(("key", "value"), [("pooling", "gem"), ("dataset", "GEM"), ("tag", "gem_v2")])
def test_keywords_that_are_about_something_else_are_left_alone(key, value):
    config = BertConfig(**{key: value})
    assert (getattr(config, key), config.hidden_act) == (value, "gelu")
    loaded = BertConfig.from_dict({key: value, "model_type": "bert"})
    assert (getattr(loaded, key), loaded.hidden_act) == (value, "gelu")


def test_the_registry_keeps_its_contract():
    registry = activations.ACT2FN
    for copied in (pickle.loads(pickle.dumps(registry)), copy.deepcopy(registry), copy.copy(registry)):
        assert copied is not registry
        assert dict(copied.items()) == dict(registry.items())
        assert isinstance(copied["gelu"], torch.nn.Module)
        assert copied["gem_n2"].spec.name == "gem_n2"
        assert "gem_n2" in copied
    for copied in (pickle.loads(pickle.dumps(activations.ACT2CLS)), copy.deepcopy(activations.ACT2CLS)):
        assert copied["gem_n2"]().spec.name == "gem_n2"
    pickled = pickle.dumps(registry)
    hf_gem.unregister()
    try:
        assert "gem_n2" not in pickle.loads(pickled)
    finally:
        hf_gem.register()
    assert registry.get("gem_n2")().spec == hf_gem.parse("gem_n2")
    assert registry.get("relu") is torch.nn.ReLU
    assert registry.get("nothing", 3) == 3


_MAPPED = """
import datasets
from transformers.activations import ACT2FN

from tests.helpers import ROOT, run_python
import hf_gem, torch

def apply(row):
    return {"y": float(ACT2FN["gem_n2"](torch.tensor(row["x"])))}

if __name__ == "__main__":
    rows = datasets.Dataset.from_dict({"x": [0.5, -1.0, 2.0, 1.0]}).map(apply, num_proc=2)
    print(*rows["y"])
"""


def test_the_registry_in_workers(tmp_path):
    pytest.importorskip("datasets", reason="its map pickles a function with its globals")
    pytest.importorskip("accelerate", reason="the helper of all tests that start processes wants it")
    from tests.helpers import ROOT, run_python

    (tmp_path / "mapped.py").write_text(_MAPPED)
    result = run_python(tmp_path / "mapped.py", HF_HOME=str(tmp_path), PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    y = [float(hf_gem.gem(torch.tensor(x), 2)) for x in (0.5, -1.0, 2.0, 1.0)]
    assert [float(word) for word in result.stdout.split()] == y


def _liger(self, x):
    """As Liger replaces the forward of Llama's MLP: SiLU is part of its kernel."""
    return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("replaced", ["all", "one", "none"])
def test_activations_that_do_not_run_in_training(replaced, tmp_path):
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=16, num_key_value_heads=2, hidden_act="gem_n2", **sizes)
    model = LlamaForCausalLM(config)
    if replaced == "none":
        hf_gem.patch_glu(model)
    for layer in model.model.layers[: {"all": 2, "one": 1, "none": 0}[replaced]]:
        layer.mlp.forward = functools.partial(_liger, layer.mlp)
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        model.save_pretrained(tmp_path)
    said = [str(warning.message) for warning in caught if "did not run" in str(warning.message)]
    if replaced == "all":
        (message,) = said
        where = "2 of 2 activations of the family in LlamaForCausalLM did not run in training: model.layers.*.mlp"
        assert message.startswith(where)
    else:  # training may leave out one layer of many, as LayerDrop and mixtures of experts do
        assert said == []


def test_activations_that_did_not_run_in_a_loop_of_ones_own(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=8, hidden_act="gem"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)  # nothing has run, which is nothing to say
    model.transformer.h[0].mlp.forward = lambda x: x
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    with pytest.warns(UserWarning, match=r"1 of 1 activations .* in GPT2LMHeadModel did not run .*h\.0\.mlp\.act"):
        model.save_pretrained(tmp_path)


def test_one_learnable_module_in_several_layers(tmp_path):
    """transformers fails at the first checkpoint, about shared tensors; the first step says what to do."""
    pytest.importorskip("accelerate")
    sizes = {"n_layer": 2, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 8, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0))
    shared = hf_gem.EGEM(learnable=True)
    for layer in model.transformer.h:
        layer.mlp.act = shared
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    with pytest.warns(UserWarning, match=r"h\.0\.mlp\.act' and .* share one learnable eps.*with copy\.deepcopy"):
        trainer.train()
    for layer in model.transformer.h:
        layer.mlp.act = copy.deepcopy(shared)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
