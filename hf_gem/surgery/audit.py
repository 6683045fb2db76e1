"""Which activations a model really runs: one forward pass, every activation counted, named and located.

A config says which activation was asked for, not which one runs: blocks hard-code `F.gelu`, and some layers never see
the field. So this looks at the operations themselves, through a `TorchDispatchMode`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .. import functional
from ..family.names import GemSpec
from ..modules import GemActivation
from .inputs import example_inputs
from .stock import is_gate, is_stock

# Operations of aten that are activations, by the name under which the field knows them.
_ACTIVATIONS = {
    **{name: name for name in ("relu", "relu6", "silu", "mish", "hardswish", "leaky_relu", "selu", "celu", "prelu")},
    **{name: name for name in ("rrelu", "softshrink", "hardshrink", "gelu", "elu", "hardtanh", "threshold")},
    "_prelu_kernel": "prelu",
    "rrelu_with_noise": "rrelu",
}
# Those that are more often a gate, a pooler or part of a formula; activations only where they multiply their own input.
_GATES = {
    **{name: name for name in ("sigmoid", "tanh", "erf", "hardsigmoid", "softplus", "log_sigmoid", "glu")},
    "log_sigmoid_forward": "log_sigmoid",
}
# What x * g(x) is, by the operations in g.
_HAND_WRITTEN = {
    frozenset({"sigmoid"}): "silu",
    frozenset({"tanh"}): "gelu_tanh",
    frozenset({"erf"}): "gelu",
    frozenset({"tanh", "softplus"}): "mish",
    frozenset({"hardsigmoid"}): "hardswish",
    frozenset({"relu6"}): "hardswish",
    frozenset({"clamp"}): "hardswish",
}
# Functions of torch made of several operations, none of which is the activation.
_COMPOSED = {F.softsign: "softsign", F.tanhshrink: "tanhshrink"}
# Function -> its family, unless that is an argument.
_OURS = {
    functional.gem: "gem",
    functional.egem: "egem",
    functional.segem: "segem",
    functional.activation: "egem",
    functional.gem_glu: "egem",
}
# Modules of these files are one activation each, whatever operations they are made of.
_LIBRARIES = ("transformers.activations", "timm.layers.activations", "timm.layers.activations_me")
_LIBRARY_FILES = tuple(name.replace(".", "/") + ".py" for name in _LIBRARIES)
_COPIES = ("_to_copy", "clone", "detach", "alias", "lift_fresh")  # elementwise, though not tagged so

_TORCH = str(Path(torch.__file__).parent) + "/"
_HERE = str(Path(__file__).parent.parent) + "/"


@dataclasses.dataclass(frozen=True)
class ActivationCall:
    """Calls of one function at one place.

    Attributes:
        function: `gem_n2`, `relu`, `gelu_tanh` ...; "(hand-written)" marks a formula recognised by its operations.
        kind: "gem"; "activation" for any other; "gate" for sigmoid, tanh and the like where they do not multiply their
            own input: the gates of an LSTM or a squeeze-and-excite block, poolers.
        module: Path of the innermost module that ran it, "" for the model itself; of a shared module, its first path.
        location: `file:line` of the innermost code outside torch and outside files of activations, with the file
            relative to its entry of `sys.path`.
        count: How often it ran.
    """

    function: str
    kind: str
    module: str
    location: str
    count: int


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` found; `print` it for a table.

    Attributes:
        calls: All calls, in the order of the first ones.
        not_run: Paths of the activation modules that the forward pass did not reach.
        stock_not_run: Those among them that are not of the family, and no gates.
    """

    calls: tuple[ActivationCall, ...]
    not_run: tuple[str, ...] = ()
    stock_not_run: tuple[str, ...] = ()

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
        groups: dict[tuple[str, str], list[ActivationCall]] = {}
        for call in self.others:
            groups.setdefault((call.function, call.location), []).append(call)
        rows = [
            (str(sum(call.count for call in calls)), *key, path_patterns([call.module for call in calls]))
            for key, calls in groups.items()
        ]
        if rows:
            rows.insert(0, ("calls", "other", "where", "modules"))
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row in rows:
                cells = [row[0].rjust(widths[0]), *(c.ljust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
                lines.append(("  " + "  ".join(cells)).rstrip())
        if self.gates:
            lines.append(f"Gates, not counted{_tally(self.gates, ': ')}")
        if self.not_run:
            stock = f", {len(self.stock_not_run)} of them not GEM" if self.stock_not_run else ""
            places = path_patterns(list(self.not_run))
            lines.append(f"{len(self.not_run)} activation modules did not run{stock}: {places}")
        return "\n".join(lines)


def audit(model: nn.Module, *args: Any, **inputs: Any) -> Audit:
    """Runs one forward pass and reports which activations ran: how many calls were GEM, and which others, and where.

    It sees the operations, not the modules: `F.gelu` in a block, `x.relu_()`, autograd Functions, scripted functions.
    Formulas written by hand are recognised where a sigmoid, tanh, erf, softplus, hardsigmoid or relu6 multiplies its
    own input (`x * sigmoid(a * x)` is called silu whatever a is), and where a float is clamped at zero from below only.
    One written with comparisons, `maximum`, `where` or `exp`, or fused into a custom kernel, is not seen, and the audit
    is `complete` without it. Modules that the inputs do not reach do not run; the report lists those that are
    activations.

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


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in the wrappers of torch.compile and of data parallelism."""
    dynamo = sys.modules.get("torch._dynamo")  # slow to import, and there where anything is compiled
    while True:
        if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


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


def copied_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a forward pass may write to."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _run(model: nn.Module, state: dict[str, Tensor], args: tuple[Any, ...], inputs: Mapping[str, Any]) -> Audit:
    """The forward pass with `state` in place of parameters and buffers."""
    tracer = _Tracer()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(evaluating(model))
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(tracer.enter(path), prepend=True).remove)
            stack.callback(module.register_forward_hook(tracer.leave, always_call=True).remove)
        enter(_Functions(tracer))
        enter(_Operations(tracer))
        torch.func.functional_call(model, state, args, dict(inputs))
    modules = {path: module for path, module in model.named_modules() if _is_activation(module)}
    not_run = tuple(path for path, module in modules.items() if module not in tracer.entered)
    return Audit(tracer.calls(), not_run, tuple(path for path in not_run if is_stock(modules[path])))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, compilation and fused encoder layers; on leaving, all is as it was.

    But for what is written into buffers: see `copied_buffers`.
    """
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(_restored(model))
        enter(torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind))
        if "torch._dynamo" in sys.modules:  # slow to import, and needed by compiled modules only
            enter(torch.compiler.set_stance("force_eager"))
        enter(torch.inference_mode(False))  # it hides operations from TorchDispatchMode
        enter(torch.no_grad())
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            module.training = False  # `model.eval()` may do more, such as merging adapters
        yield


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Takes back what is set on the modules meanwhile: training flags, and caches that a forward pass leaves."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _is_activation(module: nn.Module) -> bool:
    home, name = type(module).__module__, type(module).__name__.lower()
    of_torch = home == "torch.nn.modules.activation" and (name in _ACTIVATIONS or name == "leakyrelu")
    return isinstance(module, GemActivation) or home in _LIBRARIES or of_torch


class _Source(NamedTuple):
    """What a tensor is made of, elementwise: tensors reached without a gate, and the gates on the way to it."""

    tensors: frozenset[int] = frozenset()
    gates: frozenset[int] = frozenset()


class _Tracer:
    """Collects the calls of one forward pass."""

    def __init__(self) -> None:
        self.entered: set[nn.Module] = set()
        self._stack: list[tuple[str, nn.Module]] = []  # the modules that are running, by path
        self._composed = 0  # how many modules and functions that count as one call are running
        self._operations: list[tuple[str, str] | None] = []  # elementwise ones of the module that counts as one call
        self._found: dict[int, tuple[str, str, str, str]] = {}
        self._number = itertools.count()
        # tanh(..x..) -> its operation and what it is made of, to see when it multiplies x: a formula, not a gate.
        self._gates: dict[int, tuple[str, frozenset[int]]] = {}
        self._sources: Any = WeakTensorKeyDictionary()

    def calls(self) -> tuple[ActivationCall, ...]:
        return tuple(ActivationCall(*key, count) for key, count in Counter(self._found.values()).items())

    def enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.entered.add(module)
            self._stack.append((path, module))
            if _counts_as_one(module):
                self._composed += 1
                self._operations = []

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if _counts_as_one(module):
            self._composed -= 1
            if not self._composed:
                name, kind = _module_name(module, self._operations)
                if name:
                    self._record(name, kind)
        while self._stack and self._stack.pop()[1] is not module:
            pass  # those that an exception left

    def function(self, name: str, kind: str, run: Callable[[], Any]) -> Any:
        """A function that counts as one call, whatever operations it is made of."""
        if not self._composed:
            self._record(name, kind)
        self._composed += 1
        try:
            return run()
        finally:
            self._composed -= 1

    def gem_name(self, family: str, n: int = 1, eps: Any = None, **_: Any) -> str:
        module = self._stack[-1][1] if self._stack else None
        if isinstance(module, GemActivation):
            return module.spec.name
        if isinstance(eps, Tensor):
            return f"{GemSpec(family, n, learnable=True).name} (eps is a tensor)"
        return GemSpec(family, n, eps).name

    def sources(self, args: tuple[Any, ...]) -> list[_Source]:
        return [self._source(arg) for arg in args if isinstance(arg, Tensor)]

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: Any, sources: list[_Source], output: Any) -> None:
        """Counts an operation that is an activation, and follows elementwise ones from their input to a product."""
        packet = func.overloadpacket.__name__.rstrip("_")
        elementwise = torch.Tag.pointwise in func.tags or packet in _COPIES
        found = _recognise(packet, args, kwargs)
        result = _Source(*(frozenset().union(*sets) for sets in zip(*sources, strict=True))) if sources else _Source()
        if self._composed:
            if elementwise or found:
                self._operations.append(found)
            elementwise = False
        elif found:
            name, kind = found
            number = self._record(name, kind)
            elementwise = name in _GATE_NAMES
            if elementwise:
                made_of = result.tensors.union(*(self._gates[gate][1] for gate in result.gates))
                self._gates[number] = name, made_of
                result = _Source(frozenset(), result.gates | {number})
        elif packet == "mul" and len(sources) == 2:
            elementwise = not self._merge_gates(*sources)
        if isinstance(output, Tensor):
            self._sources[output] = result if elementwise and sources else self._new_source()

    def _merge_gates(self, a: _Source, b: _Source) -> bool:
        """Counts a product of x with gates of x as one activation in place of these."""
        own = {gate for s, other in ((a, b), (b, a)) for gate in s.gates if self._gates[gate][1] & other.tensors}
        own = {gate for gate in own if gate in self._found}
        if own:
            names = frozenset(self._gates[gate][0] for gate in own)
            *_, module, location = self._found[max(own)]
            for gate in own:
                del self._found[gate]
            formula = _HAND_WRITTEN.get(names, "x * " + "(".join(sorted(names)))
            self._found[next(self._number)] = f"{formula} (hand-written)", "activation", module, location
        return bool(own)

    def _source(self, tensor: Tensor) -> _Source:
        if tensor not in self._sources:
            self._sources[tensor] = self._new_source()
        return self._sources[tensor]

    def _new_source(self) -> _Source:
        return _Source(frozenset({next(self._number)}))

    def _record(self, name: str, kind: str) -> int:
        number = next(self._number)
        self._found[number] = name, kind, self._stack[-1][0] if self._stack else "", _location()
        return number


class _Functions(TorchFunctionMode):
    """Sees the calls of our functions, and of others that are made of several operations.

    It also keeps torch's encoder layers off their fused kernel, which would hide its activation.
    """

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = functools.partial(func, *args, **(kwargs or {}))
        if func in _OURS:
            name = self._tracer.gem_name(**{"family": _OURS[func], **(kwargs or {})})
            return self._tracer.function(name, "gem", run)
        if func in _COMPOSED:
            return self._tracer.function(_COMPOSED[func], "activation", run)
        return run()


class _Operations(TorchDispatchMode):
    """Sees every operation of aten."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # Made-up inputs have no values worth computing; true is what checks of masks and of validity ask for.
            return torch.ones((), dtype=args[0].dtype).item()
        sources = self._tracer.sources(args)  # before an operation in place changes what the tensor is
        output = func(*args, **(kwargs or {}))
        self._tracer.operation(func, args, kwargs or {}, sources, output)
        return output


def _recognise(packet: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, str] | None:
    """Name and kind of an operation of aten, None where it is neither an activation nor a gate."""
    if packet in _GATES:
        return _GATES[packet], "gate"
    if packet == "gelu" and kwargs.get("approximate") == "tanh":
        return "gelu_tanh", "activation"
    if packet == "hardtanh" and tuple(args[1:3]) == (0, 6):
        return "relu6", "activation"
    if packet == "elu" and len(args) > 2 and args[2] != 1:
        return "selu", "activation"
    if packet == "threshold" and tuple(args[1:3]) == (0, 0):
        return "relu", "activation"
    if packet in ("clamp", "clamp_min") and args[0].is_floating_point():
        bounds = (*args[1:], None)[:2]
        if bounds == (0, None):
            return "relu (hand-written)", "activation"
        if bounds == (0, 6):
            return "clamp", "gate"
    return (_ACTIVATIONS[packet], "activation") if packet in _ACTIVATIONS else None


_GATE_NAMES = {*_GATES.values(), "clamp", "relu6"}


def _counts_as_one(module: nn.Module) -> bool:
    return type(module).__module__ in (*_LIBRARIES, "torch.nn.modules.rnn")


def _module_name(module: nn.Module, operations: list[tuple[str, str] | None]) -> tuple[str, str]:
    """Name and kind of a module that counts as one call; ("", "") for the identity."""
    cls = type(module)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        name = getattr(module, "mode", cls.__name__).lower()
        relu = "relu" in (name, getattr(module, "nonlinearity", "")) or name == "rnn_relu"
        return name, "activation" if relu else "gate"
    if len(operations) < 2:
        return next(iter(operations), None) or ("", "")
    registry = getattr(sys.modules.get("transformers.activations"), "ACT2CLS", {})
    short = re.sub("(Activation|Me)$", "", cls.__name__).lower()
    name = next((name for name, entry in registry.items() if entry is cls), short)
    return name, "gate" if is_gate(name) or name in _GATES else "activation"


def _location() -> str:
    frame = sys._getframe(1)
    inside_torch = ""
    while frame.f_back is not None and frame.f_code is not _run.__code__:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE)) and not file.endswith(_LIBRARY_FILES):
            return f"{_relative(file)}:{frame.f_lineno}"
        if not inside_torch and file.startswith(_TORCH + "nn/modules/"):
            inside_torch = f"{_relative(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return inside_torch


@functools.lru_cache(maxsize=1024)
def _relative(file: str) -> str:
    roots = [root.rstrip("/") + "/" for root in sys.path if root and file.startswith(root.rstrip("/") + "/")]
    return file.removeprefix(max(roots, key=len, default=""))


def _tally(calls: tuple[ActivationCall, ...], prefix: str) -> str:
    counts: Counter[str] = Counter()
    for call in calls:
        counts[call.function] += call.count
    parts = [f"{count} x {name}" for name, count in counts.items()]
    if len(parts) > 5:
        parts[4:] = [f"and {len(parts) - 4} other names"]
    return prefix + ", ".join(parts) if parts else ""


def path_patterns(paths: list[str]) -> str:
    """The distinct paths, with `*` for the indices in which several differ, and for numbers in names if still many."""
    for few, number in ((1, r"(?<![^.])\d+(?![^.])"), (3, r"\d+(?![^.])")):
        if len(set(paths)) > few:
            paths = [re.sub(number, "*", path) for path in paths]
    distinct = list(dict.fromkeys(path or "(the model)" for path in paths))
    return ", ".join(distinct[:3]) + (f" and {len(distinct) - 3} more" if len(distinct) > 3 else "")
