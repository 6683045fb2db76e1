"""Traces a formula: runs it on symbols instead of tensors, and the symbols record the torch operations that it applies.

The result is a graph that `printer` translates into C++ or Triton. Only operations that give the same bits in torch and
in both languages are allowed. Any other operation is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..family.table import Family
from ..files import shown

Operand = Any  # a Symbol or a number
# The operations on numbers made of r and e alone, in Python, which computes these numbers for the kernels.
ON_NUMBERS = {"+": "({} + {})", "-": "({} - {})", "*": "({} * {})", "/": "({} / {})", "neg": "(-{})", "abs": "abs({})"}


def _without(operation: str) -> Callable[..., Any]:
    """Returns the method of an operation that kernels do not have."""

    def method(*operands: Operand) -> Any:
        raise TypeError(_unknown(operation))

    return method


@dataclass(frozen=True, eq=False)
class Symbol:
    """A value in a formula: one per lane, or a scalar for all lanes.

    Attributes:
        op: `z` for the input, and the expression in Python for a number made of r and e. Otherwise the operation.
        args: Operands of the operation.
        dtype: Data type: float32, int32 for bits, or bool.
        scalar: Whether this is a single number, made of r and e alone.
    """

    op: str
    args: tuple[Operand, ...] = ()
    dtype: torch.dtype = torch.float32
    scalar: bool = False

    def __add__(self, other: Operand) -> Symbol:
        return _make("+", self, other)

    def __radd__(self, other: Operand) -> Symbol:
        return _make("+", other, self)

    def __sub__(self, other: Operand) -> Symbol:
        return _make("-", self, other)

    def __rsub__(self, other: Operand) -> Symbol:
        return _make("-", other, self)

    def __mul__(self, other: Operand) -> Symbol:
        return _make("*", self, other)

    def __rmul__(self, other: Operand) -> Symbol:
        return _make("*", other, self)

    def __truediv__(self, other: Operand) -> Symbol:
        if self.scalar and isinstance(other, Symbol) and not other.scalar:
            return other.__rtruediv__(self)
        return _make("/", self, other)

    def __rtruediv__(self, other: Operand) -> Symbol:
        if self.scalar:
            return _make("/", other, self)
        inverse = _make("/", 1.0, self)
        is_one = not isinstance(other, Symbol) and other == 1
        return inverse if is_one else inverse * other  # the way torch divides a number by a tensor

    def __lshift__(self, other: Operand) -> Symbol:
        return _make("<<", self, other)

    def __rshift__(self, other: Operand) -> Symbol:
        return _make(">>", self, other)

    def __neg__(self) -> Symbol:
        return _make("neg", self)

    def __lt__(self, other: Operand) -> Symbol:
        return _make("<", self, other, dtype=torch.bool)

    def __gt__(self, other: Operand) -> Symbol:
        return _make(">", self, other, dtype=torch.bool)

    def __le__(self, other: Operand) -> Symbol:
        return _make("<=", self, other, dtype=torch.bool)

    def __ge__(self, other: Operand) -> Symbol:
        return _make(">=", self, other, dtype=torch.bool)

    def __eq__(self, other: Operand) -> Symbol:  # type: ignore[override]
        return _make("==", self, other, dtype=torch.bool)

    def __ne__(self, other: Operand) -> Symbol:  # type: ignore[override]
        return _make("!=", self, other, dtype=torch.bool)

    __hash__ = object.__hash__  # symbols are keys, found by identity

    def __bool__(self) -> bool:
        raise TypeError(
            "a formula branches on the value of a tensor. It must apply the same operations to every value. Use "
            "torch.where."
        )

    def __getattr__(self, name: str) -> Any:
        raise TypeError(_unknown(name))

    def abs(self) -> Symbol:
        return _make("abs", self)

    __abs__ = abs

    def __pos__(self) -> Symbol:
        return self

    # Python looks these up in the class, and not with __getattr__.
    __pow__ = __rpow__ = _without("**")
    __mod__ = __rmod__ = _without("%")
    __floordiv__ = __rfloordiv__ = _without("//")
    __and__ = __rand__ = _without("&")
    __or__ = __ror__ = _without("|")
    __xor__ = __rxor__ = _without("^")
    __invert__ = _without("~")
    __float__ = _without("float")

    def clamp(self, min: float | None = None, max: float | None = None) -> Symbol:
        low = self if min is None else _make("clamp_min", self, min)
        return low if max is None else _make("clamp_max", low, max)

    def rarely(self, then: Operand, otherwise: Operand) -> Symbol:
        return _make("rarely", self, then, otherwise)

    def contiguous(self) -> Symbol:
        return self

    def view(self, dtype: torch.dtype) -> Symbol:
        return _make("bits", self, dtype=dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Symbol:
        if func not in _FUNCTIONS or (kwargs and func is not torch.clamp):
            raise TypeError(_unknown(getattr(func, "__name__", str(func))))
        return _FUNCTIONS[func](*args, **(kwargs or {}))


def _make(op: str, *args: Operand, dtype: torch.dtype | None = None) -> Symbol:
    symbols = [arg for arg in args if isinstance(arg, Symbol)]
    if any(arg.dtype == torch.bool for arg in symbols[op in ("where", "rarely") :]):
        raise TypeError("a formula computes with the result of a comparison. Use it as the condition of torch.where.")
    if any(math.isnan(arg) for arg in args if not isinstance(arg, Symbol)):
        raise TypeError("a formula computes with the number nan, which kernels do not have. Rewrite it without a NaN.")
    if all(arg.scalar for arg in symbols):
        if op not in ON_NUMBERS:
            raise TypeError(
                f"a formula applies {shown(op)} to numbers made of r and e. Kernels can combine such numbers with + - "
                "* / and abs. Rewrite it with these, or apply it to a tensor."
            )
        texts = (arg.op if isinstance(arg, Symbol) else repr(float(arg)) for arg in args)
        return Symbol(ON_NUMBERS[op].format(*texts), scalar=True)
    found = next((arg.dtype for arg in symbols if arg.dtype != torch.bool), torch.float32)
    return Symbol(op, args, dtype or found)


_FUNCTIONS: dict[Any, Callable[..., Symbol]] = {
    torch.where: lambda *args: _make("where", *args),
    torch.maximum: lambda *args: _make("max", *args),
    torch.minimum: lambda *args: _make("min", *args),
    torch.abs: Symbol.abs,
    torch.clamp: Symbol.clamp,
}


def _unknown(name: str) -> str:
    return (
        f"a formula uses the operation {shown(name)}, which kernels do not have. A formula can use + - * /, "
        "comparisons, abs, clamp, torch.where, torch.maximum, torch.minimum and hf_gem.family.arithmetic. Rewrite it "
        "with these."
    )


@dataclass(frozen=True)
class Traced:
    """The formulas of a family for one n.

    Attributes:
        value: The value at the input z.
        slope: The slope at the input z.
        slope_at: Number of digits -> the slope at the output z. Empty for a family without `slope_at`.
    """

    value: Symbol
    slope: Symbol
    slope_at: dict[int, Symbol]


def trace(family: Family, n: int, digits: Sequence[int]) -> Traced:
    """Traces the formulas of a family.

    Args:
        family: The family.
        n: The paper's N.
        digits: The numbers of significant bits for which to trace `slope_at`.

    Raises:
        TypeError: A formula uses an operation that kernels do not have.
    """
    z = Symbol("z")
    r, e = Symbol("r", scalar=True), Symbol("e", scalar=True)

    def run(formula: Callable[..., Any], *more: Any) -> Symbol:
        result = formula(z, n, r, e, *more)
        if not isinstance(result, Symbol) or result.dtype != torch.float32:
            raise TypeError(
                f"a formula of {shown(family.name)} returned {shown(result)}. It must return a floating-point tensor "
                "that depends on its input. Use torch.where to select between constants."
            )
        return result

    slope_at = {}
    if family.slope_at is not None:
        slope_at = {count: run(family.slope_at, count) for count in digits}
    return Traced(run(family.value), run(family.slope), slope_at)
