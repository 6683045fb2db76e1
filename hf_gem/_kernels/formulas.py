"""The formulas of `reference` behind the interface of the kernels: any device, dtype and kind of tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..family import reference

_VALUE = {"egem": (reference.egem, reference.egem_tensor), "segem": (reference.segem, reference.segem_tensor)}
_SLOPE = {"egem": reference.egem_slope, "segem": reference.segem_slope}


def run(operation: str, form: str, n: int, eps: float | Tensor, *inputs: Tensor) -> Any:
    """See `dispatch.run`; eps may be a tensor here, and the results can be differentiated."""
    return _OPERATIONS[operation](form, n, eps, *inputs)


def _forward(form: str, n: int, eps: float | Tensor, x: Tensor) -> Tensor:
    number, tensor = _VALUE[form]
    return tensor(x, n, eps) if isinstance(eps, Tensor) else number(x, n, eps)


def _backward(form: str, n: int, eps: float | Tensor, grad: Tensor, x: Tensor) -> Tensor:
    return (grad * _SLOPE[form](x, n, eps)).to(x.dtype)


def _backward_at(form: str, n: int, eps: float | Tensor, grad: Tensor, y: Tensor) -> Tensor:
    return (grad * reference.egem_slope_at(y, n, eps)).to(y.dtype)


def _glu(form: str, n: int, eps: float | Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return (_forward(form, n, eps, reference.working(gate)) * up).to(gate.dtype)


def _glu_backward(
    form: str, n: int, eps: float | Tensor, grad: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    wide = reference.working(grad)
    grad_gate = (wide * up * _SLOPE[form](gate, n, eps)).to(gate.dtype)
    return grad_gate, (wide * _forward(form, n, eps, reference.working(gate))).to(up.dtype)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "backward": _backward,
    "backward_at": _backward_at,
    "glu": _glu,
    "glu_backward": _glu_backward,
}


def eps_slope(form: str, x: Tensor, n: int, eps: Tensor) -> Tensor:
    """d f(x) / d eps, in the working dtype of x."""
    return (reference.segem_eps_slope if form == "segem" else reference.egem_eps_slope)(x, n, eps)
