"""Audit: runs one forward pass, and counts, names and locates every activation that really runs.

A config says which activation was requested, not which one runs: some blocks hard-code `F.gelu`, and some layers never
read the field. So the audit watches the operations themselves, with a `TorchDispatchMode`.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._kernels.replaceable import is_replaced
from .._torch import tree_leaves, uncompiled
from ..modules import CALLED, GemActivation
from .inputs import example_inputs
from .kinds import is_stock
from .reports import counted, path_patterns, without_indices
from .running import copied_buffers, unwrapped
from .slots import named_modules
from .tracer import ActivationCall, is_activation, trace


@dataclasses.dataclass(frozen=True)
class Audit:
    """The result of `audit`. Print it for a table.

    Attributes:
        calls: All activation calls, in the order in which each first ran.
        not_run: Paths of the activation modules that did not run.
        stock_not_run: Paths in `not_run` of activations outside the family, without gates.
        overwritten: In-place operations on the output of an activation.
    """

    calls: tuple[ActivationCall, ...]
    not_run: tuple[str, ...] = ()
    stock_not_run: tuple[str, ...] = ()
    overwritten: tuple[ActivationCall, ...] = ()

    @property
    def others(self) -> tuple[ActivationCall, ...]:
        """The calls of activations that are not GEM."""
        return self._of_kind("activation")

    @property
    def gates(self) -> tuple[ActivationCall, ...]:
        """The calls of sigmoid, tanh and similar functions that are used as gates, not as activations."""
        return self._of_kind("gate")

    @property
    def num_gem(self) -> int:
        """The number of GEM calls."""
        return sum(call.count for call in self._of_kind("gem"))

    @property
    def num_other(self) -> int:
        """The number of calls of other activations, not counting gates."""
        return sum(call.count for call in self.others)

    @property
    def complete(self) -> bool:
        """Whether an activation ran, all that ran are GEM, and no other module holds an activation that is not."""
        return self.num_gem > 0 and self.num_other == 0 and not self.stock_not_run

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts and calls as JSON values."""
        totals = {"num_gem": self.num_gem, "num_other": self.num_other, "complete": self.complete}
        return {**totals, **dataclasses.asdict(self)}

    def _of_kind(self, kind: str) -> tuple[ActivationCall, ...]:
        return tuple(call for call in self.calls if call.kind == kind)

    def __str__(self) -> str:
        total = self.num_gem + self.num_other
        head = f"{self.num_gem} of {total} activation calls are GEM" if total else "No activation ran"
        lines = [head + _tally(self._of_kind("gem"), ": ")]
        lines += _table(self.others, "other")
        if self.gates:
            lines.append(f"Gates, not counted{_tally(self.gates, ': ')}")
        if self.not_run:
            stock = f", {len(self.stock_not_run)} of them not GEM" if self.stock_not_run else ""
            places = path_patterns(list(self.not_run))
            lines.append(f"{counted(len(self.not_run), 'activation module')} did not run{stock}: {places}")
        if self.overwritten:
            lines.append("Outputs overwritten in place; the backward pass fails if it keeps them:")
            lines += _table(self.overwritten, "overwrites")
        return "\n".join(lines)


def audit(model: nn.Module, *args: Any, **inputs: Any) -> Audit:
    """Runs one forward pass and reports which activations ran: how many calls were GEM, which were not, and where.

    The audit sees operations, not modules: `F.gelu` in a block, `x.relu_()`, autograd Functions and scripted functions.
    It recognises hand-written formulas in which a sigmoid, tanh, erf, softplus, hardsigmoid or relu6 multiplies its own
    input (it calls `x * sigmoid(a * x)` silu, whatever a is), and floats that are clamped at zero from below only.

    It does not see a formula that is written with comparisons, `maximum`, `where` or `exp`, or fused into a custom
    kernel. The audit may then be `complete` even though such a formula ran. Modules that the inputs do not reach do not
    run; the report lists those that are activations.

    The report also lists operations that overwrite the output of an activation in place, such as `x += y` or
    `nn.Dropout(inplace=True)` right after it. The backward pass fails there if the output is kept, as `save="auto"`
    does on a GPU.

    The audit restores training flags, buffers, hooks and the random state. A compiled model runs uncompiled.

    Args:
        model: Any module. A transformers or timm model needs no inputs.
        *args: Positional arguments of the model, on its device.
        **inputs: Keyword arguments of the model. If you pass no arguments at all, inputs are made up, and the forward
            pass runs on the meta device, without memory or arithmetic. If that is not possible, it runs on the device
            of the model.

    Returns:
        The calls. Print it for a table.

    Raises:
        TypeError: `model` is not a module, or it is scripted or contains a scripted module, whose calls cannot be seen.
        ValueError: You passed no inputs, and none can be made up for this model.
        RuntimeError: The model does not run on made-up inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"got {type(model).__name__}. audit takes a torch.nn.Module. Pass the model itself.")
    model = unwrapped(model)
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"submodule {path!r} is" if path else "model is"
            raise TypeError(
                f"the {what} scripted. The calls in a scripted module cannot be told apart. Audit the model before you "
                "script it."
            )
    if args or inputs:
        try:
            return _run(model, copied_buffers(model), args, inputs)
        except (AttributeError, TypeError) as error:
            if any(isinstance(value, Tensor) for value in tree_leaves((args, inputs))):
                raise
            kinds = ", ".join(type(value).__name__ for value in (*args, *inputs.values()))
            raise TypeError(
                f"got {kinds} as the inputs of {type(model).__name__}. They must be those of its forward. Pass them as "
                "audit(model, *args, **kwargs), or pass none."
            ) from error
    made_up = example_inputs(model)
    reasons: list[Exception] = []
    for dtype in (None, torch.bfloat16):  # on meta, some operations, such as grouped products of experts, need bfloat16
        try:
            return _run(model, _on_meta(_state(model), dtype), (), _on_meta(made_up.items(), dtype))
        except Exception as error:  # shapes depend on values, or a tensor is neither a parameter nor a buffer
            reasons.append(error)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise _no_forward(model, made_up, reasons[0], "on the meta device") from reasons[0]
    try:
        return _run(model, copied_buffers(model), (), made_up)
    except Exception as error:
        raise _no_forward(model, made_up, error, "on its own device") from error


def say_what_did_not_run(model: nn.Module) -> None:
    """Warns once about modules of the family that were never called although the model has trained.

    Something else runs instead. For example, Liger's kernels replace the forward of a gated MLP, while the config and
    the printed model still name the activation. If the activation of a layer with another index ran, this one was only
    left out, as LayerDrop and mixtures of experts do. Nothing is known about models that are compiled or run in copies.
    """
    modules = dict(named_modules(model))
    copied = isinstance(model, nn.DataParallel)
    if copied or any(uncompiled(m) is not None or m._compiled_call_impl is not None for m in modules.values()):
        return
    ours = {path: module for path, module in modules.items() if isinstance(module, GemActivation)}
    ran = {without_indices(path) for path, module in ours.items() if CALLED in vars(module) or is_replaced(module)}
    idle = {path: module for path, module in ours.items() if without_indices(path) not in ran}
    if not idle:
        return
    for module in idle.values():
        vars(module)[CALLED] = False  # marks that the warning was given
    warnings.warn(
        f"{len(idle)} of {len(ours)} activations of the family in {type(model).__name__} did not run in training: "
        f"{path_patterns(list(idle))}. Something else may have run instead: TrainingArguments(use_liger_kernel=True), "
        "for example, replaces gated MLPs (use hf_gem.patch_glu for these). Check with hf_gem.audit(model).",
        stacklevel=4,
    )


def _run(model: nn.Module, state: dict[str, Tensor], args: tuple[Any, ...], inputs: Mapping[str, Any]) -> Audit:
    """Runs one forward pass, with `state` instead of the model's parameters and buffers."""
    calls, ran = trace(model, state, args, inputs)
    modules = {path: module for path, module in named_modules(model) if is_activation(module)}
    not_run = tuple(path for path, module in modules.items() if module not in ran)
    stock = tuple(path for path in not_run if is_stock(modules[path]))
    overwritten = tuple(call for call in calls if call.kind == "overwrite")
    return Audit(tuple(call for call in calls if call not in overwritten), not_run, stock, overwritten)


def _no_forward(model: nn.Module, inputs: Mapping[str, Tensor], error: Exception, where: str) -> RuntimeError:
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
    return RuntimeError(
        f"{type(model).__name__} does not run on made-up inputs {shapes} {where} ({type(error).__name__}: {error}). "
        "It needs real ones. Pass them: audit(model, ...)."
    )


def _on_meta(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        name: torch.empty_like(tensor, device="meta", dtype=dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors
    }


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _table(calls: tuple[ActivationCall, ...], title: str) -> list[str]:
    """Returns the lines of a table, one per function and location. Empty if there are no calls."""
    groups: dict[tuple[str, str], list[ActivationCall]] = {}
    for call in calls:
        groups.setdefault((call.function, call.location), []).append(call)
    rows = [
        (str(sum(call.count for call in group)), *key, path_patterns([call.module for call in group]))
        for key, group in groups.items()
    ]
    if not rows:
        return []
    rows.insert(0, ("calls", title, "where", "modules"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].rjust(widths[0]), *map(str.ljust, row[1:], widths[1:])] for row in rows]
    return [("  " + "  ".join(row)).rstrip() for row in cells]


def _tally(calls: tuple[ActivationCall, ...], prefix: str) -> str:
    counts: Counter[str] = Counter()
    for call in calls:
        counts[call.function] += call.count
    parts = [f"{count} x {name}" for name, count in counts.items()]
    if len(parts) > 5:
        parts[4:] = [f"and {len(parts) - 4} other names"]
    return prefix + ", ".join(parts) if parts else ""
