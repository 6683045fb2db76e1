"""The activation functions with their derivatives: `gem`, `egem`, `segem`, `activation` for any family, and `gem_glu`.

In eager mode they run as a `torch.autograd.Function` with closed-form derivatives, computed by kernels where there are
any, which saves one tensor and supports double backward. When the graph itself is wanted (torch.compile, torch.export,
ONNX, torch.jit.trace), in forward-mode AD and under the transforms of torch.func, they run as the plain formulas, which
all of these understand. To script, use the modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from . import _kernels as kernels
from ._kernels import formulas
from ._torch import in_forward_ad, in_functorch_transform, is_tracing
from .family.arithmetic import working
from .family.egem import EGEM, GEM
from .family.formulas import eps_slope, forward, inverse, slope, slope_at
from .family.names import GemSpec, check_eps, check_n
from .family.segem import SEGEM
from .family.table import DEFAULT_EPS, Family, family_named

# Not float8 and float4, which are for storage and matrix products: a value means something with its scale only.
_DTYPES = (*kernels.DTYPES, torch.float64)
_DTYPES_IN_WORDS = "float16, bfloat16, float32 or float64"


def gem(x: Tensor, n: int = 1, save: str = "auto") -> Tensor:
    r"""GEM, `x^(2n+1) / (1 + x^(2n))` for x > 0, else 0.

    C^(2n) everywhere; strictly increasing for x > 0; largest slope `(1 + 2n)^2 / 8n`. Source: arXiv 2604.21677.

    Args:
        x: Floating-point tensor of any shape.
        n: The paper's N, 1 to 32.
        save: What the backward pass keeps; see `egem`.

    Returns:
        A tensor of the shape, dtype and memory format of x. float16 and bfloat16 are computed in float32.

    Raises:
        TypeError: x is not a dense tensor of float16, bfloat16, float32 or float64, or n is not an integer.
        ValueError: n is outside 1..32, or `save` is not possible.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(gem, (x,), x, n=n, save=save)
    return _activate(GEM, x, n, 1.0, save)


def egem(x: Tensor, n: int = 1, eps: float | Tensor = DEFAULT_EPS, save: str = "auto") -> Tensor:
    r"""E-GEM, `x t / (t + eps)` with `t = x^(2n)` for x > 0, else 0; towards ReLU as eps goes to 0.

    At most `eps^(1/2n) (2n-1)^((2n-1)/2n) / 2n` from ReLU, `sqrt(eps) / 2` for n = 1. The eps of arXiv 2604.21677 is
    read as taking the place of GEM's 1; for an eps meant as the scale of the gate, pass `eps = scale**(2 * n)`.

    Args:
        x: Floating-point tensor of any shape.
        n: The paper's N, 1 to 32.
        eps: Positive number, or a positive floating-point tensor that broadcasts against x and takes part in
            differentiation. The values of a tensor are not checked, since that would wait for the device.
        save: What the backward pass keeps. `"input"`: x. `"output"`: the result, which a linear layer or a convolution
            that follows keeps anyway, and from which the slope is recovered; then the result must not be overwritten
            in place. `"auto"`: the output on GPUs for n up to 4, except in float16 at n = 1 with eps below 7e-5, where
            outputs underflow, and except for a tensor eps; the input on CPUs, where recovering costs more time than
            it saves, and elsewhere.

    Returns:
        A tensor of the shape, dtype and memory format of x. float16 and bfloat16 are computed in float32.

    Raises:
        TypeError: x is not a dense tensor of float16, bfloat16, float32 or float64, n is not an integer, or eps is not
            a number.
        ValueError: n is outside 1..32, eps is not positive and finite, its shape does not broadcast against x, or
            `save` is not possible.
    """
    if has_torch_function_variadic(x, eps):
        return handle_torch_function(egem, (x, eps), x, n=n, eps=eps, save=save)
    return _activate(EGEM, x, n, eps, save)


def segem(x: Tensor, n: int = 1, eps: float | Tensor = DEFAULT_EPS, save: str = "auto") -> Tensor:
    r"""SE-GEM, `x` for x >= 0 and `x eps / (x^(2n) + eps)` for x < 0; towards ReLU as eps goes to 0.

    Equals `x + egem(-x)`. The dip below zero is as deep as E-GEM is far from ReLU. The public record of
    arXiv 2604.21677 gives the properties of SE-GEM, not its formula; this is the simplest function that has them.

    Args, returns and raises as for `egem`, except that the output does not tell the input: "auto" keeps the input.
    """
    if has_torch_function_variadic(x, eps):
        return handle_torch_function(segem, (x, eps), x, n=n, eps=eps, save=save)
    return _activate(SEGEM, x, n, eps, save)


def activation(
    x: Tensor, family: str = "egem", n: int = 1, eps: float | Tensor | None = None, save: str = "auto"
) -> Tensor:
    """The activation of any family by its name, one that was registered too.

    Args:
        x: Floating-point tensor of any shape.
        family: `gem`, `egem`, `segem`, or the name of a registered `Family`.
        n: The paper's N, 1 to 32.
        eps: As for `egem`; by default that of the family.
        save: What the backward pass keeps; see `egem`.

    Returns:
        A tensor of the shape, dtype and memory format of x. float16 and bfloat16 are computed in float32.

    Raises:
        TypeError: as for `egem`.
        ValueError: the family is unknown, or as for `egem`.
    """
    if has_torch_function_variadic(x, eps):
        return handle_torch_function(activation, (x, eps), x, family=family, n=n, eps=eps, save=save)
    definition, eps = _member(family, n, eps)
    return _activate(definition, x, n, eps, save)


def gem_glu(gate: Tensor, up: Tensor, family: str = "egem", n: int = 1, eps: float | Tensor | None = None) -> Tensor:
    """The inside of a gated MLP, `f(gate) up`, in one pass, for f of any family.

    Rounded once, where `egem(gate) * up` is rounded twice. The backward pass keeps gate and up.

    Args:
        gate: Floating-point tensor of any shape.
        up: One of the same shape, dtype and device.
        family: As for `activation`.
        n: The paper's N, 1 to 32.
        eps: As for `activation`.

    Returns:
        A tensor of the shape, dtype and memory format of gate.

    Raises:
        TypeError: gate or up is not a dense tensor of float16, bfloat16, float32 or float64, n is not an integer, or
            eps is not a number.
        ValueError: gate and up differ in shape, dtype or device, the family is unknown, or as for `egem`.
    """
    if has_torch_function_variadic(gate, up, eps):
        return handle_torch_function(gem_glu, (gate, up, eps), gate, up, family=family, n=n, eps=eps)
    definition, eps = _member(family, n, eps)
    n, eps = _check(gate, n, eps, "gate")
    check_tensor(up, "up")
    if (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device):
        raise ValueError(
            "gate and up must have one shape, dtype and device, got "
            + " and ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (gate, up))
        )
    product: Tensor
    if _wants_formula():
        product = formulas.run("glu", definition, n, eps, gate, up)
    elif isinstance(eps, Tensor):
        product = (_activate(definition, working(gate), n, eps, "input") * up).to(gate.dtype)
    elif torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        product = _Glu.apply(gate, up, definition, n, eps)
    else:
        product = kernels.run("glu", definition, n, eps, gate, up)
    return product


def _member(family: str, n: int, eps: float | Tensor | None) -> tuple[Family, float | Tensor]:
    """A family by name and an eps that it has."""
    definition = family_named(family)
    if eps is None:
        return definition, definition.default_eps
    if definition.fixed_eps is not None and (isinstance(eps, Tensor) or eps != definition.fixed_eps):
        GemSpec(family, n, 0.5 if isinstance(eps, Tensor) else eps, isinstance(eps, Tensor))  # raises
    return definition, eps


def _activate(family: Family, x: Tensor, n: int, eps: float | Tensor, save: str) -> Tensor:
    n, eps = _check(x, n, eps, "x")
    output = kernels.keeps_output(family, n, eps, x, save)
    if _wants_formula() or (isinstance(eps, Tensor) and family.eps_slope is None):
        return forward(family, n, eps, x)
    if not torch.is_grad_enabled() or not (x.requires_grad or (isinstance(eps, Tensor) and eps.requires_grad)):
        y: Tensor = kernels.run("forward", family, n, eps, x)
    else:
        y = _Activation.apply(x, eps, family, n, output)
    return y


def _check(x: Tensor, n: int, eps: float | Tensor, name: str) -> tuple[int, float | Tensor]:
    """n and eps as they are computed with, or an error that says what is wrong with them or with x."""
    check_tensor(x, name)
    n = check_n(n)
    if isinstance(eps, Tensor):
        _check_eps_tensor(eps, x)
    else:
        if torch.compiler.is_compiling() and isinstance(eps, float):
            # Specialises a float that torch.compile made symbolic: eps shapes the graph, as n does.
            numerator, denominator = eps.as_integer_ratio()
            eps = numerator / denominator
        eps = check_eps(eps, n)
    return n, eps


def check_tensor(x: Tensor, name: str) -> None:
    """Raises TypeError, saying what to do, where this is no tensor that an activation takes."""
    allowed = f"{name} must be a tensor of {_DTYPES_IN_WORDS}"
    if not isinstance(x, Tensor):
        raise TypeError(f"{allowed}, got {type(x).__name__}; convert it with torch.tensor")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{allowed}, got a tensor of {x.dtype}; convert it with {name}.{_conversion(x)}")
    if x.layout != torch.strided or x.is_nested:
        got = f"a nested tensor of layout {x.layout}" if x.is_nested else f"layout {x.layout}"
        how = f"torch.nested.to_padded_tensor({name}, 0.0)" if x.is_nested else f"{name}.to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got {got}; convert it with {how}")


def _conversion(x: Tensor) -> str:
    """What makes a dense tensor of one of `_DTYPES` of one of another dtype."""
    return "dequantize()" if x.is_quantized else "real" if x.is_complex() else "float()"


def _wants_formula() -> bool:
    """Whether the graph is being captured, or derivatives are taken that nest a Function wrongly: torch.func's."""
    return torch.compiler.is_compiling() or is_tracing() or in_functorch_transform() or in_forward_ad()


def _check_eps_tensor(eps: Tensor, x: Tensor) -> None:
    if eps.dtype not in _DTYPES:
        how = f"eps.{_conversion(eps)}"
        raise TypeError(f"a tensor eps must be of {_DTYPES_IN_WORDS}, got {eps.dtype}; convert it with {how}")
    if is_tracing():
        return  # shapes are tensors there
    if eps.ndim > x.ndim or any(a not in (1, b) for a, b in zip(eps.shape[::-1], x.shape[::-1], strict=False)):
        raise ValueError(
            f"a tensor eps must broadcast to the shape of x, got eps {tuple(eps.shape)} and x {tuple(x.shape)}; "
            "for one eps per channel of dimension 1, reshape it to (C, 1, ..., 1)"
        )


class _Activation(torch.autograd.Function):
    """Closed-form first derivatives; for higher ones the backward pass is plain torch, which autograd differentiates.

    Without `setup_context`, which costs as much as a small activation: what needs it gets the formulas.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float | Tensor, family: Family, n: int, output: bool) -> Tensor:
        y: Tensor = kernels.run("forward", family, n, eps, x)
        ctx.family, ctx.n, ctx.output = family, n, output
        ctx.eps = None if isinstance(eps, Tensor) else eps
        ctx.save_for_backward(y if output else x, *((eps,) if isinstance(eps, Tensor) else ()))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved, *rest = _saved(ctx)
        family, n, eps = ctx.family, ctx.n, rest[0] if rest else ctx.eps
        if torch.is_grad_enabled() or ctx.needs_input_grad[1]:
            x = _Inverse.apply(saved, eps, family, n) if ctx.output else saved
            grad_x = grad_eps = None
            if ctx.needs_input_grad[0]:
                grad_x = formulas.run("backward", family, n, eps, grad, x)
            if ctx.needs_input_grad[1]:
                grad_eps = (grad * eps_slope(family, n, eps, x)).sum_to_size(eps.shape).to(eps.dtype)
            return grad_x, grad_eps, None, None, None
        operation = "backward_at" if ctx.output else "backward"
        return _backend().run(operation, family, n, eps, grad, saved), None, None, None, None


def _backend() -> Any:
    """What computes a backward pass that is not differentiated: it may run where the forward pass did not."""
    return formulas if _wants_formula() else kernels


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        return saved
    except RuntimeError as error:
        if ctx.output and "inplace operation" in str(error):
            raise RuntimeError(
                "the output of a GEM activation was overwritten in place, as Dropout(inplace=True) does, and its "
                'backward pass keeps that output: take save="input", `module.save = "input"`, or for all of them '
                "HF_GEM_SAVE=input in the environment. " + str(error)
            ) from None
        raise


class _Inverse(torch.autograd.Function):
    """x from y = egem(x), for derivatives of the backward pass. y and eps are where they come from in the graph."""

    generate_vmap_rule = True  # a backward pass may be mapped over several incoming gradients

    @staticmethod
    def forward(y: Tensor, eps: float | Tensor, family: Family, n: int) -> Tensor:
        return inverse(family, n, eps, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        y, eps, ctx.family, ctx.n = inputs
        ctx.eps = None if isinstance(eps, Tensor) else eps
        ctx.save_for_backward(y, output, *((eps,) if isinstance(eps, Tensor) else ()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, x, *rest = ctx.saved_tensors
        eps = rest[0] if rest else ctx.eps
        # By the slope that the backward pass of `_Activation`, which comes next, multiplies by.
        if torch.is_grad_enabled() or ctx.needs_input_grad[1]:
            steepness = slope(ctx.family, ctx.n, eps, x)
        else:
            steepness = slope_at(ctx.family, ctx.n, eps, y)
        grad_y = _Quotient.apply(grad, steepness)
        grad_eps = None
        if ctx.needs_input_grad[1]:
            grad_eps = (-grad_y * eps_slope(ctx.family, ctx.n, eps, x)).sum_to_size(eps.shape).to(eps.dtype)
        return grad_y.to(y.dtype), grad_eps, None, None


class _Quotient(torch.autograd.Function):
    """a / b, and 0 where b is. The slopes by which derivatives of an inverse divide were factors before, and vanish.

    So each division comes first where it is differentiated again, when the factor is still there: autograd's own
    `a / b / b` overflows, and `torch.where` passes on a NaN from what it did not select.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(b != 0, a / b, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        quotient, b = ctx.saved_tensors
        share = _Quotient.apply(grad, b)
        return share, -share * quotient


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, family: Family, n: int, eps: float) -> Any:
        ctx.family, ctx.n, ctx.eps = family, n, eps
        ctx.save_for_backward(gate, up)
        return kernels.run("glu", family, n, eps, gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        compute = formulas if torch.is_grad_enabled() else _backend()
        grads = compute.run("glu_backward", ctx.family, ctx.n, ctx.eps, grad, *ctx.saved_tensors)
        wanted = (gradient if needed else None for gradient, needed in zip(grads, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None
