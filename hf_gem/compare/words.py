"""Fills in the text templates in `templates/`, and formats their numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np

from ..files import markdown_code, markdown_table, markdown_text


def render(template: str, **values: Any) -> str:
    """Fills in a template.

    Templates other than HTML are Markdown. Several empty lines between paragraphs become one.

    Args:
        template: Name of a file in `templates/`.
        values: The values that the template uses.
    """
    text = _templates.get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def number(value: float | None) -> str:
    """Formats an outcome, or a dash if there is none."""
    return "-" if value is None else "diverged" if not math.isfinite(value) else f"{value:.4f}"


def cell(value: float, form: str) -> str:
    """Formats a number with a Python format, or a dash for NaN."""
    return "-" if math.isnan(value) else format(value, form)


def signed(value: float) -> str:
    """Formats a difference with its sign."""
    return cell(value, "+.4g")


def span(interval: tuple[float, float]) -> str:
    """Formats an interval."""
    return "-" if math.isnan(interval[0]) else f"{interval[0]:+.4g} to {interval[1]:+.4g}"


def mean(found: Mapping[int, float]) -> float | None:
    """Computes the mean of the finished runs."""
    finished = _finite(found)
    return float(np.mean(finished)) if finished else None


def spread(found: Mapping[int, float]) -> float | None:
    """Computes the standard deviation of the finished runs."""
    finished = _finite(found)
    return float(np.std(finished, ddof=1)) if len(finished) > 1 else None


def _finite(found: Mapping[int, float]) -> list[float]:
    return [value for value in found.values() if math.isfinite(value)]


def _listed(words: list[str]) -> str:
    """Joins words with commas, and "and" before the last."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _one_line(text: str) -> str:
    """Joins the lines of a paragraph."""
    return " ".join(text.split())


_templates = jinja2.Environment(
    loader=jinja2.PackageLoader("hf_gem.compare"),
    autoescape=lambda name: bool(name and ".html" in name),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {
    "code": markdown_code,
    "form": format,
    "listed": _listed,
    "number": number,
    "one_line": _one_line,
    "text": markdown_text,
}
_templates.globals |= {"table": markdown_table}
