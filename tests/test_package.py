"""The public names, which are imported when they are first used."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import hf_gem
from tests.helpers import run_python


def test_type_checkers_see_what_is_there():
    tree = ast.parse(Path(hf_gem.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert {node.module: tuple(alias.name for alias in node.names) for node in block.body} == hf_gem._NAMES
    lazy = [name for names in hf_gem._NAMES.values() for name in names]
    assert sorted([*lazy, "register", "unregister"]) == sorted(hf_gem.__all__)


STAR = """
from hf_gem import *
import hf_gem
assert all(globals()[name] is getattr(hf_gem, name) for name in hf_gem.__all__)
assert gem is hf_gem.functional.gem
assert set(hf_gem.__all__) | {"surgery", "__version__"} <= set(dir(hf_gem))
"""

SUBMODULES = """
import importlib, sys, hf_gem
assert "torch" not in sys.modules
for name in [*hf_gem._SUBMODULES, "integrations"]:
    assert getattr(hf_gem, name) is importlib.import_module(f"hf_gem.{name}")
"""

# The first use is inside of what changes how torch works.
COMPILED = """
import sys
import hf_gem
import torch
ones = torch.ones(2)
assert "hf_gem.functional" not in sys.modules
assert torch.compile(lambda x: hf_gem.gem(x), backend="eager", fullgraph=True)(ones).tolist() == [0.5, 0.5]
"""

ON_META = """
import hf_gem
import torch
from torch.func import grad, vmap
with torch.device("meta"):
    assert hf_gem.GEM()(torch.ones(2)).is_meta
assert vmap(grad(lambda x: hf_gem.egem(x, eps=1.0)))(torch.ones(2)).tolist() == [1.0, 1.0]
assert hf_gem.GEM()(torch.ones(2)).tolist() == [0.5, 0.5]
"""

UNPICKLED = """
import pickle, sys
act, spec = pickle.loads(sys.stdin.buffer.read())
import hf_gem
assert type(act) is hf_gem.EGEM and spec == hf_gem.parse("gem_n2")
"""


@pytest.mark.parametrize("script", [STAR, SUBMODULES, COMPILED, ON_META], ids=["star", "modules", "compiled", "meta"])
def test_the_first_use(script):
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


def test_a_pickle_loads_where_nothing_is_imported():
    data = pickle.dumps((hf_gem.EGEM(n=2), hf_gem.parse("gem_n2")))
    done = subprocess.run([sys.executable, "-c", UNPICKLED], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_an_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'hf_gem' has no attribute 'gems'"):
        _ = hf_gem.gems
