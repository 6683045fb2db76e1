"""The activation functions as modules, and `get_activation`, which builds a module from a name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import functional
from ._kernels import check_save
from ._kernels.replaceable import LAYER, kernel_condition
from ._torch import is_tracing
from .family.arithmetic import learnable_eps, scale, scale_tensor, working
from .family.names import GemSpec, parse
from .family.table import DEFAULT_EPS, Formula
from .files import shown

# Attributes of a module that can be changed, and the fields of its spec.
_FIELDS = {"family": "family", "n": "n", "init_eps": "eps"}
CALLED = "_hf_gem_called"  # an attribute that a module gets when it runs; compiled modules do not get it


class GemActivation(nn.Module):
    """An activation of any family.

    n and eps are plain numbers, so building a model on the meta device loses nothing. Calls accept `inplace`, as
    `torch.nn.functional.relu` does, since a conversion puts this module in its place. The input is never overwritten.
    You can change `save`, `n` and `init_eps` at any time, as in `module.save = "input"`, and `family` too, if the other
    family takes this eps.

    A learnable eps is `init_eps * exp(log_ratio)`. It stays positive whatever the optimizer does, and it is exactly
    `init_eps` at `log_ratio = 0`, even if the module is cast to bfloat16.

    Args:
        family: `gem`, `egem`, `segem`, or the name of a registered `Family`.
        n: The paper's N, from 1 to 32.
        eps: Positive number, by default the eps of the family. If eps is learnable, this is its initial value.
        learnable: Whether to train eps, as `eps * exp(log_ratio)` with the Parameter `log_ratio`. Exclude `log_ratio`
            from weight decay.
        num_parameters: Number of learnable eps: 1 for the whole layer, or the number of channels for one per channel.
        channel_dim: Dimension of the channels: 1 for images (N, C, ...), -1 for sequences (..., C).
        inplace: Ignored. It exists because timm and torch pass it; the input is never overwritten.
        save: Tensor that is kept for the backward pass: "auto", "input" or "output"; see `hf_gem.functional.egem`.

    Raises:
        TypeError: n, eps, num_parameters or channel_dim is not a number, or learnable is not a bool.
        ValueError: An argument is out of range, or a call gets an input with another number of channels.
        IndexError: A call gets an input without the dimension `channel_dim`.
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
        self.save = save
        spec = GemSpec(family, n, eps, learnable)  # type: ignore[arg-type]  # None means the default of the family
        for name, value in (("num_parameters", num_parameters), ("channel_dim", channel_dim)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(
                    f"got {name}={shown(value)} of type {type(value).__name__}. {name} must be an integer. Write for "
                    f"example {name}=1."
                )
        if num_parameters < 1:
            raise ValueError(
                f"got num_parameters={shown(num_parameters)}. It must be at least 1. Write 1 for one eps per layer, or "
                "the number of channels for one per channel."
            )
        if num_parameters != 1 and not learnable:
            raise ValueError(
                f"got num_parameters={shown(num_parameters)} with learnable=False. A fixed eps has no parameters. Set "
                "learnable=True, or leave out num_parameters."
            )
        self.family: str  # `_follow` sets these six
        self.n: int
        self.init_eps: float
        self.formula: Formula
        self.r: float
        self.e: float
        self._follow(spec)
        self.num_parameters = num_parameters
        self.channel_dim = channel_dim
        self.log_ratio: nn.Parameter | None
        if learnable:
            self.log_ratio = nn.Parameter(torch.zeros(num_parameters))  # not 0-dim, which FSDP2 cannot shard
        else:
            self.register_parameter("log_ratio", None)

    def reset_parameters(self) -> None:
        """Resets a learnable eps to its initial value."""
        if self.log_ratio is not None:
            nn.init.zeros_(self.log_ratio)

    @property
    def eps(self) -> float | Tensor:
        """The current eps: a float, or if learnable a float32 or float64 tensor of shape (num_parameters,)."""
        return self.init_eps if self.log_ratio is None else learnable_eps(self.log_ratio, self.init_eps)

    @property
    def spec(self) -> GemSpec:
        """The family, n, the initial eps and whether it is learnable."""
        return GemSpec(self.family, self.n, self.init_eps, self.log_ratio is not None)

    def _follow(self, spec: GemSpec) -> None:
        """Sets the attributes that follow from `spec`.

        formula, r and e could be computed in `forward`, but TorchScript compiles only attributes. See also `captured`.
        """
        r, e = scale(spec.eps, spec.n)
        vars(self).update(family=spec.family, n=spec.n, init_eps=spec.eps, formula=spec.definition.value, r=r, e=e)

    def __setattr__(self, name: str, value: Any) -> None:
        if (field := _FIELDS.get(name)) is not None:
            self._follow(replace(self.spec, **{field: value}))  # raises if the value is out of range
            return
        if name == "save":
            check_save(value)
        super().__setattr__(name, value)

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        if torch.jit.is_scripting():
            return self._scripted(x)
        if not torch.compiler.is_compiling():
            vars(self)[CALLED] = True
        elif self.log_ratio is None:
            return self.captured(x)
        if self.log_ratio is None:
            return functional.activation(x, self.family, self.n, self.init_eps, self.save)
        eps = learnable_eps(self.log_ratio, self.init_eps)
        if self.num_parameters == 1:
            return functional.activation(x, self.family, self.n, eps.view([]), self.save)
        moved = x.movedim(self.channel_dim, -1)
        # In tracing, shapes are not numbers.
        if isinstance(x, Tensor) and not is_tracing() and moved.shape[-1] != self.num_parameters:
            raise ValueError(
                f"got an input of shape {tuple(x.shape)}, which has {moved.shape[-1]} channels in dimension "
                f"{self.channel_dim}. The activation has num_parameters={self.num_parameters}. Set num_parameters to "
                "the number of channels, or channel_dim to their dimension."
            )
        return functional.activation(moved, self.family, self.n, eps, self.save).movedim(-1, self.channel_dim)

    def captured(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """`forward` with a fixed eps, for a compiler. If `up` is given, the result is multiplied by it before rounding.

        Attributes that are floats become inputs of the compiled graph once they differ, so layers share a graph,
        whatever their eps: the first needs one, the next another with e as an input, and the first with another r a
        third. If r and e were computed from eps in the graph, they would be constants. Each layer would then need its
        own graph, up to the limit beyond which nothing is compiled.
        """
        functional.check_tensor(x, "x")
        y = self.formula(working(x), self.n, self.r, self.e)
        return (y if up is None else y * up).to(x.dtype)

    def extra_repr(self) -> str:
        definition = self.spec.definition
        parts = [] if type(self).__name__.lower() == self.family else [self.family]
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

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]  # without what was compiled
        del state["formula"]  # the formula of a user's family may be a lambda, which cannot be pickled
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        vars(self).setdefault("family", type(self).__name__.lower())  # pickles of version 0.1.0 lack it
        self._follow(self.spec)

    def _scripted(self, x: Tensor) -> Tensor:
        """`forward` for TorchScript: the formula, with r and e as tensors."""
        z = working(x)
        log_ratio = self.log_ratio
        if log_ratio is None:
            r = torch.full([], self.r, dtype=z.dtype, device=z.device)
            e = torch.full([], self.e, dtype=z.dtype, device=z.device)
            return self.formula(z, self.n, r, e).to(x.dtype)
        eps = learnable_eps(log_ratio, self.init_eps).to(z.dtype)
        if self.num_parameters == 1:
            r, e = scale_tensor(eps.view([]), self.n)
            return self.formula(z, self.n, r, e).to(x.dtype)
        r, e = scale_tensor(eps, self.n)
        y = self.formula(z.movedim(self.channel_dim, -1), self.n, r, e)
        return y.movedim(-1, self.channel_dim).to(x.dtype)


class GEM(GemActivation):
    """GEM, `x^(2n+1) / (1 + x^(2n))` for x > 0, else 0; see `hf_gem.functional.gem`.

    Args:
        n: The paper's N, from 1 to 32.
        inplace: Ignored. It exists because timm and torch pass it; the input is never overwritten.
        save: Tensor that is kept for the backward pass: "auto", "input" or "output"; see `hf_gem.functional.egem`.
    """

    def __init__(self, n: int = 1, inplace: bool = False, save: str = "auto") -> None:
        super().__init__("gem", n, save=save)


class _FreeEps(GemActivation):
    """The arguments of the modules whose family has a free eps."""

    _name: ClassVar[str]

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


class EGEM(_FreeEps):
    """E-GEM, `x t / (t + eps)` with `t = x^(2n)` for x > 0, else 0; see `hf_gem.functional.egem`.

    Arguments and errors are those of `GemActivation`, without `family`.
    """

    _name = "egem"


class SEGEM(_FreeEps):
    """SE-GEM, `x` for x >= 0 and `x eps / (x^(2n) + eps)` for x < 0; see `hf_gem.functional.segem`.

    Arguments and errors are those of `GemActivation`, without `family`.
    """

    _name = "segem"


_CLASSES: dict[str, type[GemActivation]] = {"egem": EGEM, "segem": SEGEM}


def module_factory(spec: GemSpec) -> Callable[..., nn.Module]:
    """Returns a picklable callable that builds a new module for `spec`. It accepts `inplace`, as timm's classes do."""
    if spec.family == "gem":
        return functools.partial(GEM, n=spec.n)
    cls = _CLASSES.get(spec.family) or functools.partial(GemActivation, spec.family)
    return functools.partial(cls, n=spec.n, eps=spec.eps, learnable=spec.learnable)


def get_activation(name: str) -> nn.Module:
    """Builds the module for an activation name. `hf_gem.parse` documents names and errors."""
    return module_factory(parse(name))()
