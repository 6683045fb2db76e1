"""The layers of a package for Hugging Face's `kernels`, into which `kernels.py` copies this file as `layers.py`."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import activation


class GemActivation(nn.Module):
    """A layer whose forward replaces that of a module of the family with a fixed eps, and reads its attributes."""

    family: str
    n: int
    init_eps: float

    can_torch_compile = True

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        # Modules in a checkpoint of save_for_hub have no attribute `save`.
        return activation(x, self.family, self.n, self.init_eps, getattr(self, "save", "auto"))
