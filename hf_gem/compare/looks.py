"""How an activation looks in pictures: the same in all of them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

from ..family.names import is_name, parse
from ..fit import MATCH_C

# Names of one function, and approximations that differ from what they stand for by less than 0.0005.
SAME = {"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_python": "gelu", "swish": "silu"}
# Of Okabe and Ito, whose colours most people with a colour vision deficiency tell apart.
_COLORS = {"relu": "#000000", "gelu": "#0072B2", "silu": "#56B4E9", "gem": "#D55E00"}
# From small half points to large ones, darker all the way.
_SCALES = {"egem": ("#C6DB2B", "#009E73", "#053B48"), "segem": ("#F3BFD9", "#B8559B", "#4A1453")}
_FURTHER = ("#E69F00", "#7F7F7F", "#8C564B", "#5D3A9B")
_MARKERS, _LINES = ("o", "s", "^", "D"), ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))


def look(act: str) -> dict[str, Any]:
    """Colour, marker and line of an activation, as matplotlib's `plot` takes them.

    Members of a family have related colours, darker for larger half points of the gate; n chooses marker and line. An
    activation with flags of its own is dotted.

    Args:
        act: Its name, flags behind it.
    """
    name, *flags = act.split()
    name, number = SAME.get(name, name), 0
    color = _COLORS.get(name) or _FURTHER[zlib.crc32(name.encode()) % len(_FURTHER)]
    if is_name(name):
        spec = parse(name)
        number = min(spec.n, len(_MARKERS)) - 1
        color = _COLORS.get(spec.family, color)
        if spec.family in _SCALES:
            half = spec.eps ** (1 / (2 * spec.n))
            if "eps=match" in flags:  # at an rms of 1
                half = float(dict(flag.split("=", 1) for flag in flags).get("match_c", MATCH_C))
            color = _between(_SCALES[spec.family], (math.log10(half) + 3) / 4)
    return {"color": color, "marker": _MARKERS[number], "ls": ":" if flags else _LINES[number]}


def _between(colors: Sequence[str], share: float) -> str:
    """A colour on the way from the first to the last of some."""
    place = min(1.0, max(0.0, share)) * (len(colors) - 1)
    first = min(int(place), len(colors) - 2)
    ends = ([int(color[start : start + 2], 16) for start in (1, 3, 5)] for color in colors[first : first + 2])
    return "#" + "".join(f"{round(a + (place - first) * (b - a)):02X}" for a, b in zip(*ends, strict=True))
