"""The activation functions with their derivatives: `gem`, `egem`, `segem`, `activation` for any family, and `gem_glu`.

In eager mode they run as a `torch.autograd.Function` with closed-form derivatives. It uses kernels if there are any,
saves one tensor and supports double backward. When the graph is captured (torch.compile, torch.export, ONNX,
torch.jit.trace), in forward-mode AD and under torch.func transforms, they run as plain formulas, which all of these
understand. For TorchScript, use the modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from . import _kernels as kernels
from ._kernels import plain
from ._torch import in_forward_ad, in_functorch_transform, is_tracing
from .family.arithmetic import working
from .family.egem import EGEM, GEM
from .family.formulas import eps_slope, forward, inverse
from .family.names import GemSpec, check_eps, check_n
from .family.segem import SEGEM
from .family.table import DEFAULT_EPS, Family, family_named

# float8 and float4 are not included. They serve storage and matrix products: a value has no meaning without its scale.
_DTYPES = (*kernels.DTYPES, torch.float64)
_DTYPES_IN_WORDS = "float16, bfloat16, float32 or float64"


def gem(x: Tensor, n: int = 1, save: str = "auto") -> Tensor:
    r"""GEM, `x^(2n+1) / (1 + x^(2n))` for x > 0, else 0.

    GEM is C^(2n) everywhere and strictly increasing for x > 0, with a largest slope of `(1 + 2n)^2 / 8n`. It was
    introduced in arXiv 2604.21677.

    Args:
        x: Floating-point tensor of any shape.
        n: The paper's N, from 1 to 32.
        save: Tensor that is kept for the backward pass; see `egem`.

    Returns:
        A tensor with the shape, dtype and memory format of x. float16 and bfloat16 are computed in float32.

    Raises:
        TypeError: x is not a dense tensor of float16, bfloat16, float32 or float64, or n is not an integer.
        ValueError: n is outside 1..32, or `save` is not available here.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(gem, (x,), x, n=n, save=save)
    return _activate(GEM, x, n, 1.0, save)


def egem(x: Tensor, n: int = 1, eps: float | Tensor = DEFAULT_EPS, save: str = "auto") -> Tensor:
    r"""E-GEM, `x t / (t + eps)` with `t = x^(2n)` for x > 0, else 0. It approaches ReLU as eps goes to 0.

    The distance from ReLU is at most `eps^(1/2n) (2n-1)^((2n-1)/2n) / 2n`, which is `sqrt(eps) / 2` for n = 1. The eps
    of arXiv 2604.21677 is read as a replacement for the 1 of GEM. If you have an eps that is meant as the scale of the
    gate, pass `eps = scale**(2 * n)`.

    Args:
        x: Floating-point tensor of any shape.
        n: The paper's N, from 1 to 32.
        eps: Positive number, or a positive floating-point tensor that broadcasts to the shape of x. Gradients flow to a
            tensor. Its values are not checked, since that would wait for the device.
        save: Tensor that is kept for the backward pass. `"input"` keeps x. `"output"` keeps the result, which a linear
            layer or convolution that follows keeps anyway, and recovers the slope from it; the result must then not be
            overwritten in place. `"auto"` keeps the output on GPUs for n up to 4, except for a tensor eps, and except
            in float16 at n = 1 with eps below 7e-5, where outputs underflow. Otherwise it keeps the input, always on
            CPUs, where recovering the slope costs more time than it saves. Where an output underflows to 0, all
            derivatives from it are 0.

    Returns:
        A tensor with the shape, dtype and memory format of x. float16 and bfloat16 are computed in float32.

    Raises:
        TypeError: x is not a dense tensor of float16, bfloat16, float32 or float64, n is not an integer, or eps is not
            a number.
        ValueError: n is outside 1..32, eps is not positive and finite, its shape does not broadcast to that of x, or
            `save` is not available here.
    """
    if has_torch_function_variadic(x, eps):
        return handle_torch_function(egem, (x, eps), x, n=n, eps=eps, save=save)
    return _activate(EGEM, x, n, eps, save)


def segem(x: Tensor, n: int = 1, eps: float | Tensor = DEFAULT_EPS, save: str = "auto") -> Tensor:
    r"""SE-GEM, `x` for x >= 0 and `x eps / (x^(2n) + eps)` for x < 0. It approaches ReLU as eps goes to 0.

    It equals `x + egem(-x)`. The depth of its dip below zero is the largest distance of E-GEM from ReLU. The public
    record of arXiv 2604.21677 gives the properties of SE-GEM but not its formula. This is the simplest function with
    these properties.

    Arguments, result and errors are those of `egem`, except that `save="output"` is not available, since the output
    does not determine the input. `"auto"` keeps the input.
    """
    if has_torch_function_variadic(x, eps):
        return handle_torch_function(segem, (x, eps), x, n=n, eps=eps, save=save)
    return _activate(SEGEM, x, n, eps, save)


def activation(
    x: Tensor, family: str = "egem", n: int = 1, eps: float | Tensor | None = None, save: str = "auto"
) -> Tensor:
    """Applies the activation of any family, given by name.

    Args:
        x: Floating-point tensor of any shape.
        family: `gem`, `egem`, `segem`, or the name of a registered `Family`.
        n: The paper's N, from 1 to 32.
        eps: Positive number or tensor; see `egem`. By default the eps of the family.
        save: Tensor that is kept for the backward pass; see `egem`.

    Returns:
        A tensor with the shape, dtype and memory format of x. float16 and bfloat16 are computed in float32.

    Raises:
        TypeError: An argument has the wrong type; see `egem`.
        ValueError: The family is unknown, or an argument is out of range; see `egem`.
    """
    if has_torch_function_variadic(x, eps):
        return handle_torch_function(activation, (x, eps), x, family=family, n=n, eps=eps, save=save)
    definition, eps = _member(family, n, eps)
    return _activate(definition, x, n, eps, save)


def gem_glu(gate: Tensor, up: Tensor, family: str = "egem", n: int = 1, eps: float | Tensor | None = None) -> Tensor:
    """Computes `f(gate) * up`, the inner part of a gated MLP, in one pass, for f of any family.

    The result is rounded once, while `egem(gate) * up` is rounded twice. The backward pass keeps gate and up.

    Args:
        gate: Floating-point tensor of any shape.
        up: Tensor with the same shape, dtype and device as gate.
        family: `gem`, `egem`, `segem`, or the name of a registered `Family`.
        n: The paper's N, from 1 to 32.
        eps: Positive number or tensor; see `egem`. By default the eps of the family.

    Returns:
        A tensor with the shape, dtype and memory format of gate.

    Raises:
        TypeError: gate or up is not a dense tensor of float16, bfloat16, float32 or float64, n is not an integer, or
            eps is not a number.
        ValueError: gate and up differ in shape, dtype or device, the family is unknown, or n or eps is out of range.
    """
    if has_torch_function_variadic(gate, up, eps):
        return handle_torch_function(gem_glu, (gate, up, eps), gate, up, family=family, n=n, eps=eps)
    definition, eps = _member(family, n, eps)
    n, eps = _check(gate, n, eps, "gate")
    check_tensor(up, "up")
    if (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device):
        given = " and ".join(
            f"{name} of shape {tuple(t.shape)}, {t.dtype} on {t.device}" for name, t in (("gate", gate), ("up", up))
        )
        raise ValueError(
            f"got {given}. They must have the same shape, dtype and device. For dtype and device, use up.to(gate)."
        )
    product: Tensor
    if _wants_formula():
        product = plain.run("glu", definition, n, eps, gate, up)
    elif isinstance(eps, Tensor):
        product = (_activate(definition, working(gate), n, eps, "input") * up).to(gate.dtype)
    elif torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        product = _Glu.apply(gate, up, definition, n, eps)
    else:
        product = kernels.run("glu", definition, n, eps, gate, up)
    return product


def _member(family: str, n: int, eps: float | Tensor | None) -> tuple[Family, float | Tensor]:
    """Looks up a family by name, and checks eps or fills in the default."""
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
        result = _Activation.apply(x, eps, family, n, output)
        y = result[0] if output else result
    return y


def _check(x: Tensor, n: int, eps: float | Tensor, name: str) -> tuple[int, float | Tensor]:
    """Checks x, n and eps, and returns n and eps in the form that the formulas and kernels take."""
    check_tensor(x, name)
    n = check_n(n)
    if isinstance(eps, Tensor):
        _check_eps_tensor(eps, x)
    else:
        if torch.compiler.is_compiling() and isinstance(eps, float):
            # Specialises a float that torch.compile made symbolic, because the graph depends on eps, as it does on n.
            numerator, denominator = eps.as_integer_ratio()
            eps = numerator / denominator
        eps = check_eps(eps, n)
    return n, eps


def check_tensor(x: Tensor, name: str) -> None:
    """Raises TypeError, with the conversion to use, if an activation does not support x."""
    allowed = f"{name} must be a tensor of {_DTYPES_IN_WORDS}"
    if not isinstance(x, Tensor):
        raise TypeError(f"got {name} of type {type(x).__name__}. {allowed}. Convert it with torch.tensor.")
    if x.dtype not in _DTYPES:
        raise TypeError(f"got {name} of {x.dtype}. {allowed}. Convert it with {name}.{_conversion(x)}.")
    if x.layout != torch.strided or x.is_nested:
        got = f"a nested tensor of layout {x.layout}" if x.is_nested else f"a tensor of layout {x.layout}"
        how = f"torch.nested.to_padded_tensor({name}, 0.0)" if x.is_nested else f"{name}.to_dense()"
        raise TypeError(f"got {got} as {name}. {name} must be a dense tensor. Convert it with {how}.")


def _conversion(x: Tensor) -> str:
    """Returns the call that converts a tensor of another dtype to one of `_DTYPES`."""
    return "dequantize()" if x.is_quantized else "real" if x.is_complex() else "float()"


def _wants_formula() -> bool:
    """Returns whether plain operations are needed: for graph capture, a torch.func transform or forward-mode AD."""
    return torch.compiler.is_compiling() or is_tracing() or in_functorch_transform() or in_forward_ad()


def _check_eps_tensor(eps: Tensor, x: Tensor) -> None:
    if eps.dtype not in _DTYPES:
        how = f"eps.{_conversion(eps)}"
        raise TypeError(f"got eps of {eps.dtype}. A tensor eps must be of {_DTYPES_IN_WORDS}. Convert it with {how}.")
    if is_tracing():
        return  # in tracing, shapes are tensors
    if eps.ndim > x.ndim or any(a not in (1, b) for a, b in zip(eps.shape[::-1], x.shape[::-1], strict=False)):
        raise ValueError(
            f"got eps of shape {tuple(eps.shape)} and x of shape {tuple(x.shape)}. A tensor eps must broadcast to the "
            "shape of x. For one eps per channel of dimension 1, reshape it to (C, 1, ..., 1)."
        )


class _Activation(torch.autograd.Function):
    """The activation with closed-form first derivatives.

    For higher derivatives, the backward pass is plain torch, which autograd differentiates. If it keeps the output, it
    recovers x from it, and the second result takes the place of x in the graph: it holds the output, and its gradient
    is that of x. Gradients of the output itself would have to be divided by the slope, which vanishes near 0.

    There is no `setup_context`, which would cost as much as a small activation. Callers that need it get the formulas.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float | Tensor, family: Family, n: int, output: bool) -> Any:
        y: Tensor = kernels.run("forward", family, n, eps, x)
        ctx.family, ctx.n, ctx.output = family, n, output
        ctx.eps = None if isinstance(eps, Tensor) else eps
        rest = (eps,) if isinstance(eps, Tensor) else ()
        if not output:
            ctx.save_for_backward(x, *rest)
            return y
        ctx.set_materialize_grads(False)
        in_place_of_x = y.detach()
        ctx.save_for_backward(in_place_of_x, *rest)
        return y, in_place_of_x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_x: Tensor | None = None) -> Any:
        grad_eps = None
        if grad is not None:
            through_y, grad_eps = _gradients(ctx, grad)
            grad_x = through_y if grad_x is None or through_y is None else grad_x + through_y
        return grad_x, grad_eps, None, None, None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of x and eps that come from the gradient of the output."""
    saved, *rest = _saved(ctx)
    family, n, eps = ctx.family, ctx.n, rest[0] if rest else ctx.eps
    if not (torch.is_grad_enabled() or ctx.needs_input_grad[1]):
        operation = "backward_at" if ctx.output else "backward"
        return _backend().run(operation, family, n, eps, grad, saved), None
    x = _Recovered.apply(saved, eps, family, n) if ctx.output else saved
    grad_x = grad_eps = None
    if ctx.needs_input_grad[0]:
        grad_x = plain.run("backward", family, n, eps, grad, x)
    if ctx.needs_input_grad[1]:
        grad_eps = (grad * eps_slope(family, n, eps, x)).sum_to_size(eps.shape).to(eps.dtype)
    return grad_x, grad_eps


def _backend() -> Any:
    """Returns the backend for a backward pass that is not differentiated. The forward pass may have had another one."""
    return plain if _wants_formula() else kernels


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        return saved
    except RuntimeError as error:
        if ctx.output and "inplace operation" in str(error):
            raise RuntimeError(
                "the output of a GEM activation was overwritten in place, for example by Dropout(inplace=True). The "
                'backward pass needs that output unchanged. Pass save="input", set `module.save = "input"`, or set '
                "HF_GEM_SAVE=input in the environment for all activations. " + str(error)
            ) from None
        raise


class _Recovered(torch.autograd.Function):
    """Recovers x from y = egem(x). Its gradient is passed on as it is, since y takes the place of x in the graph."""

    generate_vmap_rule = True  # a backward pass may be vmapped over several incoming gradients

    @staticmethod
    def forward(y: Tensor, eps: float | Tensor, family: Family, n: int) -> Tensor:
        x = inverse(family, n, eps, y)
        # Most outputs of 0 come from below 0. At 0 itself, versions of torch differ in the derivatives of a minimum.
        return torch.where(y == 0, -torch.finfo(x.dtype).tiny, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.to(ctx.dtype), None, None, None


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, family: Family, n: int, eps: float) -> Any:
        ctx.family, ctx.n, ctx.eps = family, n, eps
        ctx.save_for_backward(gate, up)
        return kernels.run("glu", family, n, eps, gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        compute = plain if torch.is_grad_enabled() else _backend()
        grads = compute.run("glu_backward", ctx.family, ctx.n, ctx.eps, grad, *ctx.saved_tensors)
        wanted = (gradient if needed else None for gradient, needed in zip(grads, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None
