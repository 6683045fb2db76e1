"""Images as arrays, in a file as that of Keras' MNIST."""

import numpy as np
import pytest

from hf_gem.training.errors import DataError
from tests.training.data.pictures import prepare

DRAW = np.random.default_rng(0)
LABELS = np.arange(40) % 4 + 3  # classes need not count from 0


def images(count=40, *channels):
    return DRAW.integers(0, 256, (count, 6, 6, *channels)).astype(np.uint8)


def write(path, **arrays):
    np.savez(path, **{"x_train": images(), "y_train": LABELS, **arrays})
    return str(path)


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
@pytest.mark.parametrize("column", [False, True])  # as in Keras' CIFAR-10
def test_all_images_and_their_classes(tmp_path, channels, column):
    x, y = images(40, *channels), LABELS[:, None] if column else LABELS
    file = write(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    data = prepare(tmp_path, dataset=file, validation_split="test")
    assert data.classes == ["3", "4", "5", "6"]
    assert data.facts["num_images"] == {"train": 40, "validation": 8}
    assert (data.facts["held_out"], data.facts["on_hub"]) == ("split", False)
    for samples in (data.train, data.validation):
        batch = samples.batch(np.arange(len(samples)))
        assert batch["labels"].tolist() == (LABELS[: len(samples)] - 3).tolist()
        pixels = (
            batch["pixel_values"].permute(0, 2, 3, 1).numpy() * data.normalisation.std + data.normalisation.mean
        ) * 255
        assert np.array_equal(
            pixels.round(), np.broadcast_to(x[: len(samples)].reshape(-1, 6, 6, *channels or (1,)), pixels.shape)
        )


@pytest.mark.parametrize("value", [0, 93, 255])
def test_a_constant_channel_becomes_zero(tmp_path, value):
    """Microscopy with two colours has one."""
    x = images(40, 3)
    x[..., 2] = value
    pixels = prepare(tmp_path, dataset=write(tmp_path / "a.npz", x_train=x)).train.batch(np.arange(20))["pixel_values"]
    assert pixels[:, 2].abs().max() <= 2**-23  # the mean is rounded to float32
    assert pixels[:, :2].std() > 0.5


def test_without_a_validation_split_some_are_held_out(tmp_path):
    data = prepare(tmp_path, dataset=write(tmp_path / "a.npz"), validation_fraction=0.25)
    assert (len(data.train), len(data.validation), data.facts["held_out"]) == (30, 10, "random")


def test_images_for_a_test_are_others(tmp_path):
    x = images()
    file = write(tmp_path / "a.npz", x_train=x, x_test=x[:8], y_test=LABELS[:8])
    data = prepare(tmp_path, dataset=file, validation_fraction=0.25, test_fraction=0.2)
    assert data.facts["num_images"] == {"train": 22, "validation": 10, "test": 8}
    parts = [part.batch(np.arange(len(part)))["pixel_values"] for part in (data.train, data.validation, data.test)]
    assert len({image.numpy().tobytes() for part in parts for image in part}) == 40
    data = prepare(tmp_path, dataset=file, validation_fraction=0.25, test_split="test")
    assert data.facts["num_images"] == {"train": 30, "validation": 10, "test": 8}
    assert data.test.batch(np.arange(8))["units"].tolist() == list(range(8))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": images().astype(np.float32)}, "float32 images of shape .40, 6, 6. .* Images must be uint8"),
        ({"x_train": images(40, 2)}, "1 or 3 channels"),
        ({"y_train": LABELS[:7]}, "7 classes"),
        ({"x_validation": images(2), "y_validation": np.array([3, 9])}, "classes .* not occur in its split 'train'"),
        (
            {"x_validation": images(0), "y_validation": LABELS[:0]},
            "few validation images: 40 train, 0 validation. .*Add",
        ),
        ({"x_train": images(0), "y_train": LABELS[:0]}, "few train images: 0 train, 0 validation"),
        ({"x_train": images(1), "y_train": LABELS[:1]}, "few train images: 0 train, 1 validation"),
        ({"x_train": images()[:, :0, :0]}, "uint8 images of shape .40, 0, 0. .*not 0 x 0"),
        ({"x_test": images(2)}, "y_test.*It must hold the arrays x_train, y_train"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, dataset=write(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize("resident", [True, False])
def test_an_empty_test_split_is_no_test(tmp_path, resident):
    file = write(tmp_path / "a.npz", x_test=images(0), y_test=LABELS[:0])
    with pytest.raises(DataError, match=r"too few test images: .* 0 test\. .* or name another --test_split"):
        prepare(tmp_path, dataset=file, test_split="test", resident=resident)


def test_files_and_splits_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"cannot read nowhere.npz: "):
        prepare(tmp_path, dataset="nowhere.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK no such thing")
    with pytest.raises(DataError, match=r"cannot read .*bad.npz: "):
        prepare(tmp_path, dataset=str(tmp_path / "bad.npz"))
    with pytest.raises(DataError, match=r"has no array 'x_fit'. Its splits are train.*--train_split"):
        prepare(tmp_path, dataset=write(tmp_path / "a.npz"), train_split="fit")
