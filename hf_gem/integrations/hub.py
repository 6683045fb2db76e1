"""Checkpoints that load without `import hf_gem`: `save_for_hub`."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from .._kernels.replaceable import BUILT_IN
from .._torch import uncompiled
from ..family.names import parse
from ..family.table import Family
from ..files import markdown_code, replace_between, shown
from ..surgery.fields import activation_fields, is_ours, plain_name
from ..surgery.plans import specs, unnamed

_ROOT = Path(__file__).parent.parent
# These files of hf_gem only import each other. They use no private torch APIs, which another version may not have.
_FALLBACK = (
    "files.py",
    *(f"family/{name}.py" for name in ("arithmetic", "table", "egem", "segem", "formulas", "names")),
    *(f"surgery/{name}.py" for name in ("slots", "reports", "plans", "fields", "configs")),
    "_kernels/replaceable.py",
    "integrations/fallback.py",
)
_IMPORT = re.compile(r"^from \.+(?:\w+\.)*(\w+) import", re.MULTILINE)
# In the file of a family: what may be imported from hf_gem, what takes its place, and the modules that it may import.
_IMPORTED = {("Family", None), ("register_family", None)}
_FAMILY = "from .gem_table import Family"
_MODULES = {f"hf_gem.{file.removesuffix('.py').replace('/', '.')}" for file in _FALLBACK}
_CODE = "modeling_gem"
# Files of hf_gem.training with models that transformers does not have -> the Auto class that builds them.
_OWN = {"image_models": "AutoModelForImageClassification", "coordinate_models": "AutoModel"}
_RUNTIMES = (
    "**Other runtimes may compute another function without a message.** llama.cpp (GGUF) and SGLang's own GPT-2 never "
    "read the activation of a GPT-2, and run GELU. vLLM is right if hf_gem is installed beside it. Compare some "
    "log-probabilities with those of transformers first; hf_gem's docs/serving.md shows how."
)
_START, _END = "<!-- loading: written by hf_gem -->", "<!-- /loading -->"


def save_for_hub(model: Any, folder: str | Path, **kwargs: Any) -> list[Path]:
    """Saves a transformers model so that it can be loaded without importing hf_gem.

    In addition to the files of `save_pretrained`, the folder gets a small module that the config's `auto_map` names and
    that `trust_remote_code=True` runs. It imports hf_gem if that is installed. Otherwise it imports the files
    `gem_*.py`, which are saved too: the formulas in plain torch, which compute the same without kernels. The model card
    says what each way of loading needs. An existing README.md keeps the rest of its text.

    Args:
        model: A transformers model, converted or not, whose class is from transformers or hf_gem.
        folder: Folder to save to, which is created if needed. Push it with `huggingface_hub.upload_folder`.
        **kwargs: Further arguments of `save_pretrained`.

    Returns:
        The files written in addition to those of `save_pretrained`. With `is_main_process=False`, there are none.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: The class of the model is not from transformers or hf_gem, no Auto class builds it, the model has no
            activation of the family, or you passed `push_to_hub`.
    """
    model = uncompiled(model) or model  # the wrapper of torch.compile would be saved too
    if kwargs.get("push_to_hub"):
        raise ValueError(
            "got push_to_hub=True. save_for_hub cannot push, because the weights would be pushed before its own files. "
            "Leave it out, and push the folder with huggingface_hub.upload_folder."
        )
    names, auto_map = _check(model)
    own = _own_code(model)
    code = _code(auto_map, names, own)
    folder = Path(folder)
    config = model.config
    before = vars(config).get("auto_map")
    config.auto_map = {auto: f"{_CODE}.{cls}" for auto, cls in auto_map.items()}
    try:
        model.save_pretrained(folder, **kwargs)
    finally:
        vars(config).pop("auto_map")
        if before is not None:
            config.auto_map = before
    if not kwargs.get("is_main_process", True):
        return []  # the config, from which the card is written, is saved by the main process only
    written = {folder / name: text for name, text in code.items()}
    card = folder / "README.md"
    auto = next(auto for auto, cls in auto_map.items() if cls == type(model).__name__)
    saved = activation_fields(type(config).from_pretrained(folder))
    notes = loading_notes(
        auto,
        "this folder or repository",
        stops=any(is_ours(plain_name(f.value)) for f in saved),
        own=own is not None,
    )
    text = card.read_text(encoding="utf-8") if card.exists() else _new_card(model)
    imported = "hf_gem" if own is None else f"hf_gem.training.{_own_name(own)}"
    written[card] = _with_notes(text, auto, notes, imported)
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    return list(written)


def loading_notes(auto: str, location: str, stops: bool = True, own: bool = False) -> str:
    """Returns the section of a model card that explains how to load a checkpoint of `save_for_hub`, in Markdown.

    Args:
        auto: Name of the Auto class.
        location: Folder or repository of the checkpoint.
        stops: Whether a field of its config names the activation, so that transformers alone stops at it.
        own: Whether the class of the model is from hf_gem.
    """
    otherwise = (
        "Without either, loading stops with an error, since transformers does not know the model."
        if own
        else "Without either, loading stops with a `KeyError` that names the activation."
        if stops
        else "Without either, transformers loads the weights into a model with its original activations, which "
        "computes **another function**, because the config has no field for the activation."
    )
    # Lines are not broken inside the location, because the new line could then start with a Markdown marker.
    named = json.dumps(location, ensure_ascii=False).replace(" ", "\0")
    call = f"{auto}.from_pretrained({named}, trust_remote_code=True)"
    text = (
        f"Without the import, {markdown_code(call)} runs `{_CODE}.py`, which imports hf_gem if it is installed. "
        "Otherwise it uses the files `gem_*.py` in the checkpoint, which compute the same function in plain torch, "
        "more slowly. They need transformers 5.17 or newer. "
    )
    paragraphs = [text + otherwise, *([_RUNTIMES] if auto == "AutoModelForCausalLM" else [])]
    filled = "\n\n".join(
        textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False) for paragraph in paragraphs
    )
    return f"{_START}\n{filled}\n{_END}".replace("\0", " ")


def _check(model: Any) -> tuple[list[str], dict[str, str]]:
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        fix = "Save a timm model with timm.models.save_for_hf." if isinstance(model, nn.Module) else "Pass the model."
        raise TypeError(f"got {type(model).__name__}. save_for_hub takes a transformers model. {fix}")
    if _origin(type(model)) is None:
        raise ValueError(
            f"{type(model).__module__}.{type(model).__name__} is not a class of transformers. Its own code must be "
            "saved too, which save_for_hub does not do. Use register_for_auto_class and save_pretrained, and import "
            "hf_gem in that code."
        )
    if (problem := unnamed(model)) is not None:
        raise ValueError(problem)
    own = _own_code(model)
    modules = {spec.name for spec in specs(model)}
    fields = {plain_name(field.value) for field in activation_fields(model.config)}
    names = sorted(modules | {name for name in fields if is_ours(name)})  # as the config spells them
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no activation of the family. save_for_hub is only needed for these. Save it "
            "with save_pretrained."
        )
    if own is not None:
        return names, {"AutoConfig": type(model.config).__name__, _OWN[_own_name(own)]: type(model).__name__}
    auto_map = {auto: built[0].__name__ for auto, built in auto_classes(type(model.config)).items()}
    if type(model).__name__ not in auto_map.values():
        raise ValueError(
            f"no Auto class builds a {type(model).__name__} from a {type(model.config).__name__}. trust_remote_code "
            "only works with Auto classes. Save it with save_pretrained, or as one of "
            f"{', '.join(sorted(set(auto_map.values()))) or 'another class'}."
        )
    return names, auto_map


def _origin(cls: type) -> type | None:
    """Returns the transformers or hf_gem class of a model, also if the code of a checkpoint derives from it."""
    home = cls.__module__
    if home.startswith("transformers.") or _is_own(home):
        return cls
    repeats = _is_copy(home, _CODE) and not any(map(inspect.isroutine, vars(cls).values()))
    return _origin(cls.__bases__[0]) if repeats or _is_copy(home, "gem_fallback") else None


def _is_own(module: str) -> bool:
    """Returns whether a module of hf_gem defines models, or is a checkpoint's copy of such a module."""
    return any(module == f"hf_gem.training.{name}" or _is_copy(module, f"gem_{name}") for name in _OWN)


def _is_copy(module: str, name: str) -> bool:
    """Returns whether a module is a file of this name in a checkpoint. Only transformers imports such module names."""
    return module.startswith("transformers_modules.") and module.endswith(f".{name}")


def _own_code(model: Any) -> Path | None:
    """Returns the file that defines a model of hf_gem, or the copy of that file in a checkpoint."""
    origin = _origin(type(model))
    return Path(str(sys.modules[origin.__module__].__file__)) if origin and _is_own(origin.__module__) else None


def _own_name(file: Path) -> str:
    """Returns the name in hf_gem of a file found by `_own_code`."""
    return file.stem.removeprefix("gem_")


def auto_classes(config_class: type) -> dict[str, tuple[Any, ...]]:
    """Returns Auto class -> the classes that it builds from such a config, the default one first."""
    from transformers.models.auto import modeling_auto

    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if isinstance(auto, type) and mapping is not None and name.startswith("AutoModel") and config_class in mapping:
            built = mapping[config_class]
            found[name] = built if isinstance(built, tuple) else (built,)
    return found


def _code(auto_map: dict[str, str], names: list[str], own: Path | None) -> dict[str, str]:
    """Returns file name -> source of all code in a checkpoint. Files of hf_gem import from the files next to them."""
    families = {parse(name).family: parse(name).definition for name in names}
    homes = {name: _home(family) for name, family in families.items() if name not in BUILT_IN}
    own_name = None if own is None else _own_name(own)
    files = {f"{_CODE}.py": _modeling(auto_map, names, own_name, {name: key for name, (key, _) in homes.items()})}
    if own is not None:
        files[f"gem_{own_name}.py"] = own.read_text(encoding="utf-8")
    for file in _FALLBACK:
        source = (_ROOT / file).read_text(encoding="utf-8")
        files[f"gem_{Path(file).name}"] = _IMPORT.sub(r"from .gem_\1 import", source)
    for name, (_, source) in homes.items():
        files[f"gem_family_{name}.py"] = source
    return files


def _home(family: Family) -> tuple[str, str]:
    """Returns the variable of a user's own family in its file, and that file with its imports changed for a checkpoint.

    Raises:
        ValueError: There is no such file, or it uses more of hf_gem than a checkpoint contains.
    """
    found = next(_definitions(family), None)
    if found is None:
        raise ValueError(
            f"the family {shown(family.name)} is not a variable of an imported module that has a file. A checkpoint "
            "needs the file that defines it. Define it as a variable of an imported module, in its own file."
        )
    key, file = found
    try:
        return key, without_package(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} uses more of hf_gem than a checkpoint has: {error}. The file of a family may only use Family, "
            "register_family and what it imports from modules of hf_gem.family. Move the rest to another file."
        ) from None


def _definitions(family: Family) -> Iterator[tuple[str, Path]]:
    """Yields the variables that hold a family, each with the file that assigns it, not with those that import it."""
    wanted = (family.name, family.value)
    for module in list(sys.modules.values()):
        for key, value in list(getattr(module, "__dict__", {}).items()):
            # The family that a checkpoint shipped is registered as a copy, but with the same functions. Objects of
            # other classes are not asked for attributes, because some import a library then.
            if type(value).__name__ == "Family" and (getattr(value, "name", ""), getattr(value, "value", "")) == wanted:
                file = Path(getattr(module, "__file__", None) or "")
                if file.is_file() and key in _assigned(file.read_text(encoding="utf-8")):
                    yield key, file


def _assigned(source: str) -> set[str]:
    names = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name))
    return {node.id for node in names if isinstance(node.ctx, ast.Store)}


def without_package(source: str) -> str:
    """Changes the file of a family so that it imports from the files of a checkpoint and registers nothing.

    Raises:
        ValueError: Something of hf_gem would be left. The message is the line.
    """
    starts = list(itertools.accumulate((len(line) + 1 for line in source.encode().split(b"\n")), initial=0))

    def span(node: Any) -> tuple[int, int]:  # in bytes, as ast counts columns
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    edits: list[tuple[int, int, str]] = []
    done: set[Any] = set()
    for node in ast.walk(ast.parse(source)):  # what is around a node comes before it
        match node:
            case ast.ImportFrom("hf_gem", names) if {(name.name, name.asname) for name in names} <= _IMPORTED:
                edits.append((*span(node), _FAMILY))
            case ast.Import([ast.alias("hf_gem", None)]):
                edits.append((*span(node), _FAMILY))
            case ast.ImportFrom(str(module), names) if module in _MODULES:
                line = ast.ImportFrom(f"gem_{module.rpartition('.')[2]}", names, 1)
                edits.append((*span(node), ast.unparse(line)))
            case ast.Call(ast.Name("register_family") | ast.Attribute(ast.Name("hf_gem"), "register_family"), [family]):
                (start, end), (first, last) = span(node), span(family)
                edits += [(start, first, "("), (last, end, ")")]
                done.update(ast.walk(node.func))
            case ast.Attribute(ast.Name("hf_gem"), "Family"):
                edits.append((*span(node), "Family"))
                done.add(node.value)
            case ast.Import(names) if any(name.name.partition(".")[0] == "hf_gem" for name in names):
                raise ValueError(f"line {node.lineno}")
            case ast.ImportFrom(module, _, level) if level or str(module).partition(".")[0] == "hf_gem":
                # The file of a family in a checkpoint may be saved again.
                if module is None or not module.startswith("gem_"):
                    raise ValueError(f"line {node.lineno}")
            case ast.Name("hf_gem" | "register_family") if node not in done:
                raise ValueError(f"line {node.lineno}")
    changed = source.encode()
    for start, end, text in sorted(edits, reverse=True):
        changed = changed[:start] + text.encode() + changed[end:]
    return changed.decode()


def _modeling(auto_map: dict[str, str], names: list[str], own: str | None, families: dict[str, str]) -> str:
    """Returns the source of the module that loads a checkpoint.

    Args:
        auto_map: Auto class -> class.
        names: Names of the activations.
        own: Name of the hf_gem file that defines the model, or None.
        families: Name of a user's own family -> its variable in its file.
    """
    classes = sorted({name for auto, name in auto_map.items() if auto != "AutoConfig"})
    origin = "" if own else "transformers."
    subclasses = "\n\n".join(f"class {name}(base({origin}{name})):\n    pass\n" for name in classes)
    library = f"from .gem_{own} import {', '.join(sorted(auto_map.values()))}" if own else "import transformers"
    shipped = "".join(f"    from .gem_family_{name} import {key}\n" for name, key in families.items())
    imports, ours, added = "", "", ""
    if families:  # hf_gem only knows a user's own family once it is registered
        imports = f"    from hf_gem.integrations.families import register_shipped\n\n{shipped}\n"
        ours = "".join(f"    register_shipped({key})\n" for key in families.values())
        added = f"{shipped}    from .gem_table import add\n\n" + "".join(
            f"    add({key})\n" for key in families.values()
        )
    registered = ", ".join(f'"{name}"' for name in names)
    return f'''"""Loads this checkpoint with trust_remote_code=True, using hf_gem if it is installed."""

{library}

try:
    # Imports a name, because an unrelated folder called hf_gem can be imported too. hf_gem hooks into model building.
    from hf_gem.family.table import family_named  # noqa: F401
{imports}{ours}
    def base(cls):
        return cls
except ImportError:
    from .gem_fallback import base, register
{added}
    register({registered})


{subclasses}'''


def _with_notes(card: str, auto: str, notes: str, imported: str) -> str:
    if _START in card and _END in card:
        return replace_between(card, _START, _END, notes.removeprefix(_START).removesuffix(_END))
    return f"""{card.rstrip()}

## Use

```bash
pip install hf-gem
```

```python
import {imported}  # registers the activation
from transformers import {auto}

model = {auto}.from_pretrained("this folder or repository")
```

{notes}
"""


def _new_card(model: Any) -> str:
    return (
        f"---\nlibrary_name: transformers\ntags:\n- hf_gem\n---\n\n# {type(model).__name__}\n\n"
        "An activation of the GEM family (arXiv 2604.21677) in a transformers model.\n"
    )
