"""The documentation states what the code does."""

import math
import re

import hf_gem
from tests.helpers import ROOT

FUNCTIONS = (ROOT / "docs" / "functions.md").read_text()


def test_the_table_of_gains_is_what_gain_returns():
    import runpy

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
