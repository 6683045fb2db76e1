"""Replacing the activations of a model that is already built: `convert` and `revert`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..family.names import GemSpec, is_name, parse
from ..files import to_json
from ..fit import MATCH_C, Fit
from .audit import Audit, audit
from .calibrate import Calibration, calibrate, replace_all
from .configs import own_config, write_plan, write_plan_of_diffusers
from .kinds import describe, is_elementwise, is_gate, kind, stock_slots
from .reports import places
from .running import arguments
from .scales import check_match, match
from .slots import Slot, spec_of, undo
from .tracer import ActivationCall

_Wanted = tuple[str | type, ...]  # names or patterns, and classes
_ALREADY = "there already"
_MOST = 5  # lines of a kind in a report
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
_QUANTISED = ("torch.ao.nn.quantized.modules", "torch.ao.nn.intrinsic.quantized.modules")
_NOT_QUANTISED = ("FloatFunctional", "PackedParams", "Embedding", "EmbeddingBag")  # the last two are so in storage only


@dataclass(frozen=True)
class Replacement:
    """One activation that was replaced.

    Attributes:
        path: Dotted path of the module or attribute.
        old: What it was, such as `relu`.
        new: The name that is there now.
        fit: With `eps="fit"`, how well the new one matches the old one on the data; None where these did not reach it.
        unfitted_error: With `eps="fit"`, the expected squared difference at the n and eps of the given name.
        rms: With `eps="match"`, root mean square of what it was given; None where the data did not reach it.
    """

    path: str
    old: str
    new: str
    fit: Fit | None = None
    unfitted_error: float | None = None
    rms: float | None = None


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        replaced: One entry for each path.
        left: (path, kind, reason) of the activations that were found and not replaced.
        audit: One forward pass of the converted model, or None where none could be run.
        not_audited: The reason for None.
        output_change: With `eps="fit"`: relative root-mean-square change of the model's output on the first batch;
            None where the two outputs cannot be compared.
        unfitted_output_change: The same with the given name everywhere.
        rms: With `eps="match"`, root mean square of what all activations were given.
        c: With `eps="match"`, the half point of the gate in units of the rms.
    """

    model: str
    replaced: tuple[Replacement, ...]
    left: tuple[tuple[str, str, str], ...]
    audit: Audit | None
    not_audited: str = ""
    output_change: float | None = None
    unfitted_output_change: float | None = None
    rms: float | None = None
    c: float | None = None

    @property
    def unreached(self) -> tuple[ActivationCall, ...]:
        """The activations that still ran: hard-coded calls, and those in `left`. Known only after an audit."""
        return self.audit.others if self.audit is not None else ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; NaN and infinity, which JSON lacks, as None."""
        report = {
            **dataclasses.asdict(dataclasses.replace(self, audit=None)),
            "replaced": [
                {**dataclasses.asdict(r), "fit": r.fit and {**dataclasses.asdict(r.fit), "spec": r.fit.spec.name}}
                for r in self.replaced
            ],
            "audit": self.audit and self.audit.to_dict(),
        }
        values: dict[str, Any] = json.loads(to_json(report))
        return values

    def _about_eps(self) -> list[str]:
        """What eps was chosen by, for the activations with the largest of it; no lines where it was given."""
        rows: list[tuple[float, str]] = []
        for r in self.replaced:
            if r.rms is not None:
                rows.append((r.rms, f"{r.path}: rms {r.rms:.3g} -> {r.new}"))
            elif r.fit is not None:
                rows.append((r.fit.error, f"{r.path}: {r.unfitted_error:.3g} -> {r.fit.error:.3g} {_edge(r.fit)}"))
        if not rows:
            return []
        title = "expected squared difference from the old activation, at the given name -> fitted:"
        if self.c is not None:
            title = f"eps = (c rms)^(2n) with c = {self.c:g} and the rms of what is given, {self.rms:.3g} over all:"
        rows.sort(key=lambda row: -row[0])
        lines = [title, *(f"  {row}" for _, row in rows[:_MOST])]
        if len(rows) > _MOST:
            lines.append(f"  and {len(rows) - _MOST} more, none larger; to_dict() has all")
        unseen = [r.path for r in self.replaced if r.fit is None and r.rms is None]
        return lines + ([f"not reached by data=, so given the eps of all: {places(unseen)}"] if unseen else [])

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.replaced)} activations replaced"]
        groups: dict[tuple[str, str], list[str]] = {}
        columns = zip(_families([r.old for r in self.replaced]), _families([r.new for r in self.replaced]), strict=True)
        for r, key in zip(self.replaced, columns, strict=True):
            groups.setdefault(key, []).append(r.path)
        lines += [f"  {old} -> {new}: {places(paths)}" for (old, new), paths in groups.items()]
        lines += [f"  {line}" for line in self._about_eps()]
        if self.output_change is not None:
            lines.append(
                "  relative change of the output on the first batch, at the given name -> fitted: "
                f"{self.unfitted_output_change:.3g} -> {self.output_change:.3g}"
            )
        left: dict[tuple[str, str], list[str]] = {}
        for path, what, reason in self.left:
            left.setdefault((what, reason), []).append(path)
        lines += [f"  left alone, {reason}: {what}, {places(paths)}" for (what, reason), paths in left.items()]
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
    fit_to: str = "output",
    c: float = MATCH_C,
    inputs: Any = None,
) -> Conversion:
    """Replaces the activations of a model, in place, and reports which, and what it could not reach.

    Found are submodules, in containers too, and attributes that hold a function, such as `self.act = F.gelu`. A call
    that is written into a forward method cannot be replaced; the audit at the end lists it. Layers that share a module
    go on sharing one, except that a learnable eps belongs to one place. `hf_gem.revert` undoes all of it.
    Hooks of a module that is replaced stay with it. What stands in its place never overwrites its input: a model that
    ignores the output of `ReLU(inplace=True)` and goes on with the input computes something else.

    A transformers model takes the conversion along in its config: saved with `save_pretrained`, it is converted again
    when it is loaded, before its weights are. So does a timm model through `save_for_hf`.

    Args:
        model: Any model, of transformers and timm too; before it is scripted, and for a learnable eps before it is
            wrapped by DDP or FSDP and before its optimizer is made.
        name: Of the family.
        replace: Which activations to replace: names such as `"relu"` or module classes, any of your own too, one or
            several. By default all with a usual name, except gates (sigmoid, tanh, softplus and their like).
        skip: Which to leave: patterns of paths such as `"*.pooler.*"`, or module classes, one or several.
        eps: A number in place of the one in the name; or `"fit"`, to choose it, and n unless the name gives one, such
            that the model changes least on `data`; or `"match"`, for a model that is still to be trained:
            `(c rms)^(2n)`, rms being the root mean square of what the activations are given on `data`.
        data: Batches for `eps="fit"` and `"match"`: tensors, tuples of positional or dicts of keyword arguments of the
            model, on its device; any iterable, which is read once. They are run in evaluation mode, without gradients;
            for `"match"`, batch normalisation takes the statistics of the batch, as in training.
        per_layer: With `eps="fit"` or `"match"`, a member for each activation; otherwise one for the whole model, with
            the rms of all values that all activations are given.
        fit_to: What `eps="fit"` makes smallest. `"output"`: the change of the model's output, all the floating-point
            tensors in it, on the first batch, over some 50 runs of it; with `per_layer` and 4 more for each layer,
            starting from one member for all. `"activations"`: the expected squared difference from what is replaced,
            over the values that reach it in all batches, which takes 5 runs of the first one and can change the output
            more than the given name would; the report has both changes.
        c: With `eps="match"`, where the gate is half open, in units of the rms.
        inputs: A batch for the forward pass of the audit; by default the first one of `data`, or one made up on the
            meta device where the model allows it.

    Returns:
        The report. Print it.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the name is malformed, nothing was found to replace, `replace` or `skip` matches nothing, the model
            does not run on `data`, an activation cannot be fitted, what it is given has no scale to match, or the model
            is one that cannot be converted (scripted, computing with quantised tensors, ...). Nothing is changed then.
    """
    spec = _check(model, name, eps, data, per_layer, fit_to, c)
    if inputs is not None:
        arguments(inputs)  # or an error
    chosen, left = _choose(model, None if isinstance(eps, str) else spec, _as_tuple(replace), _as_tuple(skip))
    if not chosen and not any(reason == _ALREADY for *_, reason in left):
        raise ValueError(_nothing_to_replace(model, left, replace, skip, inputs))
    _check_wrappers(model, spec, chosen)
    batches = iter(()) if data is None else iter(data)
    first = next(batches, None)
    if first is None and data is not None:
        raise ValueError("data= holds no batch; a generator can be read only once")
    batches = itertools.chain([] if first is None else [first], batches)
    found = Calibration(dict.fromkeys(chosen, spec))
    if eps == "fit":
        ns = (spec.n,) if "_n" in name.lower() else (1, 2, 3)
        found = calibrate(model, chosen, spec, ns, batches, per_layer, fit_to)
    elif eps == "match":
        found = match(model, chosen, spec, batches, per_layer, c)
    members = {path: dataclasses.replace(m, learnable=spec.learnable) for path, m in found.members.items()}
    layers = found.scales.layers if found.scales else {}
    numbers = [(found.fits.get(path), found.unfitted_errors.get(path), layers.get(path)) for path in chosen]
    names = [(path, describe(slot.occupant), members[path].name) for path, slot in chosen.items()]
    replaced = tuple(Replacement(*name, *number) for name, number in zip(names, numbers, strict=True))
    replace_all(model, chosen, members)
    _write_plans(model)
    seen, reason = _audit(model, first if inputs is None else inputs)
    changes = found.output_change, found.unfitted_output_change
    matched = (found.scales.rms, c) if found.scales else ()
    return Conversion(type(model).__name__, replaced, tuple(left), seen, reason, *changes, *matched)


def revert(model: nn.Module) -> list[str]:
    """Puts back every activation that `convert` replaced, the same objects, and returns their paths.

    One with weights of its own, such as PReLU, comes back on the device and in the dtype that it was replaced on.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; pass the model that was converted"
        )
    paths = undo(model)
    _write_plans(model)
    return paths


# ---- what may be converted


def _check(
    model: nn.Module, name: str, eps: float | str | None, data: Any, per_layer: bool, fit_to: str, c: float
) -> GemSpec:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}"
            + (" (a class: build it first)" if isinstance(model, type) else "")
            + "; a config is changed with hf_gem.set_activation"
        )
    spec = parse(name)
    if fit_to not in ("output", "activations"):
        raise ValueError(f"fit_to must be 'output' or 'activations', got {fit_to!r}")
    chooses = isinstance(eps, str)
    if chooses and eps not in ("fit", "match"):
        raise ValueError(f"eps must be a number, 'fit' or 'match', got {eps!r}")
    if chooses and data is None:
        raise ValueError(f"eps={eps!r} needs data=, batches to run the model on; a few dozen examples will do")
    if eps == "match":
        check_match(spec, c)
    if per_layer and not chooses:
        raise ValueError(f"per_layer=True needs an eps that is chosen by data=: 'fit' or 'match', got eps={eps!r}")
    if c != MATCH_C and eps != "match":
        raise ValueError(f"c={c!r} needs eps='match', got eps={eps!r}; leave it out")
    if isinstance(data, (Tensor, Mapping, str)) or (data is not None and not isinstance(data, Iterable)):
        raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}; write data=[batch] for one")
    if eps is not None and not chooses:
        spec = GemSpec(spec.family, spec.n, eps, spec.learnable)  # type: ignore[arg-type]
    for path, module in model.named_modules():
        home = type(module).__module__
        where = f"{path or 'the model'} is {home}.{type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where}, whose code is fixed; convert the model before scripting or tracing it")
        if "ReLU" in type(module).__name__ and ".ao.nn." in home:
            raise ValueError(f"{where}, a ReLU fused with its layer; convert the model before fusing and quantising it")
        if home.startswith(_QUANTISED) and not type(module).__name__.endswith(_NOT_QUANTISED):
            raise ValueError(f"{where}, which makes quantised tensors; convert the model before quantising it")
        if spec.learnable and getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"the weights of {path or 'the model'} are offloaded, where new parameters cannot go; "
                "convert the model before dispatching it"
            )
    return spec


def _check_wrappers(model: nn.Module, spec: GemSpec, chosen: dict[str, Slot]) -> None:
    """Wrappers that keep account of the parameters: none may come, as a learnable eps, or go, with a PReLU."""
    going = [path for path, slot in chosen.items() if _has_weights(slot)]
    if not spec.learnable and not going:
        return
    for path, module in model.named_modules():
        if {cls.__name__ for cls in type(module).__mro__} & _WRAPPERS:
            what = "the new parameters" if spec.learnable else f"that the parameters of {going[0]} are gone"
            raise ValueError(
                f"{path or 'the model'} is {type(module).__module__}.{type(module).__name__}, which would not know "
                f"{what}; convert the model before wrapping it"
            )


def _has_weights(slot: Slot) -> bool:
    return isinstance(slot.occupant, nn.Module) and any(True for _ in slot.occupant.parameters())


def _choose(
    model: nn.Module, spec: GemSpec | None, only: _Wanted, skip: _Wanted
) -> tuple[dict[str, Slot], list[tuple[str, str, str]]]:
    """The slots to replace by path, and (path, name, reason) of the others."""
    chosen: dict[str, Slot] = {}
    left = []
    unused = {*only, *skip}
    found = list(stock_slots(model, tuple(one for one in only if isinstance(one, type))))
    for slot in found:
        what = kind(slot.occupant) or ""
        by_skip = [s for s in skip if _matches(s, slot)]
        by_name = [s for s in only if (_plain(s) == what if isinstance(s, str) else _matches(s, slot))]
        unused.difference_update(by_skip, by_name)
        if by_skip:
            reason = "as asked for by skip="
        elif only and not by_name:
            reason = "not among replace="
        elif not only and is_gate(what):
            reason = "a gate"
        elif not only and not is_elementwise(slot.occupant):
            reason = "which does more than its name says, unless replace= asks for it"
        elif spec is not None and spec_of(slot.occupant) == spec:
            reason = _ALREADY
        else:
            chosen[slot.path] = slot
            continue
        left.append((slot.path, describe(slot.occupant), reason))
    if unused and found:
        kinds = sorted({kind(slot.occupant) or "" for slot in found})
        raise ValueError(
            f"{', '.join(sorted(map(repr, unused)))} matches no activation of {type(model).__name__}; replace= takes "
            f"{', '.join(kinds)} or classes, skip= patterns of paths such as {found[0].path!r}"
        )
    return chosen, left


def _as_tuple(wanted: Any) -> _Wanted:
    if wanted is None:
        return ()
    several = tuple(wanted) if isinstance(wanted, (list, tuple, set, frozenset)) else (wanted,)
    for one in several:
        if not isinstance(one, (str, type)):
            raise TypeError(f"replace= and skip= take strings and classes, one or several, got {one!r}")
    return several


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _matches(wanted: str | type, slot: Slot) -> bool:
    if isinstance(wanted, str):
        return fnmatchcase(slot.path, wanted) or slot.path.startswith(f"{wanted}.")
    return isinstance(slot.occupant, wanted)


def _nothing_to_replace(
    model: nn.Module, left: list[tuple[str, str, str]], replace: Any, skip: Any, inputs: Any
) -> str:
    name = type(model).__name__
    if kind(model) is not None:
        return f"{name} is an activation itself, with nothing around it; build the other with hf_gem.get_activation"
    if left:
        found = ", ".join(sorted({f"{what} ({reason})" for _, what, reason in left}))
        return f"nothing to replace in {name}: it has {found}; got replace={replace!r}, skip={skip!r}"
    seen, reason = _audit(model, inputs)
    if seen is None:
        return (
            f"{name} has no activation modules and no attributes that hold one; what it hard-codes is unknown: {reason}"
        )
    calls = ", ".join(f"{call.function} at {call.location}" for call in seen.others) or "none that runs"
    return f"{name} has no activation modules and no attributes that hold one; its own code calls {calls}"


# ---- what goes with a conversion


def _write_plans(model: nn.Module) -> None:
    """Into the config of every model of diffusers in here, and of transformers that is not a part of another."""
    if (diffusers := sys.modules.get("diffusers.configuration_utils")) is not None:
        for module in model.modules():
            if isinstance(module, diffusers.ConfigMixin):  # also read where a copy is built, such as an average
                write_plan_of_diffusers(module)
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel)]
    outer: list[str] = []
    for path, module in found:  # outer ones come first
        if not any(path.startswith(f"{o}.") or o == "" for o in outer):
            outer.append(path)
            own_config(module)
            write_plan(module)


def _audit(model: nn.Module, batch: Any) -> tuple[Audit | None, str]:
    args, kwargs = arguments(batch) if batch is not None else ((), {})
    try:
        return audit(model, *args, **kwargs), ""
    except Exception as error:  # the model is converted whether or not it runs here
        return None, f"{type(error).__name__}: {error}"


def _edge(found: Fit) -> str:
    return f"({found.spec.name}; eps is at the edge of its range)" if found.at_edge else f"({found.spec.name})"


def _families(names: list[str]) -> list[str]:
    """The names, those of the family as `egem_*` where there are many, as after a fit for each layer."""
    many = len(set(names)) > _MOST
    return [f"{parse(name).family}_*" if many and is_name(name) else name for name in names]
