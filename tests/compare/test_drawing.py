"""What pictures have in common."""

import io
import itertools
import math

import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="pictures are drawn by it")

from matplotlib.text import Text

from hf_gem.compare.drawing import (
    End,
    label_ends,
    mark_better,
    metric_label,
    new_figure,
    picture_of,
    show_metric,
    show_scale,
    tidy,
)


def drawn(values):
    figure = new_figure(4, 3)
    figure.subplots().plot(values)
    return picture_of(figure)


def test_a_picture_has_the_same_bytes_each_time():
    first = drawn([1, 2, 3])
    assert drawn([1, 2, 3]) == first
    assert drawn([1, 2, 4]) != first
    with Image.open(io.BytesIO(first.png)) as image:
        assert (image.format, image.size) == ("PNG", (440, 330))
    assert first.svg.startswith(b"<?xml")
    assert b"</svg>" in first.svg
    assert b"Matplotlib v" not in first.svg + first.png


@pytest.mark.parametrize(
    "heights", [[0.5] * 6, [0.0, 0.01, 1.0], [0.1, 0.5, 0.9], [1.0] * 3, [0.0] * 3, [float("nan"), 0.3, 0.31]]
)
def test_labels_do_not_overlap_and_stay_beside_the_panel(heights):
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    label_ends(axes, [End(f"line {number}", 1.0, y, "#0072B2") for number, y in enumerate(heights)])
    figure.draw_without_rendering()
    named = sorted(axes.texts, key=lambda text: Text.get_window_extent(text).y0)
    boxes = [Text.get_window_extent(text) for text in named]  # without the line that leads there
    finite = [y for y in heights if not math.isnan(y)]
    assert len(boxes) == len(finite)
    assert all(upper.y0 > lower.y1 - 1 for lower, upper in itertools.pairwise(boxes))  # a pixel of rounding
    assert all(box.x0 > axes.bbox.x1 for box in boxes)
    assert boxes[-1].x1 < figure.bbox.x1
    # in the order of the lines, and where there is room, at their height
    wanted = sorted((y, number) for number, y in enumerate(heights) if not math.isnan(y))
    assert [text.get_text() for text in named] == [f"line {number}" for _, number in wanted]
    if heights == [0.1, 0.5, 0.9]:
        middles = [(box.y0 + box.y1) / 2 for box in boxes]
        assert middles == pytest.approx([axes.transData.transform((0, y))[1] for y in heights], abs=3)


def test_no_labels_are_no_error():
    axes = new_figure(4, 3).subplots()
    label_ends(axes, [])
    label_ends(axes, [End("lost", 1.0, float("nan"), "#000000")])
    assert not axes.texts


@pytest.mark.parametrize("across", [True, False])
def test_the_better_side_is_marked(across):
    axes = new_figure(4, 3).subplots()
    for higher in (True, False):
        mark_better(axes, higher, across)
    arrows = "\N{RIGHTWARDS ARROW}\N{LEFTWARDS ARROW}" if across else "\N{UPWARDS ARROW}\N{DOWNWARDS ARROW}"
    assert [next(iter(set(text.get_text()) & set(arrows))) for text in axes.texts] == list(arrows)
    assert all("better" in text.get_text() for text in axes.texts)
    assert [text.xy[0] for text in axes.texts] == ([1.0, 0.0] if across else [0.0, 0.0])


def test_labels_of_axes_are_words_with_a_unit():
    assert metric_label("validation_loss", "nats") == "validation loss (nats)"
    assert metric_label("validation_log10_relative_l2", "") == "validation log10 of relative L2 error"
    assert metric_label("test_accuracy", "points", "minus that of relu") == "test accuracy minus that of relu (points)"


def ticks(axis):
    axis.axes.figure.draw_without_rendering()
    return [float(text.get_text()) for text in axis.get_ticklabels() if text.get_text()]


def test_accuracies_are_written_in_per_cent():
    axes = new_figure(4, 3).subplots()
    axes.set_ylim(0.1, 0.3)
    show_metric(axes.yaxis, "validation_loss")
    assert 0.2 in ticks(axes.yaxis)
    show_metric(axes.yaxis, "validation_accuracy")
    assert 20 in ticks(axes.yaxis)


@pytest.mark.parametrize(("low", "high"), [(0.55, 1.9), (0.1, 6.0), (1e-6, 10.0), (0.9, 1.1)])
def test_ticks_of_a_logarithmic_axis_are_plain_numbers_that_do_not_overlap(low, high):
    figure = new_figure(7, 3)
    axes = figure.subplots()
    axes.set(xscale="log", xlim=(low, high))
    show_scale(axes.xaxis)
    tidy(axes)
    figure.draw_without_rendering()
    shown = [text for text in axes.get_xticklabels() if low <= float(text.get_text()) <= high]
    boxes = [text.get_window_extent() for text in shown]
    assert len(boxes) >= (1 if high < 1.2 else 2)
    assert all(right.x0 > left.x1 for left, right in itertools.pairwise(boxes))
