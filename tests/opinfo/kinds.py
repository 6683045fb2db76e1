"""Every way in which torch takes a first or a second derivative, of one elementwise function.

Each takes a function f, its input x and weights g of the same shape, and of the second order v too, and returns g f'(x)
or g v f''(x): for an elementwise function, products with the Jacobian from either side are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, hvp, jacobian, jvp, vhp, vjp
from torch.utils.checkpoint import checkpoint

Function = Callable[[Tensor], Tensor]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def _flat(matrix: Tensor, x: Tensor) -> Tensor:
    """The diagonal of a Jacobian, in the shape of x."""
    return matrix.reshape(x.numel(), x.numel()).diagonal().reshape(x.shape)


def _weighted(f: Function, g: Tensor) -> Function:
    return lambda t: (f(t) * g).sum()


def _mapped(f: Function) -> Function:
    """The same function under two vmap."""
    return lambda t: func.vmap(func.vmap(f))(t[None, None])[0, 0]


# ---- first order


def backward(f: Function, x: Tensor, g: Tensor) -> Tensor:
    x = _leaf(x)
    f(x).backward(g)
    return x.grad


def with_graph(f: Function, x: Tensor, g: Tensor) -> Tensor:
    x = _leaf(x)
    return torch.autograd.grad(f(x), x, g, create_graph=True)[0].detach()


def batched_gradients(f: Function, x: Tensor, g: Tensor) -> Tensor:
    x = _leaf(x)
    (both,) = torch.autograd.grad(f(x), x, torch.stack([torch.zeros_like(g), g]), is_grads_batched=True)
    assert not both[0].any()
    return both[1]


def batched_gradients_with_graph(f: Function, x: Tensor, g: Tensor) -> Tensor:
    x = _leaf(x)
    gradients = torch.stack([torch.zeros_like(g), g])
    (both,) = torch.autograd.grad(f(x), x, gradients, is_grads_batched=True, create_graph=True)
    return both[1].detach()


def checkpointed(f: Function, x: Tensor, g: Tensor) -> Tensor:
    x = _leaf(x)
    return torch.autograd.grad(checkpoint(f, x, use_reentrant=False), x, g)[0]


def checkpointed_reentrant(f: Function, x: Tensor, g: Tensor) -> Tensor:
    x = _leaf(x)
    checkpoint(f, x, use_reentrant=True).backward(g)
    return x.grad


def saved_elsewhere(f: Function, x: Tensor, g: Tensor) -> Tensor:
    x = _leaf(x)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        y = f(x)
    return torch.autograd.grad(y, x, g)[0]


def anomaly_mode(f: Function, x: Tensor, g: Tensor) -> Tensor:
    x = _leaf(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly(check_nan=True):
            return torch.autograd.grad(f(x), x, g)[0]


def forward_mode(f: Function, x: Tensor, g: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, g))).tangent


def tangent_of_the_gradient(f: Function, x: Tensor, g: Tensor) -> Tensor:
    # The forward pass was over before forward mode began.
    x = _leaf(x)
    y = f(x)
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(g), g))
        return forward_ad.unpack_dual(gradient).tangent


def func_jvp(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return func.jvp(f, (x,), (g,))[1]


def func_vjp(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return func.vjp(f, x)[1](g)[0]


def func_linearize(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return func.linearize(f, x)[1](g)


def func_grad(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return func.grad(_weighted(f, g))(x)


def func_jacrev(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return _flat(func.jacrev(f)(x), x) * g


def func_jacfwd(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return _flat(func.jacfwd(f)(x), x) * g


def func_vmap_of_vjp(f: Function, x: Tensor, g: Tensor) -> Tensor:
    _, pull = func.vjp(f, x)
    return func.vmap(pull)(torch.stack([g, g]))[0][1]


def func_vmap_of_jvp(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return func.vmap(lambda t: func.jvp(f, (x,), (t,))[1])(torch.stack([g, g]))[1]


def func_vmap_of_backward(f: Function, x: Tensor, g: Tensor) -> Tensor:
    x = _leaf(x)
    y = f(x)
    return func.vmap(lambda t: torch.autograd.grad(y, x, t)[0])(torch.stack([g, g]))[1]


def func_jvp_of_vmap(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return func_jvp(_mapped(f), x, g)


def func_vjp_of_vmap(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return func_vjp(_mapped(f), x, g)


def func_vmap_of_jvp_of_vmap(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return func_vmap_of_jvp(_mapped(f), x, g)


def func_vmap_of_vjp_of_vmap(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return func_vmap_of_vjp(_mapped(f), x, g)


def func_functionalize(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return func.functionalize(func.grad(_weighted(f, g)))(x)


def old_vjp(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return vjp(f, x, g)[1]


def old_jvp(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return jvp(f, x, g)[1]  # by a derivative of the backward pass


def old_jacobian(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return _flat(jacobian(f, x, vectorize=True), x) * g


def old_jacobian_forward(f: Function, x: Tensor, g: Tensor) -> Tensor:
    return _flat(jacobian(f, x, vectorize=True, strategy="forward-mode"), x) * g


# ---- second order


def double_backward(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    x = _leaf(x)
    (gradient,) = torch.autograd.grad(f(x), x, g, create_graph=True)
    return torch.autograd.grad(gradient, x, v)[0]


def double_backward_batched(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    x = _leaf(x)
    (gradient,) = torch.autograd.grad(f(x), x, g, create_graph=True)
    return torch.autograd.grad(gradient, x, torch.stack([v, v]), is_grads_batched=True)[0][1]


def backward_of_batched(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    x = _leaf(x)
    (both,) = torch.autograd.grad(f(x), x, torch.stack([g, g]), is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(both[1], x, v)[0]


def backward_of_backward_in_vmap(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    x = _leaf(x)
    y = f(x)

    def gradient(t: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, t, create_graph=True)[0]

    return torch.autograd.grad(func.vmap(gradient)(torch.stack([g, g]))[1], x, v)[0]


def double_backward_in_anomaly_mode(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly(check_nan=True):
            return double_backward(f, x, g, v)


def double_backward_checkpointed(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return double_backward(lambda t: checkpoint(f, t, use_reentrant=False), x, g, v)


def forward_over_backward(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(_leaf(x), v)
        (gradient,) = torch.autograd.grad(f(dual), dual, g)
        return forward_ad.unpack_dual(gradient).tangent


def backward_over_forward(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    x = _leaf(x)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
        return torch.autograd.grad(tangent, x, g)[0]


def func_grad_of_grad(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return func.grad(_weighted(func.grad(_weighted(f, g)), v))(x)


def func_jvp_of_jvp(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return func.jvp(lambda t: func.jvp(f, (t,), (g,))[1], (x,), (v,))[1]


def func_jvp_of_vjp(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return func.jvp(func.grad(_weighted(f, g)), (x,), (v,))[1]


def func_vjp_of_jvp(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return func.vjp(lambda t: func.jvp(f, (t,), (g,))[1], x)[1](v)[0]


def func_vmap_of_jvp_of_vjp(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return func.vmap(lambda t: func.jvp(func.grad(_weighted(f, g)), (x,), (t,))[1])(torch.stack([v, v]))[1]


def func_jvp_of_jvp_of_vmap(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return func_jvp_of_jvp(_mapped(f), x, g, v)


def func_jvp_of_vjp_of_vmap(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return func_jvp_of_vjp(_mapped(f), x, g, v)


def func_vjp_of_vjp_of_vmap(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return func_grad_of_grad(_mapped(f), x, g, v)


def func_hessian(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return _flat(func.hessian(_weighted(f, g))(x), x) * v


def func_jacrev_of_jacrev(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return _flat(func.jacrev(func.jacrev(_weighted(f, g)))(x), x) * v


def func_jacfwd_of_jacfwd(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return _flat(func.jacfwd(func.jacfwd(_weighted(f, g)))(x), x) * v


def func_jacrev_of_jacfwd(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return _flat(func.jacrev(func.jacfwd(_weighted(f, g)))(x), x) * v


def old_hessian(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return _flat(hessian(_weighted(f, g), x, vectorize=True), x) * v


def old_hessian_forward(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return _flat(hessian(_weighted(f, g), x, vectorize=True, outer_jacobian_strategy="forward-mode"), x) * v


def old_hvp(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return hvp(_weighted(f, g), x, v)[1]


def old_vhp(f: Function, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return vhp(_weighted(f, g), x, v)[1]


def _public(first: Callable[..., Tensor], past: Callable[..., Tensor] | None) -> list[Callable[..., Tensor]]:
    """The functions of this module between two, in the order in which they stand."""
    kinds = [value for name, value in globals().items() if callable(value) and not name.startswith("_")]
    kinds = [value for value in kinds if getattr(value, "__module__", "") == __name__]
    return kinds[kinds.index(first) : len(kinds) if past is None else kinds.index(past)]


FIRST = _public(backward, double_backward)
SECOND = _public(double_backward, None)
