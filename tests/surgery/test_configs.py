"""Conversions in configs: what a converted config selects in memory and in a file."""

import functools

import pytest
from torch import nn

import hf_gem

pytest.importorskip("transformers")

from transformers import (
    BloomConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    DbrxConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlavaConfig,
    T5Config,
    TimmWrapperConfig,
)

from hf_gem.surgery.configs import unmask
from hf_gem.surgery.fields import activation_fields, nested_configs
from tests.helpers import fails_with
from tests.surgery.test_fields import neomme


def pop2piano():
    return pytest.importorskip("transformers.models.pop2piano.configuration_pop2piano").Pop2PianoConfig()


@pytest.mark.parametrize(
    "make",
    [
        LlamaConfig,
        GPT2Config,
        functools.partial(T5Config, feed_forward_proj="gated-gelu"),
        pytest.param(DbrxConfig, marks=fails_with("transformers", "5.17", "cannot read its own Dbrx configs")),
        CLIPConfig,
        LlavaConfig,
        TimmWrapperConfig,
        BloomConfig,
        pop2piano,  # two fields, of which one sets the other
        neomme,  # whose field takes one value
    ],
    ids=lambda make: getattr(make, "__name__", "gated T5"),
)
def test_a_converted_config_comes_back_from_a_file(make):
    def body(config):
        return {field.path: field.value for field in activation_fields(config) if field.is_body}

    config = make()
    stock = body(config)
    for part in nested_configs(config).values():
        inner = tuple(prefix for prefix in nested_configs(part) if prefix)
        own = {path: value for path, value in body(part).items() if not path.startswith(inner)}
        part.hf_gem = {"version": 1, "model": "", "base": "", "parts": [], "fields": own}
        part.hf_gem["activations"] = {"egem_learnable": ["act"], "segem": ["act2"]}
    loaded = type(config).from_dict(config.to_dict())
    named = {path for path, value in body(loaded).items() if value.removeprefix("gated-") == "egem_learnable"}
    assert named == (set() if type(config).__name__ == "NeoMMEConfig" else set(stock))
    unmask(loaded)
    assert body(loaded) == body(config) == stock


def test_a_wrapper_keeps_the_config_of_its_model():
    class Wrapper(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.backbone = GPT2Model(config)
            self.config = self.backbone.config

    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8)
    wrapper = Wrapper(config)
    hf_gem.convert(wrapper, "gem")
    assert wrapper.config is wrapper.backbone.config is wrapper.backbone.h[0].attn.config
    assert wrapper.config is not config


@pytest.mark.filterwarnings("error:::hf_gem")
def test_a_part_that_was_converted_by_itself(tmp_path):
    """The plan is saved where the part is looked for when it is loaded alone."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"image_size": 4, "patch_size": 2, **sizes}
    model = CLIPModel(CLIPConfig(text_config={"vocab_size": 8, **sizes}, vision_config=vision, projection_dim=4))
    hf_gem.convert(model.vision_model, "gem_n2", skip="*.0.*")
    model.save_pretrained(tmp_path)
    for loaded in (CLIPModel.from_pretrained(tmp_path).vision_model, CLIPVisionModel.from_pretrained(tmp_path)):
        acts = [type(layer.mlp.activation_fn).__name__ for layer in loaded.encoder.layers]
        assert acts == ["QuickGELUActivation", "GEM"]


def test_a_part_that_was_converted_by_itself_is_reverted_with_the_whole():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8))
    hf_gem.convert(model.transformer, "gem")
    hf_gem.revert(model)
    assert not isinstance(GPT2Model(model.transformer.config).h[0].mlp.act, hf_gem.GEM)
