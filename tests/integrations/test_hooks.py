"""When registration happens, that it can be undone, and that it overwrites nothing."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

import hf_gem
from hf_gem.integrations import hooks
from hf_gem.integrations.registry import patch

activations = pytest.importorskip("transformers.activations")
create_act = pytest.importorskip("timm.layers.create_act")
configuration_utils = pytest.importorskip("transformers.configuration_utils")
modeling_utils = pytest.importorskip("transformers.modeling_utils")

from timm.models import _builder as builder  # noqa: E402
from timm.models import _hub as hub  # noqa: E402
from timm.models import vgg  # noqa: E402

TIMM_DICTS = ("_ACT_LAYER_DEFAULT", "_ACT_FN_DEFAULT", "_ACT_LAYER_ME", "_ACT_FN_ME")


@pytest.fixture(autouse=True)
def _registered():
    hf_gem.register()
    yield
    hf_gem.register()


def state():
    """Everything registration touches: the type and the content of each dict, and the methods themselves."""
    dicts = [activations.ACT2FN, activations.ACT2CLS, *(getattr(create_act, name) for name in TIMM_DICTS)]
    methods = [
        configuration_utils.PreTrainedConfig.__post_init__,
        modeling_utils.PreTrainedModel._initialize_weights,
        *(vars(module)["build_model_with_cfg"] for module in (builder, vgg)),
        hub.save_config_for_hf,
    ]
    return [(type(d), list(d.items())) for d in dicts] + methods


CHECKS = """
def check():
    from transformers import GPT2Config
    from transformers.activations import ACT2CLS, ACT2FN
    import timm
    from timm.layers import create_act_layer, get_act_fn
    names = [type(ACT2FN["gem_n2"]), type(ACT2CLS["egem"]()), type(create_act_layer("segem_eps0.1"))]
    config = GPT2Config(hidden_act="gem")
    model = timm.create_model("starnet_s050", act_layer="gem_n2")
    functions = [get_act_fn("gem") is not None, model.stem[1].spec.name]
    return [t.__name__ for t in names] + functions + [config.activation_function]
"""

BEFORE = """
import torch
alone = set(sys.modules)
import hf_gem
from hf_gem import *
added = {name.split(".")[0] for name in set(sys.modules) - alone}
import transformers, timm
first = check()
hf_gem.unregister()
gone = [name in transformers.activations.ACT2FN for name in ("gem", "gelu")]
print(json.dumps([sorted(added), first, gone]))
"""

BEFORE_TORCH = """
import hf_gem
loaded = "torch" in sys.modules
print(json.dumps([loaded, check()]))
"""

AFTER = """
import transformers, timm
import transformers.models.gpt2.modeling_gpt2
from transformers.activations import ACT2CLS, ACT2FN
import hf_gem
print(json.dumps([check(), type(ACT2FN["gem_n2"]).__name__]))
"""

UNREGISTERED = """
import hf_gem
hf_gem.unregister()
import transformers.activations, timm.layers.create_act
later = "gem" in transformers.activations.ACT2FN, "gem" in timm.layers.create_act._ACT_LAYER_DEFAULT
hf_gem.register()
print(json.dumps([later, check()]))
"""

EXPECTED = ["GEM", "EGEM", "SEGEM", True, "gem_n2", "gem"]


def run(script):
    """The last line a fresh interpreter prints, as JSON; the order of imports cannot be tested in this one."""
    command = [sys.executable, "-c", "import json, sys\n" + CHECKS + script]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_hf_gem_first():
    added, checked, gone = run(BEFORE)
    assert "hf_gem" in added
    assert not {"transformers", "timm", "accelerate", "datasets", "matplotlib", "numpy.testing"} & set(added)
    assert checked == EXPECTED
    assert gone == [False, True]


def test_hf_gem_before_torch():
    assert run(BEFORE_TORCH) == [False, EXPECTED]


def test_hf_gem_last():
    assert run(AFTER) == [EXPECTED, "GEM"]


def test_unregistered_before_the_import():
    assert run(UNREGISTERED) == [[False, False], EXPECTED]


def test_register_twice_is_register_once():
    before = state()
    hf_gem.register()
    assert state() == before
    assert activations.ACT2FN is sys.modules["transformers.activations"].ACT2FN


def test_unregister_takes_everything_back():
    registered = state()
    hf_gem.unregister()
    bare = state()
    assert bare != registered
    assert [kind.__module__.split(".")[0] for kind, _ in bare[:6]] == ["transformers", *["builtins"] * 5]
    assert not [method for method in bare[6:] if method in registered]
    assert "gem" not in activations.ACT2FN
    with pytest.raises(KeyError):
        activations.ACT2FN["gem"]
    with pytest.raises(KeyError):
        create_act.get_act_layer("gem")
    hf_gem.unregister()
    assert state() == bare
    hf_gem.register()
    hf_gem.unregister()
    assert state() == bare
    hf_gem.register()
    assert [type(activations.ACT2FN["gem"]), type(create_act.create_act_layer("gem"))] == [hf_gem.GEM, hf_gem.GEM]


def registries():
    return {
        "transformers.activations.ACT2FN": activations.ACT2FN,
        "transformers.activations.ACT2CLS": activations.ACT2CLS,
        **{f"timm.layers.create_act.{name}": getattr(create_act, name) for name in TIMM_DICTS},
    }


@pytest.mark.parametrize("where", list(registries()))
@pytest.mark.parametrize("name", ["gem_n2", "egem_eps0.5"])
def test_a_taken_name_is_left_alone(where, name):
    hf_gem.unregister()
    registries()[where][name] = nn.Identity
    try:
        with pytest.raises(ValueError, match="does not overwrite it") as error:
            hf_gem.register()
        assert f"{where}[{name!r}]" in str(error.value)
        assert "Identity" in str(error.value)
        assert dict.__getitem__(registries()[where], name) is nn.Identity
    finally:
        del registries()[where][name]
    hf_gem.register()
    assert isinstance(activations.ACT2FN["gem_n2"], hf_gem.GEM)


def test_a_name_that_only_looks_like_ours_is_no_conflict():
    hf_gem.unregister()
    activations.ACT2FN["gemma_gelu"] = nn.Identity
    try:
        hf_gem.register()
        assert isinstance(activations.ACT2FN["gemma_gelu"], nn.Identity)
    finally:
        del activations.ACT2FN["gemma_gelu"]


def test_a_library_without_the_method_is_warned_about_once_and_left_alone():
    module = ModuleType("some_library")
    module.Config = type("Config", (), {})
    install, uninstall = patch("Config.__post_init__", lambda original, self: None, "no sums")
    with pytest.warns(
        UserWarning, match=r"not find some_library\.Config\.__post_init__ in the installed version: no sums"
    ):
        install(module)
    assert not hasattr(module.Config, "__post_init__")
    uninstall(module)
    with pytest.warns(UserWarning, match=r"some_library\.Model\.forward"):
        patch("Model.forward", lambda original, self: None, "no sums")[0](module)


def test_a_method_patch_wraps_once_and_unwraps():
    class Model:
        def forward(self, x, scale=1):
            """Doubles."""
            return 2 * x * scale

    module, original = ModuleType("some_library"), Model.forward
    module.Model = Model
    install, uninstall = patch("Model.forward", lambda original, self, *a, **k: original(self, *a, **k) + 1, "no sums")
    for _ in range(2):
        install(module)
        assert Model().forward(3, scale=2) == 13
    assert Model.forward.__doc__ == "Doubles."
    for _ in range(2):
        uninstall(module)
        assert Model.forward is original


def test_a_function_patch_reaches_where_it_was_imported_to(monkeypatch):
    def build(x, scale=1):
        """Doubles."""
        return 2 * x * scale

    library, importer = ModuleType("some_library"), ModuleType("some_importer")
    library.build = importer.build = build
    monkeypatch.setitem(sys.modules, "some_importer", importer)
    install, uninstall = patch("build", lambda original, *a, **k: original(*a, **k) + 1, "no sums")
    for _ in range(2):
        install(library)
        assert library.build is importer.build
        assert importer.build(3, scale=2) == 13
    assert importer.build.__doc__ == "Doubles."
    kept = importer.build
    for _ in range(2):
        uninstall(library)
        assert library.build is importer.build is build
    assert kept(3) == 6
    with pytest.warns(UserWarning, match=r"hf_gem did not find some_library\.sum in the installed version: no sums"):
        patch("sum", build, "no sums")[0](library)


def test_a_function_patch_under_that_of_somebody_else_goes_quiet():
    library, original = ModuleType("some_library"), abs
    library.build = original
    install, uninstall = patch("build", lambda original, x: original(x) + 1, "no sums")
    install(library)
    ours = library.build

    def theirs(x):
        return ours(x)

    library.build = theirs
    uninstall(library)
    assert library.build is theirs
    assert theirs(-3) == 3
    install(library)
    assert theirs(-3) == 4


def test_every_file_is_imported_after_its_library():
    """The table of hooks.py names the library of each module that a file hooks into."""
    files = [path for path in Path(hooks.__file__).parent.glob("*.py") if "\nINSTALLERS:" in path.read_text()]
    assert len(files) > 5
    for path in files:
        for module in importlib.import_module(f"hf_gem.integrations.{path.stem}").INSTALLERS:
            libraries = [library for library, names in hooks._FILES.items() if path.stem in names]
            assert any(f"{module}.".startswith(f"{library}.") for library in libraries), module
