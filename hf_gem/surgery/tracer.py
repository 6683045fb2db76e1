"""Traces one forward pass, and recognises every activation by the operations that run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .. import functional
from .._kernels.replaceable import is_replaced
from .._torch import TorchDispatchMode, is_local_scalar
from ..family.names import GemSpec
from ..modules import GemActivation
from .kinds import is_gate
from .running import evaluating
from .slots import named_modules

# aten operations that are activations -> their usual name.
_ACTIVATIONS = {
    **{name: name for name in ("relu", "relu6", "silu", "mish", "hardswish", "leaky_relu", "selu", "celu", "prelu")},
    **{name: name for name in ("rrelu", "softshrink", "hardshrink", "gelu", "elu", "hardtanh", "threshold")},
    "_prelu_kernel": "prelu",
    "rrelu_with_noise": "rrelu",
}
# Functions that mostly serve as gates, in poolers or as parts of formulas. They are activations only if they multiply
# their own input.
_GATES = {
    **{name: name for name in ("sigmoid", "tanh", "erf", "hardsigmoid", "softplus", "log_sigmoid", "glu")},
    "log_sigmoid_forward": "log_sigmoid",
}
# Operations in g -> the name of x * g(x).
_HAND_WRITTEN = {
    frozenset({"sigmoid"}): "silu",
    frozenset({"tanh"}): "gelu_tanh",
    frozenset({"erf"}): "gelu",
    frozenset({"tanh", "softplus"}): "mish",
    frozenset({"hardsigmoid"}): "hardswish",
    frozenset({"relu6"}): "hardswish",
    frozenset({"clamp"}): "hardswish",
}
# torch functions made of several operations, none of which is itself the activation.
_COMPOSED = {F.softsign: "softsign", F.tanhshrink: "tanhshrink"}
# Function -> its family. For `activation` and `gem_glu`, the default of the argument `family`.
_OURS = {
    **{functional.gem: "gem", functional.egem: "egem", functional.segem: "segem"},
    **dict.fromkeys((functional.activation, functional.gem_glu), "egem"),
}
# A module from one of these files counts as one activation, whatever operations it consists of.
_LIBRARIES = ("transformers.activations", "timm.layers.activations", "timm.layers.activations_me")
_LIBRARY_FILES = tuple(name.replace(".", "/") + ".py" for name in _LIBRARIES)
# In evaluation mode, the dispatcher does not see these.
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_COPIES = ("_to_copy", "clone", "detach", "alias", "lift_fresh")  # elementwise, although torch does not tag them so

_TORCH = str(Path(torch.__file__).parent) + "/"
_HERE = str(Path(__file__).parent.parent) + "/"


@dataclasses.dataclass(frozen=True)
class ActivationCall:
    """Calls of one function at one location.

    Attributes:
        function: Name of the function, such as `gem_n2`, `relu` or `gelu_tanh`. "(hand-written)" marks a formula that
            was recognised by its operations. For an overwrite, the operation and the activation: `add_ behind relu`.
        kind: "gem" for a member of the family, "activation" for any other activation. "gate" for sigmoid, tanh and
            similar functions that do not multiply their own input, as in an LSTM, a squeeze-and-excite block or a
            pooler. "overwrite" for an in-place operation on the output of an activation.
        module: Path of the innermost module that ran the function, "" for the model itself. For a shared module, its
            first path.
        location: `file:line` of the innermost code outside torch and outside files that define activations. The file is
            relative to its entry in `sys.path`.
        count: Number of calls.
    """

    function: str
    kind: str
    module: str
    location: str
    count: int


def trace(
    model: nn.Module, state: dict[str, Tensor], args: tuple[Any, ...], inputs: Mapping[str, Any]
) -> tuple[tuple[ActivationCall, ...], set[nn.Module]]:
    """Runs a model in evaluation mode, with `state` instead of its parameters and buffers.

    Returns:
        The calls, in the order in which each first ran, and the modules that ran.
    """
    tracer = _Tracer()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(evaluating(model))
        for path, module in list(named_modules(model)):
            stack.callback(module.register_forward_pre_hook(tracer.enter(path), prepend=True).remove)
            stack.callback(module.register_forward_hook(tracer.leave, always_call=True).remove)
        enter(_Functions(tracer))
        enter(_Operations(tracer))
        torch.func.functional_call(model, state, args, dict(inputs))
    return tracer.calls(), tracer.entered


def is_activation(module: nn.Module) -> bool:
    """Returns whether this is a module of the family, or an activation module from torch, transformers or timm."""
    home, name = type(module).__module__, type(module).__name__.lower()
    of_torch = home == "torch.nn.modules.activation" and (name in _ACTIVATIONS or name == "leakyrelu")
    return isinstance(module, GemActivation) or home in _LIBRARIES or of_torch


class _Source(NamedTuple):
    """The elementwise history of a tensor: the tensors it is computed from without a gate, and the gates on the way."""

    tensors: frozenset[int] = frozenset()
    gates: frozenset[int] = frozenset()


class _Tracer:
    """Collects the calls of one forward pass."""

    def __init__(self) -> None:
        self.entered: set[nn.Module] = set()
        self._stack: list[tuple[str, nn.Module]] = []  # the modules that are running, by path
        self._composed = 0  # the number of running modules and functions that count as one call
        self._operations: list[tuple[str, str] | None] = []  # elementwise operations of a module that counts as one
        self._found: dict[int, tuple[str, str, str, str]] = {}
        self._number = itertools.count()
        # A gate such as tanh(..x..) -> its operation and the tensors it was computed from. If it multiplies one of
        # these, it is part of a formula and not a gate.
        self._gates: dict[int, tuple[str, frozenset[int]]] = {}
        self._sources: MutableMapping[Tensor, _Source] = WeakTensorKeyDictionary()
        self._outputs: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()  # output of an activation -> its name

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
                    self._record(name, kind, output)
        while self._stack and self._stack.pop()[1] is not module:
            pass  # modules that were left by an exception

    def function(self, name: str, kind: str, run: Callable[[], Any]) -> Any:
        """Runs a function that counts as one call, whatever operations it consists of."""
        self._composed += 1
        try:
            output = run()
        finally:
            self._composed -= 1
        if not self._composed:
            self._record(name, kind, output)
        return output

    def overwrite(self, operation: str, target: Any) -> None:
        """Records an in-place operation if it changes the output of an activation or a view of one."""
        whole = target._base if isinstance(target, Tensor) and target._is_view() else target
        if not self._composed and isinstance(whole, Tensor) and whole in self._outputs:
            self._record(f"{operation} behind {self._outputs[whole]}", "overwrite")

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
        """Records an operation if it is an activation, and tracks elementwise operations from inputs to products."""
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
            number = self._record(name, kind, output)
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
        """Records a product of x with gates of x as one activation instead of the gates."""
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

    def _record(self, name: str, kind: str, output: Any = None) -> int:
        number = next(self._number)
        if kind in ("gem", "activation") and isinstance(output, Tensor):
            self._outputs[output] = name
        self._found[number] = name, kind, self._stack[-1][0] if self._stack else "", _location()
        return number


class _Functions(TorchFunctionMode):
    """Watches calls of the functions of hf_gem, and of others that consist of several operations.

    It also keeps torch's encoder layers from using their fused kernel, which would hide the activation.
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
        if func in _DROPOUTS and kwargs and kwargs["inplace"] and kwargs["p"] > 0:
            self._tracer.overwrite(f"{func.__name__}_", args[0])
        return run()


class _Operations(TorchDispatchMode):  # torch has no types here
    """Watches every aten operation."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_local_scalar(func) and args[0].is_meta:
            # Made-up inputs have no meaningful values. Checks of masks and of validity expect true.
            return torch.ones((), dtype=args[0].dtype).item()
        if func.overloadpacket.__name__.endswith("_") and args:
            self._tracer.overwrite(func.overloadpacket.__name__, args[0])
        sources = self._tracer.sources(args)  # read before an in-place operation changes the tensor
        output = func(*args, **(kwargs or {}))
        self._tracer.operation(func, args, kwargs or {}, sources, output)
        return output


def _recognise(packet: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the name and kind of an aten operation, or None if it is neither an activation nor a gate."""
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
    return type(module).__module__ in (*_LIBRARIES, "torch.nn.modules.rnn") or is_replaced(module)


def _module_name(module: nn.Module, operations: list[tuple[str, str] | None]) -> tuple[str, str]:
    """Returns the name and kind of a module that counts as one call, or ("", "") for the identity."""
    cls = type(module)
    if isinstance(module, GemActivation):
        return module.spec.name, "gem"
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
    while frame.f_back is not None and frame.f_code is not trace.__code__:
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
