"""Names and parameters of the families: one string names one function completely.

Grammar (case-insensitive)::

    gem[_n<N>]    egem[_n<N>][_eps<E>][_learnable]    segem[_n<N>][_eps<E>][_learnable]

and like the last two for every family that is registered.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from dataclasses import dataclass
from typing import Any, TypeGuard

from .arithmetic import LEARNABLE_RANGE
from .table import FAMILIES, Family, family_named

MAX_N = 32
# The gate's scale eps**(1/2n) stays inside 2**±100, where float32 holds it and its reciprocal.
MAX_LOG2_SCALE = 100

_LONGEST = 200  # characters of a name, several times those of any that means something

_NUMBER = r"\d+(?:\.\d*)?(?:em?[+-]?\d+)?"


@functools.cache
def _patterns(names: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What a name of some families looks like, and what can only have been meant as one."""
    # "E-GEM" may be written e_gem, and gem2 is a slip; gemma and gems are other words.
    titles = (re.sub("-", r"[\\W_]?", FAMILIES[name].title.lower()) for name in names)
    name = re.compile(rf"({'|'.join(names)})(?:_n(\d{{1,9}}))?(?:_eps({_NUMBER}))?(_learnable)?", re.ASCII)
    return name, re.compile(rf"(?:{'|'.join(titles)})(?:n?\d.*|[\W_].*)?", re.DOTALL)


def _match(name: str) -> re.Match[str] | None:
    return _patterns(tuple(FAMILIES))[0].fullmatch(name.lower()) if len(name) <= _LONGEST else None


def grammar(family: Family) -> str:
    """What the names of a family look like."""
    return family.name + ("[_n<N>]" if family.fixed_eps is not None else "[_n<N>][_eps<E>][_learnable]")


def _grammar() -> str:
    return ", ".join(map(grammar, FAMILIES.values()))


def check_n(n: int) -> int:
    """Returns `n` as an int, or raises TypeError (not an integer) or ValueError (outside 1..32)."""
    if type(n) is int and 1 <= n <= MAX_N:  # at every call of an activation
        return n
    if isinstance(n, bool):
        raise TypeError(f"n must be an integer from 1 to {MAX_N}, got {n!r} of type bool; write n=1 or n=2")
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(
            f"n must be an integer from 1 to {MAX_N}, got {n!r} of type {type(n).__name__}; write n=1 or n=2"
        ) from None
    if not 1 <= n <= MAX_N:
        got = n if n.bit_length() < 200 else f"one of {n.bit_length()} bits"  # Python does not print any integer
        raise ValueError(f"n must be an integer from 1 to {MAX_N}, got {got}; the paper uses 1, 2 and 3")
    return n


def check_eps(eps: float, n: int = 1) -> float:
    """Returns `eps` as a float, or raises TypeError (not a number) or ValueError (not positive, not finite)."""
    if type(eps) is float and 1e-60 < eps < 1e60:  # at every call of an activation; allowed for every n
        return eps
    if isinstance(eps, (bool, str, bytes)):
        raise TypeError(f"eps must be a positive number, got {eps!r} of type {type(eps).__name__}; write eps=1e-4")
    try:
        value = float(eps)
    except OverflowError:
        raise ValueError("eps must be positive and finite, got an integer beyond all floats; write eps=1e-4") from None
    except (TypeError, ValueError):
        raise TypeError(
            f"eps must be a positive number, got {eps!r} of type {type(eps).__name__}; write eps=1e-4"
        ) from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"eps must be positive and finite, got {value!r}; write for example eps=1e-4")
    if abs(math.log2(value)) > 2 * n * MAX_LOG2_SCALE:
        limit = min(2 * n * MAX_LOG2_SCALE * math.log10(2), 307)
        raise ValueError(
            f"eps must lie between 1e-{limit:.0f} and 1e{limit:.0f} for n={n}, got {value!r}; beyond that the gate's "
            "scale is not a float32, and for all common inputs the function is ReLU or zero; name that instead"
        )
    return value


@dataclass(frozen=True)
class GemSpec:
    """One member of the family.

    Attributes:
        family: `gem`, `egem`, `segem` or one that was registered.
        n: The paper's N, 1 to 32; our functions are C^(2n).
        eps: Scale of the gate, `t / (t + eps)` with `t = x^(2n)`; 1 for `gem`. For a learnable one, its initial value.
        learnable: Whether eps is a Parameter, owned by each layer.

    Raises:
        TypeError: n or eps is not a number, or learnable not a bool.
        ValueError: unknown family, n or eps out of range, or `gem` with an eps of its own.
    """

    family: str
    n: int = 1
    eps: float = None  # type: ignore[assignment]  # what None stands for depends on the family
    learnable: bool = False

    def __post_init__(self) -> None:
        family = family_named(self.family)
        n = check_n(self.n)
        eps = family.default_eps if self.eps is None else check_eps(self.eps, n)
        if family.fixed_eps is not None and (eps != family.fixed_eps or self.learnable):
            raise ValueError(
                f"{self.family} has eps = {family.fixed_eps:g}, fixed; got eps={eps!r}, learnable={self.learnable}. "
                f"The family {family.kernels!r} has others"
            )
        if not isinstance(self.learnable, bool):
            raise TypeError(f"learnable must be True or False, got {self.learnable!r}")
        if self.learnable and not LEARNABLE_RANGE[0] <= eps <= LEARNABLE_RANGE[1]:
            raise ValueError(f"a learnable eps must start between 1e-37 and 1e37, which float32 holds; got {eps!r}")
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "eps", eps)

    @property
    def name(self) -> str:
        """The canonical name: defaults left out, no hyphen; `parse(spec.name) == spec`."""
        default_eps = self.eps == self.definition.default_eps
        return (
            self.family
            + (f"_n{self.n}" if self.n != 1 else "")
            + ("" if default_eps else f"_eps{_print_eps(self.eps)}")
            + ("_learnable" if self.learnable else "")
        )

    @property
    def definition(self) -> Family:
        """The family with its formulas."""
        return family_named(self.family)

    def __str__(self) -> str:
        return self.name


def parse(name: str) -> GemSpec:
    """Reads an activation name.

    Args:
        name: For example `gem_n2`, `egem`, `egem_n2_eps1em6`, `segem_eps0.01_learnable`, in any case. `1e-6`, `1e-06`,
            `1em6` and `0.000001` are the same number.

    Returns:
        The parameters it stands for.

    Raises:
        TypeError: `name` is not a string.
        ValueError: the name is malformed; the message gives the grammar and the nearest valid name.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"an activation name must be a string such as 'gem_n2', got {name!r} of type {type(name).__name__}"
        )
    match = _match(name)
    if match is None:
        raise _malformed(name, "it does not follow the grammar")
    family, n, eps, learnable = match.groups()
    if FAMILIES[family].fixed_eps is not None and (eps or learnable):
        raise _malformed(name, f"{family} has eps = {FAMILIES[family].fixed_eps:g}, fixed, and its names carry none")
    try:
        return GemSpec(family, int(n or 1), _read_eps(eps), learnable is not None)
    except ValueError as error:
        raise _malformed(name, str(error)) from None


def is_name(name: object) -> bool:
    """Whether `name` is a well-formed name of the family."""
    if not isinstance(name, str) or _match(name) is None:
        return False
    try:
        parse(name)
    except ValueError:
        return False
    return True


def is_claimed(name: object) -> TypeGuard[str]:
    """Whether `name` can only have been meant as one of ours: `gem_n0`, `egem-n2`, but not `gemma` or `gelu`."""
    return isinstance(name, str) and _patterns(tuple(FAMILIES))[1].fullmatch(name.lower()) is not None


def _print_eps(eps: float) -> str:
    mantissa, _, exponent = repr(eps).partition("e")
    mantissa = mantissa.removesuffix(".0")
    if not exponent:
        return mantissa
    return f"{mantissa}e{'m' if exponent.startswith('-') else ''}{int(exponent.lstrip('+-'))}"


def _read_eps(text: str | None) -> Any:
    return text and float(text.replace("em", "e-"))


def _malformed(name: str, reason: str) -> ValueError:
    name = name[:_LONGEST]
    letters = re.sub(r"[\W_]", "", name.lower())
    if name and not any(family in letters for family in FAMILIES):
        return ValueError(
            f"got activation name {name!r:.80}, which is none of the family. Allowed: {_grammar()}. For others, such "
            "as a baseline's, there are hf_gem.set_activation and timm's act_layer; hf_gem.gain takes a function"
        )
    return ValueError(
        f"got activation name {name!r:.80}: {reason}. Allowed: {_grammar()}. Did you mean {_nearest(name)!r}?"
    )


def _nearest(name: str) -> str:
    """The valid name that keeps what can be understood of `name`."""
    text = name.lower()
    letters = re.sub(r"[\W_]", "", text)
    family = next((f for f in FAMILIES if letters.startswith(f)), "gem")
    n = re.search(r"n\W*_?(\d{1,3})", text)
    # Past the family's own letters, so that the "e" of "egem" is not taken for an eps.
    eps = re.search(rf"(?<![a-z])e(?:ps(?:ilon)?)?[\s_=:]*({_NUMBER})", text)
    learnable = "learn" in text
    if FAMILIES[family].fixed_eps is not None and (eps or learnable):
        family = "egem"
    order = min(max(int(n[1]), 1), MAX_N) if n else 1
    try:
        return GemSpec(family, order, _read_eps(eps[1] if eps else None), learnable).name
    except ValueError:
        return GemSpec(family, order, learnable=learnable).name
