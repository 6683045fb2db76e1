"""The definition of a family of activations, and the table of families."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..files import shown
from .arithmetic import Real

Formula = Callable[[Tensor, int, Real, Real], Tensor]
DEFAULT_EPS = 1e-4


def _by_digits(n: int, eps: float | Tensor, dtype: torch.dtype) -> bool:
    return dtype != torch.float16


@dataclass(frozen=True)
class Family:
    """A family of activations with the parameters n and eps, rational in x.

    Names, autograd, kernels, modules, registration and conversion are all derived from it. The formulas have the
    signature `value(z, n, r, e)`; `hf_gem.family.arithmetic` explains these arguments.

    Attributes:
        name: Name in lower-case letters, such as the `egem` of `egem_n2_eps1em6`.
        title: Name as people write it, such as `E-GEM`. In lower case and without hyphens it must equal `name`.
        formula: The definition as one line of text, for readers.
        exact: The definition as a function of x, n and eps. It works for any type of number: fractions, dual numbers,
            floats.
        value: The definition in floating-point arithmetic that neither overflows nor cancels.
        slope: The derivative of `value` with respect to x.
        slope_at: The derivative at the x whose output is y, as a function of y, n, r, e and the number of digits
            required. It exists only for a family that is strictly increasing wherever its slope is not 0. With it, the
            backward pass can keep the output instead of the input.
        inverse: The x whose output is y > 0. Required if there is a `slope_at`.
        invertible: A function of n, eps and the dtype of y that says whether `slope_at` is as accurate as the dtype
            allows.
        eps_slope: The derivative with respect to log(eps). Without it, autograd differentiates `value`.
        fixed_eps: The eps of every member of a family without a free eps, such as GEM.
        kernels: Name of the family whose kernels this family uses: its own, or that of the family it was `fixed` from.
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
    kernels: str = field(init=False)  # so that `replace`, which may change the formulas, does not copy it

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z]+", self.name):
            raise ValueError(
                f"got the family name {shown(self.name)}. It must consist of lower-case letters. Write for example "
                "'dgem'."
            )
        if self.title.replace("-", "").lower() != self.name:
            raise ValueError(
                f"got title={shown(self.title)} for name={shown(self.name)}. The title must equal the name, except for "
                "hyphens and capitals. Write for example title='D-GEM' for name='dgem'."
            )
        if (self.slope_at is None) != (self.inverse is None):
            given, missing = ("slope_at", "inverse") if self.inverse is None else ("inverse", "slope_at")
            raise ValueError(
                f"got {given} without {missing} for family {shown(self.name)}. A family needs both or neither. Add "
                f"{missing}, or leave out {given}."
            )
        object.__setattr__(self, "kernels", self.name)

    @property
    def default_eps(self) -> float:
        """The eps of a name that does not give one."""
        return DEFAULT_EPS if self.fixed_eps is None else self.fixed_eps

    def fixed(self, eps: float, name: str, title: str, formula: str) -> Family:
        """Returns this family with a fixed eps, under another name. It uses the same kernels."""
        member = replace(self, name=name, title=title, formula=formula, fixed_eps=eps)
        object.__setattr__(member, "kernels", self.kernels)
        return member

    def __copy__(self) -> Family:  # copies go through __reduce__ otherwise, which needs a registered family
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        return self

    def __reduce__(self) -> Any:  # a pickle holds the name only, and the table provides the functions
        return family_named, (self.name,)


FAMILIES: dict[str, Family] = {}


def family_named(name: str) -> Family:
    """Looks up a family by its name.

    Raises:
        ValueError: There is no family of this name.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"got family={shown(name)}. family must be one of {', '.join(FAMILIES)}. To add another one, use "
            "hf_gem.register_family."
        )
    return FAMILIES[name]


def add(family: Family) -> Family:
    """Adds a family to the table.

    Raises:
        ValueError: Another family has this name.
    """
    if FAMILIES.get(family.name, family) is not family:
        raise ValueError(
            f"the name {shown(family.name)} is taken by the family {shown(FAMILIES[family.name].formula)}. Kernels may "
            "exist for it, so it stays until the program ends. Choose another name, or restart the program or notebook "
            "to define the family again."
        )
    FAMILIES[family.name] = family
    return family
