"""How Triton kernels are launched, with a driver that only notes what it is given."""

import dataclasses

import pytest
import torch

from hf_gem._kernels.printer import triton_source
from hf_gem.family.egem import EGEM
from hf_gem.family.table import FAMILIES as TABLE
from tests.family.dgem import DGEM

gpu = pytest.importorskip("hf_gem._kernels.gpu", reason="needs Triton")


class Kernel:
    """In place of a kernel, and of what Triton returns when it has compiled and launched one."""

    def __init__(self, calls, name, compiled=None):
        self.calls, self.name, self.compiled = calls, name, compiled

    def __getitem__(self, grid):
        if self.compiled is None:
            assert len(grid) == 3  # which compiled kernels insist on

        def launch(*args, **options):
            self.calls.append((self.name, grid, args))
            return self.compiled

        return launch


@pytest.fixture
def calls(monkeypatch):
    calls = []
    kernel = Kernel(calls, "compile", Kernel(calls, "launch"))
    monkeypatch.setattr(gpu, "kernels", lambda name, n, exact: {"forward": kernel})
    monkeypatch.setattr(gpu, "interpreted", False)
    monkeypatch.setattr(gpu, "_compiled", {})
    return calls


def launch(x, n=1, family=EGEM, eps=1.0):
    y = torch.empty_like(x)
    gpu.launch("forward", family, n, eps, [y], [x])
    return y


def test_triton_looks_for_a_kernel_once(calls):
    x = torch.randn(3000, dtype=torch.bfloat16)
    launch(x)
    y = launch(x)
    assert [name for name, *_ in calls] == ["compile", "launch"]
    _, grid, args = calls[-1]
    assert grid == (2, 1, 1)
    assert args[:3] == (y.data_ptr(), x.data_ptr(), 3000)
    assert args[3:] == (1.0, 1.0, 2048)


def test_what_is_compiled_for_one_kind_of_tensor_is_not_launched_for_another(calls):
    x = torch.randn(64)
    for other in (x, x.bfloat16(), x.half()):
        launch(other)
    launch(x, n=2)
    assert [name for name, *_ in calls] == ["compile"] * 4


def test_numbers_made_of_r_and_e_are_computed_in_double_precision(calls, monkeypatch):
    """As the formulas do, so that float32 has their bits. GPUs would compute them in single precision."""

    def value(z, n, r, e):
        return DGEM.value(z, n, r, e) * (1 / e + 0.1 * r) * e

    monkeypatch.setitem(TABLE, "scaled", dataclasses.replace(DGEM, name="scaled", title="Scaled", value=value))
    launch(torch.randn(64), family=TABLE["scaled"], eps=0.3)
    _, _, args = calls[-1]
    assert args[3:-1] == (2.0, 0.3 * 4, 1 / (0.3 * 4) + 0.1 * 2.0)
    assert "* c2)" in triton_source(TABLE["scaled"], 1, exact=True)


def test_memory_that_is_not_aligned_is_left_to_triton(calls):
    x = torch.randn(65)
    launch(x[:64])
    launch(x[1:])
    launch(x[:64])
    assert [name for name, *_ in calls] == ["compile", "compile", "launch"]
    assert calls[1][2][1].data_ptr() == x[1:].data_ptr()
