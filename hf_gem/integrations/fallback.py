"""What a checkpoint takes along to be loaded where hf_gem is not installed: the formulas as they are, unfused.

`hf_gem.save_for_hub` copies this file and the ones it imports, with `gem_` before their names, into the checkpoint.
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
from ..family.egem import EGEM  # noqa: F401  # puts itself into the table
from ..family.formulas import forward
from ..family.names import parse
from ..family.segem import SEGEM  # noqa: F401
from ..surgery.configs import mask, unmask
from ..surgery.plans import apply_plans, complete


class Activation(nn.Module):
    """The activation with a name of the family, its state as in hf_gem.

    Args:
        name: For example `egem_n2_eps1em6`.
        inplace: Accepted, and the input never overwritten.
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
        eps: float | Tensor = self.spec.eps
        if self.log_ratio is not None:
            wide = torch.promote_types(self.log_ratio.dtype, torch.float32)
            eps = eps * self.log_ratio.to(wide).exp().view([])
        return forward(self.spec.definition, self.spec.n, eps, x)

    def extra_repr(self) -> str:
        return self.spec.name


_names: set[str] = set()


def register(*names: str) -> None:
    """Makes names known while the classes that `base` returns build a model, and no longer.

    Elsewhere transformers has to stop at them: a converted checkpoint holds one where it would load another function.
    """
    _names.update(names)


@contextlib.contextmanager
def _registered() -> Iterator[None]:
    from transformers.activations import ACT2CLS, ACT2FN

    registries: list[tuple[dict[str, Any], Callable[[str], Any]]] = [
        (ACT2FN, lambda name: (Activation, {"name": name})),
        (ACT2CLS, lambda name: functools.partial(Activation, name)),
    ]
    if (timm := sys.modules.get("timm.layers.create_act")) is not None:  # which the wrappers of timm have imported
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
    """A class of transformers that does what hf_gem adds to the building of a model, conversions above all."""

    class Converted(cls):  # type: ignore[misc]  # a class that is not known before
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            unmask(config)
            with _registered():
                super().__init__(config, *args, **kwargs)
            complete(self, Activation)
            apply_plans(self, Activation)
            mask(config)  # for when it is saved again

        def initialize_weights(self) -> None:
            for module in self.modules():
                eps = getattr(module, "log_ratio", None)  # of this file or, by the same name, of another checkpoint's
                # What the checkpoint lacks and transformers does not know, it would leave as memory came.
                if eps is not None and not any(getattr(x, "_is_hf_initialized", False) for x in (module, eps)):
                    nn.init.zeros_(eps)
            super().initialize_weights()

    Converted.__name__ = Converted.__qualname__ = cls.__name__
    return Converted
