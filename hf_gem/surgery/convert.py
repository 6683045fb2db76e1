"""Replaces the activations of a model that has already been built: `convert` and `revert`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..family.names import GemSpec, is_name, parse
from ..files import shown, to_json
from ..fit import MATCH_C, Fit
from .audit import Audit, audit
from .calibrate import Calibration, calibrate, replace_all
from .checks import check_arguments, check_containers, check_wrappers
from .configs import own_config, write_plan, write_plan_of_diffusers
from .fields import nested_configs
from .kinds import call_by_name, describe, foreign_call, is_elementwise, is_gate, kind, stock_slots
from .reports import counted, places
from .running import arguments
from .scales import match
from .slots import Slot, spec_of, undo

_Wanted = tuple[str | type, ...]  # names or patterns, and classes
_ALREADY = "already converted"
_MOST = 5  # the most lines of one kind in a report


@dataclass(frozen=True)
class Replacement:
    """One activation that was replaced.

    Attributes:
        path: Dotted path of the module or attribute.
        old: Kind of the old activation, such as `relu`.
        new: Name of the new activation.
        fit: With `eps="fit"`, how well the new activation matches the old one on the data. None if the data did not
            reach it.
        unfitted_error: With `eps="fit"`, the expected squared difference for the n and eps of the given name.
        rms: With `eps="match"`, the root mean square of its inputs. None if the data did not reach it.
    """

    path: str
    old: str
    new: str
    fit: Fit | None = None
    unfitted_error: float | None = None
    rms: float | None = None


@dataclass(frozen=True)
class Conversion:
    """The report of `convert`.

    Attributes:
        model: Name of the model's class.
        replaced: The replaced activations, one entry per path.
        left: The activations that were found but not replaced, as (path, kind, reason).
        audit: Audit of the converted model, or None if no forward pass was possible.
        not_audited: Reason why there is no audit.
        output_change: With `eps="fit"`, the relative root-mean-square change of the model's output on the first batch.
            None if the outputs before and after cannot be compared.
        unfitted_output_change: With `eps="fit"`, the relative change if the given name is used everywhere.
        rms: With `eps="match"`, the root mean square of the inputs of all activations.
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

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values. NaN and infinity become None, since JSON has neither."""
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
        """Returns lines that explain the choice of eps, largest errors or rms first. Empty if the caller gave eps."""
        rows: list[tuple[float, str]] = []
        for r in self.replaced:
            if r.rms is not None:
                rows.append((r.rms, f"{r.path}: rms {r.rms:.3g} -> {r.new}"))
            elif r.fit is not None:
                rows.append((r.fit.error, f"{r.path}: {r.unfitted_error:.3g} -> {r.fit.error:.3g} {_edge(r.fit)}"))
        if not rows:
            return []
        title = "expected squared difference from the old activation, for the given name -> fitted:"
        if self.c is not None:
            title = f"eps = (c rms)^(2n) with c = {self.c:g} and the rms of the inputs, {self.rms:.3g} over all:"
        rows.sort(key=lambda row: -row[0])
        lines = [title, *(f"  {row}" for _, row in rows[:_MOST])]
        if len(rows) > _MOST:
            lines.append(f"  and {len(rows) - _MOST} more, none larger; to_dict() lists all")
        unseen = [r.path for r in self.replaced if r.fit is None and r.rms is None]
        return lines + ([f"not reached by data=, so they got the common eps: {places(unseen)}"] if unseen else [])

    def __str__(self) -> str:
        lines = [f"{self.model}: {counted(len(self.replaced), 'activation')} replaced"]
        groups: dict[tuple[str, str], list[str]] = {}
        columns = zip(_families([r.old for r in self.replaced]), _families([r.new for r in self.replaced]), strict=True)
        for r, key in zip(self.replaced, columns, strict=True):
            groups.setdefault(key, []).append(r.path)
        lines += [f"  {old} -> {new}: {places(paths)}" for (old, new), paths in groups.items()]
        lines += [f"  {line}" for line in self._about_eps()]
        if self.output_change is not None:
            lines.append(
                "  relative change of the output on the first batch, for the given name -> fitted: "
                f"{self.unfitted_output_change:.3g} -> {self.output_change:.3g}"
            )
        left: dict[tuple[str, str], list[str]] = {}
        for path, what, reason in self.left:
            left.setdefault((what, reason), []).append(path)
        lines += [f"  left alone, {reason}: {what}, {places(paths)}" for (what, reason), paths in left.items()]
        if self.audit is None:
            lines.append(f"  other activations are unknown, because no forward pass was possible: {self.not_audited}")
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
    """Replaces the activations of a model in place. Reports what it replaced, and what it could not reach.

    It finds submodules, also in containers, and attributes that hold a function, such as `self.act = F.gelu`. It cannot
    replace a call that is written into a forward method; the audit at the end lists these calls. Layers that share an
    activation still share one afterwards, unless its eps is learnable. `hf_gem.revert` undoes the conversion.

    In place of a function, the activation becomes a submodule, unless the owner is a container or its class goes
    through `children()`: such a loop would run the activation too. It is then an attribute that `modules()`, `print`,
    torch.fx and TorchScript do not see, and its eps cannot be learnable.

    Hooks stay on the replaced module. The new module never overwrites its input. So the result changes if a model
    ignores the output of `ReLU(inplace=True)` and continues with the input. An activation that its owner's code calls
    with arguments that the family does not take, such as `self.act(x, approximate="tanh")`, is left alone. So is one
    that its owner's code selects by name, as Mamba's `causal_conv1d_fn(..., activation=self.activation)` does.

    The config of a transformers model stores the conversion: a model saved with `save_pretrained` is converted again
    when it is loaded, before its weights are loaded. The same holds for a timm model saved with `save_for_hf`.

    Args:
        model: Any model. Convert it before you script it. For a learnable eps, convert it before you wrap it in DDP or
            FSDP and before you create the optimizer.
        name: A name of the family.
        replace: Activations to replace: one or several names such as `"relu"`, or module classes, including your own.
            By default all that have a usual name, except gates (sigmoid, tanh, softplus and similar functions).
        skip: Activations to leave alone: one or several patterns of paths such as `"*.pooler.*"`, or module classes.
        eps: Number that replaces the eps of the name, or a way to choose it. `"fit"` chooses eps so that the model
            changes least on `data`, and also n unless the name gives it. `"match"` is for a model that you are going to
            train: it sets `(c rms)^(2n)`, where rms is the root mean square of the inputs of the activations on `data`.
        data: Batches for `eps="fit"` and `"match"`: tensors, tuples of positional arguments or dicts of keyword
            arguments, on the device of the model. Any iterable will do; it is read once. The batches run in evaluation
            mode without gradients, but with `"match"`, batch normalisation uses the statistics of the batch, as in
            training.
        per_layer: Whether `eps="fit"` and `"match"` choose for each activation separately. By default all activations
            get the same, chosen from the inputs of all of them.
        fit_to: Quantity that `eps="fit"` minimises. `"output"` is the change of the model's output on the first batch,
            over all its floating-point tensors. This takes some 50 runs of the batch, and 4 more per layer with
            `per_layer`, which starts from one choice for all layers. `"activations"` is the expected squared difference
            between the new and the old activation, over its inputs in all batches. This takes 5 runs of the first
            batch, and may change the output more than the given name would; the report has both changes.
        c: Half point of the gate for `eps="match"`, in units of the rms.
        inputs: Batch for the audit. By default the first batch of `data`, or inputs that are made up on the meta
            device, if the model allows that.

    Returns:
        The report. Print it.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The name is malformed, there is nothing to replace, `replace` or `skip` matches nothing, the model
            does not run on `data`, an activation cannot be fitted, its inputs have no scale to match, or the model
            cannot be converted, for example because it is scripted or computes with quantised tensors. Nothing is
            changed then.
    """
    spec = check_arguments(model, name, eps, data, per_layer, fit_to, c)
    if inputs is not None:
        arguments(inputs)  # raises TypeError
    chosen, left = _choose(model, None if isinstance(eps, str) else spec, _as_tuple(replace), _as_tuple(skip))
    if not chosen and not any(reason == _ALREADY for *_, reason in left):
        raise ValueError(_nothing_to_replace(model, left, inputs))
    check_wrappers(model, spec, chosen)
    check_containers(spec, chosen)
    batches = iter(()) if data is None else iter(data)
    first = next(batches, None)
    if first is None and data is not None:
        raise ValueError(
            "data= contains no batches. At least one is required. Note that a generator can only be read once."
        )
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
    """Undoes `convert`: restores the original activation objects, and returns their paths.

    An activation with weights, such as PReLU, has the device and dtype that it had when it was replaced.

    Args:
        model: The converted model.

    Returns:
        The paths of the restored activations.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"got {type(model).__name__} as model. model must be a torch.nn.Module. Pass the model that you converted."
        )
    paths = undo(model)
    _write_plans(model)
    return paths


# ---- what is replaced


def _choose(
    model: nn.Module, spec: GemSpec | None, only: _Wanted, skip: _Wanted
) -> tuple[dict[str, Slot], list[tuple[str, str, str]]]:
    """Returns path -> slot for the activations to replace, and (path, name, reason) for the others."""
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
            reason = "excluded by skip="
        elif only and not by_name:
            reason = "not in replace="
        elif not only and is_gate(what):
            reason = "a gate"
        elif not only and not is_elementwise(slot.occupant):
            reason = "not elementwise, so only replaced if it is in replace="
        elif spec is not None and spec_of(slot.occupant) == spec:
            reason = _ALREADY
        elif call := foreign_call(slot):
            reason = f"called as {call}, which the family does not take"
        elif call := call_by_name(slot):
            reason = f"its layer passes the name on instead, to {call}"
        else:
            chosen[slot.path] = slot
            continue
        left.append((slot.path, describe(slot.occupant), reason))
    if unused and found:
        kinds = sorted({kind(slot.occupant) or "" for slot in found})
        raise ValueError(
            f"got {', '.join(sorted(map(shown, unused)))}, which matches no activation in {type(model).__name__}. "
            f"replace= takes {', '.join(kinds)}, and skip= takes patterns of paths such as {found[0].path!r}. Correct "
            "it, or leave it out."
        )
    return chosen, left


def _as_tuple(wanted: Any) -> _Wanted:
    if wanted is None:
        return ()
    several = tuple(wanted) if isinstance(wanted, (list, tuple, set, frozenset)) else (wanted,)
    for one in several:
        if not isinstance(one, (str, type)):
            raise TypeError(
                f"got {shown(one)} of type {type(one).__name__} in replace= or skip=. Both take strings and classes, "
                "one or several. Write for example replace='relu'."
            )
    return several


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _matches(wanted: str | type, slot: Slot) -> bool:
    if isinstance(wanted, str):
        return fnmatchcase(slot.path, wanted) or slot.path.startswith(f"{wanted}.")
    return isinstance(slot.occupant, wanted)


def _nothing_to_replace(model: nn.Module, left: list[tuple[str, str, str]], inputs: Any) -> str:
    name = type(model).__name__
    if kind(model) is not None:
        return (
            f"{name} is itself an activation. convert replaces activations inside a model. Build the new activation "
            "with hf_gem.get_activation."
        )
    if left:
        found = ", ".join(sorted({f"{what} ({reason})" for _, what, reason in left}))
        return f"there is nothing to replace in {name}. It has {found}. Change replace= or skip=."
    seen, reason = _audit(model, inputs)
    nothing = f"{name} has no activation modules, and no attributes that hold an activation."
    fix = "Edit the model's code so that it calls an activation module."
    if seen is None:
        return f"{nothing} Calls in its own code are unknown ({reason}). {fix}"
    calls = ", ".join(f"{call.function} at {call.location}" for call in seen.others)
    return (
        f"{nothing} Its own code calls {calls}, which convert cannot replace. {fix}"
        if calls
        else (f"{nothing} Its own code calls none either. There is nothing to convert.")
    )


# ---- storing the conversion


def _write_plans(model: nn.Module) -> None:
    """Writes the plan into the config of every diffusers model, and of every transformers model.

    A part of a transformers model has a config that the whole one does not know if it was converted by itself.
    """
    if (diffusers := sys.modules.get("diffusers.configuration_utils")) is not None:
        for module in model.modules():
            if isinstance(module, diffusers.ConfigMixin):  # its config is also read to build a copy, such as an average
                write_plan_of_diffusers(module)
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return
    written: set[int] = set()
    for module in model.modules():  # outer ones come first
        if isinstance(module, transformers.PreTrainedModel) and id(module.config) not in written:
            own_config(module, root=model)
            write_plan(module)
            written |= {id(config) for config in nested_configs(module.config).values()}


def _audit(model: nn.Module, batch: Any) -> tuple[Audit | None, str]:
    args, kwargs = arguments(batch) if batch is not None else ((), {})
    try:
        return audit(model, *args, **kwargs), ""
    except Exception as error:  # the conversion is complete even if the model does not run here
        return None, f"{type(error).__name__}: {error}"


def _edge(found: Fit) -> str:
    return f"({found.spec.name}; eps is at the edge of its range)" if found.at_edge else f"({found.spec.name})"


def _families(names: list[str]) -> list[str]:
    """Returns the names. If there are many, as after a fit per layer, those of the family are shortened to `egem_*`."""
    many = len(set(names)) > _MOST
    return [f"{parse(name).family}_*" if many and is_name(name) else name for name in names]
