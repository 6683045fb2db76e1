"""One model of each module of timm: what `create_model(name, act_layer="gem_n2")` does, and `convert` after it."""

from __future__ import annotations

import re
import time
import warnings
from typing import Any

import timm
import torch

import hf_gem
from tests.sweeps.look import ALL, NAME, NO_BUILD, PARTLY, SAYS_SO, SILENT, first_line, look

# Parts of names of small models, the smallest first.
_SMALL = ("test", "atto", "femto", "pico", "nano", "tiny", "xxs", "xs", "mini", "small", "18")


def modules() -> list[str]:
    return sorted(timm.list_modules())


def example(module: str) -> str:
    """A small model of a module, chosen by its name."""
    names = sorted(timm.list_models(module=module))

    def size(name: str) -> tuple[int, int]:
        rank = next((i for i, part in enumerate(_SMALL) if part in name), len(_SMALL))
        return rank, int(re.findall(r"\d+", name + "999")[0])

    return min(names, key=size)


def sweep(module: str) -> dict[str, Any]:
    """The row of one module."""
    start = time.perf_counter()
    row = _sweep(module)
    return {"module": module, **row, "seconds": round(time.perf_counter() - start, 1)}


def _sweep(module: str) -> dict[str, Any]:
    if not timm.list_models(module=module):
        return {"outcome": "no models"}
    name = example(module)
    row: dict[str, Any] = {"example": name}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = _build(name, act_layer=NAME)
        except Exception as error:
            try:
                model = _build(name)
            except Exception as stock:
                return row | {"outcome": NO_BUILD, "why": first_line(stock)}
            row |= {"outcome": SAYS_SO, "error": first_line(error)}
    said = sorted({str(w.message) for w in caught if NAME in str(w.message)})
    seen = look(model)
    if "outcome" not in row:
        row["outcome"] = (PARTLY if seen.others else ALL) if seen.gem else (SAYS_SO if said else SILENT)
    row |= {"said": said, "gem": seen.gem, "unused": seen.unused, "not_run": seen.not_run}
    try:
        hf_gem.convert(model, NAME)
    except ValueError as error:
        row["convert_error"] = first_line(error)
    after = look(model)
    row |= {"after_gem": after.gem, "after_convert": sorted(map(list, after.others)), "after_not_run": after.not_run}
    row["stays"] = [[*other, "call" if other in after.others else "module"] for other in sorted(seen.others)]
    return row


def _build(name: str, **kwargs: Any) -> torch.nn.Module:
    try:
        with torch.device("meta"):
            return timm.create_model(name, **kwargs)
    except Exception:  # numbers that a constructor computes with tensors
        return timm.create_model(name, **kwargs)
