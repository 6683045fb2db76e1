"""PyTorch's own test machinery. Undoes what its import changes in the process, for the sake of the other tests."""

import re
import sys
import unittest

import pytest
import torch
from torch.testing._internal import common_utils, composite_compliance, optests
from torch.testing._internal.common_device_type import OpDTypes, instantiate_device_type_tests, ops
from torch.testing._internal.common_dtype import floating_types_and
from torch.testing._internal.common_utils import (
    DeterministicGuard,
    TestCase,
    TestGradients,
    noncontiguous_like,
    parametrize,
)
from torch.testing._internal.opinfo import core
from torch.testing._internal.opinfo.core import ErrorInput, OpInfo, SampleInput

__all__ = [
    "DeterministicGuard",
    "ErrorInput",
    "OpDTypes",
    "OpInfo",
    "SampleInput",
    "TestCase",
    "TestGradients",
    "assert_same",
    "composite_compliance",
    "floating_types_and",
    "instantiate_device_type_tests",
    "mark_slow",
    "noncontiguous_like",
    "ops",
    "optests",
    "parametrize",
]

setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)
torch._C.ScriptFunction.__call__ = common_utils.func_call
torch._C.ScriptMethod.__call__ = common_utils.meth_call


def _running_test():
    """Returns the function of the running test. torch's version reads the source of every frame, which is slow."""
    frame = sys._getframe()
    while frame is not None:
        case = frame.f_locals.get("self")
        if isinstance(case, unittest.TestCase):
            return getattr(case, case._testMethodName).__func__
        frame = frame.f_back
    return None


common_utils.extract_test_fn = core.extract_test_fn = _running_test


def assert_same(got, expected, bits=True):
    """Compares bit by bit, or otherwise within what the divisions of GPU kernels may be off."""
    tolerance = 0 if bits else 2.0**-18
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def mark_slow(case, pattern):
    """Marks the tests of a class whose names match a pattern as `slow`."""
    for name, test in list(vars(case).items()):
        if name.startswith("test_") and re.search(pattern, name):
            setattr(case, name, pytest.mark.slow(test))
