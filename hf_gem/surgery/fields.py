"""The fields of a transformers config that select an activation: `set_activation`.

Found from what a config declares, not from a list of models: a field whose name holds a word for activation and whose
value is the name of one, in the config, its sub-configs and its dicts.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from ..family.names import is_claimed, parse

_ACTIVATION_WORDS = {"act", "activation", "afn"}
# Fields named otherwise, and the attribute, declared nowhere, in which the config keeps what it made of the field.
_DERIVED = {"feed_forward_proj": "dense_act_fn"}
# Words for parts that are not the body of the network; `mamba` fields go to kernels that know nothing but silu.
_OTHER_PARTS = {"pooler", "projector", "projection", "classifier", "summary", "head", "readout", "mamba"}
_GATES = {"sigmoid", "hardsigmoid", "tanh", "hardtanh", "softmax", "linear"}
_GATED = "gated-"  # T5's prefix for a gated MLP


class FieldChange(NamedTuple):
    """One field that was set: dotted path in the config, value before, value after."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class ActivationField:
    """A place in a config, or in a dict of it, that names an activation.

    Attributes:
        path: Dotted, from the config that was searched.
        owner: The config or dict that holds it.
        key: Its name there.
        is_body: Whether it is an activation of the network's body; not a pooler's, a head's, a gate's ...
    """

    path: str
    owner: Any
    key: str
    is_body: bool

    @property
    def value(self) -> str:
        value: str = self.owner[self.key] if isinstance(self.owner, dict) else getattr(self.owner, self.key)
        return value

    def set(self, name: str) -> FieldChange:
        """Writes a name, keeping T5's prefix; `name` may have it already."""
        old = self.value
        prefix = _GATED if old.startswith(_GATED) and not name.startswith(_GATED) else ""
        new = prefix + name
        if isinstance(self.owner, dict):
            self.owner[self.key] = new
            return FieldChange(self.path, old, new)
        setattr(self.owner, self.key, new)
        derived = _DERIVED.get(self.key)
        if derived is not None and hasattr(self.owner, derived):
            # As T5Config has it: its gated "gelu" has always been the tanh approximation.
            setattr(self.owner, derived, "gelu_new" if new == "gated-gelu" else plain_name(new))
        return FieldChange(self.path, old, new)


def set_activation(config: Any, name: str, *, fields: str | Iterable[str] | None = None) -> list[FieldChange]:
    """Makes a transformers config select an activation, in every field that selects one.

    Sub-configs, dicts (`ffn_act_fn["name"]`), prefixes (`gated-`) and T5's `feed_forward_proj` are included. Left alone
    are poolers, projectors, summaries and heads, and whatever is set to a gate such as sigmoid or tanh, unless
    `fields` asks for them.

    Args:
        config: A transformers config; of a model that is still to be built, since a config is read then.
        name: Of the family, or any that transformers knows.
        fields: Patterns such as `"*projector*"` or `"text_config.*"` for the dotted paths to set instead.

    Returns:
        What was set, as (path, old, new).

    Raises:
        TypeError: `config` is not a config, or `name` not a string.
        ValueError: the name is malformed or unknown, or the config has no such field; it says what there is.
    """
    found = list(activation_fields(config))
    name = _known_name(name)
    if fields is None:
        chosen = [field for field in found if field.is_body]
    else:
        if not isinstance(fields, (str, list, tuple, set)):
            raise TypeError(f"fields must be patterns of paths such as '*projector*', got {fields!r}")
        patterns = [fields] if isinstance(fields, str) else list(fields)
        chosen = [field for field in found if any(fnmatchcase(field.path, pattern) for pattern in patterns)]
    if not chosen:
        others = ", ".join(f"{field.path}={field.value!r}" for field in found)
        raise ValueError(
            f"{type(config).__name__} has no field that selects an activation"
            + (
                f" of the network's body; it has {others}, which fields= can ask for"
                if fields is None and others
                else ""
            )
            + (f" and matches {fields!r}; it has {others or 'none'}" if fields is not None else "")
            + f". Build the model and replace its activations with hf_gem.convert(model, {name!r})"
        )
    changes: list[FieldChange] = []
    for field in chosen:
        try:
            changes.append(field.set(name))
        except Exception as error:  # huggingface_hub's validation, which some fields restrict to one value
            for done, change in zip(chosen, changes, strict=False):
                done.set(change.old)
            raise ValueError(
                f"{type(config).__name__} does not accept {name!r} as {field.path}: {error}. Nothing was set; leave "
                "the field out by naming the others with fields=, or use hf_gem.convert on the model that is built"
            ) from error
    return changes


def activation_fields(config: Any) -> Iterator[ActivationField]:
    """Every field that names an activation, of the body or not, depth first.

    Raises:
        TypeError: `config` is not a transformers config.
    """
    if not is_config(config):
        raise TypeError(
            f"expected a transformers config, got {type(config).__name__}; a model that is already built is changed "
            "with hf_gem.convert(model, name)"
        )
    yield from _search(config, "", set(), set())


def declares(config: Any, name: str) -> bool:
    """Whether a config's class has a field of this name, under its own name or as an alias."""
    return name in config.attribute_map or name in _parameters(type(config))  # type: ignore[arg-type]


@functools.cache
def _parameters(config_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(config_class).parameters)  # a dataclass's fields, or a custom __init__'s


def nested_configs(config: Any, prefix: str = "") -> dict[str, Any]:
    """Prefix of its fields (`""`, `"text_config."` ...) -> config, for a config and those in it, each once."""
    found = {prefix: config}
    for key, value in vars(config).items():
        if is_config(value) and not any(value is other for other in found.values()):
            found |= nested_configs(value, f"{prefix}{key}.")
    return found


def is_body(key: str) -> bool:
    """Whether a field with this name is about the body of a network, not a pooler, a head, a projector ..."""
    return not _words(key) & _OTHER_PARTS


def is_activation_key(key: str) -> bool:
    """Whether a field with this name selects an activation, if its value is the name of one."""
    return key in _DERIVED or bool(_words(key) & _ACTIVATION_WORDS)


def plain_name(value: str) -> str:
    """The name of an activation without T5's prefix for a gated MLP."""
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
    """What `TimmWrapperConfig` passes on to `timm.create_model`."""

    @property
    def value(self) -> str:
        value: str = (self.owner.model_args or {}).get(self.key, "")
        return value

    def set(self, name: str) -> FieldChange:
        old = self.value
        others = {key: value for key, value in (self.owner.model_args or {}).items() if key != self.key}
        self.owner.model_args = {**others, self.key: name} if name else others  # without one, timm's own
        return FieldChange(self.path, old, name)


def _is_activation_name(value: object) -> bool:
    if not isinstance(value, str):
        return False
    from transformers.activations import ACT2FN  # a config is here, so transformers is

    name = plain_name(value).lower()
    return is_claimed(name) or name in ACT2FN  # ours also where nothing has registered it


def _known_name(name: str) -> str:
    if is_claimed(name) or not isinstance(name, str):
        return parse(name).name  # or an error that says what is wanted
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(
            f"got activation name {name!r}; allowed are names of the family such as 'gem_n2' and {', '.join(ACT2FN)}"
        )
    return name


def is_config(value: object) -> bool:
    """Whether this is a config of transformers; no such thing exists before that is imported."""
    module = sys.modules.get("transformers.configuration_utils")
    return module is not None and isinstance(value, module.PreTrainedConfig)
