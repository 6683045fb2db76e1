"""The Triton kernels of one family for one n.

`printer.triton_source` writes the formulas of a family in place of the two below, those of the identity, and `gpu` runs
what comes out. Every program handles BLOCK neighbouring elements of tensors that are dense and laid out alike.
"""

import triton
import triton.language as tl

# ---- formulas


@triton.jit
def value_and_slope(z, r, e):
    return z, 1.0


@triton.jit
def slope_at(z, r, e, DIGITS: tl.constexpr):
    return 1.0


# ---- kernels


@triton.jit
def block(numel, BLOCK: tl.constexpr):
    """Where this program's elements start, in int64, and which of them there are."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    return start, offsets, offsets < tl.minimum(numel - start, BLOCK).to(tl.int32)


@triton.jit
def forward(y_ptr, x_ptr, numel, r, e, BLOCK: tl.constexpr):
    start, offsets, mask = block(numel, BLOCK)
    x = tl.load(x_ptr + start + offsets, mask=mask).to(tl.float32)
    value, _ = value_and_slope(x, r, e)
    tl.store(y_ptr + start + offsets, value.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward(out_ptr, grad_ptr, x_ptr, numel, r, e, BLOCK: tl.constexpr):
    start, offsets, mask = block(numel, BLOCK)
    grad = tl.load(grad_ptr + start + offsets, mask=mask).to(tl.float32)
    x = tl.load(x_ptr + start + offsets, mask=mask).to(tl.float32)
    _, slope = value_and_slope(x, r, e)
    tl.store(out_ptr + start + offsets, (grad * slope).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_at(out_ptr, grad_ptr, y_ptr, numel, r, e, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    start, offsets, mask = block(numel, BLOCK)
    grad = tl.load(grad_ptr + start + offsets, mask=mask).to(tl.float32)
    y = tl.load(y_ptr + start + offsets, mask=mask).to(tl.float32)
    slope = slope_at(y, r, e, DIGITS)
    tl.store(out_ptr + start + offsets, (grad * slope).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def glu(y_ptr, gate_ptr, up_ptr, numel, r, e, BLOCK: tl.constexpr):
    start, offsets, mask = block(numel, BLOCK)
    gate = tl.load(gate_ptr + start + offsets, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + start + offsets, mask=mask).to(tl.float32)
    value, _ = value_and_slope(gate, r, e)
    tl.store(y_ptr + start + offsets, (value * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def glu_backward(grad_gate_ptr, grad_up_ptr, grad_ptr, gate_ptr, up_ptr, numel, r, e, BLOCK: tl.constexpr):
    start, offsets, mask = block(numel, BLOCK)
    grad = tl.load(grad_ptr + start + offsets, mask=mask).to(tl.float32)
    gate = tl.load(gate_ptr + start + offsets, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + start + offsets, mask=mask).to(tl.float32)
    value, slope = value_and_slope(gate, r, e)
    tl.store(grad_gate_ptr + start + offsets, (grad * up * slope).to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptr + start + offsets, (grad * value).to(grad_up_ptr.dtype.element_ty), mask=mask)
