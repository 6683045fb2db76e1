"""The lower bounds in pyproject.toml are versions that `make test-oldest` installs, and runs the tests with."""

import itertools
import os
import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from hf_gem._torch import TORCHSCRIPT_ENDS
from hf_gem.modules import GemActivation
from tests.helpers import ROOT

tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")


def bounds():
    """Package -> its lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    found = {}
    for requirement in map(Requirement, named):
        if requirement.name != project["name"]:
            (bound,) = requirement.specifier  # one, and no package without
            assert bound.operator == ">=", requirement
            found[requirement.name] = Version(bound.version)
    return found


def test_the_target_takes_its_versions_from_pyproject():
    assert bounds()["torch"] >= Version("2.11")
    rule = re.search(r"^\$\(OLDEST\)/.ready: pyproject.toml\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    assert '--resolution lowest-direct --editable ".[train,dev]"' in rule
    assert not re.search(r"[<>=]=|\d\.\d", rule)


@pytest.mark.skipif("HF_GEM_OLDEST" not in os.environ, reason="holds in the environment of make test-oldest")
@pytest.mark.parametrize(("package", "bound"), bounds().items())
def test_the_oldest_versions_are_installed(package, bound):
    assert Version(Version(metadata.version(package)).public) == bound


def test_torchscript_ends():
    """A reminder: hf_gem/_torch.py lists what goes."""
    newest = Version(metadata.version("torch")) >= Version(TORCHSCRIPT_ENDS)
    assert hasattr(GemActivation, "_scripted") != newest
