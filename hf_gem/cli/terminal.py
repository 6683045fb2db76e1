"""Draws curves as text, with two columns and four rows of Braille dots in each character."""

from __future__ import annotations

import codecs
import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of the dots in U+2800, by row and column
_UPPER = 0x1B  # the dots in the upper half
# For encodings without these characters: the halves of a character that have dots.
_PLAIN = {chr(0x2800 + cell): " '.:"[bool(cell & _UPPER) + 2 * bool(cell & ~_UPPER)] for cell in range(256)}
_PLAIN |= {"│": "|", "└": "+", "─": "-"}


def plot(
    title: str, curves: Sequence[Callable[[Tensor], Tensor]], low: float, high: float, width: int = 34, height: int = 10
) -> list[str]:
    """Draws functions as lines of text.

    Args:
        title: The first line.
        curves: The functions. The first is drawn solid, the others dotted.
        low: Smallest x.
        high: Largest x.
        width: Width of the drawing in characters.
        height: Height of the drawing in lines.
    """
    import torch

    x = torch.linspace(low, high, 2 * width, dtype=torch.float64, device="cpu")
    rows = [curve(x) for curve in curves]
    bottom, top = min(float(y.min()) for y in rows), max(float(y.max()) for y in rows)
    scale = (4 * height - 1) / (top - bottom or 1.0)
    cells = [[0] * width for _ in range(height)]
    for number, y in enumerate(rows):
        places = [round((top - value) * scale) for value in y.tolist()]
        for column, place in enumerate(places):
            if number and column % 4 > 1:  # a gap in a dotted curve
                continue
            before = places[max(column - 1, 0)] if not number else place
            for dot in range(min(place, before + (place > before)), max(place, before - (place < before)) + 1):
                cells[dot // 4][column // 2] |= _DOTS[dot % 4][column % 2]
    labels = [f"{top:8.3g} ", *[" " * 9] * (height - 2), f"{bottom:8.3g} "]
    lines = [
        label + "│" + "".join(chr(0x2800 + cell) for cell in row) for label, row in zip(labels, cells, strict=True)
    ]
    axis = f"{low:<{width // 2}g}{high:>{width - width // 2}g}"
    return [f"{'':10}{title:<{width}}", *lines, f"{'':9}└{'─' * width}", f"{'':10}{axis}"]


def side_by_side(left: Sequence[str], right: Sequence[str]) -> str:
    """Joins two plots of the same height."""
    width = max(map(len, left))
    return "\n".join(f"{one:<{width}}  {other}".rstrip() for one, other in zip(left, right, strict=True))


@contextlib.contextmanager
def printable() -> Iterator[None]:
    """Lets standard output take all characters in a `with` block: those that its encoding lacks become ASCII."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):  # a stand-in, which has no encoding
        yield
        return
    before = stream.errors
    codecs.register_error("hf_gem.plain", _plain)
    stream.reconfigure(errors="hf_gem.plain")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)  # only standard output uses it
    return "".join(_PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end
