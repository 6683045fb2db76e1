"""The documentation states what the code does."""

import math
import re
import runpy

import hf_gem
from tests.helpers import ROOT

FUNCTIONS, FAMILIES = ((ROOT / "docs" / f"{page}.md").read_text() for page in ("functions", "families"))


def test_the_table_of_fits_is_what_fit_returns():
    made = runpy.run_path(str(ROOT / "docs" / "make.py"))["fit_table"]()
    assert made.count("\n") == 8
    # eps is the last of three digits wide, errors have four decimals: the same but for those
    rows, now = (re.findall(r"(`\w+?)_eps([\d.em]+)` ([\d.]+)", text) for text in (FUNCTIONS, made))
    assert len(rows) == len(now) == 12
    for (name, eps, error), (new_name, new_eps, new_error) in zip(rows, now, strict=True):
        assert name == new_name
        assert math.isclose(float(eps.replace("em", "e-")), float(new_eps.replace("em", "e-")), rel_tol=0.02)
        assert math.isclose(float(error), float(new_error), abs_tol=1e-4)


def test_the_table_of_gains_is_what_gain_returns():
    made = runpy.run_path(str(ROOT / "docs" / "make.py"))["gain_table"]()
    table = FUNCTIONS.split("<!-- gains -->\n")[1].split("<!-- end")[0]
    rows = re.findall(r"\| `?([\w.]+)`? \| ([\d.]+) \|", table)
    assert len(rows) > 15
    assert [name for name, _ in rows] == re.findall(r"\| `?([\w.]+)`? \| [\d.]+ \|", made)
    for name, value in rows:
        if name not in ("relu", "gelu", "silu"):
            # printed with six decimals
            assert math.isclose(hf_gem.gain(name), float(value), rel_tol=0, abs_tol=0.6e-6), name


def test_every_public_name_is_documented():
    for name in hf_gem.__all__:
        thing = getattr(hf_gem, name)
        assert thing.__doc__, name
        assert thing.__doc__ is not type(thing).__doc__, name


def test_the_family_of_ones_own_is_the_one_of_the_tests():
    block = FAMILIES.split("```python\n")[1].split("```")[0]
    source = (ROOT / "tests" / "family" / "dgem.py").read_text()
    assert block == source
    assert source.count("\n") <= 40


def test_made_tables_are_up_to_date():
    made = runpy.run_path(str(ROOT / "docs" / "make.py"))
    tables = (
        ("functions", "families", "family_table"),
        ("architecture", "floors", "floor_table"),
        ("choosing", "findings", "choosing_table"),
    )
    for page, name, make in tables:
        text = (ROOT / "docs" / f"{page}.md").read_text()
        assert text.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0] == made[make](), (
            "run docs/make.py"
        )
