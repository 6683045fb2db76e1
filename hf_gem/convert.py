"""Replacing the activations of a model that is already built: `convert` and `revert`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from . import conversion
from .audit import ActivationCall, Audit, audit, copied_buffers, evaluating, path_patterns, unwrapped
from .conversion import Slot
from .fit import Fit, Histogram, error, fit, fit_together
from .integrations.transformers import write_plan
from .modules import get_activation
from .spec import GemSpec, is_name, parse
from .stock import is_gate, kind, stock_slots

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
        output_change: With `eps="fit"`: relative root-mean-square change of the model's output on the first batch;
            None where the two outputs cannot be compared.
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
        """The report as JSON values; NaN and infinity, which JSON lacks, as None."""
        report = {
            **dataclasses.asdict(dataclasses.replace(self, audit=None)),
            "replaced": [
                {**dataclasses.asdict(r), "fit": r.fit and {**dataclasses.asdict(r.fit), "spec": r.fit.spec.name}}
                for r in self.replaced
            ],
            "audit": self.audit and self.audit.to_dict(),
        }
        return torch.utils._pytree.tree_map(
            lambda value: None if isinstance(value, float) and not math.isfinite(value) else value, report
        )

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.replaced)} activations replaced"]
        groups: dict[tuple[str, str], list[str]] = {}
        columns = zip(_families([r.old for r in self.replaced]), _families([r.new for r in self.replaced]), strict=True)
        for r, key in zip(self.replaced, columns, strict=True):
            groups.setdefault(key, []).append(r.path)
        lines += [f"  {old} -> {new}: {_places(paths)}" for (old, new), paths in groups.items()]
        fits = [(r.path, r.unfitted_error, r.fit) for r in self.replaced if r.fit is not None]
        fits.sort(key=lambda row: -row[2].error)
        if fits:
            lines.append("  expected squared difference from the old activation, at the given name -> fitted:")
            lines += [f"    {path}: {old:.3g} -> {fit.error:.3g} {_edge(fit)}" for path, old, fit in fits[:_MOST]]
            if len(fits) > _MOST:
                lines.append(f"    and {len(fits) - _MOST} more, none larger; to_dict() has all")
            unseen = [r.path for r in self.replaced if r.fit is None]
            lines += [f"  not reached by data=, so given the eps of all: {_places(unseen)}"] if unseen else []
        if self.output_change is not None:
            lines.append(f"  relative change of the output on the first batch: {self.output_change:.3g}")
        left: dict[tuple[str, str], list[str]] = {}
        for path, what, reason in self.left:
            left.setdefault((what, reason), []).append(path)
        lines += [f"  left alone, {reason}: {what}, {_places(paths)}" for (what, reason), paths in left.items()]
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
    Hooks of a module that is replaced stay with it. What stands in its place never overwrites its input: a model that
    ignores the output of `ReLU(inplace=True)` and goes on with the input computes something else.

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
        data: Batches for `eps="fit"`: tensors, tuples of positional or dicts of keyword arguments of the model, on its
            device; any iterable, which is read once. They are run in evaluation mode, without gradients.
        per_layer: With `eps="fit"`, fit each activation by itself; otherwise one eps for the whole model.
        inputs: A batch for the forward pass of the audit; by default the first one of `data`, or one made up on the
            meta device where the model allows it.

    Returns:
        The report. Print it.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the name is malformed, nothing was found to replace, `replace` or `skip` matches nothing, the model
            does not run on `data`, an activation cannot be fitted, or the model is one that cannot be converted
            (scripted, computing with quantised tensors, ...). Nothing is changed then.
    """
    spec = _check(model, name, eps, data, per_layer)
    if inputs is not None:
        _arguments(inputs)  # or an error
    chosen, left = _choose(model, None if eps == "fit" else spec, _as_tuple(replace), _as_tuple(skip))
    if not chosen and not any(reason == _ALREADY for *_, reason in left):
        raise ValueError(_nothing_to_replace(model, left, replace, skip, inputs))
    _check_wrappers(model, spec, chosen)
    batches = iter(()) if data is None else iter(data)
    first = next(batches, None)
    if first is None and data is not None:
        raise ValueError("data= holds no batch; a generator can be read only once")
    replaced = [Replacement(path, _name(slot), spec.name) for path, slot in chosen.items()]
    before = change = None
    if eps == "fit":
        before = _outputs(model, first)
        fixed_n = "_n" in name.lower()
        replaced = _fit(model, chosen, replaced, spec, fixed_n, itertools.chain([first], batches), per_layer)
    by_name: dict[str, list[Slot]] = {}
    for r in replaced:
        by_name.setdefault(r.new, []).append(chosen[r.path])
    with _put_back(model, chosen.values()) as stack:
        conversion.replace(model, by_name, get_activation)
        if before is not None:
            change = _relative_change(before, _outputs(model, first))
        stack.pop_all()
    _write_plans(model)
    seen, reason = _audit(model, first if inputs is None else inputs)
    return Conversion(type(model).__name__, tuple(replaced), tuple(left), seen, reason, change)


def revert(model: nn.Module) -> list[str]:
    """Puts back every activation that `convert` replaced, the same objects, and returns their paths.

    One with weights of its own, such as PReLU, comes back on the device and in the dtype that it was replaced on.
    """
    paths = conversion.undo(model)
    _write_plans(model)
    return paths


# ---- what may be converted


def _check(model: nn.Module, name: str, eps: float | str | None, data: Any, per_layer: bool) -> GemSpec:
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
    if per_layer and eps != "fit":
        raise ValueError(f"per_layer=True is about fitting: it needs eps='fit' and data=, got eps={eps!r}")
    if isinstance(data, (Tensor, Mapping, str)) or (data is not None and not isinstance(data, Iterable)):
        raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}; write data=[batch] for one")
    if eps is not None and eps != "fit":
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
    going = [path for path, slot in chosen.items() if isinstance(slot.occupant, nn.Module) and _has_weights(slot)]
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
    model: nn.Module, spec: GemSpec | None, only: tuple, skip: tuple
) -> tuple[dict[str, Slot], list[tuple[str, str, str]]]:
    """The slots to replace by path, and (path, name, reason) of the others."""
    chosen: dict[str, Slot] = {}
    left = []
    unused = {*only, *skip}
    found = list(stock_slots(model))
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
        elif spec is not None and getattr(slot.occupant, "spec", None) == spec:
            reason = _ALREADY
        else:
            chosen[slot.path] = slot
            continue
        left.append((slot.path, _name(slot), reason))
    if unused and found:
        kinds = sorted({kind(slot.occupant) or "" for slot in found})
        raise ValueError(
            f"{', '.join(sorted(map(repr, unused)))} matches no activation of {type(model).__name__}; replace= takes "
            f"{', '.join(kinds)} or classes, skip= patterns of paths such as {found[0].path!r}"
        )
    return chosen, left


def _name(slot: Slot) -> str:
    spec = getattr(slot.occupant, "spec", None)
    return spec.name if isinstance(spec, GemSpec) else kind(slot.occupant) or ""


def _as_tuple(wanted: Any) -> tuple:
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


def _run(model: nn.Module, batch: Any) -> Any:
    """What a model returns for a batch, which leaves no trace on it: no statistics, flags or caches."""
    args, kwargs = _arguments(batch)
    model = unwrapped(model)
    try:
        with evaluating(model):
            return torch.func.functional_call(model, copied_buffers(model), args, kwargs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on a batch of data= ({type(error).__name__}: {error}); a batch is a "
            "tensor, a tuple of the positional or a dict of the keyword arguments of the model, on its device"
        ) from error


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """The floating-point tensors that a model returns for a batch."""
    leaves = torch.utils._pytree.tree_leaves(_run(model, batch))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _relative_change(before: list[Tensor], after: list[Tensor]) -> float | None:
    if [b.shape for b in before] != [a.shape for a in after]:
        return None
    change = size = 0.0
    for b, a in zip(before, after, strict=True):
        kept = b.isfinite()  # without masked scores
        wide = torch.promote_types(b.dtype, torch.float32)
        change += float((a[kept].to(wide) - b[kept].to(wide)).square().sum(dtype=torch.float64))
        size += float(b[kept].to(wide).square().sum(dtype=torch.float64))
    return (change / size) ** 0.5 if size else float(change > 0)


@contextlib.contextmanager
def _put_back(model: nn.Module, slots: Iterable[Slot]) -> Iterator[contextlib.ExitStack]:
    """Puts the occupants of slots back on leaving, unless the stack is emptied."""
    with contextlib.ExitStack() as stack:
        stack.callback(conversion.match_nested_tensors, model)
        for slot in slots:
            stack.callback(slot.put, slot.occupant)
        yield stack


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
    model: nn.Module,
    chosen: dict[str, Slot],
    replaced: list[Replacement],
    spec: GemSpec,
    fixed_n: bool,
    batches: Iterable[Any],
    per_layer: bool,
) -> list[Replacement]:
    """What replaces each one: of spec's family, the member closest to it or to all of them."""
    recorders = _record(model, chosen, batches)
    samples: dict[str, tuple[Histogram, Callable[..., Tensor]]] = {}
    unfitted: dict[str, float] = {}
    for path, recorder in recorders.items():
        if recorder.histogram.num_values:
            try:
                samples[path] = recorder.histogram, _as_function(recorder.recorded[0])
                unfitted[path] = error(spec, *samples[path])
            except Exception as cause:
                raise ValueError(
                    f"the {_name(chosen[path])} at {path} is not one function of a number, and no other can be fitted "
                    f"to it ({type(cause).__name__}: {cause}); leave it out with skip={path!r}, or give a number as eps"
                ) from cause
    if not samples:
        raise ValueError("none of the activations ran on data=, or on NaN only; give batches that reach them")
    n = spec.n if fixed_n else None
    common = fit_together(_pooled(recorders, samples), spec.family, n=n)
    result = []
    for r in replaced:
        found = None
        if r.path in samples and per_layer:
            found = fit(*samples[r.path], spec.family, n=n)
        elif r.path in samples:
            own, relative = (error(common.spec, *samples[r.path], relative=flag) for flag in (False, True))
            found = dataclasses.replace(common, error=own, relative_error=relative)
        member = dataclasses.replace((found or common).spec, learnable=spec.learnable)
        found = found and dataclasses.replace(found, spec=member)
        result.append(dataclasses.replace(r, new=member.name, fit=found, unfitted_error=unfitted.get(r.path)))
    return result


def _record(model: nn.Module, chosen: dict[str, Slot], batches: Iterable[Any]) -> dict[str, _Recorder]:
    """Runs the batches; path -> what was recorded there, in one recorder where one module is shared."""
    recorders: dict[str, _Recorder] = {}
    shared: dict[int, _Recorder] = {}
    for path, slot in chosen.items():
        own = _Recorder(slot.occupant)
        recorders[path] = shared.setdefault(id(slot.occupant), own) if isinstance(slot.occupant, nn.Module) else own
    modes = {recorder: getattr(recorder.recorded[0], "training", False) for recorder in recorders.values()}
    with _put_back(model, chosen.values()) as stack:
        for recorder, training in modes.items():
            if training:  # out of the model, it does not follow the model's mode
                stack.callback(setattr, recorder.recorded[0], "training", True)
                recorder.recorded[0].training = False  # type: ignore[attr-defined]
        for path, slot in chosen.items():
            slot.put(recorders[path])
        for batch in batches:
            _run(model, batch)
    return recorders


def _pooled(
    recorders: dict[str, _Recorder], samples: dict[str, tuple[Histogram, Callable[..., Tensor]]]
) -> Iterable[tuple[Histogram, Callable[..., Tensor]]]:
    """The samples, those of equal functions as one: it takes less time, and nothing else changes."""
    probe = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cpu").view(torch.bfloat16).double()
    distinct = {id(recorders[path]): sample for path, sample in samples.items()}  # one for a shared module
    pooled: dict[bytes, tuple[Histogram, Callable[..., Tensor]]] = {}
    for histogram, target in distinct.values():
        with torch.no_grad():
            values = target(probe.clone()).to(probe).numpy().tobytes()
        before = pooled[values][0] if values in pooled else Histogram()
        pooled[values] = before + histogram, target
    return pooled.values()


def _as_function(activation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if not isinstance(activation, nn.Module):
        return activation
    return copy.deepcopy(activation).to("cpu", torch.float64).eval().forward  # not its hooks


def _edge(found: Fit) -> str:
    return f"({found.spec.name}; eps is at the edge of its range)" if found.at_edge else f"({found.spec.name})"


def _families(names: list[str]) -> list[str]:
    """The names, those of the family as `egem_*` where there are many, as after a fit for each layer."""
    many = len(set(names)) > _MOST
    return [f"{parse(name).family}_*" if many and is_name(name) else name for name in names]


def _places(paths: list[str]) -> str:
    return f"{len(paths)} at {path_patterns(paths)}"
