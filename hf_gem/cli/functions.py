"""`hf-gem list`, `show` and `plot`: print and draw activation functions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.errors import ConfigError
from .common import AsJson, show, user_errors


def list_families(as_json: AsJson = False) -> None:
    """List the families with their defaults, gains and largest slopes."""
    from ..family.table import FAMILIES
    from .member import ORDERS, family_row

    rows = [family_row(name) for name in FAMILIES]
    head = ("family", "names", "eps", *(f"gain n={n}" for n in ORDERS), *(f"slope n={n}" for n in ORDERS))
    cells = [
        (
            row["title"],
            row["names"],
            f"{row['default_eps']:g}{' (fixed)' if row['eps_is_fixed'] else ''}",
            *(f"{row['gain'][str(n)]:.4f}" for n in ORDERS),
            *(f"{row['largest_slope'][str(n)]:.4f}" for n in ORDERS),
        )
        for row in rows
    ]
    formulas = [f"{row['title']}: {row['formula']}" for row in rows]
    text = [*_table([head, *cells]), "", *formulas, "", "Gain and largest slope (slope) are at the default eps."]
    show(rows, "\n".join(text), as_json)


def _complete_name(incomplete: str) -> list[str]:
    from ..family.table import FAMILIES

    names = [f"{family}{n}" for family in FAMILIES for n in ("", "_n2", "_n3")]
    return [name for name in names if name.startswith(incomplete)]


def show_member(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="An activation, such as gem_n2 or egem_n2_eps1em6.", autocompletion=_complete_name
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show one activation: its formula, properties, values and graph."""
    from .member import describe

    with user_errors():
        found = describe(name)
    show(found, _described(found), as_json)


def _described(found: Mapping[str, Any]) -> str:
    import torch.nn.functional as F

    from ..family.names import parse
    from .member import functions
    from .terminal import plot, side_by_side

    learnable = ", learnable: each layer trains its own eps" if found["learnable"] else ""
    smooth = found["continuous_derivatives"]
    rows = [
        ("parameters", f"n = {found['n']}, eps = {found['eps']:g}{learnable}"),
        ("formula", found["formula"]),
        ("gate half open at", f"|x| = {found['half_point']:.6g}"),
        *([("smoothness", f"{smooth} times continuously differentiable")] if smooth else []),
        ("monotone", "yes" if found["smallest_slope"][0] >= 0 else "no"),
        ("gain", f"{found['gain']:.6f}, centered {found['gain_centered']:.6f}"),
        *((key.replace("_", " "), _extreme(*found[key])) for key in _EXTREMES),
    ]
    width = max(len(title) for title, _ in rows)
    reach = 4 * found["half_point"]
    value, slope = functions(parse(found["name"]))
    graphs = side_by_side(
        plot("f(x), dotted: ReLU", (value, F.relu), -reach, reach), plot("f'(x)", (slope,), -reach, reach)
    )
    cells = [("x", "f(x)", "f'(x)"), *(tuple(f"{number:.6g}" for number in row) for row in found["values"])]
    lines = [f"{found['name']}  ({found['title']})", *(f"  {title:<{width}}  {text}" for title, text in rows)]
    return "\n".join([*lines, "", graphs, "", *_table(cells)])


def _extreme(value: float, x: float | None) -> str:
    return f"{value:.6g}" + ("" if x is None else f" at x = {x:.4g}")


_EXTREMES = ("largest_slope", "smallest_slope", "lowest_value", "distance_from_relu")


def _complete_figure(incomplete: str) -> list[str]:
    from .drawing import FIGURES

    return [name for name in FIGURES if name.startswith(incomplete)]


def plot(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Activations to draw, such as gem egem_eps0.01 gelu.", show_default=False),
    ] = None,
    figure: Annotated[
        str | None, typer.Option(help="Draw a ready-made figure instead.", autocompletion=_complete_figure)
    ] = None,
    rows: Annotated[
        str, typer.Option(help="What to draw: function, slope or gate, separated by commas.")
    ] = "function,slope",
    beside: Annotated[str, typer.Option(help="Activations to compare with, separated by commas.")] = "relu,gelu,swish",
    reach: Annotated[float, typer.Option(help="Draw x from -REACH to REACH.")] = 3.0,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write. Its suffix sets the format: .png, .svg or .pdf.")
    ] = Path("activations.png"),
) -> None:
    """Draw functions, slopes and gates as PNG or SVG."""
    from .drawing import FIGURES, Figure, Panel, save

    if (figure is None) == (not names):
        raise ConfigError(
            "plot takes either names of activations or --figure. The figures are " + ", ".join(FIGURES) + "."
        )
    if figure is not None and figure not in FIGURES:
        raise ConfigError(f"the figure {figure!r} is not known. The figures are {', '.join(FIGURES)}.")
    sources = {f"--{name}": context.get_parameter_source(name) for name in ("rows", "beside")}
    given = [option for option, source in sources.items() if source and source.name == "COMMANDLINE"]
    if figure is not None and given:
        raise ConfigError(
            f"got {' and '.join(given)} with --figure, but a ready-made figure has its own rows and activations. Leave "
            "that out, or name activations instead of the figure."
        )
    with user_errors():
        others = [name for name in beside.split(",") if name and name not in (names or ())]
        asked = FIGURES[figure] if figure else Figure((Panel("", (*(names or ()), *others)),), tuple(rows.split(",")))
        written = save(asked, output, reach)
    print(f"Figure: {written}")


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Returns the lines of a table. The first row is its head, and columns of numbers are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = [all(_is_number(cell) for cell in column[1:]) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in rows
    ]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
