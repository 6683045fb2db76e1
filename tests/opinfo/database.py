"""The operators of the family as OpInfo, with their sample inputs, error inputs and dtypes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.testing import make_tensor

import hf_gem
from hf_gem import egem, gem, segem
from hf_gem.functional import gem_glu
from tests.helpers import needs_compiler
from tests.opinfo.machinery import ErrorInput, OpInfo, SampleInput, floating_types_and

ORDERS = (1, 2, 3, 4)
BUILT = (1, 2)  # the orders for which other tests build kernels too
DTYPES = floating_types_and(torch.half, torch.bfloat16)
EPS = 0.3
# Shape of x, and shape of its learnable eps.
_SHAPES = [((2, 3, 4), ()), ((5,), (5,)), ((2, 3, 4), (3, 1)), ((2, 3, 2, 2), (3, 1, 1))]
_EDGES = [((), ()), ((2, 0, 3), (3,)), ((2, 1, 3), (1, 3))]


def backends(op: OpInfo) -> list[str]:
    """Returns the backends that can compute an operator here. No kernel takes a tensor eps."""
    return ["eager"] + ["compiled"] * (not needs_compiler.args[0] and "learnable" not in op.variant_test_name)


# A pattern for names of tests whose operators run the same code as others. These tests are marked slow.
ALIKE = "gem_glu_gem|gem_glu_segem|gem_glu_egem_learnable|segem_learnable|[a-z]_gem_cpu"


def away_from_zero(shape: tuple[int, ...], **kwargs: Any) -> Tensor:
    """Draws points of both signs around the gate, so far from 0 that no finite difference straddles it."""
    requires_grad = kwargs.pop("requires_grad", False)
    x = make_tensor(shape, low=0.05, high=2.0, **kwargs) * make_tensor(shape, low=-1, high=1, **kwargs).sign()
    return x.masked_fill(x == 0, 0.5).requires_grad_(requires_grad)


def saves(family: str, n: int, dtype: torch.dtype, learnable: bool) -> list[str]:
    """Returns the possible values of `save`."""
    possible = family != "segem" and not (learnable and dtype == torch.half)
    return ["input", "output"] if possible else ["input"]


def _samples(family: str, learnable: bool, gated: bool) -> Callable[..., Iterator[SampleInput]]:
    def samples(
        op: OpInfo, device: str, dtype: torch.dtype, requires_grad: bool, orders: Any = ORDERS, **_: Any
    ) -> Iterator[SampleInput]:
        tensor = {"device": device, "dtype": dtype, "requires_grad": requires_grad}
        shapes = [*zip(itertools.cycle(orders), _SHAPES, strict=False), *((orders[0], edge) for edge in _EDGES)]
        for n, (shape, eps_shape) in shapes:
            for save in ["input"] if gated else saves(family, n, dtype, learnable):
                kwargs: dict[str, Any] = {"n": n} if gated else {"n": n, "save": save}
                if learnable:
                    kwargs["eps"] = make_tensor(eps_shape, low=0.2, high=1.0, **tensor)
                elif family != "gem":
                    kwargs["eps"] = EPS
                if gated:
                    kwargs["family"] = family
                up = (away_from_zero(shape, **tensor),) if gated else ()
                yield SampleInput(away_from_zero(shape, **tensor), args=up, kwargs=kwargs)

    return samples


_NESTED = [torch.ones(3), torch.ones(2)]
_NOT_DENSE = {
    "layout torch.sparse_coo as x.*Convert it with x.to_dense": lambda: torch.ones(3).to_sparse(),
    "layout torch.sparse_csr as x.*Convert it with x.to_dense": lambda: torch.eye(2).to_sparse_csr(),
    "layout torch._mkldnn as x.*Convert it with x.to_dense": lambda: torch.ones(2, 2).to_mkldnn(),
    "nested .* layout torch.strided .*Convert it with torch.nested.to_padded_tensor": lambda: (
        torch.nested.nested_tensor(_NESTED)
    ),
    "nested .* layout torch.jagged .*Convert it with torch.nested.to_padded_tensor": lambda: torch.nested.nested_tensor(
        _NESTED, layout=torch.jagged
    ),
}


def _errors(family: str, learnable: bool, gated: bool) -> Callable[..., Iterator[ErrorInput]]:
    def errors(op: OpInfo, device: str, **_: Any) -> Iterator[ErrorInput]:
        def fails(kind: type[Exception], match: str, x: Any, **kwargs: Any) -> ErrorInput:
            if gated:
                kwargs = {"family": family, **kwargs}
            args = (x,) if gated else ()
            return ErrorInput(SampleInput(x, args=args, kwargs=kwargs), error_type=kind, error_regex=match)

        x = torch.ones(2, 3, device=device)
        for wrong in ([1.0], 1.0, None, "x"):
            yield fails(TypeError, rf"got \w+ of type {type(wrong).__name__}\. .*must be a tensor of float16", wrong)
        for match, make in _NOT_DENSE.items():
            yield fails(TypeError, match.replace(" x.", r" \w+."), make())
        for n in (0, 33, -1):
            yield fails(ValueError, rf"got n={n}\. n must be ", x, n=n)
        for n in (1.5, True, "2", None):
            yield fails(TypeError, "n must be an integer", x, n=n)
        if family == "gem":
            return
        for eps in (0.0, -1.0, float("inf"), float("nan")):
            yield fails(ValueError, rf"got eps={eps}\. eps must be ", x, eps=eps)
        yield fails(TypeError, r"got eps='1' of type str\. eps must be ", x, eps="1")
        if learnable:
            for dtype in (torch.int64, torch.complex64, torch.float8_e5m2):
                yield fails(TypeError, rf"got eps of {dtype}\. A tensor eps must", x, eps=torch.ones((), dtype=dtype))
            for shape in ((2,), (3, 1), (1, 2, 3), (4,)):
                match = rf"got eps of shape \({', '.join(map(str, shape))},?\) and x of shape \(2, 3\)\. .* broadcast"
                yield fails(ValueError, match, x, eps=torch.ones(shape))
        if not gated:
            yield fails(ValueError, r"got save='both'\. save must be 'auto', 'input' or 'output'", x, save="both")
            out_of_reach = [{"n": 5}] if family == "egem" else [{"n": n} for n in ORDERS]
            for kwargs in out_of_reach:
                yield fails(ValueError, "save='output' is not available .*Use save='auto'", x, save="output", **kwargs)
        if family == "egem" and not gated:
            small = {"eps": torch.tensor(1.0) if learnable else 1e-6}
            yield fails(ValueError, "save='output' is not available for .*float16", x.half(), save="output", **small)

    return errors


def _info(name: str, op: Callable[..., Tensor], family: str, learnable: bool = False, gated: bool = False) -> OpInfo:
    return OpInfo(
        name,
        op=op,
        variant_test_name="_".join([family] * gated + ["learnable"] * learnable),
        dtypes=DTYPES,
        sample_inputs_func=_samples(family, learnable, gated),
        error_inputs_func=_errors(family, learnable, gated),
        method_variant=None,
        inplace_variant=None,
        operator_variant=None,
        inplace_operator_variant=None,
        supports_out=False,
        supports_forward_ad=True,
        supports_fwgrad_bwgrad=True,
    )


OPERATORS = [
    _info("gem", gem, "gem"),
    _info("egem", egem, "egem"),
    _info("segem", segem, "segem"),
    _info("egem", egem, "egem", learnable=True),
    _info("segem", segem, "segem", learnable=True),
    *(_info("gem_glu", gem_glu, family, gated=True) for family in ("gem", "egem", "segem")),
    _info("gem_glu", gem_glu, "egem", learnable=True, gated=True),
]


def module_forms(family: str, kwargs: dict[str, Any]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields what computes the same as a function with a fixed eps: `activation` and the modules."""
    n, save = kwargs["n"], kwargs["save"]
    eps = kwargs.get("eps")
    yield lambda x: hf_gem.activation(x, family, n, eps, save)
    yield hf_gem.modules.GemActivation(family, n, eps, save=save)
    yield hf_gem.GEM(n, save=save) if family == "gem" else getattr(hf_gem, family.upper())(n, eps, save=save)
