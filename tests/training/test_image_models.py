"""The image models are those of the papers, and survive saving."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

import hf_gem
from hf_gem.training.image_models import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    ConvNetConfig,
    ConvNetForImageClassification,
)


def resnet(**fields):
    torch.manual_seed(0)
    return CifarResNetForImageClassification(CifarResNetConfig(**{"depth": 8, "num_labels": 10, **fields}))


# He et al. 2016, table 6, in millions of parameters.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_residual_networks_have_the_published_sizes(depth, millions):
    model = resnet(depth=depth)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == depth
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.05 if depth > 100 else 0.005
    )


@pytest.mark.parametrize("act_after_add", ["same", "none"])
def test_the_published_network_by_hand(act_after_add):
    """Layer for layer, with the shortcut of option A written out, and without the activations behind the additions."""
    model = resnet(act_after_add=act_after_add).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    x = images = torch.randn(2, 3, 32, 32)
    x = model.bn(model.conv(x)).relu()
    for block, (width, stride) in zip(model.blocks, ((16, 1), (32, 2), (64, 2)), strict=True):
        shortcut = x.new_zeros(2, width, x.shape[-1] // stride, x.shape[-1] // stride)
        shortcut[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
        x = shortcut + block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
        x = x.relu() if act_after_add == "same" else x
    expected = model.classifier(x.mean((2, 3)))
    torch.testing.assert_close(model(images).logits, expected)
    assert model(images, labels=torch.tensor([1, 2])).loss == nn.functional.cross_entropy(
        expected, torch.tensor([1, 2])
    )


def test_filters_have_the_gain_asked_for():
    for gain in (2**0.5, 3.0):
        plain = ConvNetForImageClassification(ConvNetConfig(widths=(64, 128), initializer_gain=gain))
        for model, fan in ((resnet(width=64, initializer_gain=gain), 0), (plain, 1)):
            for filters in (m.weight for m in model.modules() if isinstance(m, nn.Conv2d)):
                inputs = filters.shape[fan] * 9
                spread = 5 / (2 * filters.numel()) ** 0.5  # five standard deviations of a sample's
                assert filters.std().item() * inputs**0.5 == pytest.approx(gain, rel=spread)


def test_every_activation_is_the_one_asked_for():
    for model in (resnet(hidden_act="gem_n2"), ConvNetForImageClassification(ConvNetConfig(hidden_act="gem_n2"))):
        audit = hf_gem.audit(model, pixel_values=torch.randn(1, 3, 16, 16))
        assert audit.complete
        assert audit.num_gem == (7 if "resnet" in model.config.model_type else 6)
    audit = hf_gem.audit(resnet(hidden_act="gem_n2", act_after_add="none"), pixel_values=torch.randn(1, 3, 16, 16))
    assert (audit.complete, audit.num_gem) == (True, 4)


def test_the_plain_network_halves_between_stages():
    model = ConvNetForImageClassification(ConvNetConfig(widths=(4, 8, 16)))
    assert model.features(torch.randn(1, 3, 28, 28)).shape == (1, 16, 7, 7)
    kinds = [type(layer).__name__ for layer in model.layers if not isinstance(layer, nn.ReLU)]
    assert kinds == ["Conv2d"] * 2 + (["MaxPool2d"] + ["Conv2d"] * 2) * 2


def small(cls):
    torch.manual_seed(0)
    sizes = {"depth": 8, "act_after_add": "none"} if cls is CifarResNetForImageClassification else {"widths": (4, 8)}
    model = cls(cls.config_class(hidden_act="egem_eps0.1", num_labels=3, **sizes)).train()
    model(torch.randn(4, 3, 8, 8))  # moves the statistics
    return model.eval()


@pytest.mark.parametrize("cls", [CifarResNetForImageClassification, ConvNetForImageClassification])
def test_saving_and_loading(tmp_path, cls):
    model, images = small(cls), torch.randn(4, 3, 8, 8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images).logits, model(images).logits)


# As one who has hf_gem and not imported this file, and then as one who has not installed it.
LOAD = """
import sys
has_it = sys.argv[1] == "True"
if not has_it:
    sys.modules["hf_gem"] = None
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
print(type(model).__module__.split(".")[0], *model(torch.ones(1, 3, 8, 8)).logits[0].tolist())
if has_it:
    import hf_gem
    hf_gem.save_for_hub(model, sys.argv[3])
"""


def test_a_checkpoint_brings_its_own_code(tmp_path):
    model = small(CifarResNetForImageClassification)
    hf_gem.save_for_hub(model, tmp_path / "one")
    for has_it, folder in ((True, "one"), (False, "two")):
        command = [sys.executable, "-c", LOAD, str(has_it), str(tmp_path / folder), str(tmp_path / "two")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        module, *logits = done.stdout.split()
        assert module == "transformers_modules"
        assert [float(x) for x in logits] == pytest.approx(model(torch.ones(1, 3, 8, 8)).logits[0].tolist(), rel=1e-5)
        assert "import hf_gem.training.image_models" in (tmp_path / folder / "README.md").read_text()


def test_what_cannot_be_behind_an_addition():
    with pytest.raises(ValueError, match="act_after_add must be 'same' or 'none', got 'relu'"):
        CifarResNetConfig(depth=8, act_after_add="relu")


@pytest.mark.parametrize("depth", [7, 21, 2])
def test_a_depth_that_is_none(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2, such as 20, 56 or 110, got {depth}"):
        CifarResNetConfig(depth=depth)
