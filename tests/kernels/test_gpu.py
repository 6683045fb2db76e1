"""The Triton kernels: on the CPU through Triton's interpreter, on a GPU where there is one.

Bounds as in test_formulas, with two more roundings for each division that is fast.
"""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hf_gem
from hf_gem import egem, segem
from hf_gem._kernels import plain, run
from hf_gem._torch import wait_on_device
from hf_gem.family.egem import EGEM
from hf_gem.family.formulas import slope as exact_slope
from hf_gem.family.segem import SEGEM
from hf_gem.family.table import FAMILIES as TABLE
from tests import oracle
from tests.family.dgem import DGEM
from tests.family.spelled import SPELLED
from tests.kernels.test_cpu import NUM_INPUTS, OPERATIONS, assert_same, numbers

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# NumPy, which interprets, warns of infinities in lanes that are not selected.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def value_bound(family, n):
    return 4 * n + 9 if family is SEGEM else 2 * n + 5


def slope_bound(family, n):
    return 6 * n + 15 if family is SEGEM else max(4 * n + 4, 8 * n - 1) + 4 * n


def bound_at(n):
    """From the output; see test_formulas.test_slope_from_the_output."""
    return (2 * n - 1) * (4 * n + 10) + 2 * n + 4


def assert_right(operation, family, n, eps, *inputs):
    """Against the formulas in float64, whose own errors do not count beside these."""
    with hf_gem.kernels("triton"):
        got = run(operation, family, n, eps, *inputs)
    wide = [x.double() for x in inputs]
    expected = plain.run(operation, family, n, eps, *wide)
    x = wide[-1] if operation.startswith("backward") else wide[operation == "glu_backward"]
    slopes = (bound_at(n) if operation == "backward_at" else slope_bound(family, n), None)
    if family is SEGEM:  # the slope is a difference, c - 2n c s, so measured on the scale of the sum
        c = (plain.run("forward", SEGEM, n, eps, x) / x).nan_to_num(1.0)
        factor = wide[0] * wide[2] if operation == "glu_backward" else wide[0]
        slopes = (slopes[0], (factor * c * (1 + 2 * n * (1 - c))).abs())
    values = (value_bound(family, n), None)
    kinds = {"forward": [values], "glu": [values], "glu_backward": [slopes, values]}.get(operation, [slopes])
    dtype = inputs[0].dtype
    # The interpreter cuts float32 off to bfloat16 where hardware rounds.
    last = (2 if DEVICE == "cpu" else 1) * oracle.unit_roundoff(dtype) if dtype != torch.float32 else 0.0
    if operation == "backward_at":  # what the iteration leaves, as in test_slope_from_every_half_precision_output
        last *= 1.25
    if not isinstance(got, tuple):
        got, expected = (got,), (expected,)
    for y, exact, (bound, scale) in zip(got, expected, kinds, strict=True):
        assert y.dtype == dtype
        assert y.stride() == inputs[0].stride()
        scale = exact.abs() if scale is None else scale
        other = torch.stack([part.abs() for part in wide]).nan_to_num(0).amax(0)
        absolute = oracle.min_normal(dtype) + other * (2.0**-27 if operation == "backward_at" else 2.0**-120)
        # Two more for the factors, and for the last rounding in float32.
        allowed = scale * (bound + 2) * 2.0**-24 + exact.abs() * last + absolute
        narrow = exact.to(dtype)
        wrong = ~((y.double() - exact).abs() <= allowed) & (y != narrow) & ~(y.isnan() & narrow.isnan())
        wrong &= ~(exact.abs() + allowed >= torch.finfo(dtype).max)  # either side of an overflow
        assert not wrong.any(), [t[wrong][:3].tolist() for t in (*inputs, y, exact, allowed)]


@pytest.mark.parametrize(("operation", "family"), OPERATIONS)
@pytest.mark.parametrize("n", [1, 2, 4])
@dtypes
def test_against_the_formulas(operation, family, n, dtype):
    for eps in (1e-3, 1.0):
        x = numbers(dtype, 4000)[:6000]
        x = torch.cat([x, (torch.randn(2000) * eps ** (0.5 / n)).to(dtype)]).to(DEVICE)
        others = [torch.randn(len(x)).to(dtype).to(DEVICE) for _ in range(NUM_INPUTS[operation] - 1)]
        if operation == "glu_backward":
            assert_right(operation, family, n, eps, others[0], x, others[1])
        else:
            assert_right(
                operation, family, n, eps, *([*others, x] if operation.startswith("backward") else [x, *others])
            )


@pytest.mark.parametrize(("operation", "family"), [(op, family) for op, family in OPERATIONS if op != "backward_at"])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_float32_has_the_bits_of_a_cpu(operation, family, n):
    x = numbers(torch.float32, 2000)
    a, b = torch.randn(2, len(x))
    inputs = {"forward": [x], "backward": [a, x], "glu": [x, a], "glu_backward": [a, x, b]}[operation]
    for eps in (1e-6, 0.3, 10.0):
        assert_same(operation, family, n, eps, *inputs, backend="triton", device=DEVICE)


def test_every_operation(monkeypatch):
    monkeypatch.setitem(TABLE, "spelled", SPELLED)
    x, grad = torch.randn(2, 1000)
    for operation, inputs in (("forward", [x]), ("backward", [grad, x])):
        assert_same(operation, SPELLED, 2, 0.3, *inputs, backend="triton", device=DEVICE)
        assert torch.equal(*(plain.run(operation, family, 2, 0.3, *inputs) for family in (SPELLED, DGEM)))


def test_a_family_made_from_another(monkeypatch):
    """Only a member with a fixed eps shares the kernels of the family that it was made from."""
    twice = dataclasses.replace(
        DGEM, name="twice", title="Twice", value=lambda *a: 2 * DGEM.value(*a), slope=lambda *a: 2 * DGEM.slope(*a)
    )
    monkeypatch.setitem(TABLE, "twice", twice)
    assert_same("forward", twice, 1, 0.3, torch.randn(100), backend="triton", device=DEVICE)
    assert twice.fixed(0.3, "half", "Half", "x").kernels == "twice"


@pytest.mark.parametrize("family", [EGEM, SEGEM])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number(family, dtype):
    x = numbers(dtype).to(DEVICE)
    assert_right("forward", family, 1, 1e-4, x)
    assert_right("backward", family, 1, 1e-4, torch.ones_like(x), x)
    if family is EGEM:
        assert_right("backward_at", family, 1, 1e-4, torch.ones_like(x), x)


@dtypes
def test_every_length(dtype):
    block = 4096 // torch.empty((), dtype=dtype).element_size()
    for count in (1, 2, 127, block - 1, block, block + 1, 3 * block + 5):
        assert_right("forward", EGEM, 1, 0.1, torch.randn(count).to(dtype).to(DEVICE))
        assert_right("glu_backward", SEGEM, 1, 0.1, *torch.randn(3, count).to(dtype).to(DEVICE))


@pytest.mark.parametrize("save", ["input", "output"])
def test_autograd(save):
    x = torch.randn(300, device=DEVICE, requires_grad=True)
    with hf_gem.kernels("triton"):
        y = egem(x, 2, 0.1, save=save)
        (slope,) = torch.autograd.grad(y.sum(), x)  # an expanded gradient
    exact = exact_slope(EGEM, 2, 0.1, x.detach().double())
    # From the output, its rounding counts too: (2n + 5) units in it are at most 2n times as many in the slope.
    bound = slope_bound(EGEM, 2) if save == "input" else bound_at(2) + 4 * value_bound(EGEM, 2)
    torch.testing.assert_close(slope.double(), exact, rtol=bound * 2.0**-24, atol=2.0**-27)


def both_passes(function, x, grad):
    """Value and gradient, by the Triton kernels."""
    x = x.detach().requires_grad_()
    with hf_gem.kernels("triton"):
        y = function(x)
        return y.detach(), *torch.autograd.grad(y, x, grad)


KEEPING = {
    "egem, input": lambda x: egem(x, 1, 0.1, save="input"),
    "egem, output": lambda x: egem(x, 1, 0.1, save="output"),
    "segem": lambda x: segem(x, 1, 0.1),
}
keeping = pytest.mark.parametrize("function", KEEPING.values(), ids=KEEPING)


@keeping
@dtypes
def test_memory_that_is_not_aligned(function, dtype):
    """Triton has a version for pointers and sizes that are multiples of 16, and another for all others."""
    for count in (15, 16, 17, 2048, 4095):
        memory, grads = torch.randn(2, count + 1).to(dtype).to(DEVICE)
        aligned = both_passes(function, memory[1:].clone(), grads[1:].clone())
        for x, grad in ((memory[1:], grads[1:]), (memory[1:], grads[1:].clone()), (memory[1:].clone(), grads[1:])):
            for got, expected in zip(both_passes(function, x, grad), aligned, strict=True):
                assert torch.equal(got, expected)


@keeping
def test_channels_last(function):
    x, grad = torch.randn(2, 3, 5, 6, 7).to(DEVICE)
    expected = both_passes(function, x, grad)
    last = x.to(memory_format=torch.channels_last)
    for other in (grad, grad.to(memory_format=torch.channels_last)):
        for got, exact in zip(both_passes(function, last, other), expected, strict=True):
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(got, exact)


@keeping
def test_activation_checkpointing(function):
    x, grad = torch.randn(2, 50, 7).to(DEVICE)
    expected = both_passes(function, x, grad)
    assert all(map(torch.equal, both_passes(lambda x: checkpoint(function, x, use_reentrant=False), x, grad), expected))


def test_an_output_that_is_overwritten():
    with pytest.raises(RuntimeError, match="overwritten in place"):
        both_passes(lambda x: KEEPING["egem, output"](x).add_(1.0), *torch.randn(2, 50).to(DEVICE))


# ---- what only a GPU shows


@pytest.mark.gpu
@keeping
def test_a_graph_replays_what_eager_mode_computes(function):
    x, grad = torch.randn(2, 5000, device="cuda").bfloat16()
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        both_passes(function, x, grad)  # compiles, which cannot be captured
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = both_passes(function, x, grad)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(map(torch.equal, replayed, both_passes(function, x, grad)))


@pytest.mark.gpu
@keeping
def test_kernels_run_on_the_current_stream(function):
    new, grad = torch.randn(2, 5000, device="cuda")
    expected = both_passes(function, new, grad)
    x = torch.zeros_like(new)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wait_on_device(50_000_000)  # on another stream they would run before x is written
        x.copy_(new)
        got = both_passes(function, x, grad)
    stream.synchronize()
    assert all(map(torch.equal, got, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("overwrite", [torch.nn.Dropout(0.1, inplace=True), lambda y: y.add_(1.0)])
def test_what_is_overwritten_is_named(overwrite):
    y = overwrite(egem(torch.randn(100, device="cuda", requires_grad=True)))
    with pytest.raises(RuntimeError, match='save="input"'):
        y.sum().backward()


@pytest.mark.gpu
def test_auto_keeps_the_output():
    linear = torch.nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = egem(linear(x))
    assert saved[-1] == y.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    x = torch.randn(1000, device="cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(egem(x).cpu(), egem(x.cpu()), rtol=2.0**-21, atol=0)
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    count = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 6 * count:
        pytest.skip("needs 13 GB of free GPU memory")
    x = torch.zeros(count, device="cuda", dtype=torch.bfloat16)
    x[-4097:] = 1.0
    y = egem(x, 1, 1.0)
    assert not y[:-4097].any()
    assert (y[-4097:] == 0.5).all()
