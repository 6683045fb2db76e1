"""One model of each module of timm: what `create_model(name, act_layer="gem_n2")` does, and `convert` after it."""

from __future__ import annotations

import contextlib
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch

import hf_gem
from tests.sweeps.look import ALL, NAME, NO_BUILD, NOTHING, PARTLY, RAISES, SAYS_SO, SILENT, first_line, look

# Parts of names of small models, the smallest first.
_SMALL = ("test", "atto", "femto", "pico", "nano", "tiny", "xxs", "xs", "mini", "small", "18")


def names() -> list[str]:
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
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def _sweep(module: str) -> dict[str, Any]:
    if not timm.list_models(module=module):
        return {"outcome": NOTHING, "example": ""}
    name = example(module)
    row: dict[str, Any] = {"example": name}
    model: Any = None
    raised = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = _build(timm.create_model, name, act_layer=NAME)
        except Exception as error:
            raised = first_line(error)
    if model is None:
        try:
            model = _build(timm.create_model, name)
        except Exception as error:
            return row | {"outcome": NO_BUILD, "why": first_line(error)}
    said = sorted({str(w.message) for w in caught if NAME in str(w.message)})
    seen = look(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if raised:
            model, _ = _build(hf_gem.create_timm_model, name, act=NAME)
        elif seen.others:
            hf_gem.convert(model, NAME)
    after = look(model) if raised or seen.others else seen
    not_all = PARTLY if seen.gem else RAISES if raised else SAYS_SO if said else SILENT
    return row | {
        "outcome": ALL if seen.gem and not seen.others else not_all,
        "raised": raised,
        "said": said,
        "gem": seen.gem,
        "not_run": seen.not_run,
        "stays": [[*other, "call" if other in after.others else "module"] for other in sorted(seen.others)],
        "after_gem": after.gem,
        "after_convert": sorted(map(list, after.others)),
    }


def _build(create: Callable[..., Any], name: str, **kwargs: Any) -> Any:
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        return create(name, **kwargs)
    return create(name, **kwargs)  # some constructors compute numbers with tensors
