"""Lets a checkpoint be loaded without hf_gem, with the formulas in plain torch.

`hf_gem.save_for_hub` copies this file and the files that it imports into the checkpoint, with the prefix `gem_`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._kernels.replaceable import LAYER, kernel_condition
from ..family.arithmetic import learnable_eps
from ..family.egem import EGEM  # noqa: F401  # importing it adds it to the table
from ..family.formulas import forward
from ..family.names import parse
from ..family.segem import SEGEM  # noqa: F401
from ..surgery.configs import mask, unmask
from ..surgery.plans import apply_plans, complete


class Activation(nn.Module):
    """An activation of the family, with the same state as in hf_gem.

    Args:
        name: Name of the activation, such as `egem_n2_eps1em6`.
        inplace: Ignored. The input is never overwritten.
    """

    # With the package kernels, a package of the family's kernels can replace `forward`.
    kernel_layer_name: ClassVar[str] = LAYER
    kernel_condition = staticmethod(kernel_condition)

    def __init__(self, name: str, inplace: bool = False) -> None:
        super().__init__()
        self.spec = parse(name)
        self.family, self.n, self.init_eps = self.spec.family, self.spec.n, self.spec.eps
        self.log_ratio = nn.Parameter(torch.zeros(1)) if self.spec.learnable else None

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        eps = self.init_eps if self.log_ratio is None else learnable_eps(self.log_ratio, self.init_eps).view([])
        return forward(self.spec.definition, self.spec.n, eps, x)

    def extra_repr(self) -> str:
        return self.spec.name


_names: set[str] = set()


def register(*names: str) -> None:
    """Registers names, but only while a class returned by `base` builds a model.

    At other times transformers must stop at these names. A converted checkpoint contains one so that transformers alone
    does not silently load another function.
    """
    _names.update(names)


@contextlib.contextmanager
def _registered() -> Iterator[None]:
    from transformers.activations import ACT2CLS, ACT2FN

    registries: list[tuple[dict[str, Any], Callable[[str], Any]]] = [
        (ACT2FN, lambda name: (Activation, {"name": name})),
        (ACT2CLS, lambda name: functools.partial(Activation, name)),
    ]
    if (timm := sys.modules.get("timm.layers.create_act")) is not None:  # transformers' timm wrappers import it
        registries.append((timm._ACT_LAYER_DEFAULT, lambda name: functools.partial(Activation, name)))
    added = [(registry, name, make) for registry, make in registries for name in _names if name not in registry]
    for registry, name, make in added:
        registry[name] = make(name)
    try:
        yield
    finally:
        for registry, name, _ in added:
            del registry[name]


def base(cls: Any) -> Any:
    """Returns a subclass of a transformers class that builds a model as it is built with hf_gem, with conversions."""

    class Converted(cls):  # type: ignore[misc]  # mypy does not know the base class
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            unmask(config)
            with _registered():
                super().__init__(config, *args, **kwargs)
            complete(self, Activation)
            apply_plans(self, Activation)
            mask(config)  # so that it can be saved again

        def initialize_weights(self) -> None:
            for module in self.modules():
                eps = getattr(module, "log_ratio", None)  # from this file, or from the file of another checkpoint
                # transformers would leave an eps that is missing in the checkpoint uninitialised.
                if eps is not None and not any(getattr(x, "_is_hf_initialized", False) for x in (module, eps)):
                    nn.init.zeros_(eps)
            super().initialize_weights()

    Converted.__name__ = Converted.__qualname__ = cls.__name__
    return Converted
