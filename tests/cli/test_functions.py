"""`hf-gem list`, `show` and `plot`."""

import io
import json
import math
import re
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

import hf_gem as package
from hf_gem.cli import main
from hf_gem.cli.terminal import plot


@pytest.fixture
def shown(hf_gem):
    def show(name):
        code, out, _ = hf_gem("show", name, "--json")
        assert code == 0
        return json.loads(out)

    return show


def test_list_has_gains_and_slopes(hf_gem):
    rows = {row["family"]: row for row in json.loads(hf_gem("list", "--json")[1])}
    assert [*rows][:3] == ["gem", "egem", "segem"]
    for n in (1, 2, 3):
        for family in ("gem", "egem"):
            assert math.isclose(rows[family]["largest_slope"][str(n)], (1 + 2 * n) ** 2 / (8 * n), rel_tol=1e-6)
        assert rows["segem"]["largest_slope"][str(n)] == 1
        assert rows["egem"]["gain"][str(n)] == package.gain(f"egem_n{n}")
    text = hf_gem("list")[1]
    for value in ("E-GEM", "segem[_n<N>][_eps<E>][_learnable]", "1 (fixed)", "2.0694", "1.5625"):
        assert value in text


@pytest.mark.parametrize(("name", "n", "eps"), [("gem", 1, 1.0), ("egem_n2_eps1em6", 2, 1e-6), ("egem_n3", 3, 1e-4)])
def test_show_has_the_properties_that_the_docs_derive(shown, name, n, eps):
    found = shown(name)
    half = eps ** (1 / (2 * n))
    assert (found["name"], found["n"], found["eps"]) == (name, n, eps)
    assert math.isclose(found["half_point"], half)
    assert found["continuous_derivatives"] == 2 * n
    assert found["lowest_value"] == [0, None]
    assert found["smallest_slope"] == [0, None]
    deepest = half * (2 * n - 1) ** ((2 * n - 1) / (2 * n)) / (2 * n)
    assert math.isclose(found["distance_from_relu"][0], deepest, rel_tol=1e-6)
    gates = [y / x for x, y, _ in found["values"] if x > 0]
    assert gates[0] < 0.1  # the table shows how the gate opens
    assert gates[-1] > 0.9
    assert any(math.isclose(gate, 0.5) for gate in gates)
    for x, y, slope in found["values"]:
        point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        value = package.activation(point, found["family"], n, eps)
        assert math.isclose(y, value.item(), rel_tol=1e-12)
        assert math.isclose(slope, torch.autograd.grad(value, point)[0].item(), rel_tol=1e-12)


def test_se_gem_dips_as_deep_as_e_gem_is_from_relu(shown):
    dip, distance = shown("segem_eps0.01")["lowest_value"], shown("egem_eps0.01")["distance_from_relu"]
    assert math.isclose(-dip[0], distance[0], rel_tol=1e-6)
    assert math.isclose(-dip[1], distance[1], rel_tol=1e-3)  # flat there


def test_show_is_for_people(hf_gem):
    code, out, _ = hf_gem("show", "EGEM_N2_eps1e-6_learnable")
    assert code == 0
    assert out.startswith("egem_n2_eps1em6_learnable  (E-GEM)\n")
    for part in (
        "4 times continuously differentiable",
        "monotone            yes",
        "trains its own eps",
        "dotted: ReLU",
    ):
        assert part in out
    assert max(map(len, out.splitlines())) <= 100
    assert "monotone            no" in hf_gem("show", "segem")[1]


def test_show_takes_a_family_of_ones_own(hf_gem):
    code, out, _ = hf_gem("show", "dgem", "--json")  # which tests/conftest.py registers
    assert code == 0
    assert json.loads(out)["continuous_derivatives"] is None  # nobody has proven it


def test_the_default_device_does_not_matter(hf_gem, tmp_path):
    pytest.importorskip("matplotlib")
    commands = [("list", "--json"), ("show", "egem_n2"), ("plot", "gem", "relu", "-o", str(tmp_path / "a.svg"))]
    expected = [hf_gem(*command)[1] for command in commands]
    with torch.device("meta"):
        assert [hf_gem(*command)[1] for command in commands] == expected


def test_a_curve_in_the_terminal():
    *_, bottom, top = (line[10:] for line in reversed(plot("t", [lambda x: x], -1, 1, width=4, height=2)[1:3]))
    assert (top, bottom) == ("⠀⠀⡠⠊", "⡠⠊⠀⠀")  # the diagonal
    lines = plot("t", [lambda x: 0 * x, lambda x: 0 * x + 1], -1, 1, width=4, height=2)
    assert lines[1].endswith("⠉⠀⠉⠀")  # dotted
    assert lines[2].endswith("⣀⣀⣀⣀")


@pytest.mark.parametrize(("encoding", "axis"), [("ascii", "+----"), ("cp1252", "+----"), ("cp437", "└────")])
def test_show_takes_the_characters_that_the_output_has(monkeypatch, encoding, axis):
    """A redirected console of Windows has cp1252, an old one cp437."""
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    main(["show", "gem"])
    console.flush()
    out = console.buffer.getvalue().decode(encoding)
    assert axis in out
    assert re.search(r"[.:']{3}", out)
    assert "?" not in out
    assert console.errors == "strict"  # as before, for the script of `hf-gem run`


def test_plot_writes_png_and_svg(hf_gem, tmp_path):
    pytest.importorskip("matplotlib")
    png, svg = tmp_path / "a.png", tmp_path / "b.svg"
    assert hf_gem("plot", "gem_n2", "egem", "-o", png, "--rows", "function,slope,gate") == (0, f"Figure: {png}\n", "")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert hf_gem("plot", "gem", "-o", tmp_path / "c") == (0, f"Figure: {tmp_path / 'c.png'}\n", "")
    assert (tmp_path / "c.png").exists()
    assert hf_gem("plot", "--figure", "gates", "--output", svg)[0] == 0
    first = svg.read_bytes()
    assert ET.fromstring(first).tag.endswith("svg")
    assert b"Matplotlib v" not in first
    hf_gem("plot", "--figure", "gates", "--output", svg)
    assert svg.read_bytes() == first


def test_what_is_drawn_is_the_function():
    pytest.importorskip("matplotlib")
    from hf_gem.cli.drawing import FIGURES, Figure, Panel, draw

    assert {"family", "n", "eps", "gates"} <= FIGURES.keys()
    shown = draw(Figure((Panel("", ("gem_n2", "swish")),), ("function", "slope", "gate")), reach=2)
    functions, slopes, gates = shown.axes
    for line, function in zip(
        functions.lines, (package.get_activation("gem_n2"), torch.nn.functional.silu), strict=True
    ):
        x, y = (torch.as_tensor(values) for values in line.get_data())
        assert (float(x[0]), float(x[-1])) == (-2, 2)
        torch.testing.assert_close(y, function(x))
    x, gate = (torch.as_tensor(values) for values in gates.lines[1].get_data())
    torch.testing.assert_close(gate, torch.sigmoid(x))  # Swish's
    assert torch.as_tensor(slopes.lines[0].get_data()[1]).max() == pytest.approx(1.5625, rel=1e-4)
    assert functions.lines[0].get_color() != functions.lines[1].get_color()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "either names of activations or --figure"),
        (("gem", "--figure", "n"), "either names of activations or --figure"),
        (("--figure", "n", "--rows", "gate"), "got --rows with --figure, but a ready-made figure has its own"),
        (("--figure", "n", "--beside", "", "--rows", "gate"), "got --rows and --beside with --figure"),
        (("foo",), "the activation 'foo' is not known"),
        (("gem", "--rows", "curve"), "the row 'curve' is not known"),
        (("gem", "--reach", "0"), "reach must be above 0"),
        (("gem", "-o", "a.nope"), "nope"),
        (("gem", "-o", "nowhere/a.png"), "nowhere/a.png"),
    ],
)
def test_plot_says_what_it_takes(hf_gem, arguments, words):
    pytest.importorskip("matplotlib")
    code, out, err = hf_gem("plot", *arguments)
    assert (code, out) == (1, "")
    assert words in err
