"""Pictures: the same bytes for the same numbers."""

import itertools
import math

import pytest

pytest.importorskip("matplotlib", reason="figures are drawn by it")

from hf_gem.compare.figures import Row, _lines, _look_of, _name_rates, _new_figure, forest
from hf_gem.compare.looks import look

ROWS = {
    "one": Row(0.5, (0.1, 0.9), "#000000", (0.0, 1.0), [0.2, 0.8]),
    "none": Row(math.nan, (math.nan, math.nan), "#000000"),
}


def test_a_picture_is_the_same_each_time():
    first = forest(ROWS, 0.1, "difference", True)
    assert first.startswith(b"\x89PNG")
    assert forest(ROWS, 0.1, "difference", True) == first
    assert forest(ROWS, 0.2, "difference", True) != first
    assert forest(ROWS, 0.1, "difference", False) != first  # the other side is better


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
    figure, axes = _new_figure(8, 4.4)
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
