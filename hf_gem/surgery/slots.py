"""Places in a model that hold an activation: what is there, what is put there, and how that is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..family.names import GemSpec, parse

BUILT = "_hf_gem_built"  # an attribute of the activations that come with their model when it is built again
_PACKED = "used_nested_tensor"  # an attribute; see `match_nested_tensors`


# Classes that overwrite what their activation returns, so that its backward pass has to keep the input.
_OVERWRITES = {"GammaAct"}  # of timm's nfnet


@dataclass(frozen=True)
class Slot:
    """A place that holds an activation: attribute `key` of the module `owner`, a submodule or a plain function."""

    path: str
    owner: nn.Module
    key: str

    @property
    def occupant(self) -> Callable[..., Any]:
        """What is there now.

        Raises:
            KeyError: nothing that can be called.
        """
        module = getattr(self.owner, self.key, None)
        found: object = module if isinstance(module, nn.Module) else vars(self.owner).get(self.key)
        if not callable(found):
            raise KeyError(self.path)
        return found

    def put(self, occupant: Callable[..., Any]) -> None:
        """Puts another module or function there."""
        if not isinstance(occupant, nn.Module):
            delattr(self.owner, self.key)  # a module refuses a function in the place of a submodule
        setattr(self.owner, self.key, occupant)
        if isinstance(self.owner, nn.TransformerEncoderLayer) and self.key == "activation":
            # Its inference path runs a fused kernel for the activation that this number stands for.
            relu = occupant is nn.functional.relu or isinstance(occupant, nn.ReLU)
            gelu = occupant is nn.functional.gelu or isinstance(occupant, nn.GELU)
            self.owner.activation_relu_or_gelu = 1 if relu else 2 if gelu else 0


def join(path: str, key: str) -> str:
    """The dotted path of `key` in the module at `path`; with `""`, what all paths in it start with."""
    return f"{path}.{key}" if path else key


def spec_of(occupant: object) -> GemSpec | None:
    """The function that a module of the family stands for, in hf_gem or in a checkpoint; None for all others."""
    spec = getattr(occupant, "spec", None)
    return spec if isinstance(spec, GemSpec) else None  # others may mean something else by that attribute


def is_layer(module: nn.Module) -> bool:
    """Whether a module by itself is a layer of torch that is no activation, or has weights as PReLU alone has them."""
    homes = {cls.__module__.rpartition(".")[2] for cls in type(module).__mro__ if "torch.nn.modules." in cls.__module__}
    if homes - {"module", "activation"}:
        return True
    return any(parameter.numel() != 1 for parameter in module.parameters()) and not isinstance(module, nn.PReLU)


def does_more(occupant: object) -> bool:
    """Whether what is in a slot is more than an activation, by its weights and by what it is made of.

    Names do not count, since any module may be an activation, and an Identity may stand where one is wanted.
    """
    if not isinstance(occupant, nn.Module) or isinstance(occupant, nn.Identity) or spec_of(occupant) is not None:
        return False
    parts = list(occupant.modules())[::-1]  # the innermost first, of which some have weights without a shape as yet
    return any(map(is_layer, parts)) or any(buffer.numel() != 1 for buffer in occupant.buffers())


def slot_at(model: nn.Module, path: str) -> Slot:
    """The slot with a dotted path.

    Raises:
        KeyError: there is no such module, or nothing in it that can be called.
    """
    owner, _, key = path.rpartition(".")
    try:
        slot = Slot(path, model.get_submodule(owner), key)
    except AttributeError:
        raise KeyError(path) from None
    slot.occupant  # noqa: B018  # raises
    return slot


def module_slots(model: nn.Module) -> Iterator[Slot]:
    """The place of every submodule; one in a module that is there twice counts once, under its first path."""
    keys: dict[str, list[str]] = {}
    for path, _ in model.named_modules(remove_duplicate=False):
        above, _, key = path.rpartition(".")
        keys.setdefault(above, []).append(key)
    for path, owner in model.named_modules():
        yield from (Slot(join(path, key), owner, key) for key in keys.get(path, ()) if key)


def replace(
    model: nn.Module, slots: dict[str, list[Slot]], make: Callable[[str], nn.Module], written_down: bool = True
) -> None:
    """Puts the named activations into slots; what shares a module goes on sharing one, unless it is learnable.

    A learnable one is made beside the weights of its neighbours, on their device and in their dtype.

    Args:
        model: The model from which the paths of the slots start.
        slots: Name of the family -> slots.
        make: Builds the module for a name.
        written_down: Whether this belongs to the plan of the model and can be undone.
    """
    made: dict[tuple[int, str], nn.Module] = {}
    ready = []
    for name, places in slots.items():
        learnable = parse(name).learnable
        for slot in places:
            old = slot.occupant
            # Functions are shared by everyone who imports them, which says nothing about this model.
            distinct = learnable or not isinstance(old, nn.Module)
            new = None if distinct else made.get((id(old), name))
            overwritten = type(slot.owner).__name__ in _OVERWRITES
            if new is None or overwritten:
                new = made[id(old), name] = _make(make, name, _neighbour(model, slot.path) if learnable else None)
            if overwritten and hasattr(new, "save"):  # a checkpoint's own class has one way only
                vars(new)["save"] = "input"
            if written_down:
                # In a tuple, which hides it from the model; the first one, where a conversion is converted.
                vars(new)["replaces"] = getattr(old, "replaces", (old,))
            else:
                vars(new)[BUILT] = True
            ready.append((slot, new.train(slot.owner.training)))
    for slot, new in ready:
        slot.put(new)
    match_nested_tensors(model)


def _neighbour(model: nn.Module, path: str) -> Tensor | None:
    """A weight of the innermost module around a path that has any."""
    while path:
        path = path.rpartition(".")[0]
        for tensor in model.get_submodule(path).parameters():
            if tensor.is_floating_point() and tensor.itemsize > 1:  # not one in float8
                return tensor
    return None


def _make(make: Callable[[str], nn.Module], name: str, neighbour: Tensor | None) -> nn.Module:
    with torch.inference_mode(False):  # in which no parameter is made that can be trained
        if neighbour is None:
            return make(name)
        with neighbour.device:
            return make(name).to(neighbour.dtype)


def match_nested_tensors(model: nn.Module) -> None:
    """Lets torch's encoders pack padded batches only where all their layers run the fused kernel that understands it.

    They decide that when they are built; a layer whose activation has changed since would get the packed tensors.
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
    """The slots whose module stands in for something else."""
    return (slot for slot in module_slots(model) if "replaces" in vars(slot.occupant))


def undo(model: nn.Module) -> list[str]:
    """Puts back what conversions replaced, and returns the paths."""
    slots = list(converted(model))
    for slot in slots:
        module: Any = slot.occupant
        old = module.replaces[0]
        slot.put(old.train(module.training) if isinstance(old, nn.Module) else old)
    match_nested_tensors(model)
    return [slot.path for slot in slots]
