"""The fields of a transformers config that select an activation, and `set_activation`.

Fields are found from what a config declares, not from a list of models. A field selects an activation if its name
contains a word for activation and its value is the name of one. Sub-configs and dicts are searched too.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeGuard

from ..family.names import is_claimed, parse
from ..files import shown

_ACTIVATION_WORDS = {"act", "activation", "afn"}
# Fields with other names -> the undeclared attribute that the config derives from the field.
_DERIVED = {"feed_forward_proj": "dense_act_fn"}
# Words for parts outside the body of the network. Kernels that read `mamba` fields only support silu.
_OTHER_PARTS = {"pooler", "projector", "projection", "classifier", "summary", "head", "readout", "mamba"}
_GATES = {"sigmoid", "hardsigmoid", "tanh", "hardtanh", "softmax", "linear"}
_GATED = "gated-"  # T5's prefix for a gated MLP


class FieldChange(NamedTuple):
    """A field that was set: its dotted path in the config, the old value and the new value."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class ActivationField:
    """A place in a config, or in a dict of it, that names an activation.

    Attributes:
        path: Dotted path from the config that was searched.
        owner: The config or dict that holds the field.
        key: Name of the field in its owner.
        is_body: Whether the activation belongs to the body of the network, not to a pooler, a head, a gate etc.
    """

    path: str
    owner: Any
    key: str
    is_body: bool

    @property
    def value(self) -> str:
        value: str = self.owner[self.key] if isinstance(self.owner, dict) else getattr(self.owner, self.key)
        return value

    @property
    def looked_up(self) -> str:
        """The name of the function that the model looks up, which the config may derive from the field."""
        derived: str = getattr(self.owner, _DERIVED.get(self.key, ""), plain_name(self.value))
        return derived

    def prefixed(self, name: str) -> str:
        """Returns a name with T5's prefix `gated-` if the field has it now."""
        return _GATED + name if self.value.startswith(_GATED) and not name.startswith(_GATED) else name

    def set(self, name: str) -> FieldChange:
        """Sets the field to a name. T5's prefix `gated-` is kept; `name` may include it."""
        old, new = self.value, self.prefixed(name)
        if isinstance(self.owner, dict):
            self.owner[self.key] = new
            return FieldChange(self.path, old, new)
        setattr(self.owner, self.key, new)
        derived = _DERIVED.get(self.key)
        if derived is not None and hasattr(self.owner, derived):
            # This is what T5Config does: "gated-gelu" has always meant the tanh approximation.
            setattr(self.owner, derived, "gelu_new" if new == "gated-gelu" else plain_name(new))
        return FieldChange(self.path, old, new)


def set_activation(config: Any, name: str, *, fields: str | Iterable[str] | None = None) -> list[FieldChange]:
    """Sets the activation of a transformers config, in every field that selects one.

    This includes sub-configs, dicts (`ffn_act_fn["name"]`), prefixes (`gated-`) and T5's `feed_forward_proj`. Fields of
    poolers, projectors, summaries and heads stay as they are, and so do fields set to a gate such as sigmoid or tanh,
    unless `fields` selects them.

    Args:
        config: A transformers config. Call this before you build the model, which reads the config then.
        name: A name of the family, or any name that transformers knows.
        fields: Patterns of the dotted paths to set instead, such as `"*projector*"` or `"text_config.*"`.

    Returns:
        The fields that were set, as (path, old, new).

    Raises:
        TypeError: `config` is not a config, or `name` is not a string.
        ValueError: The name is malformed or unknown, or the config has no matching field. The message lists the fields
            that it has.
    """
    found = list(activation_fields(config))
    name = _known_name(name)
    if fields is None:
        chosen = [field for field in found if field.is_body]
    else:
        if not isinstance(fields, (str, list, tuple, set)):
            raise TypeError(
                f"got fields={shown(fields)}. It must be a pattern or a list of patterns. Write for example "
                "'*projector*'."
            )
        patterns = [fields] if isinstance(fields, str) else list(fields)
        chosen = [field for field in found if any(fnmatchcase(field.path, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(_no_field(config, name, found, fields))
    valid = {prefix: part for prefix, part in nested_configs(config).items() if _is_valid(part)}
    changes: list[FieldChange] = []
    paths = ""
    try:
        for field in chosen:
            paths = field.path
            changes.append(field.set(name))
        for prefix, part in valid.items():
            paths = ", ".join(field.path for field in chosen if field.path.startswith(prefix))
            validate(part)
    except Exception as error:  # validation by huggingface_hub, which limits some fields to some values
        for done, change in zip(chosen, changes, strict=False):
            done.set(change.old)
        raise ValueError(
            f"{type(config).__name__} does not accept {name!r} as {paths} ({error}). Nothing was set. Select the other "
            f"fields with fields=, or {_instead(name)}."
        ) from error
    return changes


def validate(config: Any) -> None:
    """Checks a config as a whole, as huggingface_hub does when it is created or saved."""
    getattr(config, "validate", lambda: None)()


def _is_valid(config: Any) -> bool:
    try:
        validate(config)
    except Exception:  # whatever its class raises
        return False
    return True


def _no_field(config: Any, name: str, found: list[ActivationField], wanted: Any) -> str:
    """Returns the message for a config without a field to set."""
    others = ", ".join(f"{field.path}={shown(field.value)}" for field in found)
    if wanted is not None:
        problem, fix = f" that matches fields={shown(wanted)}. It has {others or 'none'}.", ""
    elif others:
        problem, fix = f" in the body of the network. It has {others}.", "select one of these with fields=, or "
    else:
        problem, fix = ".", ""
    fix += _instead(name)
    return f"{type(config).__name__} has no field that selects an activation{problem} {fix[0].upper()}{fix[1:]}."


def _instead(name: str) -> str:
    if is_ours(name):
        return f"build the model and call hf_gem.convert(model, {name!r})"
    return "use an activation of the family, which hf_gem.convert puts into a model that is built"


def activation_fields(config: Any) -> Iterator[ActivationField]:
    """Yields all fields that name an activation, inside and outside the body, depth first.

    Raises:
        TypeError: `config` is not a transformers config.
    """
    if not is_config(config):
        raise TypeError(
            f"got {type(config).__name__}. config must be a transformers config. For a model that is already built, "
            "use hf_gem.convert(model, name)."
        )
    yield from _search(config, "", set(), set())


def declares(config: Any, name: str) -> bool:
    """Returns whether the class of a config has a field with this name or alias."""
    return name in config.attribute_map or name in _parameters(type(config))  # type: ignore[arg-type]


@functools.cache
def _parameters(config_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(config_class).parameters)  # fields of a dataclass, or of a custom __init__


def nested_configs(config: Any, prefix: str = "") -> dict[str, Any]:
    """Maps field prefixes (`""`, `"text_config."` ...) to configs: the config itself and those in it, each once."""
    found = {prefix: config}
    for key, value in vars(config).items():
        if is_config(value) and not any(value is other for other in found.values()):
            found |= nested_configs(value, f"{prefix}{key}.")
    return found


def is_body(key: str) -> bool:
    """Returns whether a field with this name belongs to the body of a network, not to a pooler, head, projector etc."""
    return not _words(key) & _OTHER_PARTS


def is_activation_key(key: str) -> bool:
    """Returns whether a field with this name selects an activation, provided its value names one."""
    return key in _DERIVED or bool(_words(key) & _ACTIVATION_WORDS)


def is_ours(name: object) -> TypeGuard[str]:
    """Returns whether the value of a field is meant as one of the family. Names in `ACT2FN` belong to who put them."""
    if not is_claimed(name):
        return False
    from transformers.activations import ACT2FN  # transformers is loaded, since there is a config

    return not dict.__contains__(ACT2FN, name)  # `in` would include the names of the family


def plain_name(value: str) -> str:
    """Returns the name of an activation without T5's prefix for a gated MLP."""
    return value.removeprefix(_GATED)


def _words(key: object) -> set[str]:
    return set(re.split(r"[_\W]+", str(key).lower()))


def _search(container: Any, prefix: str, inherited: set[str], seen: set[int]) -> Iterator[ActivationField]:
    if id(container) in seen:
        return
    seen.add(id(container))
    if getattr(container, "model_type", None) == "timm_wrapper":
        yield _TimmField(f"{prefix}model_args.act_layer", container, "act_layer", True)
        return
    in_config = is_config(container)
    for key, value in list((vars(container) if in_config else container).items()):
        path, words = f"{prefix}{key}", _words(key)
        if is_config(value):
            yield from _search(value, f"{path}.", set(), seen)
        elif in_config and not declares(container, key):
            continue
        elif isinstance(value, dict):
            yield from _search(value, f"{path}.", words, seen)
        elif _is_activation_name(value) and (
            is_activation_key(str(key)) or (key == "name" and inherited & _ACTIVATION_WORDS)
        ):
            yield ActivationField(path, container, key, is_body(key) and value.lower() not in _GATES)


class _TimmField(ActivationField):
    """The activation that `TimmWrapperConfig` passes to `timm.create_model`."""

    @property
    def value(self) -> str:
        value: str = (self.owner.model_args or {}).get(self.key, "")
        return value

    def set(self, name: str) -> FieldChange:
        old = self.value
        others = {key: value for key, value in (self.owner.model_args or {}).items() if key != self.key}
        self.owner.model_args = {**others, self.key: name} if name else others  # without a name, timm's default
        return FieldChange(self.path, old, name)


def _is_activation_name(value: object) -> bool:
    if not isinstance(value, str):
        return False
    from transformers.activations import ACT2FN  # transformers is loaded, since there is a config

    name = plain_name(value).lower()
    return is_claimed(name) or name in ACT2FN  # names of the family count even if they are not registered


def _known_name(name: str) -> str:
    if is_ours(name) or not isinstance(name, str):
        return parse(name).name  # raises an error for a malformed name
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(
            f"got activation name {shown(name)}, which transformers does not know. Allowed names: {', '.join(ACT2FN)}, "
            "and names of the family. Write for example 'gem_n2'."
        )
    return name


def is_config(value: object) -> bool:
    """Returns whether this is a transformers config. If transformers is not imported, nothing is."""
    module = sys.modules.get("transformers.configuration_utils")
    return module is not None and isinstance(value, module.PreTrainedConfig)
