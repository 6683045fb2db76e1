"""Chooses n and eps for a whole model, from the inputs of its activations and the change of its output."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..family.names import GemSpec
from ..family.table import family_named
from ..fit import EPS_RANGE, Fit, Histogram, error, fit, fit_together
from ..modules import get_activation
from .kinds import as_function, describe
from .running import outputs, run
from .slots import Slot, match_nested_tensors, replace

_STEP = 10**0.5  # the ratio of neighbouring eps that are tried on the model
_Sample = tuple[Histogram, Callable[..., Tensor]]


@dataclass(frozen=True)
class Scales:
    """Root mean squares of the inputs of activations. NaN if any value was NaN or infinite.

    Attributes:
        rms: Root mean square of all values that enter any activation. Activations with more values weigh more.
        layers: Path -> root mean square of the inputs of that activation, if it ran. Activations that share a module
            share one value.
    """

    rms: float
    layers: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """The members chosen for a model, and the measurements behind the choice.

    Attributes:
        members: Path -> chosen member.
        fits: Path -> chosen member with its error compared to the old activation. None if the data did not reach the
            activation.
        unfitted_errors: Path -> error of the member that the caller gave.
        output_change: Relative root-mean-square change of the model's output on the first batch. None if the outputs
            before and after cannot be compared.
        unfitted_output_change: Relative change of the output if the given member is used everywhere.
        scales: Measured scales of the inputs, if `eps="match"` measured them.
    """

    members: dict[str, GemSpec]
    fits: dict[str, Fit | None] = field(default_factory=dict)
    unfitted_errors: dict[str, float] = field(default_factory=dict)
    output_change: float | None = None
    unfitted_output_change: float | None = None
    scales: Scales | None = None


def calibrate(
    model: nn.Module,
    slots: dict[str, Slot],
    given: GemSpec,
    ns: tuple[int, ...],
    batches: Iterable[Any],
    per_layer: bool,
    fit_to: str,
) -> Calibration:
    """Finds the members of a family that change a model least if they replace its activations. Replaces nothing itself.

    `fit_to="activations"` minimises the expected squared difference between the new and the old activation, over the
    values that arrive there. These errors may add up through the layers. So `fit_to="output"` minimises the change of
    the model's output on the first batch. Its candidates are the member found above, the given member, and members for
    every n with eps from 1e-6 to 10 in steps of sqrt(10). With `per_layer`, it then tries for one activation after the
    other the member closest to it, the given member, and both neighbours in eps.

    Args:
        model: The model.
        slots: Path -> slot of an activation.
        given: Member that gives the family, and to which the results are compared.
        ns: Values of n to choose from.
        batches: Batches as for `hf_gem.convert`, at least one.
        per_layer: Whether each activation gets its own member.
        fit_to: Either "activations" or "output".

    Returns:
        The chosen members and their errors.

    Raises:
        ValueError: The model does not run on a batch, or an activation is not elementwise.
    """
    given = dataclasses.replace(given, learnable=False)  # its initial state
    batches = iter(batches)
    first = next(batches)
    before = outputs(model, first)
    recorders = record_inputs(model, slots, itertools.chain([first], batches))
    samples, unfitted = _samples(recorders, given)
    common = fit_together(_pooled(recorders, samples), given.family, ns=ns).spec
    own = {path: fit(*sample, given.family, ns=ns).spec if per_layer else common for path, sample in samples.items()}
    members = {path: own.get(path, common) for path in slots}

    changes: dict[tuple[GemSpec, ...], float | None] = {}

    def change(members: dict[str, GemSpec]) -> float | None:
        key = tuple(members[path] for path in slots)
        if key not in changes:
            with put_back(model, slots.values()):
                replace_all(model, slots, members)
                changes[key] = relative_change(before, outputs(model, first))
        return changes[key]

    unfitted_change = change(dict.fromkeys(slots, given))
    if fit_to == "output" and unfitted_change is not None:
        together: dict[int, list[str]] = {}
        for path, recorder in recorders.items():
            together.setdefault(id(recorder), []).append(path)
        members = _settle(change, given, common, ns, members, list(together.values()) if per_layer else [])
    fits = {path: _as_fit(members[path], samples[path]) if path in samples else None for path in slots}
    return Calibration(members, fits, unfitted, change(members), unfitted_change)


def _settle(
    change: Callable[[dict[str, GemSpec]], float | None],
    given: GemSpec,
    common: GemSpec,
    ns: tuple[int, ...],
    own: dict[str, GemSpec],
    groups: list[list[str]],
) -> dict[str, GemSpec]:
    """Returns the members with the smallest `change` among those tried. Each group of paths may get its own."""

    def cost(members: dict[str, GemSpec]) -> float:
        found = change(members)
        return math.inf if found is None or math.isnan(found) else found

    num_steps = round(math.log(EPS_RANGE[1] / EPS_RANGE[0], _STEP))
    grid = [EPS_RANGE[0] * _STEP**k for k in range(num_steps + 1)]
    whole = [given, common, *(_member(given.family, n, eps) for n in ns for eps in grid)]
    members = min((dict.fromkeys(own, member) for member in whole), key=cost)
    least = cost(members)
    for paths in groups:
        now = members[paths[0]]
        near = [_member(now.family, now.n, now.eps * step) for step in (1 / _STEP, _STEP)]
        for member in (own[paths[0]], given, *near):
            trial = {**members, **dict.fromkeys(paths, member)}
            if (found := cost(trial)) < least:
                members, least = trial, found
    return members


def _member(family: str, n: int, eps: float) -> GemSpec:
    """Returns the member with the family's fixed eps, or with this eps, rounded to three digits and put into range."""
    low, high = EPS_RANGE
    if family_named(family).fixed_eps is not None:
        return GemSpec(family, n)
    return GemSpec(family, n, float(f"{min(max(eps, low), high):.3g}"))


def _as_fit(member: GemSpec, sample: _Sample) -> Fit:
    own, relative = (error(member, *sample, relative=flag) for flag in (False, True))
    return Fit(member, own, relative, member.definition.fixed_eps is None and member.eps in EPS_RANGE)


def replace_all(model: nn.Module, slots: dict[str, Slot], members: dict[str, GemSpec]) -> None:
    """Replaces the activation in each slot by its member."""
    by_member: dict[GemSpec, list[Slot]] = {}
    for path, member in members.items():
        by_member.setdefault(member, []).append(slots[path])
    replace(model, by_member, get_activation)


def _samples(recorders: dict[str, Recorder], given: GemSpec) -> tuple[dict[str, _Sample], dict[str, float]]:
    """Returns path -> (recorded values, old activation as a function), and path -> error of the given member."""
    samples: dict[str, _Sample] = {}
    unfitted: dict[str, float] = {}
    for path, recorder in recorders.items():
        if recorder.histogram.num_values:
            try:
                samples[path] = recorder.histogram, as_function(recorder.recorded[0])
                unfitted[path] = error(given, *samples[path])
            except Exception as cause:
                what = describe(recorder.recorded[0])
                raise ValueError(
                    f"cannot fit an activation to the {what} at {path} ({type(cause).__name__}: {cause}). Only "
                    f"elementwise activations can be fitted. Exclude it with skip={path!r}, or pass a number as eps."
                ) from cause
    if not samples:
        raise ValueError(
            "none of the activations ran on data=, or they only received NaN. eps='fit' needs at least one finite "
            "input. Pass batches that reach the activations."
        )
    return samples, unfitted


def record_inputs(
    model: nn.Module, chosen: Mapping[str, Slot], batches: Iterable[Any], batch_statistics: bool = False
) -> dict[str, Recorder]:
    """Runs the batches, and returns path -> a recorder of the inputs. Slots that share a module share a recorder."""
    recorders: dict[str, Recorder] = {}
    shared: dict[int, Recorder] = {}
    for path, slot in chosen.items():
        own = Recorder(slot.occupant)
        recorders[path] = shared.setdefault(id(slot.occupant), own) if isinstance(slot.occupant, nn.Module) else own
    modes = {recorder: getattr(recorder.recorded[0], "training", False) for recorder in recorders.values()}
    with put_back(model, chosen.values()) as stack:
        for recorder, training in modes.items():
            if training:  # outside the model, it does not follow the model's mode
                stack.callback(setattr, recorder.recorded[0], "training", True)
                recorder.recorded[0].training = False  # type: ignore[attr-defined]
        for path, slot in chosen.items():
            slot.put(recorders[path])
        for batch in batches:
            run(model, batch, batch_statistics)
    return recorders


def _pooled(recorders: dict[str, Recorder], samples: dict[str, _Sample]) -> Iterable[_Sample]:
    """Merges the samples of equal functions, which saves time and changes nothing else."""
    probe = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cpu").view(torch.bfloat16).double()
    distinct = {id(recorders[path]): sample for path, sample in samples.items()}  # a shared module counts once
    pooled: dict[bytes, _Sample] = {}
    for histogram, target in distinct.values():
        with torch.no_grad():
            values = target(probe.clone()).to(probe).numpy().tobytes()
        before = pooled[values][0] if values in pooled else Histogram()
        pooled[values] = before + histogram, target
    return pooled.values()


def relative_change(before: list[Tensor], after: list[Tensor]) -> float | None:
    """Returns the rms of the change relative to that of `before`, over finite values. None if the shapes differ."""
    if [b.shape for b in before] != [a.shape for a in after]:
        return None
    change = size = 0.0
    for b, a in zip(before, after, strict=True):
        kept = b.isfinite()
        if not kept.all():  # for example, masked scores are infinite
            a, b = a[kept], b[kept]
        wide = torch.promote_types(b.dtype, torch.float32)
        change += float((a.to(wide) - b.to(wide)).square().sum(dtype=torch.float64))
        size += float(b.to(wide).square().sum(dtype=torch.float64))
    return (change / size) ** 0.5 if size else float(change > 0)


@contextlib.contextmanager
def put_back(model: nn.Module, slots: Iterable[Slot]) -> Iterator[contextlib.ExitStack]:
    """Returns a context that restores the occupants of slots when it ends, unless the stack is emptied."""
    with contextlib.ExitStack() as stack:
        stack.callback(match_nested_tensors, model)
        for slot in slots:
            stack.callback(slot.put, slot.occupant)
        yield stack


class Recorder(nn.Module):
    """Replaces an activation temporarily, and counts its inputs in `histogram`."""

    def __init__(self, activation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.recorded = (activation,)  # in a tuple, so that it does not become a submodule
        self.histogram = Histogram()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.histogram.update(x)
        return self.recorded[0](x, *args, **kwargs)
