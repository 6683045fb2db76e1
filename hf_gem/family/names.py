"""Names of activations. One string determines the function and its parameters completely.

Grammar (case-insensitive)::

    gem[_n<N>]    egem[_n<N>][_eps<E>][_learnable]    segem[_n<N>][_eps<E>][_learnable]

Names of registered families follow the same pattern as the last two.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from dataclasses import dataclass
from typing import Any, TypeGuard

from ..files import closest, shown
from .arithmetic import LEARNABLE_RANGE
from .table import FAMILIES, Family, family_named

MAX_N = 32
# The scale of the gate, eps**(1/2n), stays inside 2**±100, so that float32 can hold it and its reciprocal.
MAX_LOG2_SCALE = 100

_LONGEST = 200  # characters of a name, several times the length of any meaningful one

_RULE_OF_N = f"n must be an integer from 1 to {MAX_N}."
_RULE_OF_EPS = "eps must be positive and finite."
_RULE_OF_START = "A learnable eps must start between 1e-37 and 1e37, which fit into float32."

_NUMBER = r"\d+(?:\.\d*)?(?:em?[+-]?\d+)?"
# The form of a name, whether or not its first word is a family. Other libraries can have such names too.
_FORM = re.compile(r"([a-z]+)(_n\d.*|_eps.*|_learnable)?", re.DOTALL)


@functools.cache
def _patterns(names: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Two patterns for the given families: valid names, and strings that were clearly meant as one."""
    # e_gem and gem2 count as misspelled names. gemma and gems are other words.
    titles = (re.sub("-", r"[\\W_]?", FAMILIES[name].title.lower()) for name in names)
    name = re.compile(rf"({'|'.join(names)})(?:_n(\d{{1,9}}))?(?:_eps({_NUMBER}))?(_learnable)?", re.ASCII)
    return name, re.compile(rf"(?:{'|'.join(titles)})(?:n?\d.*|[\W_].*)?", re.DOTALL)


def _match(name: str) -> re.Match[str] | None:
    return _patterns(tuple(FAMILIES))[0].fullmatch(name.lower()) if len(name) <= _LONGEST else None


def grammar(family: Family) -> str:
    """Returns the form of the names of a family."""
    return family.name + ("[_n<N>]" if family.fixed_eps is not None else "[_n<N>][_eps<E>][_learnable]")


def _grammar() -> str:
    return ", ".join(map(grammar, FAMILIES.values()))


def check_n(n: int) -> int:
    """Returns `n` as an int, or raises TypeError (not an integer) or ValueError (outside 1..32)."""
    if type(n) is int and 1 <= n <= MAX_N:  # fast path, since every call of an activation checks n
        return n
    allowed = f"{_RULE_OF_N} The paper uses n=1, 2 and 3."
    try:
        if isinstance(n, bool):
            raise TypeError
        order = operator.index(n)
    except TypeError:
        raise TypeError(f"got n={shown(n)} of type {type(n).__name__}. {allowed}") from None
    if not 1 <= order <= MAX_N:
        raise ValueError(f"got n={shown(order)}. {allowed}")
    return order


def check_eps(eps: float, n: int = 1) -> float:
    """Returns `eps` as a float, or raises TypeError (not a number) or ValueError (not positive, not finite)."""
    if type(eps) is float and 1e-60 < eps < 1e60:  # fast path for every call of an activation; valid for every n
        return eps
    fix = "Write for example eps=1e-4."
    try:
        if isinstance(eps, (bool, str, bytes)):
            raise TypeError
        value = float(eps)
    except (TypeError, ValueError):
        raise TypeError(
            f"got eps={shown(eps)} of type {type(eps).__name__}. eps must be a positive number. {fix}"
        ) from None
    except OverflowError:
        value = math.inf
    rule = _broken_rule_of_eps(value, n)
    if rule == _RULE_OF_EPS:
        raise ValueError(f"got eps={shown(eps)}. {rule} {fix}")
    if rule:
        raise ValueError(
            f"got eps={value!r}. {rule} Outside this range, float32 cannot hold the scale of the gate, and the "
            "function is ReLU or zero for all common inputs: use that function instead."
        )
    return value


def _broken_rule_of_eps(eps: float, n: int) -> str:
    if not (math.isfinite(eps) and eps > 0):
        return _RULE_OF_EPS
    if abs(math.log2(eps)) > 2 * n * MAX_LOG2_SCALE:
        limit = math.floor(2 * n * MAX_LOG2_SCALE * math.log10(2))
        return f"eps must be between 1e-{limit} and 1e{limit} for n={n}."
    return ""


def _broken_rule(n: int, eps: float | None, learnable: bool) -> str:
    """Returns the rule that the parameters of a name break, or an empty string."""
    if not 1 <= n <= MAX_N:
        return _RULE_OF_N
    if eps is None:
        return ""
    return _broken_rule_of_eps(eps, n) or (_RULE_OF_START if learnable and not _can_start(eps) else "")


def _can_start(eps: float) -> bool:
    return LEARNABLE_RANGE[0] <= eps <= LEARNABLE_RANGE[1]


@dataclass(frozen=True)
class GemSpec:
    """One member of the family.

    Attributes:
        family: `gem`, `egem`, `segem`, or the name of a registered family.
        n: The paper's N, from 1 to 32. The functions of this package are C^(2n).
        eps: The eps of the gate `t / (t + eps)` with `t = x^(2n)`. It is always 1 for `gem`. If eps is learnable, this
            is its initial value.
        learnable: Whether each layer trains its own eps, as a Parameter.

    Raises:
        TypeError: n or eps is not a number, or learnable is not a bool.
        ValueError: The family is unknown, n or eps is out of range, or `gem` was given another eps.
    """

    family: str
    n: int = 1
    eps: float = None  # type: ignore[assignment]  # None means the default of the family
    learnable: bool = False

    def __post_init__(self) -> None:
        family = family_named(self.family)
        n = check_n(self.n)
        eps = family.default_eps if self.eps is None else check_eps(self.eps, n)
        if family.fixed_eps is not None and (eps != family.fixed_eps or self.learnable):
            other = "" if family.kernels == family.name else f", or use the family {shown(family.kernels)}"
            raise ValueError(
                f"got eps={eps!r} and learnable={shown(self.learnable)} for {family.name}. {family.name} has a fixed "
                f"eps of {family.fixed_eps:g}. Leave out eps and learnable{other}."
            )
        if not isinstance(self.learnable, bool):
            raise TypeError(
                f"got learnable={shown(self.learnable)}. learnable must be True or False. Write learnable=True to "
                "train eps."
            )
        if self.learnable and not _can_start(eps):
            raise ValueError(f"got eps={eps!r} with learnable=True. {_RULE_OF_START} Choose an eps in that range.")
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "eps", eps)

    @property
    def name(self) -> str:
        """The canonical name. It omits defaults and contains no hyphen, and `parse(spec.name) == spec`."""
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
    """Parses an activation name.

    Args:
        name: A name such as `gem_n2`, `egem`, `egem_n2_eps1em6` or `segem_eps0.01_learnable`. Upper and lower case are
            the same. `1e-6`, `1e-06`, `1em6` and `0.000001` are the same number.

    Returns:
        The family and its parameters.

    Raises:
        TypeError: `name` is not a string.
        ValueError: The name is malformed. The message gives the grammar and the nearest valid name.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"got activation name {shown(name)} of type {type(name).__name__}. It must be a string. Write for example "
            "'gem_n2'."
        )
    match = _match(name)
    if match is None:
        raise _malformed(name)
    family, n, eps, learnable = match.groups()
    if FAMILIES[family].fixed_eps is not None and (eps or learnable):
        raise _malformed(name, f" {family} has a fixed eps of {FAMILIES[family].fixed_eps:g}.")
    try:
        parameters = int(n or 1), _read_eps(eps), learnable is not None
    except ValueError:  # float cannot read 1em+5
        raise _malformed(name) from None
    if rule := _broken_rule(*parameters):
        raise _malformed(name, f" {rule}")
    return GemSpec(family, *parameters)


def is_name(name: object) -> bool:
    """Returns whether `name` is a valid name of the family."""
    if not isinstance(name, str) or _match(name) is None:
        return False
    try:
        parse(name)
    except ValueError:
        return False
    return True


def is_claimed(name: object) -> TypeGuard[str]:
    """Returns whether `name` can only be meant as one of the family.

    This includes malformed names such as `gem_n0` and `egem-n2`. If parameters follow, it also includes slips such as
    `gme_n2`, and names such as `dgem_n2`, which may be a family that is not registered. It includes no other words,
    however similar, since another library may use `gemma_n3`. Someone may still have registered a name of this kind for
    another function, so check registries first.
    """
    if not isinstance(name, str):
        return False
    text = name.lower()
    if _patterns(tuple(FAMILIES))[1].fullmatch(text):
        return True
    form = _FORM.fullmatch(text)
    if form is None or form[2] is None:
        return False
    return form[1][1:] in FAMILIES or any(form[1] in _slips(family) for family in FAMILIES)


@functools.cache
def _slips(word: str) -> set[str]:
    """Returns what a slip makes of a word: two letters swapped, one doubled, or one dropped that the word has twice."""
    cuts = [(word[:i], word[i:]) for i in range(len(word))]
    swapped = {head + tail[1::-1] + tail[2:] for head, tail in cuts}
    doubled = {head + tail[0] + tail for head, tail in cuts}
    dropped = {head + tail[1:] for head, tail in cuts}
    return {slip for slip in swapped | doubled | dropped if set(slip) == set(word)}  # without a letter, gem is "ge"


def _print_eps(eps: float) -> str:
    mantissa, _, exponent = repr(eps).partition("e")
    mantissa = mantissa.removesuffix(".0")
    if not exponent:
        return mantissa
    return f"{mantissa}e{'m' if exponent.startswith('-') else ''}{int(exponent.lstrip('+-'))}"


def _read_eps(text: str | None) -> Any:
    return text and float(text.replace("em", "e-"))


def _malformed(name: str, reason: str = "") -> ValueError:
    got, name = shown(name), name[:_LONGEST]
    letters = re.sub(r"[\W_]", "", name.lower())
    form = _FORM.fullmatch(name.lower())
    word, parameters = form.groups() if form else ("", None)
    near = f" Did you mean {_nearest(name)!r}?"
    similar = closest(word, FAMILIES)
    if word and word not in FAMILIES and (parameters or similar or word.endswith(tuple(FAMILIES))):
        return ValueError(
            f"got activation name {got}. No family is called {shown(word)}. Allowed names: {_grammar()}."
            f"{near if similar else ''} If it is your own, register it first, with hf_gem.register_family or in "
            "$HF_GEM_FAMILIES."
        )
    if name and not any(family in letters for family in FAMILIES):
        return ValueError(
            f"got activation name {got}, which is not one of the family. Allowed names: {_grammar()}. Write for "
            "example 'gem_n2'."
        )
    return ValueError(f"got activation name {got}.{reason} Allowed names: {_grammar()}.{near}")


def _nearest(name: str) -> str:
    """Returns the valid name that keeps the recognizable parts of `name`."""
    text = name.lower()
    letters = re.sub(r"[\W_]", "", text)
    start = next((f for f in FAMILIES if letters.startswith(f)), "")
    family = start or closest(text.partition("_")[0], FAMILIES) or "gem"
    n = re.search(r"n\W*_?(\d{1,3})", text)
    # The lookbehind keeps the "e" of "egem" from being read as an eps.
    eps = re.search(rf"(?<![a-z])e(?:ps(?:ilon)?)?[\s_=:]*({_NUMBER})", text)
    learnable = "learn" in text
    if FAMILIES[family].fixed_eps is not None and (eps or learnable):
        family = "egem"
    order = min(max(int(n[1]), 1), MAX_N) if n else 1
    try:
        return GemSpec(family, order, _read_eps(eps[1] if eps else None), learnable).name
    except ValueError:
        return GemSpec(family, order, learnable=learnable).name
