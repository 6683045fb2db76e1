"""How numbers are written, and what templates are given."""

import math

import jinja2
import pytest

from hf_gem.compare.words import cell, mean, number, render, signed, span, spread


def test_numbers():
    assert [number(value) for value in (None, math.nan, math.inf, 0.12345)] == ["-", "diverged", "diverged", "0.1235"]
    assert [cell(value, ".2f") for value in (math.nan, 0.125)] == ["-", "0.12"]
    assert [signed(value) for value in (math.nan, 0.0, -0.25)] == ["-", "+0", "-0.25"]
    assert span((math.nan, math.nan)) == "-"
    assert span((-0.5, 0.25)) == "-0.5 to +0.25"


def test_means_are_of_the_runs_that_finished():
    assert mean({0: 1.0, 1: 3.0, 2: math.nan}) == 2
    assert spread({0: 1.0, 1: 3.0, 2: math.nan}) == pytest.approx(math.sqrt(2))
    assert mean({0: math.nan}) is None
    assert spread({0: 1.0, 1: math.inf}) is None


def test_a_template_that_lacks_a_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'title' is undefined"):
        render("page.html.j2", body="")


def test_only_pages_escape_html():
    page = render("page.html.j2", title="<a>", body="<b>")
    assert "<title>&lt;a&gt;</title>" in page
    assert "<b>" in page
    summary = render("summary.md.j2", studies=[], baseline="<a>", gains=[], settings=[], merged=True)
    assert "# Against <a>, in" in summary
