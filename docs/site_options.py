"""Fields of a config, `steps: int = option(1000, "Number of optimizer steps.")`, as a table of the API pages."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Options(griffe.Extension):
    """Adds the fields that `option(default, help)` makes to the docstring of their class, as its attributes."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        lines = [_described(field) for field in cls.attributes.values() if _is_option(field.value)]
        if lines and cls.docstring:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)


def _is_option(value: Any) -> bool:
    return isinstance(value, griffe.ExprCall) and str(value.function) == "option"


def _described(field: Any) -> str:
    default, text = field.value.arguments
    return f"    {field.name}: {ast.literal_eval(str(text))} Default: `{default}`."
