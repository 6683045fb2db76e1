"""Where things are kept that take time to make again: compiled kernels and tokenised text."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$HF_GEM_CACHE`, or `~/.cache/hf_gem`."""
    return Path(os.environ.get("HF_GEM_CACHE") or Path.home() / ".cache" / "hf_gem").expanduser()
