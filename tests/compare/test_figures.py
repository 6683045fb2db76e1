"""Pictures: the same bytes for the same numbers."""

import math

import pytest

pytest.importorskip("matplotlib", reason="figures are drawn by it")

from hf_gem.compare.figures import _lines, forest

ROWS = {"one": (0.5, (0.1, 0.9), [0.2, 0.8]), "none": (math.nan, (math.nan, math.nan), [])}


def test_a_picture_is_the_same_each_time():
    first = forest(ROWS, 0.1, "difference")
    assert first.startswith(b"\x89PNG")
    assert forest(ROWS, 0.1, "difference") == first
    assert forest(ROWS, 0.2, "difference") != first


def test_lines_join_activations_that_differ_in_one_number():
    outcomes = {name: [1.0] for name in ("relu", "gem", "gem_n2", "egem", "egem_eps0.01", "egem_n2", "segem")}
    assert _lines(outcomes, "n") == {
        "gem": {1.0: [1.0], 2.0: [1.0]}, "egem, eps = 0.0001": {1.0: [1.0], 2.0: [1.0]},
    }  # fmt: skip
    assert _lines(outcomes, "eps") == {"egem, n = 1": {0.0001: [1.0], 0.01: [1.0]}}
    assert _lines({"gem": [1.0], "gem_n2": []}, "n") == {}
