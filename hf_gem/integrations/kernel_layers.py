"""Layers of a package for kernels, in which this file is `layers.py`; see `kernels.py` beside it."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import activation


class GemActivation(nn.Module):
    """The forward of a module of the family with a fixed eps, whose attributes it reads."""

    family: str
    n: int
    init_eps: float

    can_torch_compile = True

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        # Modules of a checkpoint of save_for_hub have no choice of what to save.
        return activation(x, self.family, self.n, self.init_eps, getattr(self, "save", "auto"))
