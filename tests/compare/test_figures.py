"""The pictures of reports."""

import io
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="figures are drawn by it")

from hf_gem.compare.drawing import new_figure
from hf_gem.compare.figures import Course, Panel, Row, _courses, _lines, _look_of, _name_rates, curves, forests, unit_of
from hf_gem.compare.looks import look
from tests.compare.toy import TWO_ARMS, run

ROWS = {
    "one": Row(0.5, (0.1, 0.9), "#000000", (0.0, 1.0), [0.2, 0.8]),
    "none": Row(math.nan, (math.nan, math.nan), "#000000"),
}
PANEL = Panel(ROWS, 0.1, "difference", "validation_loss", True)


def test_a_picture_is_the_same_each_time():
    first = forests([PANEL])
    assert forests([PANEL]) == first
    for other in (
        replace(PANEL, band=0.2),
        replace(PANEL, higher_is_better=False),  # the other side is better
        replace(PANEL, metric="validation_accuracy"),  # in per cent
        replace(PANEL, rows={**ROWS, "one": replace(ROWS["one"], settled=False)}),
    ):
        assert forests([other]) != first


def test_several_panels_stand_beside_each_other():
    sizes = []
    for count in (1, 2, 3):
        with Image.open(io.BytesIO(forests([PANEL] * count).png)) as image:
            sizes.append(image.size)
    (one, height), (two, same), (three, more) = sizes
    assert one < two == three
    assert height == same < more


def test_a_course_is_compared_at_the_seeds_and_steps_of_both():
    course = Course([10, 20, 30], {0: np.array([3.0, 2.0, 1.0]), 1: np.array([4.0, 3.0, 2.0])})
    other = Course([20, 30, 40], {1: np.array([2.5, 1.5, 0.0]), 2: np.array([9.0, 9.0, 9.0])})
    found = course.minus(other)
    assert found.steps == [20, 30]
    assert {seed: values.tolist() for seed, values in found.values.items()} == {1: [0.5, 0.5]}
    assert course.minus(Course([50], {3: np.array([1.0])})) == Course([], {})


def test_curves_have_the_training_loss_where_records_have_it(study):
    toy = study(**TWO_ARMS, final_seeds=[0, 1])
    run(toy)
    with Image.open(io.BytesIO(curves(toy, "relu").png)) as image:
        alone = image.size
    for path in (toy.folder / "records").glob("*"):
        record = json.loads(path.read_text())
        record["curves"]["loss"] = [[1, 9.0], *([step, 5 - step / 200] for step in range(20, 201, 20)), [210, None]]
        record["result"]["unit"] = "tokens"
        path.write_text(json.dumps(record))
    toy = study(**TWO_ARMS, final_seeds=[0, 1])
    with Image.open(io.BytesIO(curves(toy, "relu").png)) as image:
        assert image.size[0] > 1.5 * alone[0]
    (course, _) = _courses(toy, "loss").values()
    assert course.steps == [*range(40, 201, 20), 210]  # without the first tenth
    assert sorted(course.values) == [0, 1]
    assert math.isnan(course.values[0][-1])
    assert unit_of(toy, "validation_loss") == unit_of(toy, "training_loss") == "nats"
    assert (unit_of(toy, "test_accuracy"), unit_of(toy, "test_accuracy", difference=True)) == ("%", "points")
    assert unit_of(toy, "validation_perplexity") == ""


def test_curves_of_a_baseline_that_always_diverged(study):
    toy = study(**TWO_ARMS, final_seeds=[0, 1], flags={"limit_for_relu": 1e-9})
    run(toy)
    assert list(_courses(toy, "validation_loss")) == ["gem"]
    assert curves(toy, "relu").png


def test_lines_join_activations_that_differ_in_one_number():
    outcomes = {name: [1.0] for name in ("relu", "gem", "gem_n2", "egem", "egem_eps0.01", "egem_n2", "segem")}
    assert _lines(outcomes, "n") == {
        "gem": {1.0: [1.0], 2.0: [1.0]}, "egem, eps = 0.0001": {1.0: [1.0], 2.0: [1.0]},
    }  # fmt: skip
    assert _lines(outcomes, "eps") == {"egem, n = 1": {0.0001: [1.0], 0.01: [1.0]}}
    assert _lines({"gem": [1.0], "gem_n2": []}, "n") == {}


def test_a_line_looks_like_the_activation_that_it_starts_from():
    assert _look_of("gem") == look("gem")
    assert _look_of("egem, n = 2") == look("egem_n2")
    assert _look_of("egem, eps = 1e-05, learnable") == look("egem_eps1em5")


@pytest.mark.parametrize("count", [6, 10])
def test_names_of_learning_rates_do_not_overlap(count):
    figure = new_figure(8, 4.4)
    axes = figure.subplots()
    rates = [1.25e-3 * 2 ** (place / 2) for place in range(count)]
    axes.plot(rates, rates)
    axes.set_xscale("log")
    _name_rates(axes, rates)
    figure.draw_without_rendering()
    labels = axes.get_xticklabels()
    places = [axes.transData.transform((rate, rates[0]))[0] for rate in rates]
    height = labels[0].get_fontsize() * figure.dpi / 72
    assert [label.get_text() for label in labels] == [f"{rate:.3g}" for rate in rates]
    assert min(b - a for a, b in itertools.pairwise(places)) > height * math.sqrt(2)  # at 45 degrees
