"""The network from coordinates to a field starts as it says, and survives saving."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModel

import hf_gem
from hf_gem.training.coordinate_models import CoordinateMLPConfig, CoordinateMLPModel
from tests.helpers import run_python

POINTS = torch.tensor([[-1.0, 0.0], [0.25, 0.5], [1.0, 1.0]])


def build(**fields):
    torch.manual_seed(0)
    return CoordinateMLPModel(CoordinateMLPConfig(**{"lower": (-1, 0), "upper": (1, 1), "hidden_size": 8, **fields}))


def test_the_network_by_hand():
    model = build(num_hidden_layers=2, hidden_act="gem_n2")
    # a coordinate that is uniform on an interval of length L has the standard deviation L / sqrt(12)
    x = torch.stack([POINTS[:, 0] * math.sqrt(3), (POINTS[:, 1] - 0.5) * math.sqrt(12)], -1)
    first, _, second, _ = model.layers
    for layer in (first, second):
        x = hf_gem.gem(x @ layer.weight.T + layer.bias, n=2)
    expected = x @ model.head.weight[0] + model.head.bias
    assert model(POINTS).field.shape == (3,)
    torch.testing.assert_close(model(POINTS).field, expected)


@pytest.mark.parametrize("gain", [1.0, 1.7])
def test_weights_have_the_gain_asked_for_and_the_first_layer_none(gain):
    model = build(hidden_size=400, initializer_gain=gain)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [layer.in_features for layer in linear] == [2, 400, 400, 400]
    for layer, expected in zip(linear, (1, gain, gain, gain), strict=True):
        spread = 5 / (2 * layer.weight.numel()) ** 0.5  # five standard deviations of a sample's
        assert layer.weight.std().item() * layer.in_features**0.5 == pytest.approx(expected, rel=spread)
        assert not layer.bias.any()


def test_every_activation_is_the_one_asked_for():
    audit = hf_gem.audit(build(hidden_act="segem_eps1"), points=POINTS)
    assert audit.complete
    assert audit.num_gem == 3


def test_saving_and_loading(tmp_path):
    model = build(hidden_act="tanh")
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, CoordinateMLPModel)
    assert torch.equal(loaded(POINTS).field, model(POINTS).field)


# As one who has hf_gem and not imported this file, and then as one who has not installed it.
LOAD = """
import sys
has_it = sys.argv[1] == "True"
if not has_it:
    sys.modules["hf_gem"] = None
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True)
print(type(model).__module__.split(".")[0], *model(torch.tensor([[0.25, 0.5]])).field.tolist())
if has_it:
    import hf_gem
    hf_gem.save_for_hub(model, sys.argv[3])
"""


def test_a_checkpoint_brings_its_own_code(tmp_path):
    model = build(hidden_act="egem_eps0.1")
    hf_gem.save_for_hub(model, tmp_path / "one")
    for has_it, folder in ((True, "one"), (False, "two")):
        done = run_python("-c", LOAD, has_it, tmp_path / folder, tmp_path / "two")
        assert done.returncode == 0, done.stderr
        module, value = done.stdout.split()
        assert module == "transformers_modules"
        assert float(value) == pytest.approx(model(POINTS[1:2]).field.item(), rel=1e-5)
        assert (tmp_path / folder / "gem_coordinate_models.py").exists()
        assert "import hf_gem.training.coordinate_models" in (tmp_path / folder / "README.md").read_text()


@pytest.mark.parametrize(("lower", "upper"), [((0, 0), (1, 0)), ((0,), (1, 1)), ((2, 0), (1, 1))])
def test_a_box_that_is_none(lower, upper):
    with pytest.raises(ValueError, match="upper must be above lower in every coordinate"):
        CoordinateMLPConfig(lower=lower, upper=upper)
