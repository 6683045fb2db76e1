"""Images become the same batches, whoever asks and in whatever pieces."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    ConvNextImageProcessor,
    PoolFormerImageProcessor,
    TimmWrapperConfig,
    TimmWrapperImageProcessor,
)

from hf_gem.training.data.decoded import DecodedImages
from hf_gem.training.data.images import Rows, VisionConfig, hold_out
from hf_gem.training.data.normalisation import Normalisation, Preprocessing
from hf_gem.training.data.resident import ResidentImages
from hf_gem.training.data.vision import image_processor, prepare_images, preprocessing_of
from tests.training.data.pictures import CPU, NEUTRAL, ROUNDED, prepare, write_folder

# Pillow and torchvision round the weights of their filters differently. Scaling the rows may so change a level by 1 and
# scaling the columns, whose weights have magnitudes of at most 1.25 in sum, by less than 2 after rounding.
_ROUNDINGS = 2.01 / 255
_HALVES = [0.5, 0.5, 0.5]
_TIMM = {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bicubic", "mean": _HALVES, "std": _HALVES}


@pytest.mark.parametrize("kind", ["resident", "decoded"])
def test_a_sample_depends_on_its_draw_and_nothing_else(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 9, 9, 3)).astype(np.uint8)
    labels = np.arange(10)
    if kind == "resident":
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        samples = ResidentImages(images, torch.from_numpy(labels), NEUTRAL, seed=5, padding=2, flip=True)
        other = ResidentImages(images, torch.from_numpy(labels), NEUTRAL, seed=6, padding=2, flip=True)
    else:
        samples = DecodedImages(Rows(pixels.__getitem__, labels), 9, NEUTRAL, seed=5, min_scale=0.3, flip=True)
        other = DecodedImages(Rows(pixels.__getitem__, labels), 9, NEUTRAL, seed=6, min_scale=0.3, flip=True)
    indices, draws = np.array([3, 3, 7, 3]), np.array([0, 1, 2, 40])
    whole = samples.batch(indices, draws)
    for k in range(4):
        part = samples.batch(indices[k : k + 1], draws[k : k + 1])
        assert torch.equal(part["pixel_values"][0], whole["pixel_values"][k])
    assert not torch.equal(whole["pixel_values"][0], whole["pixel_values"][1])
    assert not torch.equal(whole["pixel_values"], other.batch(indices, draws)["pixel_values"])
    plain = samples.batch(np.arange(10))
    exact = torch.from_numpy(pixels / 255).permute(0, 3, 1, 2)
    torch.testing.assert_close(plain["pixel_values"], exact.float(), rtol=0, atol=ROUNDED)
    assert plain["labels"].tolist() == list(range(10))


@pytest.mark.parametrize("decoded", [False, True])
def test_the_image_processor_does_what_evaluation_does(tmp_path, decoded):
    folder = write_folder(tmp_path / "data", sizes=((12, 12),) if not decoded else ((24, 24),))
    fields = {"image_size": 12, "crop_pct": 0.75} if decoded else {}
    data = prepare(tmp_path, dataset=str(folder), validation_fraction=0.5, resident=not decoded, **fields)
    processor = image_processor(data)
    wanted = data.validation.batch(np.arange(4))["pixel_values"]
    chosen = hold_out(20, {"validation": 0.5})["validation"][:4]
    files = sorted((folder / "cat").glob("*.png")) + sorted((folder / "dog").glob("*.png"))
    got = processor([Image.open(files[i]) for i in chosen], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(got, wanted, rtol=0, atol=_ROUNDINGS / min(data.normalisation.std))


@pytest.mark.parametrize("size", [(500, 400), (400, 523), (301, 301)])
@pytest.mark.parametrize(
    ("processor", "resized"),
    [
        (ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875), {"shortest_edge": 256}),
        (ConvNextImageProcessor(size={"shortest_edge": 160}, crop_pct=0.88), {"shortest_edge": 181}),
        (ConvNextImageProcessor(size={"shortest_edge": 384}, crop_pct=1.0), {"height": 384, "width": 384}),
        (ConvNextImageProcessor(size={"shortest_edge": 400}, crop_pct=0.875), {"height": 400, "width": 400}),
        (PoolFormerImageProcessor(), {"shortest_edge": 248}),
        (BitImageProcessor(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}), {"shortest_edge": 72}),
        (TimmWrapperImageProcessor(pretrained_cfg=_TIMM), {"shortest_edge": 248}),
    ],
)
def test_evaluation_prepares_images_as_the_checkpoint_does(tmp_path, processor, resized, size):
    folder = write_folder(tmp_path / "data", sizes=(size,), per_class=2)
    if isinstance(processor, TimmWrapperImageProcessor):  # its model saves it
        TimmWrapperConfig(architecture="resnet18", pretrained_cfg=_TIMM).save_pretrained(tmp_path / "model")
    else:
        processor.save_pretrained(tmp_path / "model")
    config = VisionConfig(cache_dir=str(tmp_path / "cache"), dataset=str(folder), validation_fraction=0.25)
    data = prepare_images(config, 0, CPU, preprocessing_of(str(tmp_path / "model")))
    (chosen,) = hold_out(4, {"validation": 0.25})["validation"]
    image = Image.open(sorted(folder.rglob("*.png"))[chosen])
    wanted = processor(image, return_tensors="pt")["pixel_values"]
    bound = {"rtol": 0, "atol": _ROUNDINGS / min(data.normalisation.std)}
    torch.testing.assert_close(data.validation.batch(np.arange(1))["pixel_values"], wanted, **bound)
    saved = image_processor(data)
    assert saved.size == resized
    torch.testing.assert_close(saved(image, return_tensors="pt")["pixel_values"], wanted, **bound)


@pytest.mark.parametrize("size", [(36, 12), (12, 36), (36, 36)])
def test_images_of_any_shape_are_squared_by_scaling_in_all_three_places(tmp_path, size):
    """Resident images, the processor that is saved with the model, and images that are decoded for that model."""
    folder = write_folder(tmp_path / "data", sizes=(size,))
    fields = {"dataset": str(folder), "validation_fraction": 0.5}
    data = prepare(tmp_path, **fields, resident=True, image_size=12)
    indices = np.arange(len(data.validation))
    wanted = data.validation.batch(indices)["pixel_values"]

    image_processor(data).save_pretrained(tmp_path / "model")
    files = sorted((folder / "cat").glob("*.png")) + sorted((folder / "dog").glob("*.png"))
    images = [Image.open(files[i]) for i in hold_out(20, {"validation": 0.5})["validation"]]
    got = AutoImageProcessor.from_pretrained(tmp_path / "model")(images, return_tensors="pt")["pixel_values"]
    bound = _ROUNDINGS / min(data.normalisation.std)
    torch.testing.assert_close(got, wanted, rtol=0, atol=bound)

    config = VisionConfig(cache_dir=str(tmp_path / "cache"), **fields, resident=False)
    decoded = prepare_images(config, 0, CPU, preprocessing_of(str(tmp_path / "model")))
    torch.testing.assert_close(decoded.validation.batch(indices)["pixel_values"], wanted, rtol=0, atol=bound)
    assert image_processor(decoded).size == image_processor(data).size
    trained = decoded.train.batch(np.arange(10), np.arange(10))["pixel_values"]  # without random crops
    torch.testing.assert_close(trained, data.train.batch(np.arange(10))["pixel_values"], rtol=0, atol=bound)


def test_what_a_model_says_is_what_it_gets(tmp_path):
    folder = write_folder(tmp_path / "data")
    own = Preprocessing(Normalisation((0.5,) * 3, (0.5,) * 3), 24, 0.8)
    config = VisionConfig(cache_dir=str(tmp_path / "cache"), dataset=str(folder))
    data = prepare_images(config, 0, CPU, own)
    assert isinstance(data.train, DecodedImages)  # 12 pixels have to become 24
    assert (data.image_size, data.validation.crop_pct, data.normalisation.mean) == (24, 0.8, (0.5,) * 3)
