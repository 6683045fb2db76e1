"""How activations look in pictures."""

import itertools
import re

import numpy as np
import pytest

from hf_gem.compare.looks import ink, look

EGEMS = [f"egem_eps{eps}" for eps in ("1em6", "1em5", "0.001", "0.01", "0.1", "1.0", "10.0")]


def lightness(color):
    """Relative luminance."""
    red, green, blue = (int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


def test_a_name_looks_the_same_everywhere():
    assert look("gelu_pytorch_tanh") == look("gelu")
    assert look("swish") == look("silu")
    assert look("some_other") == look("some_other")
    for act in ("relu", "some_other", *EGEMS, "segem_eps1em60"):
        assert re.fullmatch("#[0-9A-F]{6}", look(act)["color"])


def test_members_are_told_apart_without_colour():
    shades = [lightness(look(act)["color"]) for act in EGEMS]
    assert shades == sorted(shades, reverse=True)
    assert min(a - b for a, b in itertools.pairwise(shades)) > 0.005
    markers = [(look(act)["marker"], look(act)["ls"]) for act in ("gem", "gem_n2", "gem_n3", "gem_n4")]
    assert len(set(markers)) == 4
    assert len({look(act)["color"] for act in ("relu", "gelu", "silu", "gem", "egem", "segem")}) == 6
    assert look("gem act_after_add=none") != look("gem")
    doses = [lightness(look(f"egem_n2 eps=match match_c={c}")["color"]) for c in (0.1, 0.25, 0.5, 1, 2, 4, 6)]
    assert doses == sorted(set(doses), reverse=True)
    assert look("egem_n2 eps=match") == look("egem_n2 eps=match match_c=1")


# Machado, Oliveira and Fernandes (2009), for linear RGB: what people see who lack one kind of cones.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color, seen):
    """CIELAB of a colour, as it is seen."""
    linear = np.array([(int(color[start : start + 2], 16) / 255) ** 2.2 for start in (1, 3, 5)])
    xyz = XYZ @ np.clip(np.asarray(seen) @ linear, 0, 1) / XYZ.sum(1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_differ_for_people_with_a_colour_vision_deficiency(deficiency):
    acts = ("relu", "gelu", "silu", "relu2", "mish", "tanh", "xielu", "gem", "egem_n2", "segem_eps0.01")
    seen = {act: lab(look(act)["color"], DEFICIENCIES[deficiency]) for act in acts}
    distances = {(a, b): np.linalg.norm(seen[a] - seen[b]) for a, b in itertools.combinations(acts, 2)}
    assert min(distances.values()) > 10, min(distances, key=distances.get)  # 2.3 is a just noticeable difference


@pytest.mark.parametrize("act", ["relu", "mish", "silu", "tanh", "egem_eps1em6", "segem_eps1em6"])
def test_names_in_the_colour_of_a_line_can_be_read(act):
    color = look(act)["color"]
    contrast = 1.05 / (lightness(ink(color)) + 0.05)
    assert contrast > 4.5  # as WCAG wants it of text on white
    assert lightness(ink(color)) <= lightness(color)
    assert ink("#0072B2") == "#0072B2"  # dark enough
