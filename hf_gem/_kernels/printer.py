"""Translates the formulas of a family into C++ (`at::vec`) and Triton, and prints each distinct operation once."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..family.arithmetic import digits, scale
from ..family.table import Family, family_named
from ..files import replace_between
from .symbols import Symbol, Traced, trace

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes that kernels support


class _Printer:
    """Prints statements for symbols, in the order in which they are requested.

    Attributes:
        operations: Operation -> its text, with operands as {0}, {1} ...
        infinity: The text of infinity.
        numbers: Expression of a number made of r and e -> its text.
    """

    operations: ClassVar[dict[str, str]]
    infinity: ClassVar[str]

    def __init__(self, numbers: dict[str, str]) -> None:
        self.numbers = numbers
        self.lines: list[str] = []
        self._names: dict[str, str] = {}  # text of an operation -> the variable that holds it
        self._printed: dict[Symbol, str] = {}
        self._count = itertools.count()

    def operand(self, x: Any, like: Symbol) -> str:
        """Prints a symbol or number as the operand of an operation on vectors of the type of `like`."""
        if not isinstance(x, Symbol):
            return self.literal(x, like.dtype)
        return self.numbers[x.op] if x.scalar else self.name(x)

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

    def statement(self, name: str, text: str, x: Symbol) -> str:
        raise NotImplementedError

    def rarely(self, x: Symbol) -> str:
        raise NotImplementedError


_NAMES = {torch.float32: "float", torch.int32: "int", torch.bool: "bool"}
_BINARY = {op: f"({{0}} {op} {{1}})" for op in ("+", "-", "*", "/", "<", "<=", ">", ">=", "==", "!=", "<<", ">>")}


def _single(value: float) -> float:
    """Returns the float32 to which torch rounds a number that is combined with a tensor."""
    return float(torch.tensor(value, dtype=torch.float32))


class _Cpp(_Printer):
    """C++ of `at::vec`.

    Attributes:
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
    infinity = "INFINITY"

    def __init__(self, numbers: dict[str, str], outputs: Iterable[Symbol]) -> None:
        super().__init__({expression: f"k.{name}" for expression, name in numbers.items()})
        self.rare = _rare(outputs)

    def literal(self, value: float, dtype: torch.dtype) -> str:
        if dtype == torch.int32:
            return f"VInt({int(value)})"
        single = _single(value)
        return f"V({self.number(single, f'{single.hex()}f')})"

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
    infinity = 'float("inf")'

    def __init__(self, numbers: dict[str, str], exact: bool) -> None:
        super().__init__(numbers)
        self.exact = exact

    def key(self, x: Symbol) -> str:
        return "fast /" if x.op == "/" and not self.exact else super().key(x)

    def literal(self, value: float, dtype: torch.dtype) -> str:
        return repr(int(value)) if dtype == torch.int32 else self.number(_single(value))

    def statement(self, name: str, text: str, x: Symbol) -> str:
        return f"{name} = {text}"

    def rarely(self, x: Symbol) -> str:
        condition, then, otherwise = x.args
        operands = self.name(condition), self.operand(then, x), self.operand(otherwise, x)
        return self.variable(self.operations["where"].format(*operands), x)


@functools.cache
def _traced(family: Family, n: int) -> Traced:
    return trace(family, n, sorted({digits(dtype) for dtype in DTYPES}))


@functools.cache
def _numbers(family: Family, n: int) -> dict[str, str]:
    """Returns the numbers that kernels take as arguments: expression of r and e -> name. Begins with r and e."""
    outputs = [symbol for function in _functions(_traced(family, n)).values() for symbol in function.values()]
    expressions = dict.fromkeys(["r", "e", *(x.op for x in _below(*outputs) if x.scalar)])
    return {x: x if x in ("r", "e") else f"c{k}" for k, x in enumerate(expressions)}


@functools.lru_cache(maxsize=4096)
def numbers(kernels: str, n: int, eps: float) -> tuple[float, ...]:
    """Computes the numbers that the kernels of a family take as arguments, in Python, as the formulas do."""
    r, e = scale(eps, n)
    return tuple(eval(x, {"r": r, "e": e, "inf": math.inf}) for x in _numbers(family_named(kernels), n))


def cpp_source(family: Family, n: int) -> str:
    """Returns the C++ source of all kernels of a family for one n: `cpu.cpp` with the formulas inserted."""
    found = _traced(family, n)
    arguments = _numbers(family, n)
    functions = []
    for name, outputs in _functions(found).items():
        printer = _Cpp(arguments, outputs.values())
        results = [(output, printer.name(symbol)) for output, symbol in outputs.items()]
        lines = [*printer.lines, *(f"{output} = {result};" for output, result in results)]
        parameters = ", ".join(["V z", "const Constants& k", *(f"V& {output}" for output in outputs)])
        functions.append(_block(f"inline void {name}({parameters}) {{", lines, "}"))
    members = ", ".join(arguments.values())
    lines = [f"{c} = V((float)numbers[{k}]);" for k, c in enumerate(arguments.values())]
    constants = [f"V {members};", *_block("Constants(const double* numbers) {", lines, "}")]
    formulas = [_block("struct Constants {  // of all lanes", constants, "};"), *functions]
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
    arguments = _numbers(family, n)
    parts = []
    for name, outputs in _functions(found).items():
        printer = _Triton(arguments, exact)
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
    return replace_between(text, start, end, f"\n\n{formulas}\n\n").replace("r, e", ", ".join(arguments.values()))


def check(family: Family, n: int) -> None:
    """Raises TypeError if a formula cannot be translated into kernels. The family need not be in the table."""
    trace(family, n, [digits(torch.float32)])
