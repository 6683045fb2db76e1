"""Classifiers by name: one activation everywhere or an error, new last layers, sizes of images."""

import pytest
import torch
from transformers import AutoModelForImageClassification, ResNetConfig, ViTConfig
from transformers.initialization import guard_torch_init_functions

from hf_gem.files import shown
from hf_gem.training.classifiers import (
    input_size,
    last_layer,
    load_classifier,
    new_classifier,
    replace_activations,
)
from hf_gem.training.errors import ConfigError
from hf_gem.training.image_models import ConvNetConfig, ConvNetForImageClassification

CLASSES = ["a", "b"]
CONFIGS = {
    "resnet": ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"),
    "vit": ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8),
}
NO_ACTIVATIONS = ConvNetConfig(widths=(4,), hidden_act="linear")


@pytest.mark.parametrize(
    ("model", "act", "left"),
    [
        ("resnet", "gelu", r"reach 2 .* 2 x relu at resnet\.\S+activation"),
        ("timm/seresnet18", "gelu", "reach 8 .* 8 x relu"),
        ("timm/mobilenetv3_small_050", "silu", "reach 14 .* 14 x relu"),
        *[
            (name, "relu", None)
            for name in ("resnet", "timm/seresnet18", "timm/resnet18", "timm/mobilenetv3_small_050")
        ],
        *[("timm/resnet18", "gelu", None), ("vit", "quick_gelu", None)],
    ],
)
def test_a_stock_activation_is_everywhere_or_refused(tmp_path, model, act, left):
    """An arm of the family has its activation everywhere; one of another has to have it in the same places."""
    if model in CONFIGS:
        CONFIGS[model].save_pretrained(tmp_path)
        model = str(tmp_path)
    if left is None:
        new_classifier(model, act, CLASSES)
        return
    with pytest.raises(ConfigError, match=f"--hidden_act {act} does not {left}.*or a --model that uses it everywhere"):
        new_classifier(model, act, CLASSES)


def test_a_model_without_activations_is_an_error(tmp_path):
    NO_ACTIVATIONS.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot use --hidden_act egem in --model .*has no activation modules"):
        new_classifier(str(tmp_path), "egem", CLASSES)
    with pytest.raises(ConfigError, match=r"egem in --model 'x': .*has no activation modules.*\. Do this\."):
        replace_activations(ConvNetForImageClassification(NO_ACTIVATIONS), "x", "egem", fix="Do this.")


def test_what_is_no_model_is_an_error(tmp_path):
    for call in (
        lambda: new_classifier(str(tmp_path), "egem", CLASSES),
        lambda: load_classifier(str(tmp_path), CLASSES, False),
        lambda: input_size(str(tmp_path)),
    ):
        with pytest.raises(ConfigError, match=rf"cannot (build|load) --model {shown(str(tmp_path))}: "):
            call()
    with pytest.raises(ConfigError, match=r"cannot build --model 'timm/resnet18\.typo': .*Check the name\."):
        input_size("timm/resnet18.typo")


def test_the_last_layer_is_kept_where_it_fits_and_new_where_not(tmp_path, capsys):
    torch.manual_seed(0)
    saved = ConvNetForImageClassification(ConvNetConfig(widths=(4,), id2label={0: "a", 1: "b"}))
    saved.save_pretrained(tmp_path)
    weight = last_layer(saved).weight
    assert torch.equal(last_layer(load_classifier(str(tmp_path), CLASSES, False)).weight, weight)
    assert "other names" not in capsys.readouterr().out
    assert torch.equal(last_layer(load_classifier(str(tmp_path), ["c", "d"], False)).weight, weight)
    assert "under other names ('a' for 'c')" in capsys.readouterr().out
    assert not torch.equal(last_layer(load_classifier(str(tmp_path), CLASSES, True)).weight, weight)
    more = load_classifier(str(tmp_path), ["a", "b", "c"], False)
    assert (last_layer(more).out_features, more.config.id2label[2]) == (3, "c")
    assert isinstance(more, type(AutoModelForImageClassification.from_pretrained(tmp_path)))


def test_a_new_last_layer_while_transformers_guards_initialisation(tmp_path):
    ConvNetForImageClassification(ConvNetConfig(widths=(4,), num_labels=2)).save_pretrained(tmp_path)
    weight = last_layer(load_classifier(str(tmp_path), CLASSES, False)).weight
    with guard_torch_init_functions():  # as another thread that builds a model has it
        assert not torch.equal(last_layer(load_classifier(str(tmp_path), CLASSES, True)).weight, weight)


def test_the_size_of_images_that_a_model_is_made_for(tmp_path):
    CONFIGS["vit"].save_pretrained(tmp_path / "vit")
    CONFIGS["resnet"].save_pretrained(tmp_path / "resnet")
    assert input_size(str(tmp_path / "vit")) == 8
    assert input_size(str(tmp_path / "resnet")) is None
    assert input_size("timm/vit_tiny_patch16_384") == 384
