"""What every test relies on: no network, a fixed seed, and a reason beside every skipped GPU test."""

import getpass
import os
import sys
import tempfile
from pathlib import Path

# Before anything imports huggingface_hub, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Kernels that are built here stay here.
os.environ.setdefault("HF_GEM_CACHE", str(Path(__file__).parent.parent / ".cache" / "hf_gem"))

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported: they run on the CPU then


import hf_gem
from hf_gem._kernels import trust
from tests.family.dgem import DGEM

try:
    trust.make_private(Path(os.environ["HF_GEM_CACHE"]))
except OSError:  # a clone in a folder that others can write to, from where no code is loaded
    private = f"hf_gem-tests-{getpass.getuser()}"
    os.environ["HF_GEM_CACHE"] = str(trust.make_private(Path(tempfile.gettempdir()) / private))

hf_gem.register_family(DGEM)  # a family that is not ours is there in all tests


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """accelerate keeps its state for the life of the process, also that of a Trainer."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
