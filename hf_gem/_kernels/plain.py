"""The formulas of a family with the interface of the kernels, for any device, dtype and kind of tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..family.arithmetic import working
from ..family.formulas import forward, slope, slope_at
from ..family.table import Family


def run(operation: str, family: Family, n: int, eps: float | Tensor, *inputs: Tensor) -> Any:
    """Computes what `dispatch.run` does, but eps may be a tensor, and the results can be differentiated.

    If the inputs have different strides, the first operand determines those of the result: the one made from x or gate.
    """
    return _OPERATIONS[operation](family, n, eps, *inputs)


def _backward(family: Family, n: int, eps: float | Tensor, grad: Tensor, x: Tensor) -> Tensor:
    return (slope(family, n, eps, x) * grad).to(x.dtype)


def _backward_at(family: Family, n: int, eps: float | Tensor, grad: Tensor, y: Tensor) -> Tensor:
    return (slope_at(family, n, eps, y) * grad).to(y.dtype)


def _glu(family: Family, n: int, eps: float | Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return (forward(family, n, eps, working(gate)) * up).to(gate.dtype)


def _glu_backward(
    family: Family, n: int, eps: float | Tensor, grad: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    wide = working(grad)
    grad_gate = (slope(family, n, eps, gate) * (wide * up)).to(gate.dtype)
    return grad_gate, (forward(family, n, eps, working(gate)) * wide).to(up.dtype)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "forward": forward,
    "backward": _backward,
    "backward_at": _backward_at,
    "glu": _glu,
    "glu_backward": _glu_backward,
}
