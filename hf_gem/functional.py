"""The activation functions with their derivatives: `gem`, `egem`, `segem`.

In eager mode they run as a `torch.autograd.Function` with closed-form derivatives, which saves only x and supports
double backward and forward-mode AD. When the graph itself is wanted (torch.compile, torch.export, ONNX,
torch.jit.trace), and under the transforms of torch.func, they run as the plain formulas, which all of these understand.
To script, use the modules.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from . import reference
from .spec import DEFAULT_EPS, check_eps, check_n

_FORWARD = {"egem": (reference.egem, reference.egem_tensor), "segem": (reference.segem, reference.segem_tensor)}
_SLOPE = {"egem": reference.egem_slope, "segem": reference.segem_slope}
_EPS_SLOPE = {"egem": reference.egem_eps_slope, "segem": reference.segem_eps_slope}


def gem(x: Tensor, n: int = 1) -> Tensor:
    r"""GEM, `x^(2n+1) / (1 + x^(2n))` for x > 0, else 0.

    C^(2n) everywhere; strictly increasing for x > 0; largest slope `(1 + 2n)^2 / 8n`. Source: arXiv 2604.21677.

    Args:
        x: Floating-point tensor of any shape.
        n: The paper's N, 1 to 32.

    Returns:
        A tensor of the shape, dtype and memory format of x. float16 and bfloat16 are computed in float32.

    Raises:
        TypeError: x is not a dense floating-point tensor, or n is not an integer.
        ValueError: n is outside 1..32.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(gem, (x,), x, n=n)
    return _activate("egem", x, n, 1.0)


def egem(x: Tensor, n: int = 1, eps: float | Tensor = DEFAULT_EPS) -> Tensor:
    r"""E-GEM, `x t / (t + eps)` with `t = x^(2n)` for x > 0, else 0; towards ReLU as eps goes to 0.

    At most `eps^(1/2n) (2n-1)^((2n-1)/2n) / 2n` from ReLU, `sqrt(eps) / 2` for n = 1. The eps of arXiv 2604.21677 is
    read as taking the place of GEM's 1; for an eps meant as the scale of the gate, pass `eps = scale**(2 * n)`.

    Args:
        x: Floating-point tensor of any shape.
        n: The paper's N, 1 to 32.
        eps: Positive number, or a positive floating-point tensor that broadcasts against x and takes part in
            differentiation. The values of a tensor are not checked, since that would wait for the device.

    Returns:
        A tensor of the shape, dtype and memory format of x. float16 and bfloat16 are computed in float32.

    Raises:
        TypeError: x is not a dense floating-point tensor, n is not an integer, or eps is not a number.
        ValueError: n is outside 1..32, eps is not positive and finite, or its shape does not broadcast against x.
    """
    if has_torch_function_variadic(x, eps):
        return handle_torch_function(egem, (x, eps), x, n=n, eps=eps)
    return _activate("egem", x, n, eps)


def segem(x: Tensor, n: int = 1, eps: float | Tensor = DEFAULT_EPS) -> Tensor:
    r"""SE-GEM, `x` for x >= 0 and `x eps / (x^(2n) + eps)` for x < 0; towards ReLU as eps goes to 0.

    Equals `x + egem(-x)`. The dip below zero is as deep as E-GEM is far from ReLU. The public record of
    arXiv 2604.21677 gives the properties of SE-GEM, not its formula; this is the simplest function that has them.

    Args, returns and raises as for `egem`.
    """
    if has_torch_function_variadic(x, eps):
        return handle_torch_function(segem, (x, eps), x, n=n, eps=eps)
    return _activate("segem", x, n, eps)


def _activate(formula: str, x: Tensor, n: int, eps: float | Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"{type(x).__name__}"
        raise TypeError(f"x must be a floating-point tensor, got {got}; convert it first, for example with x.float()")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got layout {x.layout}; convert it first with x.to_dense()")
    n = check_n(n)
    if isinstance(eps, Tensor):
        _check_eps_tensor(eps, x)
    else:
        if torch.compiler.is_compiling() and isinstance(eps, float):
            # Specialises a float that torch.compile made symbolic: eps shapes the graph, as n does.
            numerator, denominator = eps.as_integer_ratio()
            eps = numerator / denominator
        eps = check_eps(eps, n)
    if _wants_formula():
        number, tensor = _FORWARD[formula]
        return tensor(x, n, eps) if isinstance(eps, Tensor) else number(x, n, eps)
    return _Activation.apply(x, eps, formula, n)


def _wants_formula() -> bool:
    """Whether the graph is being captured, or torch.func transforms it: they nest jvp of a Function wrongly."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def _check_eps_tensor(eps: Tensor, x: Tensor) -> None:
    if not eps.is_floating_point():
        raise TypeError(f"a tensor eps must be floating-point, got {eps.dtype}; convert it first, e.g. eps.float()")
    if torch.jit.is_tracing():
        return  # shapes are tensors there
    if eps.ndim > x.ndim or any(a not in (1, b) for a, b in zip(eps.shape[::-1], x.shape[::-1], strict=False)):
        raise ValueError(
            f"a tensor eps must broadcast to the shape of x, got eps {tuple(eps.shape)} and x {tuple(x.shape)}; "
            "for one eps per channel of dimension 1, reshape it to (C, 1, ..., 1)"
        )


class _Activation(torch.autograd.Function):
    """Closed-form first derivatives; the backward is itself plain torch, so autograd gives the higher ones."""

    @staticmethod
    def forward(x, eps, formula, n):
        number, tensor = _FORWARD[formula]
        return tensor(x, n, eps) if isinstance(eps, Tensor) else number(x, n, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, eps, ctx.formula, ctx.n = inputs
        saved = (x, eps) if isinstance(eps, Tensor) else (x,)
        ctx.eps = None if isinstance(eps, Tensor) else eps
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad):
        x, *rest = ctx.saved_tensors
        eps = rest[0] if rest else ctx.eps
        grad_x = grad_eps = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad * _SLOPE[ctx.formula](x, ctx.n, eps)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_eps = (grad * _EPS_SLOPE[ctx.formula](x, ctx.n, eps)).sum_to_size(eps.shape).to(eps.dtype)
        return grad_x, grad_eps, None, None

    @staticmethod
    def jvp(ctx, x_tangent, eps_tangent, *_):
        x, *rest = ctx.saved_tensors
        eps = rest[0] if rest else ctx.eps
        terms = []
        if x_tangent is not None:
            terms.append(x_tangent * _SLOPE[ctx.formula](x, ctx.n, eps))
        if eps_tangent is not None:
            terms.append(eps_tangent * _EPS_SLOPE[ctx.formula](x, ctx.n, eps))
        return sum(terms).to(x.dtype)
