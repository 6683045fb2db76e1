"""Which kernels run, what goes to the formulas, and that neither can be told from the result."""

import contextlib
import random
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hf_gem
from hf_gem import egem, segem
from hf_gem._kernels import BACKENDS, cpu, dispatch, plain
from hf_gem.family.egem import EGEM
from hf_gem.family.segem import SEGEM
from tests.helpers import needs_compiler


@pytest.fixture
def launched(monkeypatch):
    """The operations that the C++ kernels compute."""
    calls = []
    launch = cpu.launch
    monkeypatch.setattr(cpu, "launch", lambda operation, *rest: (calls.append(operation), launch(operation, *rest)))
    return calls


# ---- the choice


def selected():
    return dispatch._blocks[-1].backend


def test_the_backends_of_the_context_manager():
    assert selected() == "auto"
    with hf_gem.kernels("eager"):
        assert selected() == "eager"
        with pytest.raises(RuntimeError, match="inside"), hf_gem.kernels("compiled"):
            raise RuntimeError("inside")
        assert selected() == "eager"
    assert selected() == "auto"


@needs_compiler
def test_blocks_of_two_threads(launched):
    """They overlap, and the one that was entered first ends first."""
    x = torch.randn(20)
    first_ends, second_begins = threading.Event(), threading.Event()

    def first():
        with hf_gem.kernels("eager"):
            second_begins.set()
            assert first_ends.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    assert second_begins.wait(60)
    with hf_gem.kernels("compiled"):
        egem(x)
        assert launched == ["forward"]
        first_ends.set()
        thread.join()
        assert selected() == "compiled"
    assert selected() == "auto"
    egem(x)
    assert launched == ["forward", "forward"]


def test_a_block_inside_compiled_code():
    def function(x):
        with hf_gem.kernels("eager"):
            return egem(x)

    x = torch.randn(8)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))
    assert selected() == "auto"


@pytest.mark.parametrize("backend", ["cuda", "", None, 1])
def test_another_backend(backend):
    with pytest.raises(ValueError, match=r"got .*must be one of 'auto', 'eager', 'compiled', 'triton'\."):
        hf_gem.kernels(backend).__enter__()


@pytest.mark.parametrize(
    ("value", "selected"), [*[(name, name) for name in BACKENDS], ("EAGER", "eager"), ("", "auto")]
)
def test_the_environment_variable(monkeypatch, value, selected):
    monkeypatch.setenv("HF_GEM_KERNELS", value)
    assert dispatch._from_environment() == selected


@pytest.mark.parametrize(
    ("variable", "allowed"),
    [
        ("HF_GEM_KERNELS", "one of 'auto', 'eager', 'compiled', 'triton'"),
        ("HF_GEM_SAVE", "'auto', 'input' or 'output'"),
    ],
)
def test_a_wrong_environment_variable(variable, allowed):
    command = [sys.executable, "-c", "import hf_gem; hf_gem.egem"]
    done = subprocess.run(command, env={variable: "fast"}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"got {variable}='fast'. {variable} must be {allowed}" in done.stderr


@pytest.mark.parametrize(("default", "kept"), [("auto", "input"), ("input", "input"), ("output", "output")])
@pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiler)])
def test_what_auto_keeps_is_a_choice(monkeypatch, default, kept, backend):
    """With "output" a CPU notices, as a GPU does, that an output was overwritten."""
    monkeypatch.setattr(dispatch, "_DEFAULT_SAVE", default)
    x = torch.randn(64, requires_grad=True)
    with hf_gem.kernels(backend):
        y = egem(x)
        expected = torch.autograd.grad(egem(x, save=kept).sum(), x)
        assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], expected[0])
        with torch.no_grad():
            y.mul_(2)
        overwritten = pytest.raises(RuntimeError, match="modified by an inplace operation")
        with overwritten if kept == "output" else contextlib.nullcontext():
            y.sum().backward()
        segem(x).mul_(2).sum().backward()  # whose output cannot be kept
        egem(x, save="input").mul_(2).sum().backward()


@needs_compiler
def test_what_computes(launched):
    x = torch.randn(50, requires_grad=True)
    for backend, expected in (("eager", []), ("compiled", ["forward", "backward"])):
        with hf_gem.kernels(backend):
            segem(x, 1, 0.1).sum().backward()
        assert launched == expected
        launched.clear()
    with hf_gem.kernels("compiled"):
        gate, up = torch.randn(2, 30, requires_grad=True)
        hf_gem.functional.gem_glu(gate, up).sum().backward()
    assert launched == ["glu", "glu_backward"]


# ---- inputs of all kinds


LAYOUTS = {
    "0-dim": torch.tensor(0.7),
    "empty": torch.empty(3, 0, 2),
    "transposed": torch.randn(6, 4).t(),
    "strided": torch.randn(10)[::3],
    "expanded": torch.randn(3, 1).expand(3, 5),
    "offset": torch.randn(7, 9)[1:, 2:],
    "unaligned": torch.randn(101)[1:],
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
}


@needs_compiler
@pytest.mark.parametrize("backend", ["compiled", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    x = LAYOUTS[layout]
    grad = torch.randn(x.shape)
    up = torch.randn(*x.shape, 2)[..., 0]
    cases = [("forward", EGEM, x), ("backward", EGEM, grad, x), ("glu_backward", SEGEM, grad, x, up)]
    if x.dim():
        cases.append(("backward", EGEM, grad[..., :1].expand_as(x), x))
    close = {"rtol": 2.0**-20, "atol": 2.0**-40} if backend == "triton" else {"rtol": 0, "atol": 0}
    for operation, family, *inputs in cases:
        with hf_gem.kernels(backend):
            got = dispatch.run(operation, family, 1, 0.1, *inputs)
        expected = plain.run(operation, family, 1, 0.1, *inputs)
        for y, right in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, expected)), strict=True):
            torch.testing.assert_close(y, right, **close)
        if operation != "glu_backward":
            assert got.stride() == torch.relu(x).stride()


def any_layout(shape, draw):
    """A tensor in some layout; dimensions of one element have strides that mean nothing."""
    kind = draw.randrange(5)
    x = torch.randn(shape)
    if kind == 1:
        order = draw.sample(range(len(shape)), len(shape))
        x = torch.randn([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
    if kind == 2 and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    if kind == 3:
        x = torch.randn([size + 1 for size in shape])[tuple(slice(size) for size in shape)]
    if kind == 4:
        return x.expand(shape)[..., :1].expand(shape)
    return x.as_strided(
        shape, [draw.choice((s, 1, 7, 100)) if n == 1 else s for n, s in zip(shape, x.stride(), strict=True)]
    )


@needs_compiler
@pytest.mark.parametrize("operation", ["forward", "backward", "backward_at", "glu", "glu_backward"])
def test_strides_are_those_of_the_formulas(launched, operation):
    draw = random.Random(operation)
    count = {"forward": 1, "glu_backward": 3}.get(operation, 2)
    for case in range(300):
        shape = [draw.choice((1, 1, 2, 3)) for _ in range(draw.randrange(1, 6))]
        x = any_layout(shape, draw)
        inputs = [x] + [x + 1 if case % 2 else any_layout(shape, draw) for _ in range(count - 1)]
        expected = plain.run(operation, EGEM, 1, 0.1, *inputs)
        with hf_gem.kernels("compiled"):
            dispatch.run(operation, EGEM, 1, 0.1, *inputs)
            launched.clear()
            got = dispatch.run(operation, EGEM, 1, 0.1, *inputs)
        assert launched == [operation]
        for y, right in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, expected)), strict=True):
            assert y.stride() == right.stride(), [x.stride() for x in inputs]
            assert torch.equal(y, right)


class _Tagged(torch.Tensor):
    pass


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@needs_compiler
def test_what_others_have_to_see_goes_to_the_formulas(launched):
    x = torch.randn(20)
    with hf_gem.kernels("compiled"):
        with _Count() as mode:
            egem(x)
        assert mode.count > 3
        tagged = egem(x.as_subclass(_Tagged))
        assert type(tagged) is _Tagged
        egem(x.double())
        torch.func.vmap(egem)(x)
        torch.func.grad(lambda v: egem(v).sum())(x)
        egem(torch.imag(torch.conj(torch.randn(4, dtype=torch.complex64))))  # of which the sign is still to be changed
        egem(x.to("meta"))
        egem(x, 1, torch.tensor(0.1))
        assert not launched
        egem(torch.nn.Parameter(x))
    assert launched == ["forward"]


def test_negated_views():
    x = torch.imag(torch.conj(torch.randn(9, dtype=torch.complex64)))
    assert x.is_neg()
    assert torch.equal(egem(x), egem(x.clone().resolve_neg()))


@needs_compiler
@pytest.mark.parametrize(
    "function",
    [egem, lambda x: egem(x, save="output"), segem, lambda x: hf_gem.functional.gem_glu(x, x.flip(0))],
    ids=["egem", "kept output", "segem", "glu"],
)
def test_batches_of_gradients(launched, function):
    x = torch.randn(5, requires_grad=True)
    with hf_gem.kernels("compiled"):
        expected = torch.autograd.functional.jacobian(function, x)
        launched.clear()
        torch.testing.assert_close(torch.autograd.functional.jacobian(function, x, vectorize=True), expected)
        (rows,) = torch.autograd.grad(function(x), x, torch.eye(5), is_grads_batched=True)
        torch.testing.assert_close(rows, expected)
    assert {operation for operation in launched if "backward" in operation} == set()


@needs_compiler
def test_zeros_without_memory():
    zeros = torch._efficientzerotensor(4)
    with hf_gem.kernels("compiled"):
        assert torch.equal(hf_gem.gem(zeros), torch.zeros(4))
        assert torch.equal(dispatch.run("backward", SEGEM, 1, 0.1, zeros, torch.randn(4)), torch.zeros(4))


def test_compilers_do_not_see_the_choice(monkeypatch):
    monkeypatch.setattr(dispatch, "_GPUS", ("cpu",))  # where `save="auto"` depends on it
    x = torch.randn(8, requires_grad=True)
    compiled = torch.compile(lambda x: egem(x) + segem(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain.run("forward", EGEM, 1, 1e-4, x) + segem(x))


@needs_compiler
def test_mixed_dtypes_of_gradients():
    # A hook may hand over a gradient of another dtype than autograd asks for.
    x, grad = torch.randn(8), torch.randn(8, dtype=torch.float64)
    with hf_gem.kernels("compiled"):
        assert dispatch.run("backward", EGEM, 1, 0.1, grad, x).dtype == torch.float32


# ---- where they cannot be had


def one_warning(backend, match):
    x = torch.randn(20)
    with hf_gem.kernels(backend):
        with pytest.warns(UserWarning, match=match) as caught:
            y = egem(x)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(egem(x), y)
    assert torch.equal(y, plain.run("forward", EGEM, 1, 1e-4, x))


@pytest.fixture
def _no_memory():
    for cached in (dispatch._triton, dispatch._interpreter):
        cached.cache_clear()
    yield
    for cached in (dispatch._triton, dispatch._interpreter):
        cached.cache_clear()


@pytest.mark.usefixtures("_no_memory")
def test_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_gem._kernels.gpu", None)
    monkeypatch.delattr(hf_gem._kernels, "gpu", raising=False)
    one_warning("triton", "Triton cannot be imported")


@pytest.mark.usefixtures("_no_memory")
def test_triton_on_a_cpu(monkeypatch):
    gpu = pytest.importorskip("hf_gem._kernels.gpu")
    monkeypatch.setattr(gpu, "interpreted", False)
    one_warning("triton", "TRITON_INTERPRET=1")


@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to find C compiler.\nSet CC"), FileNotFoundError("ptxas"), OSError()]
)
def test_triton_that_cannot_launch(error, monkeypatch):
    """As in an image without a C compiler: one warning, and the formulas go on, in the backward pass too."""
    launches = []

    class Broken:
        interpreted = False

        @staticmethod
        def launch(*arguments):
            launches.append(arguments[0])
            raise error

    monkeypatch.setattr(dispatch, "_triton", lambda: Broken)
    monkeypatch.setattr(dispatch, "_triton_fails", False)
    monkeypatch.setattr(dispatch, "_GPUS", ("cpu",))  # for what is kept for the backward pass
    monkeypatch.setattr(dispatch, "_interpreter", lambda: Broken)  # where tensors of a CPU go with this backend
    x = torch.linspace(-3, 3, 50, requires_grad=True)
    with hf_gem.kernels("triton"), pytest.warns(UserWarning, match=r"plain formulas on GPUs from now on.*C compiler"):
        y = egem(x, 2, 0.5)
    assert torch.equal(y, plain.run("forward", EGEM, 2, 0.5, x))
    assert y.grad_fn.output  # decided before the launch failed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (got,) = torch.autograd.grad(y.sum(), x)
        egem(x, 2, 0.5)
    assert torch.equal(got, plain.run("backward_at", EGEM, 2, 0.5, torch.ones_like(x), y))
    assert launches == ["forward"]
