"""How activations look in pictures."""

import itertools
import re

from hf_gem.compare.looks import look

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
