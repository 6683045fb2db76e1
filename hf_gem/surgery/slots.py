"""Slots: the places in a model that hold an activation. Functions to find, replace and restore them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..family.names import GemSpec

BUILT = "_hf_gem_built"  # an attribute of activations that the model gets again when it is built: their name
_PACKED = "used_nested_tensor"  # an attribute; see `match_nested_tensors`
_LOOPS = {"children", "named_children", "_modules"}  # names in code that goes through the submodules of a module
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Copies and pickles of this layer get a ReLU, unless the activation is an attribute.
_RESTORES = nn.TransformerDecoderLayer
# Classes that overwrite the output of their activation, so its backward pass has to keep the input.
_OVERWRITES = {"GammaAct"}  # in timm's nfnet


@dataclass(frozen=True)
class Slot:
    """A place that holds an activation: the attribute `key` of the module `owner`, a submodule or a plain function."""

    path: str
    owner: nn.Module
    key: str

    @property
    def occupant(self) -> Callable[..., Any]:
        """The module or function that the slot holds now.

        Raises:
            KeyError: The slot holds nothing callable.
        """
        module = getattr(self.owner, self.key, None)
        found: object = module if isinstance(module, nn.Module) else vars(self.owner).get(self.key)
        if not callable(found):
            raise KeyError(self.path)
        return found

    def put(self, occupant: Callable[..., Any]) -> None:
        """Replaces the module or function in the slot.

        A module in place of a function becomes a submodule, unless `no_submodule` has a reason against it.
        """
        held = vars(self.owner)  # torch keeps submodules elsewhere
        if isinstance(occupant, nn.Module) and (self.key not in held or no_submodule(self.owner) is None):
            setattr(self.owner, self.key, occupant)
        else:
            if self.key not in held:
                delattr(self.owner, self.key)
            held[self.key] = occupant
        if isinstance(self.owner, nn.TransformerEncoderLayer) and self.key == "activation":
            # In inference, the layer runs a fused kernel, and this number selects the activation of that kernel.
            relu = occupant is nn.functional.relu or isinstance(occupant, nn.ReLU)
            gelu = occupant is nn.functional.gelu or isinstance(occupant, nn.GELU)
            self.owner.activation_relu_or_gelu = 1 if relu else 2 if gelu else 0


def no_submodule(owner: nn.Module) -> str | None:
    """Returns the reason why an activation in place of a function must not become a submodule, or None."""
    if isinstance(owner, _RESTORES):
        return "copies of this class run a ReLU if the activation is a submodule"
    held = (held for cls in classes(owner) for held in vars(cls).values())
    functions = map(inspect.unwrap, filter(inspect.isfunction, held))
    loops = any(not _LOOPS.isdisjoint(function.__code__.co_names) for function in functions)
    if loops or isinstance(owner, _CONTAINERS):
        return "this class goes through its submodules, and would then run the activation once more"
    return None


def classes(module: nn.Module) -> Iterator[type]:
    """Yields the class of a module and those it is derived from, before `nn.Module`."""
    return itertools.takewhile(lambda cls: cls is not nn.Module, type(module).__mro__)


def join(path: str, key: str) -> str:
    """Joins the path of a module and a key in it. With `key=""`, returns the prefix of all paths in that module."""
    return f"{path}.{key}" if path else key


def spec_of(occupant: object) -> GemSpec | None:
    """Returns the spec of a module of the family, from hf_gem or the code of a checkpoint. None for anything else."""
    spec = getattr(occupant, "spec", None)
    return spec if isinstance(spec, GemSpec) else None  # in other modules, `spec` may mean something else


def is_layer(module: nn.Module) -> bool:
    """Returns whether a module is itself a layer: a torch layer that is not an activation, or a module with weights.

    Weights with one element do not count, and neither do those of PReLU.
    """
    homes = {cls.__module__.rpartition(".")[2] for cls in type(module).__mro__ if "torch.nn.modules." in cls.__module__}
    if homes - {"module", "activation"}:
        return True
    return any(parameter.numel() != 1 for parameter in module.parameters()) and not isinstance(module, nn.PReLU)


def does_more(occupant: object) -> bool:
    """Returns whether a module is more than an activation, judging by its weights and its parts.

    Names do not matter, since any module may be an activation. An Identity does not count as more: it may take the
    place of an activation.
    """
    if not isinstance(occupant, nn.Module) or isinstance(occupant, nn.Identity) or spec_of(occupant) is not None:
        return False
    parts = list(occupant.modules())[::-1]  # innermost first, since the weights of lazy modules have no shape yet
    return any(map(is_layer, parts)) or any(buffer.numel() != 1 for buffer in occupant.buffers())


def slot_at(model: nn.Module, path: str) -> Slot:
    """Returns the slot at a dotted path.

    Raises:
        KeyError: There is no such module, or the slot holds nothing callable.
    """
    owner, _, key = path.rpartition(".")
    try:
        slot = Slot(path, model.get_submodule(owner), key)
    except AttributeError:
        raise KeyError(path) from None
    slot.occupant  # noqa: B018  # raises
    return slot


def module_slots(model: nn.Module) -> Iterator[Slot]:
    """Yields the slots that hold a module, submodule or not.

    A slot in a module that occurs twice is listed once, under its first path.
    """
    keys: dict[str, list[str]] = {}
    for path, _ in model.named_modules(remove_duplicate=False):
        above, _, key = path.rpartition(".")
        keys.setdefault(above, []).append(key)
    for path, owner in model.named_modules():
        hidden = [key for key, held in vars(owner).items() if isinstance(held, nn.Module)]
        yield from (Slot(join(path, key), owner, key) for key in dict.fromkeys([*keys.get(path, ()), *hidden]) if key)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields what `model.named_modules()` does, and the activations of the family that are no submodules."""
    seen = set(model.modules())
    for path, owner in model.named_modules():
        yield path, owner
        for key, held in list(vars(owner).items()):
            if isinstance(held, nn.Module) and held not in seen and spec_of(held) is not None:
                seen.add(held)
                yield join(path, key), held


def replace(
    model: nn.Module, slots: dict[GemSpec, list[Slot]], make: Callable[[str], nn.Module], written_down: bool = True
) -> None:
    """Puts members of the family into slots. Slots that share a module share the new one too, unless it is learnable.

    A learnable activation gets the device and dtype of the weights next to it.

    Args:
        model: The model in which the paths of the slots start.
        slots: Member of the family -> slots.
        make: Function that builds the module for a name.
        written_down: Whether the replacement belongs to the model's plan and can be undone.
    """
    made: dict[tuple[int, GemSpec], nn.Module] = {}
    ready = []
    for spec, places in slots.items():
        for slot in places:
            old = slot.occupant
            # Everyone who imports a function shares it, so that does not mean that this model shares its activations.
            distinct = spec.learnable or not isinstance(old, nn.Module)
            new = None if distinct else made.get((id(old), spec))
            overwritten = type(slot.owner).__name__ in _OVERWRITES
            if new is None or overwritten:
                neighbour = _neighbour(model, slot.path) if spec.learnable else None
                new = made[id(old), spec] = _make(make, spec.name, neighbour)
            if overwritten and hasattr(new, "save"):  # the class in a checkpoint has no such choice
                vars(new)["save"] = "input"
            if written_down:
                # A tuple hides the module from the model. If a conversion is converted again, the original one stays.
                vars(new)["replaces"] = getattr(old, "replaces", (old,))
            else:
                vars(new)[BUILT] = spec.name
            ready.append((slot, new.train(slot.owner.training)))
    for slot, new in ready:
        slot.put(new)
    match_nested_tensors(model)


def _neighbour(model: nn.Module, path: str) -> Tensor | None:
    """Returns a weight of the innermost module around a path that has weights."""
    while path:
        path = path.rpartition(".")[0]
        for tensor in model.get_submodule(path).parameters():
            if tensor.is_floating_point() and tensor.itemsize > 1:  # skips float8
                return tensor
    return None


def _make(make: Callable[[str], nn.Module], name: str, neighbour: Tensor | None) -> nn.Module:
    with torch.inference_mode(False):  # parameters made in inference mode could not be trained
        if neighbour is None:
            return make(name)
        with neighbour.device:
            return make(name).to(neighbour.dtype)


def match_nested_tensors(model: nn.Module) -> None:
    """Lets a torch encoder pack padded batches only if all its layers run the fused kernel that supports them.

    The encoder decides this when it is built. Without this function, a layer whose activation was replaced later would
    get packed tensors.
    """
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            fused = all(getattr(layer, "activation_relu_or_gelu", 0) for layer in encoder.layers)
            if not fused and getattr(encoder, "use_nested_tensor", False):
                encoder.use_nested_tensor = False
                vars(encoder)[_PACKED] = True
            elif fused and vars(encoder).pop(_PACKED, False):
                encoder.use_nested_tensor = True


def converted(model: nn.Module) -> Iterator[Slot]:
    """Yields the slots whose module replaced something."""
    return (slot for slot in module_slots(model) if "replaces" in vars(slot.occupant))


def undo(model: nn.Module) -> list[str]:
    """Restores everything that conversions replaced, and returns the paths."""
    slots = list(converted(model))
    for slot in slots:
        module: Any = slot.occupant
        old = module.replaces[0]
        slot.put(old.train(module.training) if isinstance(old, nn.Module) else old)
    match_nested_tensors(model)
    return [slot.path for slot in slots]
