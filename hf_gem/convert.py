"""Replacing the activations of a model that is already built: `convert` and `revert`."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from . import conversion
from .audit import ActivationCall, Audit, audit
from .conversion import Slot
from .fit import Fit, Histogram, error, fit, fit_together
from .integrations.transformers import write_plan
from .modules import get_activation
from .spec import GemSpec, parse
from .stock import is_gate, kind, stock_slots

_ALREADY = "there already"


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
            lines += [
                f"    {r.path}: {r.unfitted_error:.3g} -> {r.fit.error:.3g} {_edge(r.fit)}" for r in fits if r.fit
            ]
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
    chosen, left = _choose(model, None if eps == "fit" else spec, _as_tuple(replace), _as_tuple(skip))
    if not chosen and not any(reason == _ALREADY for *_, reason in left):
        raise ValueError(_nothing_to_replace(model, left, replace, skip))
    batches = list(data) if data is not None else []
    fits: dict[str, tuple[Fit, float]] = {}
    before = None
    if eps == "fit":
        before = _outputs(model, batches[0])
        fits = _fit(model, chosen, spec, "_n" in name.lower(), batches, per_layer)
    replaced = []
    by_name: dict[str, list[Slot]] = {}
    for path, slot in chosen.items():
        fitted, unfitted = fits.get(path, (None, None))
        new = fitted.spec.name if fitted else spec.name
        replaced.append(Replacement(path, _name(slot), new, fitted, unfitted))
        by_name.setdefault(new, []).append(slot)
    conversion.replace(model, by_name, get_activation)
    _write_plans(model)
    change = _relative_change(before, _outputs(model, batches[0])) if before is not None else None
    if inputs is None and batches:
        inputs = batches[0]
    seen, reason = _audit(model, inputs)
    return Conversion(type(model).__name__, tuple(replaced), tuple(left), seen, reason, change)


def revert(model: nn.Module) -> list[str]:
    """Puts back every activation that `convert` replaced, the same objects, and returns their paths."""
    paths = conversion.undo(model)
    _write_plans(model)
    return paths


# ---- what may be converted


def _check(model: nn.Module, name: str, eps: float | str | None, data: Any) -> GemSpec:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}"
            + (" (a class: build it first)" if isinstance(model, type) else "")
            + "; a config is changed with hf_gem.set_activation"
        )
    spec = parse(name)
    if isinstance(eps, str) and eps != "fit":
        raise ValueError(f"eps must be a number or 'fit', got {eps!r}")
    if eps == "fit" and data is None:
        raise ValueError("eps='fit' needs data=, batches to run the model on; a few dozen examples will do")
    if eps is not None and eps != "fit":
        spec = GemSpec(spec.family, spec.n, eps, spec.learnable)  # type: ignore[arg-type]
    for path, module in model.named_modules():
        where = f"{path or 'the model'} is {type(module).__module__}.{type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where}, whose code is fixed; convert the model before scripting or tracing it")
        if "ReLU" in type(module).__name__ and ".ao.nn." in type(module).__module__:
            raise ValueError(f"{where}, a ReLU fused with its layer; convert the model before fusing and quantising it")
        if spec.learnable and _is_wrapper(module):
            raise ValueError(f"{where}, which would not know the new parameters; convert the model before wrapping it")
        if spec.learnable and getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"the weights of {path or 'the model'} are offloaded, where new parameters cannot go; "
                "convert the model before dispatching it"
            )
    return spec


def _is_wrapper(module: nn.Module) -> bool:
    names = {cls.__name__ for cls in type(module).__mro__}
    return bool(names & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"})


def _choose(
    model: nn.Module, spec: GemSpec | None, only: tuple, skip: tuple
) -> tuple[dict[str, Slot], list[tuple[str, str, str]]]:
    """The slots to replace by path, and (path, name, reason) of the others."""
    chosen: dict[str, Slot] = {}
    left = []
    unused = {pattern for pattern in (*only, *skip) if isinstance(pattern, str)}
    found = list(stock_slots(model))
    for slot in found:
        what = kind(slot.occupant) or ""
        by_skip = [s for s in skip if _matches(s, slot)]
        by_name = [s for s in only if (_plain(s) == what if isinstance(s, str) else _matches(s, slot))]
        unused.difference_update(s for s in (*by_skip, *by_name) if isinstance(s, str))
        if by_skip:
            reason = "as asked for by skip="
        elif only and not by_name:
            reason = "not among replace="
        elif not only and is_gate(what):
            reason = "a gate"
        elif spec is not None and getattr(slot.occupant, "spec", None) == spec:
            reason = _ALREADY
        else:
            chosen[slot.path] = slot
            continue
        left.append((slot.path, _name(slot), reason))
    if unused and found:
        kinds = sorted({kind(slot.occupant) or "" for slot in found})
        raise ValueError(
            f"{', '.join(map(repr, sorted(unused)))} matches no activation of {type(model).__name__}; replace= takes "
            f"{', '.join(kinds)} or classes, skip= patterns of paths such as {found[0].path!r}"
        )
    return chosen, left


def _name(slot: Slot) -> str:
    spec = getattr(slot.occupant, "spec", None)
    return spec.name if isinstance(spec, GemSpec) else kind(slot.occupant) or ""


def _as_tuple(wanted: Any) -> tuple:
    if wanted is None:
        return ()
    return (wanted,) if isinstance(wanted, (str, type)) else tuple(wanted)


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _matches(wanted: str | type, slot: Slot) -> bool:
    if isinstance(wanted, str):
        return fnmatchcase(slot.path, wanted) or slot.path.startswith(f"{wanted}.")
    return isinstance(slot.occupant, wanted)


def _nothing_to_replace(model: nn.Module, left: list[tuple[str, str, str]], replace: Any, skip: Any) -> str:
    name = type(model).__name__
    if left:
        found = ", ".join(sorted({f"{what} ({reason})" for _, what, reason in left}))
        return f"nothing to replace in {name}: it has {found}; got replace={replace!r}, skip={skip!r}"
    seen, reason = _audit(model, None)
    if seen is None:
        return (
            f"{name} has no activation modules and no attributes that hold one; what it hard-codes is unknown: {reason}"
        )
    calls = ", ".join(f"{call.function} at {call.location}" for call in seen.others) or "none that runs"
    return f"{name} has no activation modules and no attributes that hold one; its own code calls {calls}"


# ---- what goes with a conversion


def _write_plans(model: nn.Module) -> None:
    """Into the config of every transformers model in here that is not a part of another."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel)]
    outer: list[str] = []
    for path, module in found:  # outer ones come first
        if not any(path.startswith(f"{o}.") or o == "" for o in outer):
            outer.append(path)
            write_plan(module)


def _audit(model: nn.Module, batch: Any) -> tuple[Audit | None, str]:
    args, kwargs = _arguments(batch) if batch is not None else ((), {})
    try:
        return audit(model, *args, **kwargs), ""
    except Exception as error:  # the model is converted whether or not it runs here
        return None, f"{type(error).__name__}: {error}"


# ---- running a model on data


def _arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise TypeError(f"a batch is a tensor, a tuple of arguments or a dict of keyword ones, got {type(batch).__name__}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """The floating-point tensors that a model returns for a batch."""
    args, kwargs = _arguments(batch)
    with _evaluating(model):
        leaves = torch.utils._pytree.tree_leaves(model(*args, **kwargs))
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    change = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    size = sum(float(b.square().sum()) for b in before)
    return (change / size) ** 0.5 if size else float(change > 0)


class _Recorder(nn.Module):
    """Stands in for an activation and counts what enters it."""

    def __init__(self, activation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.recorded = (activation,)  # in a tuple, so that it is put back as it was
        self.histogram = Histogram()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.histogram.update(x)
        return self.recorded[0](x, *args, **kwargs)


def _fit(
    model: nn.Module, chosen: dict[str, Slot], spec: GemSpec, fixed_n: bool, batches: list[Any], per_layer: bool
) -> dict[str, tuple[Fit, float]]:
    """Path -> the fitted member of spec's family, and the error of spec itself."""
    recorders: dict[int, _Recorder] = {}
    occupants = {path: slot.occupant for path, slot in chosen.items()}
    try:
        for path, slot in chosen.items():
            slot.put(recorders.setdefault(id(occupants[path]), _Recorder(occupants[path])))
        for batch in batches:
            args, kwargs = _arguments(batch)
            with _evaluating(model):
                model(*args, **kwargs)
    finally:
        for path, slot in chosen.items():
            slot.put(occupants[path])
    samples = {
        key: (recorder.histogram, _as_function(recorder.recorded[0]))
        for key, recorder in recorders.items()
        if recorder.histogram.num_values
    }
    if not samples:
        raise ValueError("none of the activations ran on data=; give batches that reach them")
    n = spec.n if fixed_n else None
    pooled: dict[str, tuple[Histogram, Callable[..., Tensor]]] = {}
    for histogram, target in samples.values():
        # What prints alike computes alike, unless it has parameters.
        own_state = isinstance(target, nn.Module) and any(True for _ in target.parameters())
        same = f"{target} {id(target) if own_state else ''}"
        before = pooled[same][0] if same in pooled else Histogram()
        pooled[same] = before + histogram, target
    common = fit_together(pooled.values(), spec.family, n=n)
    found: dict[int, tuple[Fit, float]] = {}
    for key in recorders:
        if key not in samples:  # it did not run
            found[key] = dataclasses.replace(common, error=math.nan, relative_error=math.nan), math.nan
        elif per_layer:
            found[key] = fit(*samples[key], spec.family, n=n), error(spec, *samples[key])
        else:
            own, relative = (error(common.spec, *samples[key], relative=r) for r in (False, True))
            found[key] = dataclasses.replace(common, error=own, relative_error=relative), error(spec, *samples[key])
    return {
        path: (dataclasses.replace(best, spec=dataclasses.replace(best.spec, learnable=spec.learnable)), unfitted)
        for path, occupant in occupants.items()
        for best, unfitted in [found[id(occupant)]]
    }


def _as_function(activation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if not isinstance(activation, nn.Module):
        return activation
    return copy.deepcopy(activation).to("cpu", torch.float64).eval()


def _edge(found: Fit) -> str:
    return f"({found.spec.name}; eps is at the edge of its range)" if found.at_edge else f"({found.spec.name})"


def _some(paths: list[str], most: int = 4) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")
