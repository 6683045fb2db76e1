"""Finds, builds, loads and saves models, given a folder, a timm model, a transformers model type or a Hub id."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..family.names import is_claimed, parse
from ..files import closest, shown
from ..integrations.hub import auto_classes
from ..surgery.convert import convert
from ..surgery.fields import set_activation
from ..surgery.reports import counted
from ..training.errors import ConfigError, DataError, reason


@dataclass(frozen=True)
class Source:
    """The origin of a model.

    Attributes:
        given: What the user wrote.
        library: `timm` or `transformers`.
        name: Name of the model in that library.
        is_type: Whether this is a model type of transformers, which has a default config but no weights.
    """

    given: str
    library: str
    name: str
    is_type: bool = False


def find(given: str) -> Source:
    """Finds the model that the user named.

    Raises:
        ConfigError: There is no such model.
        ModuleNotFoundError: Its library is not installed.
    """
    if Path(given).is_dir():
        return _of_folder(given)
    name = given.removeprefix("timm/")
    types = _model_types()
    if given in types:
        return Source(given, "transformers", given, is_type=True)
    with contextlib.suppress(ModuleNotFoundError):
        import timm

        if timm.is_model(name):
            return Source(given, "timm", name)
        types |= set(timm.list_models())
    if given.startswith("timm/"):
        return Source(given, "timm", f"hf-hub:{given}")
    if given.count("/") == 1:
        return Source(given, "transformers", given)
    near = closest(given, types)
    hint = f"The nearest name is {near}" if near else "A folder needs a config.json"
    raise ConfigError(
        f"the model {given!r:.80} is not known. Give a folder, a timm model, a model type of transformers such as "
        f"gpt2, or USER/NAME of the Hub. {hint}."
    )


def build(source: Source, act: str | None = None) -> nn.Module:
    """Builds a model with new weights, on the meta device if its class allows that.

    Args:
        source: The model to build.
        act: An activation that the model is built with.

    Raises:
        ConfigError: The model cannot be built, or not with this activation.
    """
    with _explained(source, "built"):
        if source.library == "timm":
            return _on_meta(lambda: _timm_model(source, act))
        config = _config(source, act)
        cls = _model_class(config)
        return _on_meta(lambda: cls(config))


def load(source: Source, act: str | None = None, to_save: bool = False) -> nn.Module:
    """Loads a model with its weights, in evaluation mode.

    Args:
        source: The model to load.
        act: An activation that the model is built with.
        to_save: Whether the model will be saved. It must then be of the class that its config names, with all weights.

    Raises:
        ConfigError: It has no weights, or they cannot be loaded, or not with this activation.
    """
    if source.is_type:
        raise ConfigError(
            f"{source.given!r} is a model type, which has no weights. Give a folder, or USER/NAME of the Hub."
        )
    with _explained(source, "loaded"):
        if source.library == "timm":
            return _timm_model(source, act, pretrained=True).eval()
        from transformers.utils import logging

        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        config = _config(source, act)
        cls = _model_class(config, to_save)
        options = {"config": config, "dtype": "auto", "trust_remote_code": False}
        if to_save:
            return _with_all_weights(cls, source, **options).eval()
        model: nn.Module = cls.from_pretrained(source.name, **options)
        return model.eval()


def with_activation(make: Callable[..., nn.Module], source: Source, act: str | None) -> nn.Module:
    """Makes a model with an activation, and converts it if it cannot be built with one.

    Args:
        make: `build` or `load`.
        source: The model.
        act: The activation, or None for the model's own.

    Raises:
        ConfigError: The model cannot be made.
        ValueError: The name of the activation is malformed, or there is nothing to convert.
    """
    try:
        return make(source, act)
    except ConfigError:
        if not is_claimed(act):  # convert takes no others
            raise
    parse(act)
    model = make(source)
    convert(model, act)
    warnings.warn(f"{source.given} cannot be built with {act}, so it was converted afterwards.", stacklevel=2)
    return model


def save(model: nn.Module, source: Source, folder: Path) -> None:
    """Saves a model with a model card, and with the tokenizer or image processor of its source."""
    if source.library == "timm":
        import timm

        timm.models.save_for_hf(model, str(folder), safe_serialization=True)
        (folder / "README.md").write_text(_TIMM_CARD.format(type(model).__name__), encoding="utf-8")
        return
    from .. import save_for_hub

    try:
        save_for_hub(model, folder)
    except ValueError:  # a class that no Auto class builds
        model.save_pretrained(folder)  # type: ignore[operator]
    try:
        processor(source).save_pretrained(folder)
    except DataError as error:
        warnings.warn(f"{error} So {folder} has none either.", stacklevel=2)


def processor(source: Source, auto: str = "AutoProcessor", what: str = "tokenizer or image processor") -> Any:
    """Loads the tokenizer or image processor of a transformers model.

    Args:
        source: Where the model comes from.
        auto: The class of transformers that loads it.
        what: What it loads, for the error.

    Raises:
        DataError: The source has none.
    """
    import transformers

    try:
        found = getattr(transformers, auto).from_pretrained(source.name, trust_remote_code=False)
    except Exception as error:  # transformers raises different exceptions for a model without one
        raise DataError(f"there is no {what} in {source.given} ({reason(error)}).") from error
    # Without its files, transformers makes up a tokenizer that knows no words.
    files = getattr(getattr(found, "tokenizer", found), "vocab_files_names", {}).values()
    if files and not any(_has(source, file) for file in files):
        raise DataError(f"there is no {what} in {source.given}.")
    return found


def _has(source: Source, file: str) -> bool:
    from transformers.utils.hub import cached_file

    with contextlib.suppress(OSError):
        return cached_file(source.name, file) is not None
    return False


_TIMM_CARD = """---
library_name: timm
tags:
- hf_gem
---

# {}

An activation of the GEM family (arXiv 2604.21677) in a timm model.

## Use

```bash
pip install "hf-gem[timm]"
```

```python
import hf_gem  # registers the activation
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)  # or "hf-hub:USER/NAME"
```

Without the import, timm stops with an error.
"""


def _of_folder(given: str) -> Source:
    try:
        config = json.loads((Path(given) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the folder {given!r} has no config.json that can be read: {error}") from error
    if isinstance(config, dict) and "model_type" in config:
        return Source(given, "transformers", given)
    if isinstance(config, dict) and "architecture" in config:
        return Source(given, "timm", given)
    raise DataError(
        f"{given}/config.json is neither of transformers nor of timm: it has no model_type or architecture."
    )


def _model_types() -> set[str]:
    with contextlib.suppress(ModuleNotFoundError):
        from transformers import CONFIG_MAPPING

        return set(CONFIG_MAPPING.keys())
    return set()


def _timm_name(source: Source) -> str:
    return f"local-dir:{source.name}" if Path(source.name).is_dir() else source.name


def _timm_model(source: Source, act: str | None, **options: Any) -> nn.Module:
    import timm

    if act is not None:
        options["act_layer"] = act
    return timm.create_model(_timm_name(source), **options)


def _config(source: Source, act: str | None = None) -> Any:
    from transformers import AutoConfig

    from ..training import coordinate_models, image_models  # noqa: F401  # registers the models of the recipes

    if source.is_type:
        config = AutoConfig.for_model(source.name)
    else:
        config = AutoConfig.from_pretrained(source.name, trust_remote_code=False)
    if act is not None:
        set_activation(config, act)
    return config


def _model_class(config: Any, to_save: bool = False) -> Any:
    """Returns the class that a config names, or otherwise the first one that an Auto class builds from it.

    Raises:
        ConfigError: There is no class. With `to_save`, also if the config names one that transformers does not have.
    """
    import transformers

    found = {cls.__name__: cls for built in auto_classes(type(config)).values() for cls in built}
    for name in config.architectures or ():
        if name in found:
            return found[name]
        cls = getattr(transformers, name, None)  # not every class has an Auto class
        if isinstance(config, getattr(cls, "config_class", None) or ()):
            return cls
    if config.architectures and to_save:
        raise ConfigError(
            f"{shown(config.name_or_path)} names {shown(config.architectures[0])} under architectures in its "
            f"config.json. transformers has no such class for a {type(config).__name__}, and another class may lose "
            "weights. Load the model with its own code in Python, call hf_gem.convert and save it."
        )
    if not found:
        raise ConfigError(f"transformers builds no model from a {type(config).__name__}.")
    return next(iter(found.values()))


def _with_all_weights(cls: Any, source: Source, **options: Any) -> nn.Module:
    """Loads a transformers model that has the weights of its checkpoint and no others.

    Raises:
        ConfigError: It lacks weights, or the checkpoint has more. The latter is no error if its config names the class:
            the checkpoint of a BertForMaskedLM often contains another head too.
    """
    named = cls.__name__ in (options["config"].architectures or ())
    model: nn.Module
    model, info = cls.from_pretrained(source.name, **options, output_loading_info=True)
    absent = set(info["missing_keys"])
    optional = "add_pooling_layer" in inspect.signature(cls.__init__).parameters  # which no config stores
    if absent and optional and absent == {key for key in model.state_dict() if key.startswith("pooler.")}:
        model.register_module("pooler", None)  # as its class does without that argument
        absent.clear()
    lost = set() if named else info["unexpected_keys"]
    for keys, problem in ((absent, "lacks"), (lost, "has in addition")):
        if keys:
            raise ConfigError(
                f"{shown(source.given)} is not the checkpoint of a {cls.__name__}: it {problem} "
                f"{counted(len(keys), 'weight')}, such as {shown(min(keys))}. The converted model would be another "
                "one. Name the right class under architectures in its config.json, or load the model in Python, call "
                "hf_gem.convert and save it."
            )
    return model


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        return make()
    return make()  # some constructors read values of tensors


@contextlib.contextmanager
def _explained(source: Source, done: str) -> Iterator[None]:
    try:
        yield
    except (ConfigError, ModuleNotFoundError):
        raise
    except Exception as error:  # both libraries pass on whatever their models raise
        raise ConfigError(
            f"the model {source.given!r:.80} cannot be {done}: {type(error).__name__}: {error}"
        ) from error
