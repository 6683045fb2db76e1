"""How Triton kernels are launched, with a driver that only notes what it is given."""

import pytest
import torch

from hf_gem.family.egem import EGEM

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


def launch(x, n=1):
    y = torch.empty_like(x)
    gpu.launch("forward", EGEM, n, 1.0, [y], [x])
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


def test_memory_that_is_not_aligned_is_left_to_triton(calls):
    x = torch.randn(65)
    launch(x[:64])
    launch(x[1:])
    launch(x[:64])
    assert [name for name, *_ in calls] == ["compile", "compile", "launch"]
    assert calls[1][2][1].data_ptr() == x[1:].data_ptr()
