"""Replacing the activations of a model that is already built: `convert` and `revert`."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from . import conversion
from .audit import ActivationCall, Audit, audit
from .conversion import Slot
from .fit import DEFAULT_EPS_RANGE, Fit, Statistics, error, fit
from .integrations.transformers import write_plan
from .modules import GemActivation
from .spec import GemSpec, parse
from .stock import is_gate, kind, stock_slots


@dataclass(frozen=True)
class Replacement:
    """One activation that was replaced.

    Attributes:
        path: Dotted path of the module or attribute.
        old: What it was, such as `relu`.
        new: The name that is there now.
        fit: With `eps="fit"`, how well the new one matches the old one on the data.
        unfitted_error: With `eps="fit"`, the expected squared difference at the n and eps of the given name.
    """

    path: str
    old: str
    new: str
    fit: Fit | None = None
    unfitted_error: float | None = None


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        replaced: One entry for each path.
        left: (path, kind, reason) of the activations that were found and not replaced.
        audit: One forward pass of the converted model, or None where none could be run.
        not_audited: The reason for None.
        output_change: With `eps="fit"`: relative root-mean-square change of the model's output on the first batch.
    """

    model: str
    replaced: tuple[Replacement, ...]
    left: tuple[tuple[str, str, str], ...]
    audit: Audit | None
    not_audited: str = ""
    output_change: float | None = None

    @property
    def unreached(self) -> tuple[ActivationCall, ...]:
        """The activations that still ran: hard-coded calls, and those in `left`. Known only after an audit."""
        return self.audit.others if self.audit is not None else ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            **dataclasses.asdict(dataclasses.replace(self, audit=None)),
            "replaced": [
                {**dataclasses.asdict(r), "fit": r.fit and {**dataclasses.asdict(r.fit), "spec": r.fit.spec.name}}
                for r in self.replaced
            ],
            "audit": self.audit and self.audit.to_dict(),
        }

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.replaced)} activations replaced"]
        groups: dict[tuple[str, str], list[str]] = {}
        for r in self.replaced:
            groups.setdefault((r.old, r.new), []).append(r.path)
        lines += [f"  {old} -> {new}: {_some(paths)}" for (old, new), paths in groups.items()]
        fits = [r for r in self.replaced if r.fit is not None]
        if fits:
            lines.append("  expected squared difference from the old activation, at the given name -> fitted:")
            lines += [f"    {r.path}: {r.unfitted_error:.3g} -> {r.fit.error:.3g} {_edge(r.fit)}" for r in fits if r.fit]
        if self.output_change is not None:
            lines.append(f"  relative change of the output on the first batch: {self.output_change:.3g}")
        left: dict[tuple[str, str], list[str]] = {}
        for path, what, reason in self.left:
            left.setdefault((what, reason), []).append(path)
        lines += [f"  left alone, {reason}: {what} at {_some(paths)}" for (what, reason), paths in left.items()]
        if self.audit is None:
            lines.append(f"  what else runs is unknown, no forward pass was possible: {self.not_audited}")
        else:
            lines.append(str(self.audit))
        return "\n".join(lines)


def convert(
    model: nn.Module,
    name: str,
    *,
    replace: Any = None,
    skip: Any = None,
    eps: float | str | None = None,
    data: Iterable[Any] | None = None,
    per_layer: bool = False,
    inputs: Any = None,
) -> Conversion:
    """Replaces the activations of a model, in place, and reports which, and what it could not reach.

    Found are submodules, in containers too, and attributes that hold a function, such as `self.act = F.gelu`. A call
    that is written into a forward method cannot be replaced; the audit at the end lists it. Layers that share a module
    go on sharing one, except that a learnable eps belongs to one place. `hf_gem.revert` undoes all of it.

    A transformers model takes the conversion along in its config: saved with `save_pretrained`, it is converted again
    when it is loaded, before its weights are. So does a timm model through `save_for_hf`.

    Args:
        model: Any model, of transformers and timm too; before it is scripted, and for a learnable eps before it is
            wrapped by DDP or FSDP and before its optimizer is made.
        name: Of the family.
        replace: Which activations to replace: names such as `"relu"` or module classes, one or several. By default all
            except gates (sigmoid, tanh, softplus and their like).
        skip: Which to leave: patterns of paths such as `"*.pooler.*"`, or module classes, one or several.
        eps: A number in place of the one in the name; or `"fit"`, to choose it, and n unless the name gives one, such
            that the expected squared difference from the replaced activation is smallest on `data`.
        data: Batches for `eps="fit"`: tensors, tuples of positional or dicts of keyword arguments of the model. They
            are run without gradients, in the mode the model is in.
        per_layer: Fit each activation by itself; otherwise one eps for the whole model.
        inputs: A batch for the forward pass of the audit; by default the first one of `data`, or one made up on the
            meta device where the model allows it.

    Returns:
        The report. Print it.

    Raises:
        TypeError: `model` is not a module, or `name` not a string.
        ValueError: the name is malformed, nothing was found to replace, `replace` names an unknown activation, or the
            model is one that cannot be converted (scripted, quantised with fused activations, ...). Nothing is changed.
    """
    spec = _check(model, name, eps, data)
    chosen, left = _choose(model, _as_tuple(replace), _as_tuple(skip))
    if not chosen:
        raise ValueError(_nothing_to_replace(model, left, replace, skip))
    batches = list(data) if data is not None else []
    fits: dict[str, tuple[Fit, float]] = {}
    before = None
    if eps == "fit":
        before = _outputs(model, batches[0])
        fits = _fit(model, chosen, spec, "_n" in name.lower(), batches, per_layer)
    kinds = {slot.path: kind(slot.occupant) or "" for slot in chosen}
    names = {slot.path: fits[slot.path][0].spec.name if fits else spec.name for slot in chosen}
    by_name: dict[str, list[Slot]] = {}
    for slot in chosen:
        by_name.setdefault(names[slot.path], []).append(slot)
    conversion.replace(by_name)
    _forget_compiled_code(model)
    _write_plans(model)
    change = _relative_change(before, _outputs(model, batches[0])) if before is not None else None
    if inputs is None and batches:
        inputs = batches[0]
    seen, reason = _audit(model, inputs)
    return Conversion(
        type(model).__name__,
        tuple(Replacement(s.path, kinds[s.path], names[s.path], *fits.get(s.path, (None, None))) for s in chosen),
        tuple(left),
        seen,
        reason,
        change,
    )


def revert(model: nn.Module) -> list[str]:
    """Puts back every activation that `convert` replaced, the same objects, and returns their paths."""
    paths = conversion.undo(model)
    _forget_compiled_code(model)
    _write_plans(model)
    return paths
