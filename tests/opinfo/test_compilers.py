"""PyTorch's test_aotdispatch.py, test_proxy_tensor.py and fake-tensor tests, and torch.compile with free sizes."""

import re
import warnings

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch.testing._internal.two_tensor import TwoTensor

import hf_gem
from hf_gem import egem, gem, segem
from hf_gem.functional import gem_glu
from tests.helpers import needs_compiler
from tests.opinfo.database import BUILT, EPS, OPERATORS
from tests.opinfo.machinery import TestCase, instantiate_device_type_tests, mark_slow, ops, optests, parametrize

in_double = {"allowed_dtypes": (torch.float64,)}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # compiled are the formulas, where eager mode has closed forms


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch._dynamo.reset()


def few(op, device, dtype):
    """A sample with each `save`."""
    seen = set()
    for sample in op.sample_inputs(device, dtype, requires_grad=True, orders=BUILT[-1:]):
        if sample.kwargs.get("save") not in seen:
            seen.add(sample.kwargs.get("save"))
            yield sample


def close(got, expected, **_):
    torch.testing.assert_close(got, expected, **CLOSE)


class TestCompilers(TestCase):
    @parametrize("dynamic", [False, True])
    @ops(OPERATORS, **in_double)
    def test_aot_autograd(self, device, dtype, op, dynamic):
        for sample in few(op, device, dtype):
            optests.aot_autograd_check(
                op.get_op(),
                (sample.input, *sample.args),
                sample.kwargs,
                dynamic,
                assert_equals_fn=close,
                try_check_data_specialization=True,
            )

    @parametrize("mode", ["real", "fake", "symbolic"])
    @ops(OPERATORS, **in_double)
    def test_make_fx(self, device, dtype, op, mode):
        for sample in few(op, device, dtype):
            args = (sample.input, *sample.args)
            optests.make_fx_check(op.get_op(), args, sample.kwargs, mode, close, randomize_data=True)

    @ops(OPERATORS, **in_double)
    def test_fake_check(self, device, dtype, op):
        for sample in few(op, device, dtype):
            detached = sample.transform(lambda v: v.detach() if isinstance(v, torch.Tensor) else v)
            optests.fake_check(op.get_op(), (detached.input, *detached.args), detached.kwargs)

    @ops(OPERATORS, **in_double)
    def test_compile_with_free_sizes(self, device, dtype, op):
        # One graph, without a break, for all sizes of the first dimension.
        for sample in few(op, device, dtype):
            graphs = []

            def counting(graph, inputs, graphs=graphs):
                graphs.append(graph)
                return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

            compiled = torch.compile(op.get_op(), backend=counting, fullgraph=True)
            for rows in (3, 5, 8):
                tensors = [sample.input.detach(), *(arg.detach() for arg in sample.args)]
                tensors = [t.repeat(rows, *[1] * (t.dim() - 1)).requires_grad_() for t in tensors]
                for t in tensors:
                    torch._dynamo.mark_dynamic(t, 0)
                eps = sample.kwargs.get("eps")
                eps = [eps] if isinstance(eps, torch.Tensor) else []
                y = compiled(*tensors, **sample.kwargs)
                expected = op(*tensors, **sample.kwargs)
                close(y, expected)
                weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
                leaves = [*tensors, *eps]
                close(torch.autograd.grad(y, leaves, weights), torch.autograd.grad(expected, leaves, weights))
            # With a float64 of no dimensions torch may call the backend twice at first, for `x * eps` too.
            assert len(graphs) in ((1, 2) if any(e.dim() == 0 for e in eps) else (1,))


instantiate_device_type_tests(TestCompilers, globals(), only_for=("cpu",))

# Tracing takes a second each: of the operators, one is waited for.
mark_slow(TestCompilersCPU, "gem_glu|learnable|[a-z]_gem_cpu|segem")  # noqa: F821  # what the line above has made

FORMS = {
    "gem": lambda x: gem(x, 2),
    "egem from its output": lambda x: egem(x, 2, EPS, save="output"),
    "segem": lambda x: segem(x, 2, EPS),
    "glu": lambda x: gem_glu(x, 2 * x, "egem", 2, EPS),
    "learnable": lambda x: egem(x, 2, torch.full((3,), EPS, dtype=x.dtype)),
}
forms = pytest.mark.parametrize("form", list(FORMS))


@needs_compiler
@forms
def test_compiled_autograd(form):
    # The backward pass of an eager forward pass is traced, which what calls a kernel cannot be: torch would warn.
    f = FORMS[form]
    x = torch.randn(4, 3, requires_grad=True)
    with hf_gem.kernels("compiled"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (expected,) = torch.autograd.grad(f(x).sum(), x)
        y = f(x).sum()
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            y.backward()
    torch.testing.assert_close(x.grad, expected)
    assert not [w for w in caught if re.search("hf_gem|third-party", str(w.message))]


@forms
def test_sizes_that_data_decide(form):
    f = FORMS[form]
    x = torch.randn(10, 3)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda x, mask: f(x[mask]), fullgraph=True, backend="aot_eager")
        for mask in (x[:, 0] > 0, x[:, 0] > 10):
            torch.testing.assert_close(compiled(x, mask), f(x[mask]))


@forms
@pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiler)])
def test_a_subclass_of_two_tensors(form, backend):
    f = FORMS[form]
    a, b = torch.randn(2, 4, 3)
    two = TwoTensor(a.clone(), b.clone()).requires_grad_()
    with hf_gem.kernels(backend):
        pair = [t.clone().requires_grad_() for t in (a, b)]
        expected = [torch.autograd.grad(f(t).sum(), t)[0] for t in pair]
        for g in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
            two.grad = None
            y = g(two)
            y.sum().backward()
            torch.testing.assert_close([y.a, y.b], [f(t) for t in pair])
            torch.testing.assert_close([two.grad.a, two.grad.b], expected)


@pytest.mark.slow
@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_with_free_sizes(form, dtype):
    f = FORMS[form]
    compiled = torch.compile(f, dynamic=True, fullgraph=True)
    for rows in (4, 7, 16):
        x = torch.randn(rows, 3).to(dtype).requires_grad_()
        y = compiled(x)
        torch.testing.assert_close(y, f(x))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(f(x).sum(), x)[0])
