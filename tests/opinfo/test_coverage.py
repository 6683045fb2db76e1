"""PyTorch's generic tests of operators: where each is, and why the others do not apply.

The tests are written here with the machinery that torch installs (`torch.testing._internal`), since the classes
themselves are in PyTorch's repository only. The lists of test/test_ops.py and test/functorch/test_ops.py are complete
for the end of 2025, between torch 2.9 and 2.11.
"""

import importlib

import pytest

OURS = {
    # test/test_ops.py
    "TestCommon.test_dtypes": "test_common.TestCommonCPU.test_dtypes",
    "TestCommon.test_errors": "test_common.TestCommonCPU.test_errors",
    "TestCommon.test_noncontiguous_samples": "test_common.TestCommonCPU.test_noncontiguous_samples",
    "TestCommon.test_variant_consistency_eager": "test_common.TestCommonCPU.test_variant_consistency_eager",
    "TestCompositeCompliance.test_operator": "test_common.TestCompositeComplianceCPU.test_operator",
    "TestCompositeCompliance.test_backward": "test_common.TestCompositeComplianceCPU.test_backward",
    # Kernels read memory by its address, after which torch no longer shares it: one copy is made, and inputs stay.
    "TestCompositeCompliance.test_cow_input": "test_common.TestCommonCPU.test_inputs_are_left_alone",
    "TestCompositeCompliance.test_forward_ad": "test_common.TestCompositeComplianceCPU.test_forward_ad",
    "TestMathBits.test_neg_view": "test_common.TestCommonCPU.test_neg_view",
    "TestFakeTensor.test_fake": "test_common.TestCommonCPU.test_fake_and_meta",
    "TestFakeTensor.test_fake_autocast": "test_common.TestCommonCPU.test_autocast",
    "TestFakeTensor.test_fake_crossref_backward_no_amp": "test_common.TestCommonCPU.test_fake_and_meta",
    "TestFakeTensor.test_fake_crossref_backward_amp": "test_common.TestCommonCPU.test_fake_and_meta",
    "TestFakeTensor.test_strided_layout": "test_common.TestCommonCPU.test_fake_and_meta",
    "TestForwardADWithScalars.test_0d_tensor_with_python_scalar": "test_gradients.TestFwdGradientsCPU",
    # test/test_ops_gradients.py, test_ops_fwd_gradients.py
    "TestBwdGradients.test_fn_grad": "test_gradients.TestBwdGradientsCPU.test_fn_grad",
    "TestBwdGradients.test_fn_gradgrad": "test_gradients.TestBwdGradientsCPU.test_fn_gradgrad",
    "TestFwdGradients.test_fn_fwgrad_bwgrad": "test_gradients.TestFwdGradientsCPU.test_fn_fwgrad_bwgrad",
    "TestFwdGradients.test_forward_mode_AD": "test_gradients.TestFwdGradientsCPU.test_forward_mode_ad",
    # test/functorch/test_ops.py
    "TestOperators.test_grad": "kinds.func_grad",
    "TestOperators.test_jvp": "kinds.func_jvp",
    "TestOperators.test_vjp": "kinds.func_vjp",
    "TestOperators.test_vjpvjp": "kinds.func_grad_of_grad",
    "TestOperators.test_jvpvjp": "kinds.func_jvp_of_vjp",
    "TestOperators.test_vjpjvp": "kinds.func_vjp_of_jvp",
    "TestOperators.test_jvpjvp": "kinds.func_jvp_of_jvp",
    "TestOperators.test_vmapvjp": "kinds.func_vmap_of_vjp",
    "TestOperators.test_vmapjvpall": "kinds.func_vmap_of_jvp",
    "TestOperators.test_vmapvjpvjp": "kinds.func_hessian",
    "TestOperators.test_vmapjvpvjp": "kinds.func_vmap_of_jvp_of_vjp",
    "TestOperators.test_jvpvmap": "kinds.func_jvp_of_vmap",
    "TestOperators.test_jvpvmapvmap": "kinds.func_jvp_of_vmap",
    "TestOperators.test_vjpvmap": "kinds.func_vjp_of_vmap",
    "TestOperators.test_vjpvmapvmap": "kinds.func_vjp_of_vmap",
    "TestOperators.test_vmapjvpvmap": "kinds.func_vmap_of_jvp_of_vmap",
    "TestOperators.test_vmapvjpvmap": "kinds.func_vmap_of_vjp_of_vmap",
    "TestOperators.test_jvpjvpvmap": "kinds.func_jvp_of_jvp_of_vmap",
    "TestOperators.test_jvpvjpvmap": "kinds.func_jvp_of_vjp_of_vmap",
    "TestOperators.test_vjpvjpvmap": "kinds.func_vjp_of_vjp_of_vmap",
    "TestOperators.test_vmap_autograd_grad": "kinds.func_vmap_of_backward",
    "TestVmapOperatorsOpInfo.test_vmap_exhaustive": "test_gradients.TestVmapCPU.test_vmap_exhaustive",
    # test/functorch/test_aotdispatch.py, test/test_proxy_tensor.py, test/test_meta.py
    "TestEagerFusionOpInfo.test_aot_autograd_exhaustive": "test_compilers.TestCompilersCPU.test_aot_autograd",
    "TestEagerFusionOpInfo.test_aot_autograd_symbolic_exhaustive": "test_compilers.TestCompilersCPU.test_aot_autograd",
    "TestProxyTensorOpInfo.test_make_fx_exhaustive": "test_compilers.TestCompilersCPU.test_make_fx",
    "TestProxyTensorOpInfo.test_make_fx_fake_exhaustive": "test_compilers.TestCompilersCPU.test_make_fx",
    "TestProxyTensorOpInfo.test_make_fx_symbolic_exhaustive": "test_compilers.TestCompilersCPU.test_make_fx",
    "TestMeta.test_dispatch_meta_outplace": "test_common.TestCommonCPU.test_fake_and_meta",
    "TestMeta.test_dispatch_symbolic_meta_outplace": "test_compilers.TestCompilersCPU.test_make_fx",
    # test/inductor, test/test_expanded_weights.py, test/dynamo
    "TestInductorOpInfo.test_comprehensive": "test_compilers.test_inductor_with_free_sizes",
    "TestExpandedWeightModule": "test_gradients.test_per_sample_gradients_by_expanded_weights",
    "TestCompiledAutograd": "test_compilers.test_compiled_autograd",
    "TestOpsUnbacked": "test_compilers.test_sizes_that_data_decide",
}
_ONE_SURFACE = "the family has functions and modules; neither methods nor in-place forms, nor `out=`"
_REFUSED = "is refused with an error, which test_errors or test_dtypes sees"
_NO_ATEN = "is of operators that torch.library or ATen registers; these are Python functions of public operations"
NOT_APPLICABLE = {
    "TestCommon.test_out": _ONE_SURFACE,
    "TestCommon.test_out_warning": _ONE_SURFACE,
    "TestCommon.test_out_requires_grad_error": _ONE_SURFACE,
    "TestCommon.test_out_integral_dtype": _ONE_SURFACE,
    "TestCommon.test_meta_consistency_out_dtype_mismatch": _ONE_SURFACE,
    "TestBwdGradients.test_inplace_grad": _ONE_SURFACE,
    "TestBwdGradients.test_inplace_gradgrad": _ONE_SURFACE,
    "TestFwdGradients.test_inplace_forward_mode_AD": _ONE_SURFACE,
    "TestMeta.test_dispatch_meta_inplace": _ONE_SURFACE,
    "TestSelfKwarg.test_self_kwargs": _ONE_SURFACE,
    "TestBwdGradients.test_fn_fail_gradgrad": "is for operators without a second derivative",
    "TestMathBits.test_conj_view": "a complex tensor " + _REFUSED,
    "TestMathBits.test_neg_conj_view": "a complex tensor " + _REFUSED,
    "TestCommon.test_complex_half_reference_testing": "a complex tensor " + _REFUSED,
    "TestCommon.test_promotes_int_to_float": "an integer tensor " + _REFUSED,
    "TestCommon.test_non_standard_bool_values": "a bool tensor " + _REFUSED,
    "TestCommon.test_errors_sparse": "a sparse tensor " + _REFUSED,
    "TestSparseUnaryUfuncs": "a sparse tensor " + _REFUSED,
    "TestNestedTensorOpInfo": "a nested tensor " + _REFUSED,
    "TestCommon.test_numpy_ref": "tests/family compares with exact fractions, which is stronger",
    "TestUnaryUfuncs.test_reference_numerics": "tests/family compares with exact fractions, which is stronger",
    "TestCommon.test_compare_cpu": "tests/kernels/test_gpu.py compares the bits of a GPU with those of a CPU",
    "TestCommon.test_multiple_devices": "needs two GPUs",
    "TestCommon.test_python_ref": _NO_ATEN,
    "TestCommon.test_python_ref_errors": _NO_ATEN,
    "TestCommon.test_python_ref_executor": _NO_ATEN,
    "TestCommon.test_python_ref_meta": _NO_ATEN,
    "TestCommon.test_python_ref_torch_fallback": _NO_ATEN,
    "TestRefsOpsInfo.test_refs_are_in_decomp_table": _NO_ATEN,
    "TestRefsOpsInfo.test_refs_are_in_python_ref_db": _NO_ATEN,
    "TestCommon.test_reduction_ops_reduce": "is for reductions",
    "TestCommon.test_reduction_tag_coverage": "is for reductions",
    "TestOperators.test_vmapjvpall_has_batch_rule": _NO_ATEN,
    "TestOperators.test_vmapvjp_has_batch_rule": _NO_ATEN,
    "TestOperators.test_extremal_numerics": "is for losses and normalisations; benchmarks/verify.py has extreme inputs",
    "TestOperators.test_view_then_inplace": _ONE_SURFACE,
    "TestOperators.test_data_write_errors_under_transform": "is about writing to .data, which nothing here does",
    "TestOperators.test_tensor_with_scalar_list": "is for operators with lists of numbers",
    "TestOperators.test_ordered_complex_raises": "a complex tensor " + _REFUSED,
    "TestCommon.test_pointwise_tag_coverage": _NO_ATEN,
    "TestTags.test_tags": _NO_ATEN,
    "TestDecomp.test_comprehensive": _NO_ATEN,
    "TestSchemaCheckModeOpInfo.test_schema_correctness": _NO_ATEN,
    "optests.opcheck, generate_opcheck_tests": _NO_ATEN,
    "TestFakeTensor.test_pointwise_ops": _NO_ATEN,
    "TestCompositeCompliance.test_view_replay": "is for views; these return new tensors",
    "TestJit.test_variant_consistency_jit": "functions are not scripted; tests/test_modules.py scripts the modules",
}


@pytest.mark.parametrize("theirs", OURS)
def test_ours_is_there(theirs):
    module, *names = OURS[theirs].split(".")
    where = importlib.import_module(f"tests.opinfo.{module}")
    if len(names) == 2:  # one test for each operator and dtype
        assert any(name.startswith(names[1] + "_") for name in vars(getattr(where, names[0])))
    else:
        assert callable(getattr(where, names[0]))


def test_a_test_is_there_or_does_not_apply():
    assert not OURS.keys() & NOT_APPLICABLE.keys()
    assert all(len(reason) > 10 for reason in NOT_APPLICABLE.values())
