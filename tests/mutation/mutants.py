"""Makes small changes to the functions in a file, such as < for <=. Tests should notice each of them."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

_SWAPS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
    **{ast.LShift: ast.RShift, ast.RShift: ast.LShift},
}
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor", "fmax": "fmin"}


@dataclass(frozen=True)
class Mutant:
    """A changed file.

    Attributes:
        function: Qualified name of the changed function, such as `GemSpec.name`.
        line: Line of the change in the file.
        change: The code before and after, as text.
        source: Source of the whole changed file.
    """

    function: str
    line: int
    change: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Yields all changes to the bodies of functions. Error messages, docstrings and defaults stay."""
    for name, function in _functions(ast.parse(source)):
        for statement in function.body:
            for node, new in _changes(statement):
                before, after = ast.unparse(node), ast.unparse(new)
                text = after if isinstance(new, ast.stmt) else f"({after})"
                yield Mutant(name, node.lineno, f"{before}  ->  {after}", _replaced(source, node, text))


def code_of(source: str, file: str, function: str) -> CodeType:
    """Returns the code of a function in a file, by its qualified name."""
    code = compile(source, file, "exec", dont_inherit=True)
    for part in function.split("."):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == part)
    return code


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yields nodes inside a node, each with its replacement."""
    if isinstance(node, (ast.JoinedStr, ast.FunctionDef)) or _is_docstring(node):
        return
    yield from ((node, new) for new in _replacements(node))
    if isinstance(node, (ast.Raise, ast.Assert)):
        return
    for field, child in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for part in child if isinstance(child, list) else [child]:
                if isinstance(part, ast.AST):
                    yield from _changes(part)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Raise() | ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Return(value=ast.expr()):
            yield ast.Return(ast.Constant(None))
        case ast.If(test=ast.Name() | ast.Call() | ast.Attribute()) | ast.IfExp():
            yield _copy(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.Compare():
            for index, op in enumerate(node.ops):
                yield _copy(node, ops=[*node.ops[:index], _SWAPS[type(op)](), *node.ops[index + 1 :]])
        case ast.BoolOp():
            yield _copy(node, op=_SWAPS[type(node.op)]())
        case ast.BinOp() if not any(isinstance(p, ast.JoinedStr) or _is_text(p) for p in (node.left, node.right)):
            yield _copy(node, op=_SWAPS[type(node.op)]())
        case ast.AugAssign():
            yield _copy(node, op=_SWAPS[type(node.op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1 if abs(node.value) < 1e15 else node.value / 2)
        case ast.Call(func=ast.Name(id=name)) if name in _CALLS:
            yield _copy(node, func=ast.Name(_CALLS[name]))
        case ast.Call(func=ast.Attribute(attr=name)) if name in _CALLS:
            yield _copy(node, func=_copy(node.func, attr=_CALLS[name]))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))


def _copy(node: ast.AST, **changes: object) -> ast.AST:
    return type(node)(**{**dict(ast.iter_fields(node)), **changes})


def _replaced(source: str, node: ast.AST, text: str) -> str:
    """Replaces a node in the source by a text. Columns of nodes count bytes."""
    lines = source.encode().splitlines(keepends=True)
    before = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    after = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
    if isinstance(node, ast.stmt):
        text = text.replace("\n", "\n" + " " * node.col_offset)
    return (before + text.encode() + after).decode()
