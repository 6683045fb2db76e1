"""Images that are decoded once are kept, cropped and flipped."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_gem.training.data import resident as data_resident
from hf_gem.training.data.images import VisionConfig, hold_out, read_splits
from hf_gem.training.data.resident import ResidentImages
from hf_gem.training.errors import DataError
from tests.training.data.pictures import NEUTRAL, prepare, write_folder


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


def test_digits_are_those_of_scikit_learn(tmp_path):
    theirs = pytest.importorskip("sklearn.datasets", reason="it has them too").load_digits()
    splits = read_splits(VisionConfig(validation_fraction=0.2))
    for name, part in hold_out(1797, {"validation": 0.2}).items():
        rows = splits.parts[name]
        assert np.array_equal(rows.labels, theirs.target[part])
        pixels = np.stack([np.asarray(rows.image(index)) for index in range(len(rows))])
        assert np.array_equal(pixels, np.round(theirs.images[part] * 255 / 16))
    assert splits.classes == [str(name) for name in theirs.target_names]


def test_resident_images_are_scaled_once(tmp_path):
    folder = write_folder(tmp_path / "data")
    data = prepare(tmp_path, dataset=str(folder), image_size=6, resident=True)
    whole = prepare(tmp_path, dataset=str(folder), resident=True)
    assert data.train.images.shape == (*whole.train.images.shape[:2], 6, 6)
    image = Image.fromarray(whole.train.images[0].permute(1, 2, 0).numpy())
    assert np.array_equal(data.train.images[0].permute(1, 2, 0), np.asarray(image.resize((6, 6), Image.BICUBIC)))


def test_splits_with_images_of_different_sizes(tmp_path):
    write_folder(tmp_path / "data" / "train")
    write_folder(tmp_path / "data" / "test", sizes=((10, 10),))
    fields = {"dataset": str(tmp_path / "data"), "validation_split": "test"}
    with pytest.raises(DataError, match=r"12 x 12 \(train\) and 10 x 10 \(validation\).*Give an --image_size, or"):
        prepare(tmp_path, **fields)
    data = prepare(tmp_path, **fields, image_size=12, resident=True)
    assert data.validation.images.shape == (20, 3, 12, 12)


@pytest.mark.parametrize("fields", [{"crop_min_scale": 0.3}, {"crop_pct": 0.5}])
def test_crops_of_other_images_are_refused(tmp_path, fields):
    (name,) = fields
    with pytest.raises(DataError, match=rf"got --{name} 0\.\d, but .* are resident.*use --resident no"):
        prepare(tmp_path, **fields)
    prepare(tmp_path, crop_min_scale=1.0, crop_pct=1.0)  # as without them


def test_grey_images_among_others(tmp_path):
    folder = write_folder(tmp_path / "data")
    Image.new("L", (12, 12), 7).save(folder / "cat" / "grey.png")
    data = prepare(tmp_path, dataset=str(folder), validation_fraction=0.1)
    assert data.train.images.shape[1] == 3


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


def test_a_set_whose_labels_have_changed_is_decoded_again(tmp_path, monkeypatch):
    """As a dataset of the Hub may, under the same name."""
    monkeypatch.setattr(data_resident, "source_state", lambda config: ["the same"])
    first = prepare(tmp_path, dataset=str(write_folder(tmp_path / "one")))
    second = prepare(tmp_path, dataset=str(write_folder(tmp_path / "two", per_class=9)))
    assert first.facts["hash"] != second.facts["hash"]
    assert len(second.train.images) == len(second.train)
