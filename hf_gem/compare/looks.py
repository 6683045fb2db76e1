"""The colour, marker and line of each activation, which are the same in all pictures."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from ..family.names import is_name, parse
from ..fit import MATCH_C

# Other names of a function, and approximations that differ from the exact function by less than 0.0005.
SAME = {"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_python": "gelu", "swish": "silu"}
# Most of these are from Okabe and Ito. People with any of the usual colour vision deficiencies can tell all of these
# apart, as a test simulates.
_COLORS = {
    **{"relu": "#000000", "gelu": "#0072B2", "silu": "#56B4E9", "gem": "#D55E00", "relu2": "#E69F00"},
    **{"mish": "#8C564B", "tanh": "#BDBDBD", "xielu": "#F0E442"},
}
# From small half points to large ones, from light to dark.
_SCALES = {"egem": ("#C6DB2B", "#009E73", "#053B48"), "segem": ("#F3BFD9", "#B8559B", "#4A1453")}
_FURTHER = ("#882255", "#C9B27C", "#5E5E5E")  # for other names, chosen by a hash of the name
_MARKERS, _LINES = ("o", "s", "^", "D"), ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
_DARK_ENOUGH = 0.18  # relative luminance at which text on white has a contrast of 4.5


def look(act: str) -> dict[str, Any]:
    """Returns the colour, marker and line of an activation, as arguments of matplotlib's `plot`.

    Members of a family have related colours, darker for larger half points of the gate. n determines marker and line.
    An activation with its own flags has a dotted line.

    Args:
        act: Name of the activation, followed by its flags.
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


def ink(color: str) -> str:
    """Darkens a colour until it can be read as text on white."""
    parts = [part / 255 for part in _parts(color)]
    luminance = sum(weight * part**2.2 for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    factor = min(1.0, (_DARK_ENOUGH / luminance) ** (1 / 2.2)) if luminance else 1.0
    return _hex(255 * factor * part for part in parts)


def _between(colors: Sequence[str], share: float) -> str:
    """Interpolates between colours, from the first at share 0 to the last at 1."""
    place = min(1.0, max(0.0, share)) * (len(colors) - 1)
    first = min(int(place), len(colors) - 2)
    start, end = map(_parts, colors[first : first + 2])
    return _hex(a + (place - first) * (b - a) for a, b in zip(start, end, strict=True))


def _parts(color: str) -> list[int]:
    return [int(color[start : start + 2], 16) for start in (1, 3, 5)]


def _hex(parts: Iterable[float]) -> str:
    return "#" + "".join(f"{round(part):02X}" for part in parts)
