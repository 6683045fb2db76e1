"""PyTorch's test_ops_gradients.py and test_ops_fwd_gradients.py, and its functorch tests that the kinds leave out."""

import itertools

import pytest
import torch
from torch.nn.utils import _per_sample_grad
from torch.utils._pytree import tree_map_only

import hf_gem
from tests.opinfo.database import ALIKE, EPS, OPERATORS
from tests.opinfo.machinery import TestCase, TestGradients, assert_same, instantiate_device_type_tests, mark_slow, ops

in_double = {"allowed_dtypes": (torch.float64,)}


class TestBwdGradients(TestGradients):
    @ops(OPERATORS, **in_double)
    def test_fn_grad(self, device, dtype, op):
        self._grad_test_helper(device, dtype, op, op.get_op())

    @ops(OPERATORS, **in_double)
    def test_fn_gradgrad(self, device, dtype, op):
        self._check_helper(device, dtype, op, op.get_op(), "bwgrad_bwgrad")


class TestFwdGradients(TestGradients):
    @ops(OPERATORS, **in_double)
    def test_fn_fwgrad_bwgrad(self, device, dtype, op):
        self._check_helper(device, dtype, op, op.get_op(), "fwgrad_bwgrad")

    @ops(OPERATORS, **in_double)
    def test_forward_mode_ad(self, device, dtype, op):
        self._grad_test_helper(
            device,
            dtype,
            op,
            op.get_op(),
            check_forward_ad=True,
            check_backward_ad=False,
            check_batched_grad=False,
            check_batched_forward_grad=True,
        )


class TestVmap(TestCase):
    """Batches in any dimension of any argument, and what moves along with them."""

    @ops(OPERATORS, allowed_dtypes=(torch.float64, torch.float32))
    def test_vmap_exhaustive(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=False, orders=(1, 2)):
            if sample.input.numel() == 0:
                continue
            names = [name for name, value in sample.kwargs.items() if isinstance(value, torch.Tensor)]
            tensors = [sample.input, *sample.args, *(sample.kwargs[name] for name in names)]
            plain = {name: value for name, value in sample.kwargs.items() if name not in names}

            def call(*tensors, names=names, plain=plain, op=op):
                rest = len(tensors) - len(names)
                return op(*tensors[:rest], **plain, **dict(zip(names, tensors[rest:], strict=True)))

            for in_dims in itertools.product((None, 0, -1), repeat=len(tensors)):
                if all(dim is None for dim in in_dims):
                    continue
                batched = [
                    value if dim is None else torch.stack([value, 1.5 * value, 0.5 * value], dim)
                    for value, dim in zip(tensors, in_dims, strict=True)
                ]
                rows = [
                    [
                        value if dim is None else value.select(dim, i)
                        for value, dim in zip(batched, in_dims, strict=True)
                    ]
                    for i in range(3)
                ]
                got = torch.func.vmap(call, in_dims)(*batched)
                # Under transforms the formulas compute, in place of kernels.
                assert_same(got, torch.stack([call(*row) for row in rows]), bits=not got.is_cuda)
                got = torch.func.vmap(call, in_dims, out_dims=-1, chunk_size=2)(*batched)
                assert_same(got, torch.stack([call(*row) for row in rows], -1), bits=not got.is_cuda)


for case in (TestBwdGradients, TestFwdGradients, TestVmap):
    instantiate_device_type_tests(case, globals(), only_for=("cpu", "cuda"))
    mark_slow(globals()[f"{case.__name__}CPU"], ALIKE)


@pytest.mark.parametrize("name", ["gem_n2", "egem_n2", "segem", "egem_n2_learnable", "segem_learnable"])
def test_ensembles(name):
    # A model and its gradients mapped over sets of parameters, and over samples.
    models = [torch.nn.Sequential(torch.nn.Linear(4, 3), hf_gem.get_activation(name)).double() for _ in range(3)]
    x = torch.randn(5, 4, dtype=torch.float64)
    params, buffers = torch.func.stack_module_state(models)
    skeleton = torch.nn.Sequential(torch.nn.Linear(4, 3), hf_gem.get_activation(name)).to("meta")

    def loss(p, b, x):
        return torch.func.functional_call(skeleton, (p, b), (x,)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (0, 0, None))(params, buffers, x)
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, None, 0))(dict(models[0].named_parameters()), {}, x)
    for i, model in enumerate(models):
        model(x).square().sum().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[key][i], parameter.grad, rtol=1e-12, atol=1e-12)
    for key, parameter in models[0].named_parameters():
        torch.testing.assert_close(per_sample[key].sum(0), parameter.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("save", ["input", "output"])
def test_per_sample_gradients_by_expanded_weights(save):
    # test_expanded_weights.py: weights around a function without any.
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), hf_gem.EGEM(2, EPS, save=save), torch.nn.Linear(3, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    _per_sample_grad.call_for_per_sample_grads(model)(x).sum().backward()
    for p in model.parameters():
        p.total = p.grad_sample.sum(0)
    model(x).sum().backward()
    for p in model.parameters():
        torch.testing.assert_close(p.total, p.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("save", ["input", "output"])
def test_higher_orders_are_finite_everywhere(order, save):
    # Also where a division inside would be 0 / 0: left of 0, at 0, far out, at the infinities. From an output, a fourth
    # derivative divides by high powers of the slope, which would vanish at 1e-30.
    small = 1e-30 if save == "input" or order < 4 else 1e-3
    x = torch.tensor([-torch.inf, -2.0, 0.0, small, 0.4, 3.0, 1e30, torch.inf], dtype=torch.float64, requires_grad=True)
    for n in (1, 2, 3, 4):
        derivative = hf_gem.egem(x, n, EPS, save=save)
        with torch.autograd.set_detect_anomaly(True):
            for _ in range(order):
                (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)
        assert derivative.isfinite().all()
        assert tree_map_only(torch.Tensor, torch.Tensor.tolist, derivative[[0, 1]]) == [0, 0]
