"""Images become the same batches, whoever asks and in whatever pieces."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_gem.training.data import resident as data_resident
from hf_gem.training.data.decoded import DecodedImages
from hf_gem.training.data.images import Rows, VisionConfig, hold_out
from hf_gem.training.data.normalisation import Normalisation, Preprocessing
from hf_gem.training.data.resident import ResidentImages
from hf_gem.training.data.vision import image_processor, prepare_images
from hf_gem.training.errors import DataError

CPU = torch.device("cpu")
NEUTRAL = Normalisation((0, 0, 0), (1, 1, 1))
ROUNDED = 8 * torch.finfo(torch.float32).eps  # of an image in [0, 1], normalised


def prepare(tmp_path, **fields):
    return prepare_images(VisionConfig(cache_dir=str(tmp_path / "cache"), **fields), 0, CPU)


def write_folder(folder, sizes=((12, 12),), mode="RGB", per_class=10):
    """A folder of images with the number of the image in its top left pixel; returns the folder."""
    draw = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            width, height = sizes[number % len(sizes)]
            pixels = draw.integers(0, 256, (height, width, 3)).astype(np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / label / f"{number}.png")
    return folder


def test_digits(tmp_path):
    data = prepare(tmp_path, validation_fraction=0.2)
    assert (len(data.train), len(data.validation), data.image_size) == (1438, 359, 8)
    batch = data.train.batch(np.arange(1438))
    assert batch["pixel_values"].shape == (1438, 3, 8, 8)
    assert batch["labels"].bincount().min() > 100
    # The statistics are those of the pixels: what is normalised by them has mean 0 and variance 1.
    assert batch["pixel_values"].mean().abs() < 1e-5
    assert batch["pixel_values"].var(correction=0) == pytest.approx(1, abs=1e-4)
    assert data.facts["num_images"] == {"train": 1438, "validation": 359}
    assert prepare(tmp_path, validation_fraction=0.2).facts == data.facts


def test_an_image_folder_with_splits(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path / "data" / split)
    data = prepare(tmp_path, dataset=str(tmp_path / "data"), validation_split="test")
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.validation), data.facts["held_out"]) == (20, 20, "split")
    stored = np.asarray(Image.open(tmp_path / "data" / "test" / "dog" / "3.png")) / 255
    dogs = [i for i in range(20) if data.validation.batch(np.array([i]))["labels"] == 1]
    got = data.validation.batch(np.array(dogs))["pixel_values"]
    expected = (stored - data.normalisation.mean) / data.normalisation.std
    assert min(np.abs(image.permute(1, 2, 0).numpy() - expected).max() for image in got) < 1e-5


@pytest.mark.parametrize("suffix", [".PNG", ".JPG", ".Jpeg"])
@pytest.mark.parametrize("split", ["", "test"])
def test_names_in_capitals_are_images_too(tmp_path, suffix, split):
    for path in write_folder(tmp_path / "data" / split, per_class=6).rglob("*.png"):
        Image.open(path).save(path.with_suffix(suffix))
        path.unlink()
    data = prepare(tmp_path, dataset=str(tmp_path / "data"), train_split=split or "train", validation_fraction=0.25)
    assert (data.classes, len(data.train), len(data.validation)) == (["cat", "dog"], 9, 3)
    assert data.train.batch(np.arange(9))["pixel_values"].shape == (9, 3, 12, 12)


def test_parquet_with_columns_of_any_name(tmp_path):
    images = [np.full((6, 6), i, np.uint8) for i in range(20)]
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.Value("string")})
    rows = {"img": images, "kind": ["even" if i % 2 == 0 else "odd" for i in range(20)]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    data = prepare(tmp_path, dataset=str(tmp_path / "data"), validation_fraction=0.25)
    assert (data.classes, len(data.train), len(data.validation)) == (["even", "odd"], 15, 5)
    assert data.facts["held_out"] == "random"
    for samples in (data.train, data.validation):
        batch = samples.batch(np.arange(len(samples)))
        values = batch["pixel_values"][:, 0, 0, 0] * data.normalisation.std[0] + data.normalisation.mean[0]
        assert torch.equal((values * 255).round().long() % 2, batch["labels"])


def test_images_of_many_sizes_are_decoded_when_needed(tmp_path):
    folder = write_folder(tmp_path / "data", sizes=((20, 14), (9, 30)), mode="L")
    data = prepare(tmp_path, dataset=str(folder), image_size=8, validation_fraction=0.2, crop_min_scale=0.3)
    assert isinstance(data.train, DecodedImages)
    batch = data.train.batch(np.arange(4), np.arange(4))
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    with pytest.raises(DataError, match=r"have 2 shapes, .* use --resident no"):
        prepare(tmp_path, dataset=str(folder), resident=True)
    with pytest.raises(DataError, match="--crop_padding 2 is for resident images"):
        prepare(tmp_path, dataset=str(folder), crop_padding=2)


def test_grey_images_among_others(tmp_path):
    folder = write_folder(tmp_path / "data")
    Image.new("L", (12, 12), 7).save(folder / "cat" / "grey.png")
    data = prepare(tmp_path, dataset=str(folder), validation_fraction=0.1)
    assert data.train.images.shape[1] == 3


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


def test_crops_are_windows_of_the_padded_image_and_all_are_drawn():
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    samples = ResidentImages(image, torch.zeros(1, dtype=torch.int64), NEUTRAL, padding=1, flip=True)
    padded = torch.nn.functional.pad(image[0, 0], [1] * 4)
    windows = {
        tuple(window.flatten().tolist()): (top, left, flipped)
        for top in range(3)
        for left in range(3)
        for flipped in (False, True)
        for window in [(padded[top : top + 4, left : left + 4]).flip([1] if flipped else [])]
    }
    drawn = samples.batch(np.zeros(2000, np.int64), np.arange(2000))["pixel_values"]
    found = [windows[tuple((crop[0] * 255).round().long().flatten().tolist())] for crop in drawn]
    counts = np.unique(np.array(found), axis=0, return_counts=True)[1]
    assert len(counts) == 18
    assert counts.min() > 2000 / 18 - 5 * (2000 / 18) ** 0.5  # five standard deviations


def test_random_crops_have_the_areas_and_shapes_asked_for():
    samples = DecodedImages(Rows(lambda _: np.zeros((60, 80), np.uint8), np.zeros(1)), 8, NEUTRAL, min_scale=0.2)
    random = np.random.default_rng(0).random((2000, 5))
    boxes = np.array([samples._box(80, 60, row) for row in random])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes[:, :2].min() >= 0
    assert boxes[:, 2].max() <= 80 + 1e-9
    assert boxes[:, 3].max() <= 60 + 1e-9
    inside = (wide < 80) & (high < 60)
    share = (wide * high / 4800)[inside]
    assert 0.2 <= share.min() < 0.22
    ratio = (wide / high)[inside]
    assert 0.75 - 1e-9 <= ratio.min() < 0.77
    assert 1.3 < ratio.max() <= 4 / 3 + 1e-9
    assert samples._box(80, 60, None) == (10.0, 0.0, 70.0, 60.0)  # the middle square


@pytest.mark.parametrize("decoded", [False, True])
def test_the_image_processor_does_what_evaluation_does(tmp_path, decoded):
    folder = write_folder(tmp_path / "data", sizes=((12, 12),) if not decoded else ((24, 24),))
    fields = {"image_size": 12, "crop_pct": 0.75} if decoded else {}
    data = prepare(tmp_path, dataset=str(folder), validation_fraction=0.5, resident=not decoded, **fields)
    processor = image_processor(data)
    wanted = data.validation.batch(np.arange(4))["pixel_values"]
    chosen = np.flatnonzero(hold_out(20, 0.5))[:4]
    files = sorted((folder / "cat").glob("*.png")) + sorted((folder / "dog").glob("*.png"))
    got = processor([Image.open(files[i]) for i in chosen], return_tensors="pt")["pixel_values"]
    # A resize of the whole and a crop of it, against a resize of the crop: the same but at the edges.
    bound = 1e-5 if not decoded else 0.35
    assert (got - wanted).abs().mean() <= bound


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "nowhere/at-all-for-sure"}, "cannot be read"),
        ({"label_column": "breed"}, "has no column 'breed'"),
        ({"image_column": "picture"}, "has no column 'picture'; its columns are image, label"),
        ({"train_split": "training"}, "has no split 'training'"),
        ({"image_size": 9, "resident": True}, "resident ones are not scaled, to 9"),
    ],
)
def test_what_cannot_be_read_is_explained(tmp_path, monkeypatch, fields, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fields = {"dataset": str(write_folder(tmp_path / "data")), **fields}
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, **fields)


def test_a_column_of_labels_is_not_guessed(tmp_path):
    rows = {"img": [np.full((6, 6), i, np.uint8) for i in range(4)], "id": list(range(4)), "kind": list("abab")}
    features = {"img": datasets.Image(), "id": datasets.Value("int64"), "kind": datasets.Value("string")}
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(DataError, match=r"which column .* is the label cannot be told .*name --label_column"):
        prepare(tmp_path, dataset=str(tmp_path / "data"))
    data = prepare(tmp_path, dataset=str(tmp_path / "data"), label_column="kind", validation_fraction=0.5)
    assert data.classes == ["a", "b"]


@pytest.mark.parametrize("resident", [True, False])
def test_a_file_that_is_no_image(tmp_path, resident):
    folder = write_folder(tmp_path / "data")
    (folder / "cat" / "3.png").write_text("no image")

    def read_all():
        data = prepare(tmp_path, dataset=str(folder), resident=resident, image_size=12)
        for samples in (data.train, data.validation):
            samples.batch(np.arange(len(samples)))

    with pytest.raises(DataError, match="of the dataset cannot be read: UnidentifiedImageError"):
        read_all()


def test_a_set_whose_labels_have_changed_is_decoded_again(tmp_path, monkeypatch):
    """As a dataset of the Hub may, under the same name."""
    monkeypatch.setattr(data_resident, "source_state", lambda config: ["the same"])
    first = prepare(tmp_path, dataset=str(write_folder(tmp_path / "one")))
    second = prepare(tmp_path, dataset=str(write_folder(tmp_path / "two", per_class=9)))
    assert first.facts["hash"] != second.facts["hash"]
    assert len(second.train.images) == len(second.train)


def test_what_a_model_says_is_what_it_gets(tmp_path):
    folder = write_folder(tmp_path / "data")
    own = Preprocessing(Normalisation((0.5,) * 3, (0.5,) * 3), 24, 0.8)
    config = VisionConfig(cache_dir=str(tmp_path / "cache"), dataset=str(folder))
    data = prepare_images(config, 0, CPU, own)
    assert isinstance(data.train, DecodedImages)  # 12 pixels have to become 24
    assert (data.image_size, data.validation.crop_pct, data.normalisation.mean) == (24, 0.8, (0.5,) * 3)


def test_damaged_values_are_refused():
    for fields, name in (
        ({"crop_padding": -1}, "crop_padding"),
        ({"crop_pct": 0}, "crop_pct"),
        ({"image_size": 0}, "image_size"),
    ):
        with pytest.raises(ValueError, match=f"--{name} must be"):
            VisionConfig(**fields).validate()
