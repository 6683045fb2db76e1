"""What a family of activations is, and the table of families."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .arithmetic import Real

Formula = Callable[[Tensor, int, Real, Real], Tensor]
DEFAULT_EPS = 1e-4


def _by_digits(n: int, eps: float | Tensor, dtype: torch.dtype) -> bool:
    return dtype != torch.float16


@dataclass(frozen=True)
class Family:
    """A family of activations with the parameters n and eps, rational in x.

    Everything else follows from it: names, autograd, kernels, modules, registration, conversion.
    `hf_gem.family.arithmetic` says what the formulas take: `value(z, n, r, e)`.

    Attributes:
        name: As in `egem_n2_eps1em6`: lower-case letters.
        title: As people write it; without hyphens and in lower case, the name.
        formula: One line for readers.
        exact: The definition, of x, n and eps, for any type of number: fractions, dual numbers, floats.
        value: The same in floating-point arithmetic that neither overflows nor cancels.
        slope: Its derivative in x.
        slope_at: The derivative where the function is y, of y, n, r, e and the digits to which it is wanted. For a
            family that is strictly increasing wherever its slope is not 0: its backward pass may keep the output.
        inverse: The x where the function is y > 0; goes with `slope_at`.
        invertible: Of n, eps and the dtype of y: whether `slope_at` is as accurate as that dtype allows.
        eps_slope: The derivative in log(eps). Without it a learnable eps is differentiated through `value`.
        fixed_eps: The eps of every member, where the name carries none.
        kernels: The family whose formulas these are, if they are those of another one.
    """

    name: str
    title: str
    formula: str
    exact: Callable[[Any, int, Any], Any]
    value: Formula
    slope: Formula
    slope_at: Callable[[Tensor, int, Real, Real, int], Tensor] | None = None
    inverse: Formula | None = None
    invertible: Callable[[int, float | Tensor, torch.dtype], bool] = _by_digits
    eps_slope: Formula | None = None
    fixed_eps: float | None = None
    kernels: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z]+", self.name):
            raise ValueError(f"the name of a family must be lower-case letters, got {self.name!r}; write 'dgem'")
        if self.title.replace("-", "").lower() != self.name:
            raise ValueError(
                f"title must spell the name of the family, hyphens and capitals apart, got title={self.title!r} for "
                f"name={self.name!r}; write for example title='D-GEM' for name='dgem'"
            )
        if (self.slope_at is None) != (self.inverse is None):
            raise ValueError(f"family {self.name!r} must give both slope_at and inverse, or neither")
        if not self.kernels:
            object.__setattr__(self, "kernels", self.name)

    @property
    def default_eps(self) -> float:
        """The eps of a name that carries none."""
        return DEFAULT_EPS if self.fixed_eps is None else self.fixed_eps

    def fixed(self, eps: float, name: str, title: str, formula: str) -> Family:
        """The family of this one's members with one eps, under another name and with the same kernels."""
        return replace(self, name=name, title=title, formula=formula, fixed_eps=eps, kernels=self.kernels)

    def __reduce__(self) -> Any:  # functions of the table, not of the pickle
        return family_named, (self.name,)


FAMILIES: dict[str, Family] = {}


def family_named(name: str) -> Family:
    """The family with a name.

    Raises:
        ValueError: there is none.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"family must be one of {', '.join(FAMILIES)}, got {name!r:.80}; hf_gem.register_family adds others"
        )
    return FAMILIES[name]


def add(family: Family) -> Family:
    """Puts a family into the table.

    Raises:
        ValueError: the name is that of another family.
    """
    if FAMILIES.get(family.name, family) is not family:
        raise ValueError(
            f"the name {family.name!r} is taken by the family {FAMILIES[family.name].formula!r}; choose another"
        )
    FAMILIES[family.name] = family
    return family
