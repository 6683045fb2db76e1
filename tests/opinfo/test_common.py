"""What PyTorch's test/test_ops.py asks of every operator; test_coverage.py lists its tests and what is left out."""

import contextlib
import itertools
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import hf_gem
from tests.opinfo.database import ALIKE, BUILT, DTYPES, OPERATORS, backends, module_forms
from tests.opinfo.machinery import (
    DeterministicGuard,
    OpDTypes,
    TestCase,
    assert_same,
    composite_compliance,
    instantiate_device_type_tests,
    mark_slow,
    noncontiguous_like,
    ops,
)

PACKED = {torch.quint4x2, torch.quint2x4}  # made from other quantised tensors only
ALL_DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)} - PACKED, key=str)
SINGLE = (torch.float32,)


def call(op, sample):
    return op(sample.input, *sample.args, **sample.kwargs)


def leaves(sample):
    values = (sample.input, *sample.args, *sample.kwargs.values())
    return [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]


def value_and_gradients(op, sample):
    y = call(op, sample)
    return y.detach(), *torch.autograd.grad(y, leaves(sample), weights(y))


def weights(y):
    """An incoming gradient with the strides of y."""
    return torch.empty_like(y).copy_(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape))


def at(sample, dtype, device=None):
    """A sample in another dtype, or on another device; a leaf of its own."""
    return sample.transform(
        lambda v: v.detach().to(device, dtype).requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
    )


def zeros(shape, dtype):
    """Zeros of any dtype that torch has; what it cannot fill is left as it is."""
    if str(dtype).startswith(("torch.qint", "torch.quint8")):
        return torch.quantize_per_tensor(torch.zeros(shape), 0.1, 0, dtype)
    try:
        return torch.zeros(shape).to(dtype)
    except (RuntimeError, NotImplementedError):
        return torch.empty(shape, dtype=dtype)


def same_stream(device):
    """The default stream of a GPU. torch copies memory that tensors share there, whatever stream is current."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.stream(torch.cuda.default_stream()) if on_gpu else contextlib.nullcontext()


def significant(tensor):
    """Strides, but for dimensions that have one place or none."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def backends_and_samples(op, device, dtype):
    for backend in backends(op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True, orders=BUILT):
            yield backend, sample


class TestCommon(TestCase):
    @ops(OPERATORS, dtypes=OpDTypes.none)
    def test_dtypes(self, device, op):
        for dtype in ALL_DTYPES:
            for requires_grad in (False, True):
                sample = next(op.sample_inputs(device, torch.float32, requires_grad=requires_grad))
                if dtype in set(DTYPES):
                    y = call(op, at(sample, dtype))
                    assert y.dtype == dtype
                    if requires_grad:
                        sample = at(sample, dtype)
                        gradients = value_and_gradients(op, sample)[1:]
                        assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves(sample)]
                elif not requires_grad:
                    self._refuses(op, sample, dtype)

    def _refuses(self, op, sample, dtype):
        """Other dtypes are refused, and the advice in the message works where torch can convert at all."""
        x = zeros(sample.input.shape, dtype)
        name = re.escape(str(dtype))
        match = rf"got \w+ of {name}\. \w+ must be a tensor of float16, bfloat16, float32 or float64\. Convert it with"
        with pytest.raises(TypeError, match=match) as caught:
            op(x, *sample.args, **sample.kwargs)
        how = re.search(r"Convert it with \w+\.([a-z]+)", str(caught.value))[1]
        try:
            converted = x.real if how == "real" else getattr(x, how)()
        except NotImplementedError:
            assert re.search("x2|bits|int[1-7]$", str(dtype))  # packed values
        else:
            args = tuple(zeros(arg.shape, converted.dtype) for arg in sample.args)
            call(op, type(sample)(converted, args=args, kwargs=at(sample, torch.float32, "cpu").kwargs))

    @ops(OPERATORS, dtypes=OpDTypes.none)
    def test_errors(self, device, op):
        count = 0
        for error in op.error_inputs(device):
            with pytest.raises(error.error_type, match=error.error_regex):
                call(op, error.sample_input)
            count += 1
        assert count > 15

    @ops(OPERATORS, allowed_dtypes=SINGLE)
    def test_noncontiguous_samples(self, device, dtype, op):
        for backend, sample in backends_and_samples(op, device, dtype):
            with hf_gem.kernels(backend):
                expected = value_and_gradients(op, sample)
                strided = sample.transform(lambda v: noncontiguous_like(v) if isinstance(v, torch.Tensor) else v)
                got = value_and_gradients(op, strided)
                assert_same(got, expected)
                # A gradient that is not contiguous, nor one run of memory.
                y = call(op, strided)
                gradient = torch.ones_like(y)
                grads = [gradient, noncontiguous_like(gradient), gradient.new_ones(()).expand(y.shape)]
                first, *others = (torch.autograd.grad(y, leaves(strided), g, retain_graph=True) for g in grads)
            for other in others:
                assert_same(other, first)

    @ops([op for op in OPERATORS if not op.variant_test_name], allowed_dtypes=SINGLE)
    def test_variant_consistency_eager(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            expected = value_and_gradients(op, sample)
            for form in module_forms(op.name, sample.kwargs):
                x = sample.input.detach().clone().requires_grad_()
                y = form(x)
                assert_same((y.detach(), *torch.autograd.grad(y, x, weights(y))), expected)

    @ops(OPERATORS, allowed_dtypes=SINGLE)
    def test_neg_view(self, device, dtype, op):
        # A lazily negated tensor has memory that holds the opposite.
        for backend, sample in backends_and_samples(op, device, dtype):
            negated = sample.transform(
                lambda v: torch._neg_view(-v.detach()).requires_grad_() if isinstance(v, torch.Tensor) else v
            )
            assert negated.input.is_neg()
            with hf_gem.kernels(backend):
                expected = value_and_gradients(op, sample)
                # The formulas compute it, in place of kernels.
                assert_same(value_and_gradients(op, negated), expected, bits=not sample.input.is_cuda)
                y = call(op, sample)
                grads = [torch.autograd.grad(y, leaves(sample), g, retain_graph=True)
                         for g in (torch.ones_like(y), torch._neg_view(-torch.ones_like(y)))]  # fmt: skip
            assert_same(*grads, bits=not sample.input.is_cuda)

    @ops(OPERATORS, allowed_dtypes=SINGLE)
    def test_fake_and_meta(self, device, dtype, op):
        # What compilers plan with has the shape, dtype, strides and device of what is computed.
        for backend, sample in backends_and_samples(op, device, dtype):
            channels_last = sample.input.dim() == 4
            layouts = [torch.contiguous_format, torch.channels_last][: 1 + channels_last]
            for layout in layouts:
                x = sample.input.detach().contiguous(memory_format=layout).requires_grad_()
                real = type(sample)(x, args=sample.args, kwargs=sample.kwargs)
                with hf_gem.kernels(backend):
                    expected = value_and_gradients(op, real)
                    meta = at(real, dtype, "meta")
                    got = value_and_gradients(op, meta)
                    with FakeTensorMode() as mode:
                        fake = real.transform(lambda v: tree_map_only(torch.Tensor, mode.from_tensor, v))
                        faked = value_and_gradients(op, fake)
                for y, on_meta, in_fake in zip(expected, got, faked, strict=True):
                    for other in (on_meta, in_fake):
                        assert (other.shape, other.dtype) == (y.shape, y.dtype)
                        assert significant(other) == significant(y)
                    assert in_fake.device == y.device

    @ops(OPERATORS, allowed_dtypes=(torch.bfloat16, torch.float32))
    def test_autocast(self, device, dtype, op):
        # The family computes in float32 inside, and keeps the dtype that it is given.
        for autocast_dtype in (torch.bfloat16, torch.float16):
            for backend, sample in backends_and_samples(op, device, dtype):
                with hf_gem.kernels(backend):
                    expected = value_and_gradients(op, sample)
                    with torch.autocast(torch.device(device).type, autocast_dtype):
                        assert_same(value_and_gradients(op, sample), expected)
                        y = call(op, sample)
                    # As a loop of training does it: the backward pass runs outside.
                    assert_same(torch.autograd.grad(y, leaves(sample), weights(y)), expected[1:])

    @ops(OPERATORS, allowed_dtypes=SINGLE)
    def test_deterministic(self, device, dtype, op):
        # In this mode torch fills new memory with NaN: what is not written shows.
        for backend, sample in backends_and_samples(op, device, dtype):
            with hf_gem.kernels(backend):
                expected = value_and_gradients(op, sample)
                with DeterministicGuard(True, fill_uninitialized_memory=True):
                    for _ in range(2):
                        assert_same(value_and_gradients(op, sample), expected)

    @ops(OPERATORS, allowed_dtypes=SINGLE)
    def test_inputs_are_left_alone(self, device, dtype, op):
        # test_cow_input: memory that tensors share until one of them is written.
        with same_stream(device):
            for backend, sample in backends_and_samples(op, device, dtype):
                with hf_gem.kernels(backend):
                    versions = [leaf._version for leaf in leaves(sample)]
                    expected = value_and_gradients(op, sample)
                    shared = sample.transform(
                        lambda v: torch._lazy_clone(v.detach()).requires_grad_() if isinstance(v, torch.Tensor) else v
                    )
                    assert_same(value_and_gradients(op, shared), expected)
                    assert_same(value_and_gradients(op, sample), expected)
                    assert [leaf._version for leaf in leaves(sample)] == versions


class TestCompositeCompliance(TestCase):
    """Subclasses of tensors that see every operation, in all places where a tensor can stand."""

    @ops(OPERATORS, allowed_dtypes=SINGLE)
    def test_operator(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=False):
            args = [sample.input, *sample.args]
            composite_compliance.check_with_mode(op, args, sample.kwargs, self.assertEqual)
            composite_compliance.check_all_permutations(op, args, sample.kwargs, self.assertEqual)

    @ops(OPERATORS, allowed_dtypes=SINGLE)
    def test_backward(self, device, dtype, op):
        # Of three tensors and their tangents there are 64 mixtures.
        for sample in itertools.islice(op.sample_inputs(device, dtype, requires_grad=True, orders=BUILT), 2):
            args = [sample.input, *sample.args]
            composite_compliance.check_backward_formula(
                op.get_op(), args, sample.kwargs, assert_equal_fn=self.assertEqual
            )

    @ops(OPERATORS, allowed_dtypes=SINGLE)
    def test_forward_ad(self, device, dtype, op):
        # Of three tensors and their tangents there are 64 mixtures.
        for sample in itertools.islice(op.sample_inputs(device, dtype, requires_grad=True, orders=BUILT), 2):
            args = [sample.input, *sample.args]
            composite_compliance.check_forward_ad_formula(
                op.get_op(), args, sample.kwargs, assert_equal_fn=self.assertEqual
            )


for case in (TestCommon, TestCompositeCompliance):
    instantiate_device_type_tests(case, globals(), only_for=("cpu", "cuda"))
    mark_slow(globals()[f"{case.__name__}CPU"], ALIKE)
