"""set_activation: the fields of any config, what is left alone, and what is said where there is nothing to set."""

import pytest

import hf_gem

pytest.importorskip("transformers")

from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import (
    BertModel,
    BloomConfig,
    CLIPConfig,
    DbrxConfig,
    DebertaConfig,
    EncoderDecoderConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    NemotronHConfig,
    PreTrainedConfig,
    T5Config,
    TimmWrapperConfig,
    ViTConfig,
)


def changes(config, name="gem_n2", **kwargs):
    return {change.path: (change.old, change.new) for change in hf_gem.set_activation(config, name, **kwargs)}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), {"hidden_act": ("silu", "gem_n2")}),
        (GPT2Config(), {"activation_function": ("gelu_new", "gem_n2")}),
        (T5Config(), {"feed_forward_proj": ("relu", "gem_n2")}),
        (T5Config(feed_forward_proj="gated-gelu"), {"feed_forward_proj": ("gated-gelu", "gated-gem_n2")}),
        (DbrxConfig(), {"ffn_config.ffn_act_fn.name": ("silu", "gem_n2")}),
        (DebertaConfig(), {"hidden_act": ("gelu", "gem_n2")}),  # not pooler_hidden_act
        (ViTConfig(), {"hidden_act": ("gelu", "gem_n2")}),  # not pooler_act
        (NemotronHConfig(), {"mlp_hidden_act": ("relu2", "gem_n2")}),  # not mamba_hidden_act
        (TimmWrapperConfig(), {"model_args.act_layer": ("", "gem_n2")}),
        (
            CLIPConfig(),
            {"text_config.hidden_act": ("quick_gelu", "gem_n2"), "vision_config.hidden_act": ("quick_gelu", "gem_n2")},
        ),
        (
            LlavaConfig(),  # not projector_hidden_act
            {"text_config.hidden_act": ("silu", "gem_n2"), "vision_config.hidden_act": ("quick_gelu", "gem_n2")},
        ),
        (
            EncoderDecoderConfig.from_encoder_decoder_configs(GPT2Config(), T5Config()),
            {
                "encoder.activation_function": ("gelu_new", "gem_n2"),
                "decoder.feed_forward_proj": ("relu", "gem_n2"),
            },
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_fields_of_a_config(config, expected):
    before = config.to_dict()
    assert changes(config) == expected
    assert changes(config) == {path: (new, new) for path, (_, new) in expected.items()}  # a second time
    restored = {path: old for path, (old, _) in expected.items()}
    for path, old in restored.items():
        if old:
            hf_gem.set_activation(config, old.removeprefix("gated-"), fields=path)
    if all(restored.values()):
        assert config.to_dict() == before


def test_what_t5_makes_of_its_field():
    config = T5Config(feed_forward_proj="gated-gelu")
    assert config.dense_act_fn == "gelu_new"
    hf_gem.set_activation(config, "egem_n2_eps1e-6")
    assert (config.feed_forward_proj, config.dense_act_fn) == ("gated-egem_n2_eps1em6", "egem_n2_eps1em6")
    assert config.is_gated_act
    hf_gem.set_activation(config, "gelu")
    assert (config.feed_forward_proj, config.dense_act_fn) == ("gated-gelu", "gelu_new")


def test_fields_that_are_asked_for():
    config = LlavaConfig()
    assert changes(config, fields="projector_*") == {"projector_hidden_act": ("gelu", "gem_n2")}
    assert config.text_config.hidden_act == "silu"
    assert changes(config, "egem", fields=["text_config.*", "nothing"]) == {"text_config.hidden_act": ("silu", "egem")}
    assert changes(DebertaConfig(), fields="*pooler*") == {"pooler_hidden_act": ("gelu", "gem_n2")}
    assert changes(ViTConfig(), fields="pooler_act") == {"pooler_act": ("tanh", "gem_n2")}
    with pytest.raises(ValueError, match=r"matches fields='text\.\*'\. It has .*text_config\.hidden_act='egem'"):
        hf_gem.set_activation(config, "gem", fields="text.*")


def test_other_names_and_configs_of_other_people():
    assert changes(GPT2Config(), "relu") == {"activation_function": ("gelu_new", "relu")}

    class TheirConfig(PreTrainedConfig):  # as remote code writes them
        model_type = "theirs"

        def __init__(self, mlp_act="gelu", gate_activation="sigmoid", activation_dropout=0.1, **kwargs):
            self.mlp_act, self.gate_activation = mlp_act, gate_activation
            self.activation_dropout = activation_dropout
            super().__init__(**kwargs)

    assert changes(TheirConfig()) == {"mlp_act": ("gelu", "gem_n2")}


def test_timm_keeps_its_other_arguments():
    config = TimmWrapperConfig(model_args={"depth": 3, "act_layer": "relu"})
    assert changes(config) == {"model_args.act_layer": ("relu", "gem_n2")}
    assert config.model_args == {"depth": 3, "act_layer": "gem_n2"}


def test_nothing_to_set():
    with pytest.raises(ValueError, match=r"BloomConfig has no field that selects .*hf_gem\.convert\(model, 'gem_n2'\)"):
        hf_gem.set_activation(BloomConfig(), "gem_n2")
    with pytest.raises(ValueError, match=r"BloomConfig has no field .* Use an activation of the family, which"):
        hf_gem.set_activation(BloomConfig(), "relu")  # which convert does not take


def test_a_field_that_refuses_the_name_leaves_everything_as_it_was():
    config = EncoderDecoderConfig.from_encoder_decoder_configs(GPT2Config(), neomme())
    before = config.to_dict()
    with pytest.raises(ValueError, match=r"does not accept 'gem_n2' as decoder\.hidden_act"):
        hf_gem.set_activation(config, "gem_n2")
    assert config.to_dict() == before


def test_a_config_that_refuses_the_name_as_a_whole_leaves_everything_as_it_was():
    """Its own validation runs when it is created and saved, so a model that was trained with it could not be saved."""
    inner = pytest.importorskip("transformers.models.qwen4_exp.configuration_qwen4_exp").Qwen4ExpTextConfig()
    config = EncoderDecoderConfig.from_encoder_decoder_configs(GPT2Config(), inner)
    before = config.to_dict()
    with pytest.raises(ValueError, match=r"does not accept 'gem_n2' as decoder\.hidden_act (?s:.*)Unsupported"):
        hf_gem.set_activation(config, "gem_n2")
    assert config.to_dict() == before
    assert changes(config, fields="encoder.*") == {"encoder.activation_function": ("gelu_new", "gem_n2")}


def test_a_config_that_was_refused_before_can_still_be_set():
    config = LlamaConfig()
    config.num_attention_heads = 3  # which does not divide hidden_size
    with pytest.raises(StrictDataclassClassValidationError):
        config.validate()
    assert changes(config) == {"hidden_act": ("silu", "gem_n2")}


def neomme():
    return pytest.importorskip("transformers.models.neomme.configuration_neomme").NeoMMEConfig()


@pytest.mark.parametrize(
    ("config", "name", "error", "message"),
    [
        (GPT2Config(), "gem_nn2", ValueError, r"got activation name 'gem_nn2'.*Did you mean 'gem_n2'"),
        (GPT2Config(), "gelo", ValueError, r"got activation name 'gelo', which .*Allowed names: .*gelu"),
        (GPT2Config(), nn.GELU, TypeError, "got activation name <class.*must be a string"),
        ({"hidden_act": "gelu"}, "gem", TypeError, r"got dict\. config must be a transformers config"),
        (BertModel, "gem", TypeError, r"got type\. config must be a transformers config.*hf_gem\.convert"),
    ],
)
def test_bad_arguments(config, name, error, message):
    with pytest.raises(error, match=message):
        hf_gem.set_activation(config, name)


def test_a_long_name_does_not_come_back_whole():
    with pytest.raises(ValueError, match="got activation name 'gelogelo") as error:
        hf_gem.set_activation(GPT2Config(), "gelo" * 10**5)
    assert "gelo" * 20 not in str(error.value)
