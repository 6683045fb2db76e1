"""What images there are, of which class, and what cannot be read."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from hf_gem.training.data.images import Rows, VisionConfig
from hf_gem.training.errors import DataError
from tests.training.data.pictures import prepare, write_folder

datasets = pytest.importorskip("datasets", reason="files are read by it")


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


def draw(*paths):
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (number, 0, 0)).save(path)


@pytest.mark.parametrize(
    "classes",
    [("bus", "freight train", "passenger train"), ("cat", "val"), ("test", "train"), ("car [1]", "test drive")],
)
def test_words_in_names_of_classes_and_images_mean_nothing(tmp_path, classes):
    folder = tmp_path / "my test [2]"
    names = ("1.png", "train bild 2.png", "test-3.png", "val.png", "5 [x].png")
    draw(*(folder / label / name for label in classes for name in names))
    draw(folder / ".thumbnails" / "1.png", folder / "__MACOSX" / "test" / "1.png")  # as systems add them
    data = prepare(tmp_path, dataset=str(folder), validation_fraction=0.2)
    assert data.classes == list(classes)
    assert len(data.train) + len(data.validation) == 5 * len(classes)


def test_folders_of_splits_have_several_names_and_may_lie_in_another(tmp_path):
    names = {"Training": 5, "val": 3, "evaluation": 2}
    draw(*(tmp_path / "set" / "images" / s / c / f"{i}.png" for s, n in names.items() for c in "ab" for i in range(n)))
    data = prepare(tmp_path, dataset=str(tmp_path / "set"), test_split="test")
    assert data.facts["num_images"] == {"train": 10, "validation": 6, "test": 4}


@pytest.mark.parametrize("stray", ["1.png", "a/more/1.png", "test/1.png"])
def test_an_image_outside_the_folder_of_a_class_is_named(tmp_path, stray):
    draw(tmp_path / "set" / stray)
    folder = tmp_path / "set" / ("train" if "test" in stray else "")
    draw(*(folder / label / f"{i}.png" for label in "ab" for i in "12"))
    with pytest.raises(DataError, match=r"the image '.*\.png' is not directly in the folder of a class.*one folder"):
        prepare(tmp_path, dataset=str(tmp_path / "set"))


def test_classes_from_a_file_of_metadata(tmp_path):
    for split in ("train", "test"):
        draw(*(tmp_path / "set" / split / f"{i}.png" for i in range(4)))
        lines = ["file_name,kind", *(f"{i}.png,{'ab'[i % 2]}" for i in range(4))]
        (tmp_path / "set" / split / "metadata.csv").write_text("\n".join(lines))
    data = prepare(tmp_path, dataset=str(tmp_path / "set"), validation_split="test")
    assert (data.classes, data.facts["num_images"]) == (["a", "b"], {"train": 4, "validation": 4})


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "nowhere/at-all-for-sure"}, "cannot read the dataset"),
        ({"label_column": "breed"}, "has no column 'breed'"),
        ({"image_column": "picture"}, "has no column 'picture'. Its columns are image, label"),
        ({"train_split": "training"}, "has no split 'training'"),
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
    with pytest.raises(DataError, match=r"cannot tell which column .* holds the label.*--label_column"):
        prepare(tmp_path, dataset=str(tmp_path / "data"))
    data = prepare(tmp_path, dataset=str(tmp_path / "data"), label_column="kind", validation_fraction=0.5)
    assert data.classes == ["a", "b"]


@pytest.mark.parametrize("kind", ["string", "int64", "ClassLabel"])
def test_every_image_needs_a_class(tmp_path, kind):
    kind = datasets.ClassLabel(names=["0", "1"]) if kind == "ClassLabel" else datasets.Value(kind)
    labels = [None if i == 7 else str(i % 2) if kind.dtype == "string" else i % 2 for i in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = {"image": [np.full((6, 6), i, np.uint8) for i in range(20)], "label": labels}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(DataError, match=r"column 'label' .* null, that are none of its 2 classes"):
        prepare(tmp_path, dataset=str(tmp_path / "data"))


def test_training_images_cover_all_classes(tmp_path):
    draw(*(tmp_path / "set" / f"{path}.png" for path in ("train/a/1", "train/b/1", "test/a/1", "test/c/1")))
    with pytest.raises(DataError, match="validation images of classes that do not occur in its split 'train'"):
        prepare(tmp_path, dataset=str(tmp_path / "set"), validation_split="test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_column": "tags"}, "column 'tags' of .* holds no classes, but List.*Name another --label_column"),
        ({"image_column": "kind"}, "column 'kind' of .* holds no images: Arrow.*Name another --image_column"),
    ],
)
def test_columns_of_other_types_are_refused(tmp_path, fields, message):
    rows = {
        "img": [np.full((6, 6), i, np.uint8) for i in range(4)],
        "tags": [[i] for i in range(4)],
        "kind": [0, 1] * 2,
    }
    features = {
        "img": datasets.Image(),
        "tags": datasets.List(datasets.Value("int64")),
        "kind": datasets.Value("int64"),
    }
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, **{"dataset": str(tmp_path / "train.parquet"), "label_column": "kind", **fields})


@pytest.mark.parametrize("resident", [True, False])
def test_an_image_that_is_cut_short_is_named(tmp_path, resident):
    folder = write_folder(tmp_path / "data")
    broken = folder / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:-30])  # the error of its reader does not name it

    def read_all():
        data = prepare(tmp_path, dataset=str(folder), resident=resident, image_size=12)
        for samples in (data.train, data.validation):
            samples.batch(np.arange(len(samples)))

    with pytest.raises(DataError, match=rf"cannot read {re.escape(str(broken))}: OSError: .*truncated"):
        read_all()


@pytest.mark.parametrize(
    ("dtype", "suffix"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif"), (np.float32, "tif")]
)
def test_more_than_8_bits_a_channel_are_refused(tmp_path, dtype, suffix):
    """Medical sets have them. Pillow's conversion to RGB makes all values above 255 white, and fractions black."""
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8)).save(path)
    with pytest.raises(DataError, match=r"image 0 of the dataset: .*its mode [IF].* 8 bits .* Scale its values"):
        Rows(lambda index: path, np.zeros(1, np.int64)).image(0)


def test_damaged_values_are_refused():
    for fields, name in (
        ({"crop_padding": -1}, "crop_padding"),
        ({"crop_pct": 0}, "crop_pct"),
        ({"image_size": 0}, "image_size"),
    ):
        with pytest.raises(ValueError, match=f"--{name} must be"):
            VisionConfig(**fields).validate()
