"""timm: every well-formed name, as a layer and as a function, in every mode."""

import pytest
import torch
from torch import nn

import hf_gem

timm = pytest.importorskip("timm")

from timm.layers import (  # noqa: E402
    create_act_layer,
    get_act_fn,
    get_act_layer,
    set_exportable,
    set_layer_config,
    set_scriptable,
)

NAMES = ["gem", "gem_n3", "GEM_N2", "egem_n2_eps1em6", "egem_eps0.00001", "segem_eps0.01", "segem_n32_eps1e9"]
LEARNABLE = ["egem_learnable", "segem_n2_eps0.5_learnable"]
MODES = {
    "default": lambda: set_layer_config(),
    "scriptable": lambda: set_scriptable(True),
    "exportable": lambda: set_exportable(True),
    "no_jit": lambda: set_layer_config(no_jit=True),
}

modes = pytest.mark.parametrize("mode", list(MODES))


@modes
@pytest.mark.parametrize("name", NAMES)
def test_functions(name, mode):
    x = torch.randn(10)
    with MODES[mode]():
        function = get_act_fn(name)
    for kwargs in ({}, {"inplace": True}, {"inplace": False}):
        assert torch.equal(function(x, **kwargs), hf_gem.get_activation(name)(x))


@modes
@pytest.mark.parametrize("name", NAMES + LEARNABLE)
def test_layers(name, mode):
    spec = hf_gem.parse(name)
    with MODES[mode]():
        layers = [create_act_layer(name), create_act_layer(name, inplace=True), get_act_layer(name)(inplace=False)]
    for layer in layers:
        assert layer.spec == spec
        assert isinstance(layer, nn.Module)
    assert len({id(layer) for layer in layers}) == 3
    assert len({id(p) for layer in layers for p in layer.parameters()}) == 3 * spec.learnable


@pytest.mark.parametrize("name", LEARNABLE)
def test_a_function_owns_no_parameter(name):
    with pytest.raises(ValueError, match="a function cannot own; use get_act_layer") as error:
        get_act_fn(name)
    assert name in str(error.value)


@modes
@pytest.mark.parametrize("lookup", [get_act_fn, get_act_layer, create_act_layer])
def test_malformed_names(lookup, mode):
    with MODES[mode](), pytest.raises(ValueError, match=r"got activation name 'gem_n0'.*Did you mean 'gem'"):
        lookup("gem_n0")


@modes
def test_everything_else_is_as_before(mode):
    with MODES[mode]():
        found = [lookup(name) for lookup in (get_act_fn, get_act_layer) for name in ("relu", "silu", "hard_swish")]
        hf_gem.unregister()
        try:
            assert found == [f(name) for f in (get_act_fn, get_act_layer) for name in ("relu", "silu", "hard_swish")]
        finally:
            hf_gem.register()
        for lookup in (get_act_fn, get_act_layer, create_act_layer):
            with pytest.raises(KeyError, match="gemma"):
                lookup("gemma")
        assert get_act_layer(None) is get_act_fn(None) is create_act_layer("") is None
        assert get_act_layer(nn.GELU) is nn.GELU


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_model_by_name():
    def build(act_layer, scriptable=False):
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", act_layer=act_layer, num_classes=3, scriptable=scriptable)
        return model.eval()

    model = build("egem_n2_eps0.01")
    layers = [m for m in model.modules() if isinstance(m, hf_gem.EGEM)]
    assert layers
    assert {layer.spec.name for layer in layers} == {"egem_n2_eps0.01"}
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        assert not torch.equal(expected, build("relu")(x))
        scripted = torch.jit.script(build("egem_n2_eps0.01", scriptable=True))
        torch.testing.assert_close(scripted(x), expected)
    learnable = build("egem_learnable")
    owned = [p for name, p in learnable.named_parameters() if name.endswith("log_ratio")]
    assert len(owned) == len([m for m in learnable.modules() if isinstance(m, hf_gem.EGEM)]) > 1
