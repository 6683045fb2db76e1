"""timm: every well-formed name, as a layer, as a function and in models, which can be saved."""

import copy
import json
import pickle
import sys

import pytest
import torch
from torch import nn

import hf_gem
from hf_gem.integrations.timm import ActName
from hf_gem.modules import GemActivation
from hf_gem.surgery.plans import plan_of
from hf_gem.surgery.slots import replace, slot_at, undo

timm = pytest.importorskip("timm")
feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")

from timm.layers import (  # noqa: E402
    create_act,
    create_act_layer,
    get_act_fn,
    get_act_layer,
    set_exportable,
    set_layer_config,
    set_scriptable,
)
from timm.models import create_feature_extractor  # noqa: E402
from timm.models._hub import save_for_hf  # noqa: E402

NAMES = ["gem", "gem_n3", "GEM_N2", "egem_n2_eps1em6", "egem_eps0.00001", "segem_eps0.01", "segem_n32_eps1e9"]
LEARNABLE = ["egem_learnable", "segem_n2_eps0.5_learnable"]
MODES = {
    "default": set_layer_config,
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
    with pytest.raises(ValueError, match=r"A function cannot own the parameter.*Use get_act_layer") as error:
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


# ---- models


def on_meta(model_name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(model_name, **kwargs)


def activations(model):
    """Names of the activations in a model: our names, the classes of others, without the gates of attention."""
    others = {
        type(m).__name__ for m in model.modules() if type(m).__module__.rpartition(".")[2].startswith("activation")
    }
    ours = {m.spec.name for m in model.modules() if isinstance(m, GemActivation)}
    return others - {"Sigmoid", "Hardsigmoid"} | ours


# Each calls act_layer in its own way: act_layer(), act_layer(True), act_layer(inplace=True), from a tuple.
@pytest.mark.parametrize("model_name", ["cait_xxs24_224", "starnet_s050", "vgg11", "xception41", "gmlp_ti16_224"])
@pytest.mark.parametrize("name", ["segem_n2", "egem_learnable"])
def test_models_that_call_act_layer(model_name, name):
    assert activations(on_meta(model_name, act_layer=name.upper())) == {name}


def test_an_act_layer_of_another_name():
    with pytest.warns(
        UserWarning, match=r"RexNet has 13 activations that did not pick up act_layer='gem', such as relu at features"
    ):
        model = on_meta("rexnet_100", act_layer="gem", dw_act_layer="gem_n2")
    assert {"gem", "gem_n2"} <= activations(model)
    assert "ReLU6" not in activations(model)


@pytest.mark.parametrize("model_name", ["mobilenetv3_small_050", "lcnet_050", "hardcorenas_a"])
def test_blocks_of_efficientnets_that_name_their_own(model_name):
    assert activations(on_meta(model_name, act_layer="gem_n2")) == {"gem_n2"}
    stock = activations(on_meta(model_name, act_layer="silu"))
    assert "ReLU" in stock
    hf_gem.unregister()
    try:
        assert activations(on_meta(model_name, act_layer="silu")) == stock
    finally:
        hf_gem.register()


def test_a_model_that_ignores_act_layer_says_so():
    with pytest.warns(UserWarning, match="ResNetV2 accepts act_layer='gem' but does not use it"):
        on_meta("resnetv2_50d_evos", act_layer="gem")


@pytest.mark.parametrize("model_name", ["cait_xxs24_224", "resnet10t", "mobilenetv3_small_050", "nf_resnet26"])
def test_a_malformed_name_in_a_model(model_name):
    with pytest.raises(ValueError, match=r"got activation name 'gem_n0'.*Did you mean 'gem'"):
        on_meta(model_name, act_layer="gem_n0")


@pytest.mark.parametrize("name", ["gemini_n2", "gme_n2", "gem_like"])
@pytest.mark.parametrize("registry", ["_ACT_LAYER_DEFAULT", "_ACT_LAYER_ME"])
def test_a_name_that_someone_registered_is_theirs(name, registry, request, tmp_path):
    class Theirs(nn.ReLU):
        def __init__(self, inplace=False):
            super().__init__()

    layers = getattr(create_act, registry)
    layers[name] = Theirs
    request.addfinalizer(lambda: layers.pop(name))
    assert get_act_layer(name) is Theirs
    model = on_meta("resnet10t", act_layer=name.upper())
    assert {type(m) for m in model.modules() if isinstance(m, nn.ReLU)} == {Theirs}
    timm.models._hub.save_config_for_hf(model, tmp_path / "config.json")
    assert "hf_gem" not in (tmp_path / "config.json").read_text()


def test_names_of_timm_in_models_are_as_before():
    assert activations(on_meta("resnet10t", act_layer="gelu")) == {"GELU"}
    assert activations(on_meta("vgg11", act_layer=nn.SiLU)) == {"SiLU"}
    with pytest.raises(TypeError, match="'str' object is not callable"):
        on_meta("vgg11", act_layer="gelu")
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'act_layer'\. Use hf_gem\.create_timm_model"):
        on_meta("crossvit_tiny_240", act_layer="gem")
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'act_layer'$"):
        on_meta("crossvit_tiny_240", act_layer="relu")


def test_a_name_that_is_called():
    name = get_act_layer("GEM_N2")
    assert name == "gem_n2"
    assert json.loads(json.dumps({"act_layer": name})) == {"act_layer": "gem_n2"}
    x = torch.randn(10)
    for copied in (name, copy.deepcopy(name), pickle.loads(pickle.dumps(name))):
        assert type(copied) is ActName
        for layer in (copied(), copied(True), copied(inplace=True)):
            assert layer.spec.name == "gem_n2"
        for y in (copied(x), copied(x, inplace=True)):
            assert torch.equal(y, hf_gem.gem(x, 2))


def test_a_learnable_eps_is_where_and_what_the_model_is():
    model = timm.create_model("resnet10t", act_layer="egem_learnable", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_nfnet():
    gamma = hf_gem.gain("egem_n2", centered=True)
    model = on_meta("nf_resnet26", act_layer="egem_n2")
    assert activations(model) == {"egem_n2"}
    conv = model.stages[0][0].conv1
    assert conv.scale == gamma * conv.weight[0].numel() ** -0.5
    with pytest.warns(
        UserWarning, match=r"NormFreeNet has 12 activations that did not pick up .*, such as relu at .*attn"
    ):
        act = on_meta("dm_nfnet_f0", act_layer="egem_n2").final_act  # applies functions, and gamma to their output
    x = torch.randn(10)
    whole = not torch.__version__.startswith("2.11.")  # whose compiler cannot trace a name, and breaks the graph
    for run in (act, torch.compile(act, fullgraph=whole, backend="eager"), torch.fx.symbolic_trace(act)):
        assert torch.equal(run(x), hf_gem.egem(x, 2) * gamma)
    with pytest.raises(ValueError, match=r"got 'egem_learnable' for get_act_fn.* or use 'egem' in a model that takes"):
        sys.modules["timm.models.nfnet"].GammaAct(ActName("egem_learnable"))(x)
    gammas = sys.modules["timm.models.nfnet"]._nonlin_gamma
    assert gammas["relu"] == pytest.approx(hf_gem.gain(torch.relu, centered=True), rel=1e-3)  # theirs is sampled
    with pytest.raises(AssertionError, match="Please add non-linearity constants"):
        on_meta("nf_resnet26", act_layer="hard_mish")


@pytest.mark.parametrize("how", ["act_layer", "convert"])
def test_nfnet_trains_where_outputs_are_kept(how, monkeypatch):
    """As on a GPU. Its GammaAct multiplies in place what the function that it looked up returned."""
    monkeypatch.setattr("hf_gem._kernels.dispatch._DEFAULT_SAVE", "output")
    act = timm.models.nfnet.GammaAct("gem_n2" if how == "act_layer" else "gelu", gamma=1.7)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), act, torch.nn.Linear(4, 2))
    if how == "convert":
        hf_gem.convert(model, "gem_n2")
    x = torch.randn(5, 3)
    (got,) = torch.autograd.grad(model(x).sum(), model[0].weight)
    h = model[0](x)
    expected = torch.autograd.grad((1.7 * hf_gem.gem(h, 2, save="input") @ model[2].weight.T).sum(), model[0].weight)
    torch.testing.assert_close(got, expected[0])


@pytest.mark.parametrize("name", ["gem_n2", "egem_learnable"])
def test_feature_extraction_by_fx(name):
    model = timm.create_model("resnet10t", act_layer=name).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_features(x)
        for create in (create_feature_extractor, feature_extraction.create_feature_extractor):
            assert torch.equal(create(model, ["layer4"])(x)["layer4"], expected)
        assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
        features = timm.create_model("resnet10t", act_layer=name, features_only=True, feature_cls="fx").eval()
        features.graph_module.load_state_dict(model.state_dict(), strict=False)
        assert torch.equal(features(x)[-1], expected)


# ---- saved models


def convert(model, **activations):
    undo(model)
    slots = {hf_gem.parse(name): [slot_at(model, path) for path in paths] for name, paths in activations.items()}
    replace(model, slots, hf_gem.get_activation)
    return plan_of(model)


def disturb(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    return model.eval()


def save(model, folder, **kwargs):
    """Saves, and returns the arguments of the model that the config holds."""
    save_for_hf(model, folder, safe_serialization=True, **kwargs)
    return json.loads((folder / "config.json").read_text()).get("model_args", {})


def load(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


BUILDERS = {
    "create_model": lambda name: timm.create_model("resnet10t", act_layer=name, num_classes=3),
    "entry point": lambda name: timm.models.resnet10t(act_layer=name, num_classes=3),
    "resolved by the entry point": lambda name: timm.models.mobilenetv3_small_050(act_layer=name, num_classes=3),
}


@pytest.mark.parametrize("build", list(BUILDERS))
@pytest.mark.parametrize("name", ["gem_n2", "egem_n2_eps0.01_learnable"])
def test_a_saved_model_by_name(build, name, tmp_path):
    model = disturb(BUILDERS[build](name))
    assert save(model, tmp_path)["act_layer"] == name
    loaded = load(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_what_the_caller_of_save_says_wins(tmp_path):
    model = timm.create_model("resnet10t", act_layer="gem_n2")
    assert save(model, tmp_path, model_args={"act_layer": "gem_n3"})["act_layer"] == "gem_n3"
    assert save(model, tmp_path, model_config={"model_args": {"act_layer": "egem"}})["act_layer"] == "egem"
    assert "act_layer" not in save(timm.create_model("resnet10t"), tmp_path)


@pytest.fixture
def converted(tmp_path):
    model = timm.create_model("resnet10t", num_classes=3)
    model.plan = convert(model, egem_learnable=["act1"], gem_n3=["layer1.0.act2"])
    disturb(model)
    assert save(model, tmp_path)["hf_gem"] == model.plan
    return model


def test_a_saved_conversion(converted, tmp_path):
    x = torch.randn(2, 3, 32, 32)
    loaded = load(tmp_path)
    by_hand = timm.create_model("resnet10t", num_classes=3, hf_gem=converted.plan)
    by_hand.load_state_dict(converted.state_dict())
    with torch.no_grad():
        for model in (loaded, by_hand.eval()):
            assert torch.equal(model(x), converted(x))
        for kind in ("list", "fx"):
            features = load(tmp_path, features_only=True, feature_cls=kind)
            assert torch.equal(features(x)[-1], converted.forward_features(x))
    fresh = timm.create_model(f"local-dir:{tmp_path}")
    assert fresh.act1.spec.name == "egem_learnable"
    assert not fresh.act1.log_ratio.any()


def test_a_conversion_is_saved_as_it_is_now(converted, tmp_path):
    loaded = load(tmp_path)
    assert save(loaded, tmp_path)["hf_gem"] == converted.plan
    plan = convert(loaded, gem=["act1"])
    assert plan != converted.plan
    assert save(loaded, tmp_path)["hf_gem"] == plan
    undo(loaded)
    assert "hf_gem" not in save(loaded, tmp_path)


def test_a_conversion_of_a_checkpoint_path(converted, tmp_path):
    torch.save(converted.state_dict(), tmp_path / "weights.pth")
    loaded = timm.create_model(
        "resnet10t", num_classes=3, hf_gem=converted.plan, checkpoint_path=tmp_path / "weights.pth"
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), converted(x))


@pytest.mark.usefixtures("converted")
def test_timm_alone_refuses_a_conversion(tmp_path):
    hf_gem.unregister()
    try:
        with pytest.raises(TypeError, match="unexpected keyword argument 'hf_gem'"):
            load(tmp_path)
    finally:
        hf_gem.register()


def test_unregister_takes_the_models_back():
    names = [name for name in sys.modules if name.startswith("timm.models.")]
    held = {name: vars(sys.modules[name]).get("build_model_with_cfg") for name in names}
    ours = sys.modules["timm.models._builder"].build_model_with_cfg
    assert set(held.values()) == {ours, None}
    hf_gem.unregister()
    try:
        for name in names:
            assert vars(sys.modules[name]).get("build_model_with_cfg") is (held[name] and ours.__wrapped__)
        assert type(sys.modules["timm.models.nfnet"]._nonlin_gamma) is dict
        assert not hasattr(sys.modules["timm.models._hub"].save_config_for_hf, "__wrapped__")
        with pytest.raises(KeyError, match="gem"):
            on_meta("resnet10t", act_layer="gem")
        with pytest.raises(TypeError, match="'str' object is not callable"):
            on_meta("vgg11", act_layer="gem")
        with pytest.raises(AssertionError, match="Please add non-linearity constants"):
            on_meta("nf_resnet26", act_layer="gem")
    finally:
        hf_gem.register()
    assert activations(on_meta("vgg11", act_layer="gem")) == {"gem"}


def test_the_wrapper_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(
        architecture="resnet10t", num_labels=3, model_args={"act_layer": "egem_learnable"}
    )
    model = disturb(transformers.TimmWrapperForImageClassification(config))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)
    assert activations(loaded) == {"egem_learnable"}


def test_every_activation_of_a_model():
    model, report = hf_gem.create_timm_model("test_resnet", "gem_n2", num_classes=3)  # takes act_layer
    assert hf_gem.audit(model).complete
    assert report.replaced == ()
    model, report = hf_gem.create_timm_model("swin_tiny_patch4_window7_224", "gem_n2", num_classes=3)  # takes none
    assert hf_gem.audit(model).complete
    assert len(report.replaced) == 12
    model, report = hf_gem.create_timm_model("test_efficientnet_gn", "egem_learnable", num_classes=3)
    assert hf_gem.audit(model).complete
    with pytest.raises(ValueError, match=r"got act='gem' and act_layer='relu'"):
        hf_gem.create_timm_model("resnet18", "gem", act_layer="relu")
    with pytest.raises(ValueError, match=r"got activation name 'gem_nn2'"):
        hf_gem.create_timm_model("resnet18", "gem_nn2")
    with pytest.raises(TypeError, match="no_such_argument"):
        hf_gem.create_timm_model("resnet18", "gem", no_such_argument=1)


def test_features_of_a_converted_model(tmp_path):
    for name in ("test_efficientnet", "mobilenetv3_small_050"):
        model = timm.create_model(name, num_classes=3).eval()
        hf_gem.convert(model, "egem_eps0.1")
        timm.models.save_for_hf(model, tmp_path / name, safe_serialization=True)
    saved = f"local-dir:{tmp_path / 'test_efficientnet'}"
    features = timm.create_model(saved, pretrained=True, features_only=True).eval()
    assert hf_gem.audit(features).complete
    # Its feature extractor keeps an activation elsewhere than the model does.
    with pytest.raises(ValueError, match=r"MobileNetV3Features has no activation at .*built by the same code"):
        timm.create_model(f"local-dir:{tmp_path / 'mobilenetv3_small_050'}", features_only=True)
