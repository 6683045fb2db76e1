"""A pytest plugin that runs timm's tests/test_models.py for the models PEERS_MODELS with the activation PEERS_ACT.

Without PEERS_ACT, they have their own activations. run.py uses this in the folder of timm's sources.
"""

from __future__ import annotations

import functools
import os
from typing import Any
from unittest import mock

import timm

import hf_gem

_MODELS = frozenset(os.environ["PEERS_MODELS"].split(","))
_plain = timm.create_model


@functools.wraps(_plain)
def _create_model(name: str, *args: Any, **kwargs: Any) -> Any:
    with mock.patch.object(timm, "create_model", _plain):  # hf_gem calls it
        return hf_gem.create_timm_model(name, os.environ["PEERS_ACT"], *args, **kwargs)[0]


if os.environ.get("PEERS_ACT"):
    timm.create_model = _create_model  # before the suite imports it


def pytest_collection_modifyitems(items: list[Any]) -> None:
    items[:] = [item for item in items if _model(item) in _MODELS]


def _model(item: Any) -> Any:
    callspec = getattr(item, "callspec", None)
    return callspec and callspec.params.get("model_name")
