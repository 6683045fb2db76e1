"""Every block of Python in the README and in docs/ runs.

A block goes on where the one before it ended, except on pages of which a reader copies one block. In front of a block,
`<!-- not run: why -->` excludes it.
"""

import re
import sys
from unittest import mock

import pytest
import torch

import hf_gem
from hf_gem.family.table import FAMILIES
from tests.helpers import ROOT, save_bytes_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("timm")

from transformers import GPT2Config, GPT2LMHeadModel

PAGES = {path.stem: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCK = re.compile(r"(?:<!-- not run: (.+) -->\n+)?^( *)```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
ALONE = {"choosing", "kernels", "models", "proofs", "serving"}  # pages whose blocks stand alone
NEEDS = {"exporting": ("onnxruntime", "onnxscript")}
SLOW = {"choosing", "exporting"}  # the first builds a GPT-2 of 124M parameters


def blocks(page: str) -> list[str]:
    """The code of a page, without what it says is not run."""
    found = BLOCK.findall(PAGES[page].read_text())
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for why, indent, code in found if not why]


def execute(page: str) -> dict:
    """Runs the blocks of a page; returns what the last of them has defined."""
    names: dict = {}
    for code in blocks(page):
        names = {} if page in ALONE else names
        exec(compile(code, f"{page}.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def after_readme():
    """What the README has defined at its end."""
    return execute("README")


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder to write into, where the Hub's GPT-2 is a small one."""
    monkeypatch.chdir(tmp_path)
    name = save_bytes_tokenizer(tmp_path / "openai-community" / "gpt2")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 257}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=256)).save_pretrained(name)
    families = {name: family for name, family in FAMILIES.items() if name != "dgem"}  # which a page registers
    with mock.patch.dict(FAMILIES, families, clear=True):
        yield tmp_path


def marked(page: str):
    return pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page


@pytest.mark.parametrize(
    "page", [marked(page) for page in PAGES if blocks(page) and page not in ("README", "families")]
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_page(page, somewhere):
    for module in NEEDS.get(page, ()):
        pytest.importorskip(module)
    names = execute(page)
    if page == "models":
        assert hf_gem.audit(names["swin"]).complete
    if page == "kernels":
        assert not hf_gem.unpatch_glu(names["llama"])


def test_the_family_of_a_reader(somewhere, monkeypatch):
    """The page has a file and a program that imports it."""
    definition, program = blocks("families")
    (somewhere / "dgem.py").write_text(definition)
    monkeypatch.syspath_prepend(somewhere)
    names: dict = {}
    exec(compile(program, "families.md", "exec"), names)
    assert hf_gem.audit(names["model"]).complete
    del sys.modules["dgem"]


def test_readme(after_readme):
    assert type(after_readme["cnn"].act1).__name__ == "GEM"
    assert hf_gem.audit(after_readme["vit"]).num_gem == 0
    assert after_readme["y"].shape == (8, 64)
    assert isinstance(after_readme["layer"], torch.nn.Module)


def test_no_block_is_overlooked():
    """Neither an indented one nor one that is called something else than `python`."""
    for page, path in PAGES.items():
        text = path.read_text()
        assert len(BLOCK.findall(text)) == len(re.findall(r"^ *```py", text, re.MULTILINE)), page
        assert not re.search(r"^    (import|from) \w", text, re.MULTILINE), page
