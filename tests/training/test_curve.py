"""The picture of a run's loss."""

import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="the picture is drawn by it")

from hf_gem.training import curve
from hf_gem.training.curve import draw_loss
from tests.training.test_loop import run
from tests.training.test_report import RECORD


def colours(path):
    with Image.open(path) as image:
        return image.size, {tuple(colour) for _, colour in image.convert("RGB").getcolors(1 << 20)}


def test_the_picture_has_two_curves(tmp_path):
    draw_loss(RECORD, tmp_path / "loss.png", "nats per token")
    size, found = colours(tmp_path / "loss.png")
    assert size == (1050, 600)
    assert {(0x99, 0x99, 0x99), (0x22, 0x22, 0x22)} <= found
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_accuracy_is_a_panel_of_its_own(tmp_path):
    curves = {**RECORD["curves"], "validation_accuracy": [[0, 0.1], [20, 0.5]]}
    draw_loss({**RECORD, "curves": curves}, tmp_path / "loss.png")
    assert colours(tmp_path / "loss.png")[0] == (1500, 600)


def test_a_loss_that_is_not_finite_leaves_a_gap(tmp_path):
    curves = {"loss": [[1, 8.2], [2, None], [3, 4.1]], "validation_loss": [[0, None]]}
    draw_loss({**RECORD, "status": "diverged", "curves": curves, "config": {**RECORD["config"], "steps": 9}},
              tmp_path / "loss.png")  # fmt: skip
    assert (0x99, 0x99, 0x99) in colours(tmp_path / "loss.png")[1]


def test_the_picture_is_drawn_while_a_run_trains(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curve, "draw_loss", lambda record, path: drawn.append((record["curves"], path)))
    run(tmp_path / "short")
    assert not drawn  # it would take longer than such a run
    monkeypatch.setattr(curve, "_EVERY", 0.0)
    run(tmp_path / "long", steps=9)
    assert [path for _, path in drawn] == [tmp_path / "long" / "loss_curve.png"] * 2
    assert [[step for step, _ in curves["validation_loss"]] for curves, _ in drawn] == [[0, 3], [0, 3, 6]]
    assert [step for step, _ in drawn[-1][0]["loss"]] == [1, 2, 3, 4, 5, 6]
