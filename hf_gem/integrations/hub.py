"""Checkpoints that load without `import hf_gem`: `save_for_hub`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from torch import nn

from ..spec import is_claimed
from .fields import activation_fields

_ROOT = Path(__file__).parent.parent
_FALLBACK = ("spec.py", "reference.py", "conversion.py", "integrations/fields.py", "integrations/fallback.py")
_CODE = "modeling_gem"
_START, _END = "<!-- loading: written by hf_gem.save_for_hub -->", "<!-- /loading -->"


def save_for_hub(model: Any, folder: str | Path, **kwargs: Any) -> list[Path]:
    """Saves a transformers model so that it loads where nobody has imported hf_gem.

    Beside what `save_pretrained` writes, the folder gets a small module, named in the config's `auto_map`, which
    `trust_remote_code=True` runs: it imports hf_gem where that is installed, and otherwise the files `gem_*.py` that
    come along, the formulas in plain torch, which compute the same without any kernels. The card says what each way of
    loading needs; an existing README.md keeps the rest of its text.

    Args:
        model: A transformers model, converted or not; of a class that transformers has itself.
        folder: Where to, made if need be. Push it with `huggingface_hub.upload_folder`.
        kwargs: For `save_pretrained`.

    Returns:
        The files written beside those of `save_pretrained`.

    Raises:
        TypeError: not a transformers model.
        ValueError: its class is not one of transformers, or it has no activation of the family.
    """
    names = _check(model)
    folder = Path(folder)
    auto_map = _auto_map(model)
    config = model.config
    before = vars(config).get("auto_map")
    config.auto_map = {auto: f"{_CODE}.{cls}" for auto, cls in auto_map.items()}
    try:
        model.save_pretrained(folder, **kwargs)
    finally:
        vars(config).pop("auto_map")
        if before is not None:
            config.auto_map = before
    written = {folder / f"{_CODE}.py": _modeling(sorted(set(auto_map.values())), names)}
    for file in _FALLBACK:
        source = (_ROOT / file).read_text()
        name = f"gem_{Path(file).name}"
        written[folder / name] = re.sub(r"^from \.+(\w+) import", r"from .gem_\1 import", source, flags=re.MULTILINE)
    card = folder / "README.md"
    written[card] = _with_section(card.read_text() if card.exists() else _new_card(model), loading_notes(model))
    for path, text in written.items():
        path.write_text(text)
    return list(written)


def loading_notes(model: Any, location: str = "this folder or repository") -> str:
    """What a card says about the ways to load a model, in Markdown."""
    auto = next((auto for auto, cls in _auto_map(model).items() if cls == type(model).__name__), "AutoModel")
    loud = any(field.is_body for field in activation_fields(model.config))
    otherwise = (
        "Without either, loading stops with a `KeyError` that names the activation."
        if loud
        else "Without either, transformers loads the weights into the model with its original activations, **another "
        "function**, since its config has no field that could name one."
    )
    return f"""```python
import hf_gem  # pip install hf-gem; registers the activation
from transformers import {auto}

model = {auto}.from_pretrained("{location}")
```

Without the import, `{auto}.from_pretrained("{location}", trust_remote_code=True)` runs `{_CODE}.py` of
this repository, which imports hf_gem where it is installed. Where it is not, the files `gem_*.py` take its place: the
same function in plain torch, slower. They need transformers 5.17 or newer and nothing else. {otherwise}
"""


def _check(model: Any) -> list[str]:
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"save_for_hub takes a transformers model, got {type(model).__name__}"
            + ("; save a timm model with timm.models.save_for_hf" if isinstance(model, nn.Module) else "")
        )
    home = type(model).__module__
    if not home.startswith(("transformers.", "transformers_modules.")):
        raise ValueError(
            f"{home}.{type(model).__name__} is not a class of transformers, so its own code has to come along: use "
            "register_for_auto_class and save_pretrained, and import hf_gem in that code"
        )
    modules = {module.spec.name for module in model.modules() if hasattr(module, "spec")}
    fields = {f.value.removeprefix("gated-") for f in activation_fields(model.config) if is_claimed(f.value)}
    names = sorted(modules | fields)
    if not names:
        raise ValueError(f"{type(model).__name__} has no activation of the family; save it with save_pretrained")
    return names


def _auto_map(model: Any) -> dict[str, str]:
    """Auto class -> the class it builds for this config."""
    from transformers.models.auto import modeling_auto

    config_class = type(model.config)
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if isinstance(auto, type) and mapping is not None and name.startswith("AutoModel") and config_class in mapping:
            built = mapping[config_class]
            found[name] = (built[0] if isinstance(built, tuple) else built).__name__
    return found


def _modeling(classes: list[str], names: list[str]) -> str:
    subclasses = "\n\n".join(f"class {name}(base(transformers.{name})):\n    pass\n" for name in classes)
    registered = ", ".join(f'"{name}"' for name in names)
    return f'''"""Loads this checkpoint with trust_remote_code=True, by hf_gem where it is installed."""

import transformers

try:
    import hf_gem  # noqa: F401  # takes part in building the model

    def base(cls):
        return cls
except ImportError:
    from .gem_fallback import base, register

    register({registered})


{subclasses}'''


def _with_section(card: str, notes: str) -> str:
    section = f"{_START}\n\n## Loading\n\n{notes}\n{_END}\n"
    if _START in card and _END in card:
        head, _, rest = card.partition(_START)
        return head + section + rest.partition(_END)[2].lstrip("\n")
    return f"{card.rstrip()}\n\n{section}"


def _new_card(model: Any) -> str:
    return (
        f"---\nlibrary_name: transformers\ntags:\n- hf_gem\n---\n\n# {type(model).__name__}\n\n"
        "An activation of the GEM family (arXiv 2604.21677) in a transformers model.\n"
    )
