"""Which activations a model really runs: one forward pass, every activation counted, named and located.

A config says which activation was asked for, not which one runs: blocks hard-code `F.gelu`, and some layers never see
the field. So this looks at the operations themselves, through a `TorchDispatchMode`.
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
from .._torch import uncompiled
from ..modules import CALLED, GemActivation
from .inputs import example_inputs
from .kinds import is_stock
from .reports import path_patterns
from .running import copied_buffers, unwrapped
from .tracer import ActivationCall, is_activation, trace


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` found; `print` it for a table.

    Attributes:
        calls: All calls, in the order of the first ones.
        not_run: Paths of the activation modules that the forward pass did not reach.
        stock_not_run: Those among them that are not of the family, and no gates.
        overwritten: Operations in place on the output of an activation.
    """

    calls: tuple[ActivationCall, ...]
    not_run: tuple[str, ...] = ()
    stock_not_run: tuple[str, ...] = ()
    overwritten: tuple[ActivationCall, ...] = ()

    @property
    def others(self) -> tuple[ActivationCall, ...]:
        """The activations that are not GEM."""
        return self._of_kind("activation")

    @property
    def gates(self) -> tuple[ActivationCall, ...]:
        """Sigmoid, tanh and the like, which are no activations where they stand."""
        return self._of_kind("gate")

    @property
    def num_gem(self) -> int:
        """Number of GEM calls."""
        return sum(call.count for call in self._of_kind("gem"))

    @property
    def num_other(self) -> int:
        """Number of calls of other activations, gates not among them."""
        return sum(call.count for call in self.others)

    @property
    def complete(self) -> bool:
        """Whether every activation that was seen was GEM, one ran, and none of another kind might on other inputs."""
        return self.num_gem > 0 and self.num_other == 0 and not self.stock_not_run

    def to_dict(self) -> dict[str, Any]:
        """The counts and calls, ready for json."""
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
            lines.append(f"{len(self.not_run)} activation modules did not run{stock}: {places}")
        if self.overwritten:
            lines.append("Outputs that are overwritten in place, which stops a backward pass that has kept them:")
            lines += _table(self.overwritten, "overwrites")
        return "\n".join(lines)


def audit(model: nn.Module, *args: Any, **inputs: Any) -> Audit:
    """Runs one forward pass and reports which activations ran: how many calls were GEM, and which others, and where.

    It sees the operations, not the modules: `F.gelu` in a block, `x.relu_()`, autograd Functions, scripted functions.
    Formulas written by hand are recognised where a sigmoid, tanh, erf, softplus, hardsigmoid or relu6 multiplies its
    own input (`x * sigmoid(a * x)` is called silu whatever a is), and where a float is clamped at zero from below only.
    One written with comparisons, `maximum`, `where` or `exp`, or fused into a custom kernel, is not seen, and the audit
    is `complete` without it. Modules that the inputs do not reach do not run; the report lists those that are
    activations. It also lists what overwrites the output of an activation in place, such as `x += y` or
    `nn.Dropout(inplace=True)` right behind it: the backward pass then stops where the output was kept, as
    `save="auto"` does on a GPU.

    The model is left as it was: training flags, buffers, hooks and the random state. A compiled one runs uncompiled.

    Args:
        model: Any module; a model of transformers or timm needs no inputs.
        *args: What to call the model with, on its device.
        **inputs: The same by keyword. Without any inputs they are made up, and the forward pass runs on the meta
            device, without memory or arithmetic; where that is not possible, on the model's own.

    Returns:
        The calls; `print` it for a table.

    Raises:
        TypeError: `model` is not a module, or is or contains a scripted one, whose calls cannot be told apart.
        ValueError: no inputs were given, and none can be made up for such a model.
        RuntimeError: the model does not run on made-up inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"audit takes a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    model = unwrapped(model)
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            place = f"its submodule {path!r}" if path else "it"
            raise TypeError(f"got a model to audit of which {place} is scripted; audit the model before torch.jit does")
    if args or inputs:
        return _run(model, copied_buffers(model), args, inputs)
    made_up = example_inputs(model)
    reasons: list[Exception] = []
    for dtype in (None, torch.bfloat16):  # some operations, such as the grouped products of experts, need it on meta
        try:
            return _run(model, _on_meta(_state(model), dtype), (), _on_meta(made_up.items(), dtype))
        except Exception as error:  # values shape the tensors, or a tensor is no parameter and no buffer
            reasons.append(error)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise _no_forward(model, made_up, reasons[0], "and its parameters hold no values") from reasons[0]
    try:
        return _run(model, copied_buffers(model), (), made_up)
    except Exception as error:
        raise _no_forward(model, made_up, error, "on its own device") from error


def say_what_did_not_run(model: nn.Module) -> None:
    """Warns, once for a model, of modules of the family in one that has trained which have never been called.

    Something else computes in their place, as Liger's kernels do, which replace the forward of a gated MLP, while the
    config and the printed model go on naming them. Of what is compiled, or runs in copies, nothing is known.
    """
    modules = dict(model.named_modules())
    copied = isinstance(model, nn.DataParallel)
    if copied or any(uncompiled(m) is not None or m._compiled_call_impl is not None for m in modules.values()):
        return
    ours = {path: module for path, module in modules.items() if isinstance(module, GemActivation)}
    idle = {path: module for path, module in ours.items() if CALLED not in vars(module) and not is_replaced(module)}
    if not idle:
        return
    for module in idle.values():
        vars(module)[CALLED] = False  # said
    warnings.warn(
        f"{len(idle)} of {len(ours)} activations of the family have not run in {type(model).__name__}, which has "
        f"trained: {path_patterns(list(idle))}. Something may compute another one in their place, as "
        "TrainingArguments(use_liger_kernel=True) does for a gated MLP, where there is hf_gem.patch_glu; see what runs "
        "with hf_gem.audit(model)",
        stacklevel=4,
    )


def _run(model: nn.Module, state: dict[str, Tensor], args: tuple[Any, ...], inputs: Mapping[str, Any]) -> Audit:
    """One forward pass with `state` in place of parameters and buffers."""
    calls, ran = trace(model, state, args, inputs)
    modules = {path: module for path, module in model.named_modules() if is_activation(module)}
    not_run = tuple(path for path, module in modules.items() if module not in ran)
    stock = tuple(path for path in not_run if is_stock(modules[path]))
    overwritten = tuple(call for call in calls if call.kind == "overwrite")
    return Audit(tuple(call for call in calls if call not in overwritten), not_run, stock, overwritten)


def _no_forward(model: nn.Module, inputs: Mapping[str, Tensor], error: Exception, where: str) -> RuntimeError:
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
    return RuntimeError(
        f"{type(model).__name__} does not run on the made-up inputs {shapes}, {where} "
        f"({type(error).__name__}: {error}); pass real ones: audit(model, ...)"
    )


def _on_meta(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        name: torch.empty_like(tensor, device="meta", dtype=dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors
    }


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _table(calls: tuple[ActivationCall, ...], title: str) -> list[str]:
    """Lines of a table, one for each function and place; none without calls."""
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
