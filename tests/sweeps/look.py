"""What a built model runs, as far as it can be made to run: the parts that made-up inputs reach are audited; of the
others the modules are counted and the source is read."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_gem import audit
from hf_gem.modules import GemActivation
from hf_gem.surgery.kinds import is_stock, kind, stock_slots

NAME = "gem_n2"
# What can come of it.
ALL, PARTLY, SAYS_SO, SILENT = "all", "partly", "none, and says so", "IGNORED SILENTLY"
RAISES, NOTHING = "raises", "has no activation"
NO_MODEL, NO_BUILD = "part of another model", "cannot be built"

_CALL = re.compile(
    r"\b(?:F|nn\.functional|torch)\.(relu6?|gelu|silu|[cs]?elu|mish|leaky_relu|hardswish)\("
    r"|(\w+) \*=? torch\.sigmoid\(\2\)"
)


@dataclass
class Look:
    """The activations of one model.

    Attributes:
        gem: Number of GEM calls, and of GEM modules in parts that could not be run.
        others: (function, place) of the other activations, gates not among them.
        unused: Paths of GEM modules that a forward pass of their part did not reach.
        not_run: Why the model, or a part of it, could not be run.
        said: The warnings about the name while the model was made.
    """

    gem: int = 0
    others: set[tuple[str, str]] = field(default_factory=set)
    unused: list[str] = field(default_factory=list)
    not_run: str = ""
    said: list[str] = field(default_factory=list)


def look(model: nn.Module, is_part: Callable[[nn.Module], bool] = lambda module: False) -> Look:
    """Audits a model and, where a forward pass of it does not reach them, those of its parts that can be run alone."""
    found = Look()
    parts = {path: module for path, module in model.named_modules() if path == "" or is_part(module)}
    entered: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, args: entered.add(module)) for module in model.modules()]
    ran: set[nn.Module] = set()
    for part in parts.values():
        if part in ran:
            continue
        entered.clear()
        try:
            report = audit(part)
        except Exception as error:
            found.not_run = found.not_run or first_line(error)
            continue
        ran |= entered
        found.gem += report.num_gem
        found.others |= {(_plain(call.function), short(call.location)) for call in report.others}
    for hook in hooks:
        hook.remove()
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, GemActivation) and module not in ran:
            if parts[_innermost(path, parts)] in ran:
                found.unused.append(path)
            else:
                found.gem += 1
        elif module not in ran and parts[_innermost(path, parts)] not in ran:
            found.others |= _written_in(type(module))
    for slot in stock_slots(model):
        runner: Any = slot.occupant if isinstance(slot.occupant, nn.Module) else slot.owner
        if runner not in ran and is_stock(slot.occupant):
            path = slot.path.rpartition(".")[0]
            while path and type(modules[path]).__module__.startswith("torch."):
                path = path.rpartition(".")[0]
            owner = type(modules[path])
            found.others.add(
                (str(kind(slot.occupant)), f"{short(owner.__module__.replace('.', '/'))}.py {owner.__name__}")
            )
    return found


@functools.cache
def _written_in(cls: type) -> frozenset[tuple[str, str]]:
    """The activations that the methods of a class call by name."""
    found = set()
    for base in cls.__mro__:
        if not base.__module__.startswith(("transformers.models.", "timm.models.")):
            continue
        for name, method in vars(base).items():
            if name != "__init__" and inspect.isfunction(method):
                lines, first = inspect.getsourcelines(inspect.unwrap(method))
                for number, line in enumerate(lines, first):
                    if match := _CALL.search(line.partition("#")[0]):
                        place = f"{short(base.__module__.replace('.', '/'))}.py:{number}"
                        found.add((match[1] or "silu", place))
    return frozenset(found)


def _innermost(path: str, parts: dict[str, nn.Module]) -> str:
    while path not in parts:
        path = path.rpartition(".")[0]
    return path


def _plain(function: str) -> str:
    return function.removesuffix(" (hand-written)")


def short(location: str) -> str:
    """Without what every row has: the folder of a model's own file."""
    return re.sub(r"^(transformers/models/\w+|timm/models)/", "", location)


def first_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:250]
