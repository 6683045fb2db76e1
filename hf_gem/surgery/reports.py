"""What the reports share: many paths in few words."""

from __future__ import annotations

import re


def path_patterns(paths: list[str]) -> str:
    """The distinct paths, with `*` for the indices in which several differ, and for numbers in names if still many."""
    for few, number in ((1, r"(?<![^.])\d+(?![^.])"), (3, r"\d+(?![^.])")):
        if len(set(paths)) > few:
            paths = [re.sub(number, "*", path) for path in paths]
    distinct = list(dict.fromkeys(path or "(the model)" for path in paths))
    return ", ".join(distinct[:3]) + (f" and {len(distinct) - 3} more" if len(distinct) > 3 else "")


def places(paths: list[str]) -> str:
    """How many paths, and which."""
    return f"{len(paths)} at {path_patterns(paths)}"
