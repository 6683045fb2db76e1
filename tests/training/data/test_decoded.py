"""Images that are decoded for each batch are cropped as asked for."""

from dataclasses import replace

import numpy as np
import pytest

from hf_gem.training.data.decoded import DecodedImages
from hf_gem.training.data.images import Rows
from hf_gem.training.errors import DataError
from tests.training.data.pictures import NEUTRAL, prepare, write_folder


def test_images_of_many_sizes_are_decoded_when_needed(tmp_path):
    folder = write_folder(tmp_path / "data", sizes=((20, 14), (9, 30)), mode="L")
    data = prepare(tmp_path, dataset=str(folder), image_size=8, validation_fraction=0.2, crop_min_scale=0.3)
    assert isinstance(data.train, DecodedImages)
    batch = data.train.batch(np.arange(4), np.arange(4))
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    with pytest.raises(DataError, match=r"have 2 shapes, .* Give an --image_size, or use --resident no"):
        prepare(tmp_path, dataset=str(folder), resident=True)
    with pytest.raises(DataError, match=r"got --crop_padding 2.*only works with resident images"):
        prepare(tmp_path, dataset=str(folder), crop_padding=2)


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
    whole = replace(samples, min_scale=1.0)
    assert whole._box(80, 60, random[0]) == (10.0, 0.0, 70.0, 60.0)  # the middle square
    assert replace(whole, squash=True)._box(80, 60, random[0]) == (0.0, 0.0, 80.0, 60.0)
