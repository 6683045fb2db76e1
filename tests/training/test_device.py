"""Memory of the CPU that training uses again."""

import ctypes
import resource
import sys

import pytest
import torch

from hf_gem.training.device import keep_freed_memory


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs the malloc of glibc"
)
def test_freed_memory_is_used_again():
    keep_freed_memory()
    assert sum(fresh_pages() >= 32 for _ in range(20)) <= 5  # until there is a block that is large enough


def fresh_pages():
    """How many pages the system clears for a tensor of 64 MB: all 16,384, or 32 where they are large."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
