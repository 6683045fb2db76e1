"""The activation functions as modules, and modules by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import functional
from ._kernels import check_save
from ._kernels.replaceable import LAYER, kernel_condition
from .family.arithmetic import saturated, scale, scale_tensor, working
from .family.names import GemSpec, parse
from .family.table import DEFAULT_EPS


def _eps_at(log_ratio: Tensor, init_eps: float) -> Tensor:
    """`init_eps * exp(log_ratio)`, in float32 for half types; saturates where float32 ends, from 1e-37 to 1e37."""
    if has_torch_function_unary(log_ratio):  # one node for torch.fx, which cannot follow a branch on a dtype
        return handle_torch_function(_eps_at, (log_ratio,), log_ratio, init_eps)
    if log_ratio.dtype != torch.float64:
        log_ratio = log_ratio.to(torch.float32)
    # Where exp itself is finite. No bound is computed from init_eps: a compiler would make a graph for each.
    return saturated(init_eps * torch.exp(log_ratio.clamp(-87.0, 87.0)))


CALLED = "_hf_gem_called"  # an attribute of modules that have run, but for what was compiled


class GemActivation(nn.Module):
    """An activation of any family. n and eps are plain numbers, so that building on the meta device loses nothing.

    Calls take `inplace` as `torch.nn.functional.relu` does, in whose place they stand after a conversion, and never
    overwrite their input. `save` may be changed at any time, `module.save = "input"`.

    A learnable eps is `init_eps * exp(log_ratio)`: positive whatever the optimizer does, and exactly `init_eps` at
    `log_ratio = 0`, also when the module is cast to bfloat16.

    Args:
        family: `gem`, `egem`, `segem`, or the name of a registered `Family`.
        n: The paper's N, 1 to 32.
        eps: Positive number, by default that of the family; the initial value where it is learnable.
        learnable: Makes eps a positive Parameter, `eps * exp(log_ratio)`. Leave `log_ratio` out of weight decay.
        num_parameters: 1, or C for an eps of its own for each channel.
        channel_dim: The dimension of the channels: 1 for images (N, C, ...), -1 for sequences (..., C).
        inplace: Accepted for timm and torch signatures; the input is never overwritten.
        save: What the backward pass keeps, "auto", "input" or "output"; see `hf_gem.functional.egem`.

    Raises:
        TypeError: n, eps, num_parameters or channel_dim is not a number, or learnable not a bool.
        ValueError: one of them is out of range; when called, the input has another number of channels.
        IndexError: when called, the input has no dimension `channel_dim`.
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["eps", "spec"]
    # What the package kernels of Hugging Face looks for.
    kernel_layer_name: ClassVar[str] = LAYER
    kernel_condition = staticmethod(kernel_condition)

    def __init__(
        self,
        family: str,
        n: int = 1,
        eps: float | None = None,
        learnable: bool = False,
        num_parameters: int = 1,
        channel_dim: int = 1,
        inplace: bool = False,
        save: str = "auto",
    ) -> None:
        super().__init__()
        check_save(save)
        spec = GemSpec(family, n, eps, learnable)  # type: ignore[arg-type]  # None stands for the family's own
        for name, value in (("num_parameters", num_parameters), ("channel_dim", channel_dim)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
        if num_parameters < 1:
            raise ValueError(f"num_parameters must be 1 or the number of channels, got {num_parameters}")
        if num_parameters != 1 and not learnable:
            raise ValueError(f"num_parameters={num_parameters} needs learnable=True: a fixed eps has no parameters")
        self.family = spec.family
        self.formula = spec.definition.value  # for TorchScript, which compiles a function that is an attribute
        self.n = spec.n
        self.init_eps = spec.eps
        self.num_parameters = num_parameters
        self.channel_dim = channel_dim
        self.save = save
        self.e: float  # see __setattr__
        self.re: float
        self.log_ratio: nn.Parameter | None
        if learnable:
            self.log_ratio = nn.Parameter(torch.zeros(num_parameters))  # never 0-dim, which FSDP2 cannot shard
        else:
            self.register_parameter("log_ratio", None)

    def reset_parameters(self) -> None:
        """Sets a learnable eps back to its initial value."""
        if self.log_ratio is not None:
            nn.init.zeros_(self.log_ratio)

    @property
    def eps(self) -> float | Tensor:
        """The current eps: a float, or a learnable one as a float32 or float64 tensor of shape (num_parameters,)."""
        return self.init_eps if self.log_ratio is None else _eps_at(self.log_ratio, self.init_eps)

    @property
    def spec(self) -> GemSpec:
        """Family, n, initial eps and learnability."""
        return GemSpec(self.family, self.n, self.init_eps, self.log_ratio is not None)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("n", "init_eps") and vars(self).keys() >= {"n", "init_eps"}:
            r, self.e = scale(self.init_eps, self.n)
            self.re = r * self.e  # exact, as is the r = re / e that follows; for what it is good, see `captured`

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        if torch.jit.is_scripting():
            return self._scripted(x)
        if not torch.compiler.is_compiling():
            vars(self)[CALLED] = True
        elif self.log_ratio is None:
            return self.captured(x)
        if self.log_ratio is None:
            return functional.activation(x, self.family, self.n, self.init_eps, self.save)
        eps = _eps_at(self.log_ratio, self.init_eps)
        if self.num_parameters == 1:
            return functional.activation(x, self.family, self.n, eps.view([]), self.save)
        x = x.movedim(self.channel_dim, -1)
        return functional.activation(x, self.family, self.n, eps, self.save).movedim(-1, self.channel_dim)

    def captured(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """`forward` for a compiler, of a fixed eps; with `up`, times that, rounded once.

        Floats are inputs of its graph as soon as they differ, so that layers share one whatever their eps. An r that is
        computed there from eps would be a constant, with a graph for each layer, up to the limit past which nothing is
        compiled. And r is the same for many eps: it would cost one graph more when it first differs; r e does not.
        """
        functional.check_tensor(x, "x")
        y = self.formula(working(x), self.n, self.re / self.e, self.e)
        return (y if up is None else y * up).to(x.dtype)

    def extra_repr(self) -> str:
        definition = self.spec.definition
        parts = [] if type(self) is not GemActivation else [self.family]
        parts.append(f"n={self.n}")
        if definition.fixed_eps is None:
            parts.append(f"eps={self.init_eps:g}")
        if self.log_ratio is not None:
            parts.append("learnable=True")
        if self.num_parameters > 1:
            parts.append(f"num_parameters={self.num_parameters}, channel_dim={self.channel_dim}")
        if self.save != "auto":
            parts.append(f"save={self.save!r}")
        return ", ".join(parts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Pickles of version 0.1.0 lack these.
        vars(self).setdefault("family", type(self).__name__.lower())
        vars(self).setdefault("formula", self.spec.definition.value)
        self.n = self.n  # and e and re

    def _scripted(self, x: Tensor) -> Tensor:
        """`forward` for TorchScript, which takes the formula as it is, with tensors for r and e."""
        z = working(x)
        log_ratio = self.log_ratio
        if log_ratio is None:
            r = torch.full([], self.re / self.e, dtype=z.dtype, device=z.device)
            e = torch.full([], self.e, dtype=z.dtype, device=z.device)
            return self.formula(z, self.n, r, e).to(x.dtype)
        eps = _eps_at(log_ratio, self.init_eps).to(z.dtype)
        if self.num_parameters == 1:
            r, e = scale_tensor(eps.view([]), self.n)
            return self.formula(z, self.n, r, e).to(x.dtype)
        r, e = scale_tensor(eps, self.n)
        y = self.formula(z.movedim(self.channel_dim, -1), self.n, r, e)
        return y.movedim(-1, self.channel_dim).to(x.dtype)


class GEM(GemActivation):
    """GEM, `x^(2n+1) / (1 + x^(2n))` for x > 0, else 0; see `hf_gem.functional.gem`.

    Args:
        n: The paper's N, 1 to 32.
        inplace: Accepted for timm and torch signatures; the input is never overwritten.
        save: What the backward pass keeps, "auto", "input" or "output"; see `hf_gem.functional.egem`.
    """

    def __init__(self, n: int = 1, inplace: bool = False, save: str = "auto") -> None:
        super().__init__("gem", n, save=save)


class EGEM(GemActivation):
    """E-GEM, `x t / (t + eps)` with `t = x^(2n)` for x > 0, else 0; see `hf_gem.functional.egem`.

    Args and errors are those of `GemActivation`, without the family.
    """

    _name = "egem"

    def __init__(
        self,
        n: int = 1,
        eps: float = DEFAULT_EPS,
        learnable: bool = False,
        num_parameters: int = 1,
        channel_dim: int = 1,
        inplace: bool = False,
        save: str = "auto",
    ) -> None:
        super().__init__(self._name, n, eps, learnable, num_parameters, channel_dim, inplace, save)


class SEGEM(EGEM):
    """SE-GEM, `x` for x >= 0 and `x eps / (x^(2n) + eps)` for x < 0; see `hf_gem.functional.segem`. Args as EGEM."""

    _name = "segem"


_CLASSES: dict[str, type[GemActivation]] = {"egem": EGEM, "segem": SEGEM}


def module_factory(spec: GemSpec) -> Callable[..., nn.Module]:
    """A picklable callable that builds a new module for `spec`; takes `inplace` like the activation classes of timm."""
    if spec.family == "gem":
        return functools.partial(GEM, n=spec.n)
    cls = _CLASSES.get(spec.family) or functools.partial(GemActivation, spec.family)
    return functools.partial(cls, n=spec.n, eps=spec.eps, learnable=spec.learnable)


def get_activation(name: str) -> nn.Module:
    """Builds the module an activation name stands for; see `hf_gem.parse` for names and errors."""
    return module_factory(parse(name))()
