"""The Triton kernels of one family for one n.

`printer.triton_source` replaces the two formulas of the identity below by those of a family, and the arguments r and e
by all numbers that these take. `gpu` runs the result.
Each program handles BLOCK neighbouring elements of dense tensors with the same layout. Only the last program may have
fewer elements. It needs masks, which rule out loads and stores of 16 bytes.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

PART = tl.constexpr(256)  # elements that the last program handles at a time
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
    """Divides, rounded correctly."""
    if INTERPRETED:
        return x / y
    return tl.math.div_rn(x, y)


@triton.jit
def divide_fast(x, y):
    """Divides to within two roundings if |y| is from 2^-126 to 2^126. Beyond that, 1 / y may become 0."""
    if INTERPRETED:
        return x / y
    return libdevice.fast_dividef(x, y)


@triton.jit
def block(numel, BLOCK: tl.constexpr):
    """Returns the start of this program's elements, in int64, and their number."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    return start, tl.minimum(numel - start, BLOCK).to(tl.int32)


@triton.jit
def load(ptr, start, count, SIZE: tl.constexpr):
    """Loads SIZE elements, or the first `count` of them."""
    offsets = tl.arange(0, SIZE)
    mask = None if count is None else offsets < count
    return tl.load(ptr + start + offsets, mask=mask).to(tl.float32)


@triton.jit
def store(ptr, start, count, x, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    mask = None if count is None else offsets < count
    tl.store(ptr + start + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_part(y_ptr, x_ptr, start, count, r, e, SIZE: tl.constexpr):
    value, _ = value_and_slope(load(x_ptr, start, count, SIZE), r, e)
    store(y_ptr, start, count, value, SIZE)


@triton.jit(do_not_specialize=["numel"])
def forward(y_ptr, x_ptr, numel: tl.int64, r, e, BLOCK: tl.constexpr):
    start, count = block(numel, BLOCK)
    if count == BLOCK:
        forward_part(y_ptr, x_ptr, start, None, r, e, BLOCK)
    else:
        for i in range(0, count, PART):
            forward_part(y_ptr, x_ptr, start + i, count - i, r, e, PART)


@triton.jit
def backward_part(out_ptr, grad_ptr, x_ptr, start, count, r, e, SIZE: tl.constexpr):
    grad = load(grad_ptr, start, count, SIZE)
    _, slope = value_and_slope(load(x_ptr, start, count, SIZE), r, e)
    store(out_ptr, start, count, grad * slope, SIZE)


@triton.jit(do_not_specialize=["numel"])
def backward(out_ptr, grad_ptr, x_ptr, numel: tl.int64, r, e, BLOCK: tl.constexpr):
    start, count = block(numel, BLOCK)
    if count == BLOCK:
        backward_part(out_ptr, grad_ptr, x_ptr, start, None, r, e, BLOCK)
    else:
        for i in range(0, count, PART):
            backward_part(out_ptr, grad_ptr, x_ptr, start + i, count - i, r, e, PART)


@triton.jit
def backward_at_part(out_ptr, grad_ptr, y_ptr, start, count, r, e, DIGITS: tl.constexpr, SIZE: tl.constexpr):
    grad = load(grad_ptr, start, count, SIZE)
    slope = slope_at(load(y_ptr, start, count, SIZE), r, e, DIGITS)
    store(out_ptr, start, count, grad * slope, SIZE)


@triton.jit(do_not_specialize=["numel"])
def backward_at(out_ptr, grad_ptr, y_ptr, numel: tl.int64, r, e, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    start, count = block(numel, BLOCK)
    if count == BLOCK:
        backward_at_part(out_ptr, grad_ptr, y_ptr, start, None, r, e, DIGITS, BLOCK)
    else:
        for i in range(0, count, PART):
            backward_at_part(out_ptr, grad_ptr, y_ptr, start + i, count - i, r, e, DIGITS, PART)


@triton.jit
def glu_part(y_ptr, gate_ptr, up_ptr, start, count, r, e, SIZE: tl.constexpr):
    value, _ = value_and_slope(load(gate_ptr, start, count, SIZE), r, e)
    store(y_ptr, start, count, value * load(up_ptr, start, count, SIZE), SIZE)


@triton.jit(do_not_specialize=["numel"])
def glu(y_ptr, gate_ptr, up_ptr, numel: tl.int64, r, e, BLOCK: tl.constexpr):
    start, count = block(numel, BLOCK)
    if count == BLOCK:
        glu_part(y_ptr, gate_ptr, up_ptr, start, None, r, e, BLOCK)
    else:
        for i in range(0, count, PART):
            glu_part(y_ptr, gate_ptr, up_ptr, start + i, count - i, r, e, PART)


@triton.jit
def glu_backward_part(grad_gate_ptr, grad_up_ptr, grad_ptr, gate_ptr, up_ptr, start, count, r, e, SIZE: tl.constexpr):
    grad = load(grad_ptr, start, count, SIZE)
    up = load(up_ptr, start, count, SIZE)
    value, slope = value_and_slope(load(gate_ptr, start, count, SIZE), r, e)
    store(grad_gate_ptr, start, count, grad * up * slope, SIZE)
    store(grad_up_ptr, start, count, grad * value, SIZE)


@triton.jit(do_not_specialize=["numel"])
def glu_backward(grad_gate_ptr, grad_up_ptr, grad_ptr, gate_ptr, up_ptr, numel: tl.int64, r, e, BLOCK: tl.constexpr):
    start, count = block(numel, BLOCK)
    if count == BLOCK:
        glu_backward_part(grad_gate_ptr, grad_up_ptr, grad_ptr, gate_ptr, up_ptr, start, None, r, e, BLOCK)
    else:
        for i in range(0, count, PART):
            glu_backward_part(grad_gate_ptr, grad_up_ptr, grad_ptr, gate_ptr, up_ptr, start + i, count - i, r, e, PART)
