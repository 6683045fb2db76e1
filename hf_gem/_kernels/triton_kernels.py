"""The Triton kernels of one family for one n.

`printer.triton_source` writes the formulas of a family in place of the two below, those of the identity, and `gpu` runs
what comes out. Every program handles BLOCK neighbouring elements of tensors that are dense and laid out alike. Only the
last one may have fewer, and needs a mask, beside which loads and stores of 16 bytes are not to be had.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# ---- formulas


@triton.jit
def value_and_slope(z, r, e):
    return z, 1.0


@triton.jit
def slope_at(z, r, e, DIGITS: tl.constexpr):
    return 1.0


# ---- kernels


@triton.jit
def divide(x, y):
    """Within two roundings, where |y| is in 2^-126 to 2^126; beyond, 1 / y may come out as 0."""
    if INTERPRETED:
        return x / y
    return libdevice.fast_dividef(x, y)


@triton.jit
def block(numel, BLOCK: tl.constexpr):
    """Where this program's elements start, in int64, and how many follow."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    return start, tl.arange(0, BLOCK), numel - start


@triton.jit
def load(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask=mask).to(tl.float32)


@triton.jit
def store(ptr, offsets, x, mask):
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_block(y_ptr, x_ptr, offsets, mask, r, e):
    value, _ = value_and_slope(load(x_ptr, offsets, mask), r, e)
    store(y_ptr, offsets, value, mask)


@triton.jit(do_not_specialize=["numel"])
def forward(y_ptr, x_ptr, numel: tl.int64, r, e, BLOCK: tl.constexpr):
    start, offsets, rest = block(numel, BLOCK)
    if rest >= BLOCK:
        forward_block(y_ptr + start, x_ptr + start, offsets, None, r, e)
    else:
        forward_block(y_ptr + start, x_ptr + start, offsets, offsets < rest, r, e)


@triton.jit
def backward_block(out_ptr, grad_ptr, x_ptr, offsets, mask, r, e):
    grad = load(grad_ptr, offsets, mask)
    _, slope = value_and_slope(load(x_ptr, offsets, mask), r, e)
    store(out_ptr, offsets, grad * slope, mask)


@triton.jit(do_not_specialize=["numel"])
def backward(out_ptr, grad_ptr, x_ptr, numel: tl.int64, r, e, BLOCK: tl.constexpr):
    start, offsets, rest = block(numel, BLOCK)
    if rest >= BLOCK:
        backward_block(out_ptr + start, grad_ptr + start, x_ptr + start, offsets, None, r, e)
    else:
        backward_block(out_ptr + start, grad_ptr + start, x_ptr + start, offsets, offsets < rest, r, e)


@triton.jit
def backward_at_block(out_ptr, grad_ptr, y_ptr, offsets, mask, r, e, DIGITS: tl.constexpr):
    grad = load(grad_ptr, offsets, mask)
    slope = slope_at(load(y_ptr, offsets, mask), r, e, DIGITS)
    store(out_ptr, offsets, grad * slope, mask)


@triton.jit(do_not_specialize=["numel"])
def backward_at(out_ptr, grad_ptr, y_ptr, numel: tl.int64, r, e, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    start, offsets, rest = block(numel, BLOCK)
    if rest >= BLOCK:
        backward_at_block(out_ptr + start, grad_ptr + start, y_ptr + start, offsets, None, r, e, DIGITS)
    else:
        backward_at_block(out_ptr + start, grad_ptr + start, y_ptr + start, offsets, offsets < rest, r, e, DIGITS)


@triton.jit
def glu_block(y_ptr, gate_ptr, up_ptr, offsets, mask, r, e):
    value, _ = value_and_slope(load(gate_ptr, offsets, mask), r, e)
    store(y_ptr, offsets, value * load(up_ptr, offsets, mask), mask)


@triton.jit(do_not_specialize=["numel"])
def glu(y_ptr, gate_ptr, up_ptr, numel: tl.int64, r, e, BLOCK: tl.constexpr):
    start, offsets, rest = block(numel, BLOCK)
    if rest >= BLOCK:
        glu_block(y_ptr + start, gate_ptr + start, up_ptr + start, offsets, None, r, e)
    else:
        glu_block(y_ptr + start, gate_ptr + start, up_ptr + start, offsets, offsets < rest, r, e)


@triton.jit
def glu_backward_block(grad_gate_ptr, grad_up_ptr, grad_ptr, gate_ptr, up_ptr, offsets, mask, r, e):
    grad = load(grad_ptr, offsets, mask)
    up = load(up_ptr, offsets, mask)
    value, slope = value_and_slope(load(gate_ptr, offsets, mask), r, e)
    store(grad_gate_ptr, offsets, grad * up * slope, mask)
    store(grad_up_ptr, offsets, grad * value, mask)


@triton.jit(do_not_specialize=["numel"])
def glu_backward(grad_gate_ptr, grad_up_ptr, grad_ptr, gate_ptr, up_ptr, numel: tl.int64, r, e, BLOCK: tl.constexpr):
    start, offsets, rest = block(numel, BLOCK)
    if rest >= BLOCK:
        glu_backward_block(grad_gate_ptr + start, grad_up_ptr + start, grad_ptr + start, gate_ptr + start, up_ptr + start, offsets, None, r, e)
    else:
        glu_backward_block(grad_gate_ptr + start, grad_up_ptr + start, grad_ptr + start, gate_ptr + start, up_ptr + start, offsets, offsets < rest, r, e)
