"""Helpers for reports: they shorten lists of paths."""

from __future__ import annotations

import re

_INDEX = r"(?<![^.])\d+(?![^.])"  # of a layer among others of its kind


def without_indices(path: str) -> str:
    """Returns a path with `*` for its indices."""
    return re.sub(_INDEX, "*", path)


def path_patterns(paths: list[str]) -> str:
    """Lists the distinct paths, with `*` for differing indices, and for numbers in names if there are too many."""
    for few, number in ((1, _INDEX), (3, r"\d+(?![^.])")):
        if len(set(paths)) > few:
            paths = [re.sub(number, "*", path) for path in paths]
    distinct = list(dict.fromkeys(path or "(the model)" for path in paths))
    return ", ".join(distinct[:3]) + (f" and {len(distinct) - 3} more" if len(distinct) > 3 else "")


def places(paths: list[str]) -> str:
    """Returns the number of paths, and the shortened paths."""
    return f"{len(paths)} at {path_patterns(paths)}"


def counted(number: int, what: str) -> str:
    """Returns a number with its noun, such as `1 activation` or `12 activations`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
