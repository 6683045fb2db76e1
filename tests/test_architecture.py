"""The plan of the house: imports run in one direction, and files and functions stay small.

Read from the source, so that imports inside functions count too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports from its own floor and from those before it. No two names share a floor.
FLOORS = [
    *("_torch", "files", "family", "_kernels", "functional", "modules", "init", "fit"),
    *("surgery", "integrations", "training", "recipes", "compare", "cli", "__main__"),
]
# The package itself: its __init__ collects the public surface of the core, and whoever imports it gets all of that.
PACKAGE = FLOORS.index("integrations")
OPTIONAL = {"transformers", "timm", "datasets", "accelerate", "matplotlib", "evaluate", "tokenizers", "sklearn", "yaml"}
MAY_NEED_OPTIONAL = {"training", "compare", "cli"}
# What training can do without is imported where it is used, but for files that are about nothing else.
DISPENSABLE = {"datasets", "evaluate", "trackio", "sklearn", "scipy", "matplotlib", "markdown_it"}
MAY_NEED_DISPENSABLE = {
    "hf_gem/training/metrics.py",
    *(f"hf_gem/compare/{name}.py" for name in ("drawing", "figures", "pages")),
}
PRIVATE_TORCH = re.compile(r"(?<![\w.])torch(?:\.\w+)*\._[a-zA-Z]\w*")
MOST_LOOSE_FILES, MOST_LINES_OF_FILE, MOST_LINES_OF_FUNCTION = 8, 450, 45


def violations(source: str, path: str) -> list[str]:
    """What is wrong with the imports of `source`, the file at `path` relative to the repository."""
    parts = list(Path(path).with_suffix("").parts)
    package = parts[:-1]  # of an __init__.py too: relative imports there start from its own folder
    recipe = parts[0] == "recipes"
    own = parts[1] if len(parts) > 1 else ""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        for target in _targets(node, package):
            top, *rest = target.split(".")
            if top == "recipes" and not recipe:
                found.append(f"{path}:{node.lineno}: nothing imports recipes, but this imports {target}")
            if top == "hf_gem" and not recipe and _rank(rest) > _rank([own]):
                found.append(f"{path}:{node.lineno}: {own} may not import {target}, a later floor")
    avoided = OPTIONAL if not recipe and own not in MAY_NEED_OPTIONAL else DISPENSABLE
    for node in _at_import(tree) if path not in MAY_NEED_DISPENSABLE else ():
        for target in _targets(node, package):
            if target.split(".")[0] in avoided:
                found.append(f"{path}:{node.lineno}: it imports {target} when it is itself imported")
    return found


def _targets(node: ast.AST, package: list[str]) -> list[str]:
    """The absolute dotted names a statement imports; of `from a import b` that is a.b, whatever b is."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        base = [*base, *(node.module.split(".") if node.module else [])]
        return [".".join([*base, alias.name]) for alias in node.names]
    return []


def _rank(path: list[str]) -> int:
    """The floor of hf_gem.<path>; of the package itself, or of a name that its __init__ gives, that of the package."""
    name = path[0] if path else ""
    if name in FLOORS:
        return FLOORS.index(name)
    if name.startswith("__init__") or not _is_module(name):
        return PACKAGE
    raise AssertionError(f"hf_gem.{name} is on no floor; add it to FLOORS")


def _is_module(name: str) -> bool:
    return bool(name) and ((ROOT / "hf_gem" / f"{name}.py").exists() or (ROOT / "hf_gem" / name).is_dir())


def _at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when the module is imported: none in functions, none for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _at_import(node)


def files(*folders: str) -> list[str]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def long_functions(source: str) -> list[str]:
    """Functions whose code, without decorators and docstring, has more lines than MOST_LINES_OF_FUNCTION."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            if length > MOST_LINES_OF_FUNCTION:
                found.append(f"{node.name} has {length} lines")
    return found


@pytest.mark.parametrize("path", files("hf_gem", "recipes"))
def test_imports_run_one_way(path):
    assert violations((ROOT / path).read_text(), path) == []


def test_every_floor_is_there_and_few_files_are_loose():
    assert [name for name in FLOORS if not _is_module(name)] == []
    loose = [path for path in files("hf_gem") if path.count("/") == 1]
    assert len(loose) <= MOST_LOOSE_FILES, loose


def test_the_tree_in_the_docs():
    """Every file stands on its floor, in the order of the floors, and nothing that is not there is named."""
    tree = (ROOT / "docs" / "architecture.md").read_text().split("    hf_gem/\n")[1].split("\n\n")[0]
    sections: dict[str, str] = {}
    for line in tree.splitlines():
        if re.match(r" {6}\w", line):
            floor = re.split(r"[/. ]", line.strip())[0]
            sections[floor] = ""
        sections[floor] += line + "\n"
    assert list(sections) == FLOORS
    named = {floor: set(re.findall(r"(\w+)\.py", text)) for floor, text in sections.items()}
    there: dict[str, set[str]] = {}
    for path in files("hf_gem"):
        parts = Path(path).with_suffix("").parts[1:]
        if parts != ("__init__",):
            there.setdefault(parts[0], set()).update({parts[-1]} - {"__init__"})
    assert named == there


@pytest.mark.parametrize("path", files("hf_gem", "recipes", "benchmarks", "docs"))
def test_files_and_functions_are_short(path):
    source = (ROOT / path).read_text()
    assert source.count("\n") <= (180 if path.startswith("recipes/") else MOST_LINES_OF_FILE)
    assert long_functions(source) == []


@pytest.mark.parametrize("path", files("hf_gem", "recipes", "benchmarks", "docs"))
def test_private_torch_stands_in_one_file(path):
    if path != "hf_gem/_torch.py":
        assert PRIVATE_TORCH.findall((ROOT / path).read_text()) == []


def test_private_torch_is_found():
    for line in ("torch._C.x()", "from torch.utils._pytree import y", "import torch._dynamo", "torch.cuda._sleep(1)"):
        assert PRIVATE_TORCH.search(line)
    assert not PRIVATE_TORCH.search("torch.__version__, torch.nn.Module, my_torch._x")


def test_a_long_function_is_found():
    body = "    x = 1\n"
    assert long_functions("def f():\n" + body * (MOST_LINES_OF_FUNCTION - 1)) == []
    assert long_functions("def f():\n" + body * MOST_LINES_OF_FUNCTION) == ["f has 46 lines"]
    assert long_functions('def f():\n    """' + "\n" * 90 + '"""\n' + body) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("hf_gem/family/names.py", "from .. import functional"),
        ("hf_gem/family/names.py", "from ..modules import GEM"),
        ("hf_gem/family/names.py", "import hf_gem.functional"),
        ("hf_gem/family/names.py", "from hf_gem import functional as f"),
        ("hf_gem/family/names.py", "from hf_gem import gem"),
        ("hf_gem/family/names.py", "import hf_gem"),
        ("hf_gem/family/egem.py", "def f():\n    from .._kernels import dispatch"),
        ("hf_gem/functional.py", "from .init import gain"),
        ("hf_gem/init.py", "from .fit import fit"),
        ("hf_gem/modules.py", "if True:\n    from .integrations.hooks import register"),
        ("hf_gem/surgery/convert.py", "from ..integrations.transformers import write_plan"),
        ("hf_gem/integrations/timm.py", "from ..training import loop"),
        ("hf_gem/integrations/__init__.py", "from ..compare.study import x"),
        ("hf_gem/training/loop.py", "from ..compare import plan"),
        ("hf_gem/training/data/text.py", "from ...cli import main"),
        ("hf_gem/compare/study.py", "from hf_gem.cli import main"),
        ("hf_gem/compare/study.py", "import recipes.gpt2_pretrain"),
        ("hf_gem/training/loop.py", "from recipes import gpt2_pretrain"),
        ("hf_gem/integrations/transformers.py", "import transformers"),
        ("hf_gem/integrations/timm.py", "try:\n    from timm.layers import create_act\nexcept ImportError:\n    pass"),
        ("hf_gem/__init__.py", "from transformers import PreTrainedModel"),
        ("hf_gem/modules.py", "class A:\n    import datasets"),
        ("hf_gem/__init__.py", "from .training import loop"),
        ("hf_gem/training/evaluate.py", "import evaluate"),
        ("recipes/gpt2_pretrain.py", "from datasets import load_dataset"),
    ],
)
def test_a_wrong_import_is_found(path, source):
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("hf_gem/family/egem.py", "from .names import parse\nimport torch"),
        ("hf_gem/functional.py", "from . import family\nfrom .family.names import parse"),
        (
            "hf_gem/integrations/timm.py",
            "from .. import functional\nfrom . import registry\nfrom ..surgery import convert",
        ),
        ("hf_gem/integrations/timm.py", "def install():\n    import timm"),
        ("hf_gem/training/data/source.py", "def f():\n    import datasets"),
        ("hf_gem/modules.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
        (
            "hf_gem/training/loop.py",
            "import transformers\nfrom .. import gain\nfrom ..family.names import parse\nimport hf_gem",
        ),
        ("hf_gem/__init__.py", "from .integrations import register\nfrom .functional import gem"),
        ("recipes/gpt2_pretrain.py", "import accelerate\nfrom hf_gem.training import loop\nimport hf_gem.cli"),
    ],
)
def test_a_right_import_is_not(path, source):
    assert violations(source, path) == []
