"""Translates the formulas of a family into C++ (`at::vec`) and Triton, and prints each distinct operation once."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..family.arithmetic import digits
from ..family.table import Family
from ..files import replace_between
from .symbols import Symbol, Traced, trace

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes that kernels support


class _Printer:
    """Prints statements for symbols, in the order in which they are requested.

    Attributes:
        operations: Operation -> its text for vectors, with operands as {0}, {1} ...
        on_numbers: The same for numbers made of r and e.
        infinity: The text of infinity.
    """

    operations: ClassVar[dict[str, str]]
    on_numbers: ClassVar[dict[str, str]]
    infinity: ClassVar[str]

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names: dict[str, str] = {}  # text of an operation -> the variable that holds it
        self._printed: dict[Symbol, str] = {}
        self._count = itertools.count()

    def operand(self, x: Any, like: Symbol) -> str:
        """Prints a symbol or number as the operand of an operation on vectors of the type of `like`."""
        if not isinstance(x, Symbol):
            return self.literal(x, like.dtype)
        return self.broadcast(self.scalar(x)) if x.scalar else self.name(x)

    def scalar(self, x: Any) -> str:
        """Prints a number made of r and e as an expression in double precision."""
        if not isinstance(x, Symbol):
            return self.number(float(x))
        return self.on_numbers[x.op].format(*map(self.scalar, x.args)) if x.args else x.op

    def number(self, value: float, text: str = "") -> str:
        """Prints a number: as `text` if it is finite, by default in double precision."""
        if math.isinf(value):
            return self.infinity if value > 0 else f"(-{self.infinity})"
        return text or repr(value)

    def name(self, x: Symbol) -> str:
        """Returns the variable that holds a symbol, and prints its definition if there is none yet."""
        if x not in self._printed:
            self._printed[x] = self._assign(x)
        return self._printed[x]

    def _assign(self, x: Symbol) -> str:
        if not x.args:
            return x.op
        if x.op == "rarely":
            return self.rarely(x)
        like = next((a for a in x.args if isinstance(a, Symbol) and a.dtype != torch.bool), x)
        operands = [self.operand(a, like) for a in x.args]
        return self.variable(self.operations[self.key(x)].format(*operands), x)

    def variable(self, text: str, x: Symbol) -> str:
        if text not in self._names:
            self._names[text] = f"v{next(self._count)}"
            self.lines.append(self.statement(self._names[text], text, x))
        return self._names[text]

    def key(self, x: Symbol) -> str:
        """Returns the key of a symbol in `operations`."""
        return f"bits {_NAMES[x.dtype]}" if x.op == "bits" else x.op

    # ---- differences between the languages

    def literal(self, value: float, dtype: torch.dtype) -> str:
        raise NotImplementedError

    def broadcast(self, expression: str) -> str:
        raise NotImplementedError

    def statement(self, name: str, text: str, x: Symbol) -> str:
        raise NotImplementedError

    def rarely(self, x: Symbol) -> str:
        raise NotImplementedError


_NAMES = {torch.float32: "float", torch.int32: "int", torch.bool: "bool"}
_BINARY = {op: f"({{0}} {op} {{1}})" for op in ("+", "-", "*", "/", "<", "<=", ">", ">=", "==", "!=", "<<", ">>")}
_ON_NUMBERS = {**{op: _BINARY[op] for op in ("+", "-", "*", "/")}, "neg": "(-{0})"}


def _single(value: float) -> float:
    """Returns the float32 to which torch rounds a number that is combined with a tensor."""
    return float(torch.tensor(value, dtype=torch.float32))


class _Cpp(_Printer):
    """C++ of `at::vec`.

    Attributes:
        constants: Expression of r and e -> the member of `Constants` that holds its value, in all lanes.
        rare: The `rarely` symbols among all that will be printed here: outside branches, or in the current one.
    """

    operations: ClassVar[dict[str, str]] = {
        **_BINARY,
        "neg": "{0}.neg()",
        "abs": "{0}.abs()",
        "where": "V::blendv({2}, {1}, {0})",
        # at::vec's own functions return a NaN with every bit set. This returns the NaN of an operand.
        "max": "V::blendv(at::vec::clamp_min({0}, {1}), {1}, {1} != {1})",
        "min": "V::blendv(at::vec::clamp_max({0}, {1}), {1}, {1} != {1})",
        "clamp_min": "at::vec::clamp_min({0}, {1})",
        "clamp_max": "at::vec::clamp_max({0}, {1})",
        "bits int": "bits<VInt>({0})",
        "bits float": "bits<V>({0})",
    }
    on_numbers: ClassVar[dict[str, str]] = {**_ON_NUMBERS, "abs": "std::fabs({0})"}
    infinity = "INFINITY"

    def __init__(self, constants: dict[str, str], outputs: Iterable[Symbol]) -> None:
        super().__init__()
        self.constants = constants
        self.rare = _rare(outputs)

    def literal(self, value: float, dtype: torch.dtype) -> str:
        if dtype == torch.int32:
            return f"VInt({int(value)})"
        single = _single(value)
        return f"V({self.number(single, f'{single.hex()}f')})"

    def broadcast(self, expression: str) -> str:
        return f"k.{self.constants.setdefault(expression, f'c{len(self.constants)}')}"

    def statement(self, name: str, text: str, x: Symbol) -> str:
        return f"const {'VInt' if x.dtype == torch.int32 else 'V'} {name} = {text};"

    def rarely(self, x: Symbol) -> str:
        """Prints a branch, also for all other symbols with the same condition that can be computed in it."""
        mask = self.name(x.args[0])
        usual = {x: self.operand(x.args[2], x)}
        for y in self.rare:
            if self._is_next(y) and _are_apart(y, usual) and self.name(y.args[0]) == mask:
                usual[y] = self.operand(y.args[2], y)
        for y, text in usual.items():
            self._printed[y] = f"v{next(self._count)}"
            self.lines.append(f"V {self._printed[y]} = {text};")
        outside = self.lines, self.rare
        names, printed = dict(self._names), dict(self._printed)
        self.lines, self.rare = [], _rare(y.args[1] for y in usual)
        for y in usual:
            inside = self.operand(y.args[1], y)
            self.lines.append(f"{printed[y]} = V::blendv({printed[y]}, {inside}, {mask});")
        body = self.lines
        self.lines, self.rare = outside
        self._names, self._printed = names, printed  # variables of the branch do not exist after it
        self.lines += _block(f"if ({mask}.zero_mask() != (1 << V::size()) - 1) {{", body, "}")
        return self._printed[x]

    def _is_next(self, y: Symbol) -> bool:
        """Returns whether y is still to be printed, and its condition and usual value take no further branch."""
        return y not in self._printed and all(x in self._printed for x in _rare((y.args[0], y.args[2])))


def _are_apart(y: Symbol, others: Iterable[Symbol]) -> bool:
    """Returns whether y depends on none of the others, and none of them on y."""
    below = _below(y)
    return not any(x in below or y in _below(x) for x in others)


def _rare(symbols: Iterable[Any]) -> list[Symbol]:
    """Returns the `rarely` symbols among all that is printed for the given ones."""
    return [x for x in _below(*(x for x in symbols if isinstance(x, Symbol))) if x.op == "rarely"]


def _below(*symbols: Symbol) -> dict[Symbol, None]:
    """Returns the given symbols and everything that they are computed from."""
    found: dict[Symbol, None] = {}
    todo = list(symbols)
    while todo:
        symbol = todo.pop()
        if symbol not in found:
            found[symbol] = None
            todo += [arg for arg in symbol.args if isinstance(arg, Symbol)]
    return found


class _Triton(_Printer):
    operations: ClassVar[dict[str, str]] = {
        **_BINARY,
        "/": "divide({0}, {1})",
        "fast /": "divide_fast({0}, {1})",
        "neg": "({0} * -1)",  # -x of Triton 3.6 is 0 - x, which loses the sign of a zero
        "abs": "tl.abs({0})",
        "where": "tl.where({0}, {1}, {2})",
        "max": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        "min": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        "clamp_min": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        "clamp_max": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        "bits int": "{0}.to(tl.int32, bitcast=True)",
        "bits float": "{0}.to(tl.float32, bitcast=True)",
    }
    on_numbers: ClassVar[dict[str, str]] = {**_ON_NUMBERS, "abs": "tl.abs({0})"}
    infinity = 'float("inf")'

    def __init__(self, exact: bool) -> None:
        super().__init__()
        self.exact = exact

    def key(self, x: Symbol) -> str:
        return "fast /" if x.op == "/" and not self.exact else super().key(x)

    def literal(self, value: float, dtype: torch.dtype) -> str:
        return repr(int(value)) if dtype == torch.int32 else self.number(_single(value))

    def broadcast(self, expression: str) -> str:
        return expression

    def statement(self, name: str, text: str, x: Symbol) -> str:
        return f"{name} = {text}"

    def rarely(self, x: Symbol) -> str:
        condition, then, otherwise = x.args
        operands = self.name(condition), self.operand(then, x), self.operand(otherwise, x)
        return self.variable(self.operations["where"].format(*operands), x)


@functools.cache
def _traced(family: Family, n: int) -> Traced:
    return trace(family, n, sorted({digits(dtype) for dtype in DTYPES}))


def cpp_source(family: Family, n: int) -> str:
    """Returns the C++ source of all kernels of a family for one n: `cpu.cpp` with the formulas inserted."""
    found = _traced(family, n)
    constants: dict[str, str] = {}
    functions = []
    for name, outputs in _functions(found).items():
        printer = _Cpp(constants, outputs.values())
        results = [(output, printer.name(symbol)) for output, symbol in outputs.items()]
        lines = [*printer.lines, *(f"{output} = {result};" for output, result in results)]
        parameters = ", ".join(["V z", "const Constants& k", *(f"V& {output}" for output in outputs)])
        functions.append(_block(f"inline void {name}({parameters}) {{", lines, "}"))
    lines = [f"V {', '.join(constants.values())};"] if constants else []
    lines += _block(
        "Constants(double r, double e) {", [f"{c} = V((float){text});" for text, c in constants.items()], "}"
    )
    formulas = [_block("struct Constants {  // of all lanes", lines, "};"), *functions]
    text = Path(__file__).with_name("cpu.cpp").read_text(encoding="utf-8")
    flag = f"#define HAS_SLOPE_AT {int(bool(found.slope_at))}"
    return text.replace("// FORMULAS", "\n\n".join([flag, *("\n".join(block) for block in formulas)]))


def _functions(found: Traced) -> dict[str, dict[str, Symbol]]:
    """Returns the functions to print: name -> outputs."""
    slopes_at = {f"slope_at_{count}": {"slope": symbol} for count, symbol in found.slope_at.items()}
    return {"value_and_slope": {"value": found.value, "slope": found.slope}, **slopes_at}


def _block(head: str, lines: list[str], tail: str = "") -> list[str]:
    return [head, *(f"    {line}" for line in lines), tail]


def triton_source(family: Family, n: int, exact: bool) -> str:
    """Returns the Python source of a family's kernels for one n: `triton_kernels.py` with the formulas inserted.

    Args:
        family: The family.
        n: The paper's N.
        exact: Whether divisions are rounded correctly.
    """
    found = _traced(family, n)
    parts = []
    for name, outputs in _functions(found).items():
        printer = _Triton(exact)
        results = ", ".join([printer.name(symbol) for symbol in outputs.values()])
        parts.append(_block(f"def {name}(z, r, e):", [*printer.lines, f"return {results}"]))
    if found.slope_at:
        choices = [
            line for k in found.slope_at for line in (f"if DIGITS == {k}:", f"    slope = slope_at_{k}(z, r, e)")
        ]
        parts.append(_block("def slope_at(z, r, e, DIGITS: tl.constexpr):", [*choices, "return slope"]))
    text = Path(__file__).with_name("triton_kernels.py").read_text(encoding="utf-8")
    formulas = "\n\n".join("@triton.jit\n" + "\n".join(block) for block in parts)
    start, end = "# ---- formulas\n", "# ---- kernels\n"
    return replace_between(text, start, end, f"\n\n{formulas}\n\n")


def check(family: Family, n: int) -> None:
    """Raises TypeError if a formula cannot be translated into kernels. The family need not be in the table."""
    trace(family, n, [digits(torch.float32)])
