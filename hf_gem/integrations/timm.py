"""timm: its activation registries, the arguments of models, and the configs of saved ones.

Names that the memory-efficient (`_ME`) dicts of `timm.layers.create_act` do not hold are looked up in the `_DEFAULT`
ones, and scriptable and exportable modes read only these, so these two are all there is to replace there. Every model
is built by `build_model_with_cfg`, which is where a name becomes an `ActName` and where a conversion is repeated.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import functional
from ..family.names import GemSpec, is_claimed, parse
from ..init import gain
from ..modules import GemActivation, get_activation, module_factory
from ..surgery.convert import Conversion, convert
from ..surgery.kinds import is_stock, kind, stock_slots
from ..surgery.plans import PLAN, apply_plan, plan_of, unnamed
from ..surgery.slots import BUILT
from .registry import Installer, NameLookup, lookups, patch


class ActName(str):
    """A name that is also called like what it stands for: given a tensor it is the function, else it builds the layer.

    Some models look `act_layer` up and others call it; this serves both, and a config can still be saved as JSON.
    """

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        spec = parse(self)
        if args and not isinstance(args[0], bool):
            return _make_function(spec)(*args, **kwargs)
        return module_factory(spec)(**kwargs)  # without a positional `inplace`, which has no effect


def _function(x: Tensor, n: int, eps: float, family: str, inplace: bool = False) -> Tensor:
    """An activation function as timm calls it: `inplace` is accepted, and the input never overwritten.

    The backward pass keeps the input: nfnet multiplies the result in place, and there is no module to say so to.
    """
    return functional.activation(x, family, n, eps, save="input")


def _make_function(spec: GemSpec) -> Callable[..., Tensor]:
    if spec.learnable:
        fixed = spec.name.removesuffix("_learnable")
        raise ValueError(
            f"{spec.name!r} has a parameter, which a function cannot own; use get_act_layer instead, or {fixed!r} in a "
            "model that takes a function"
        )
    return functools.partial(_function, n=spec.n, eps=spec.eps, family=spec.family)


class _Layers(NameLookup):
    make = staticmethod(lambda spec: ActName(spec.name))


class _Functions(NameLookup):
    make = staticmethod(_make_function)


class _Gammas(NameLookup):
    make = staticmethod(lambda spec: gain(spec.name, centered=True))


def _build_model(original: Any, model_cls: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """Builds with names that can be called, and repeats a saved conversion before weights are loaded into it.

    The conversion is an argument of the model, which timm without hf_gem refuses by its key.
    """
    plan = kwargs.pop(PLAN, None)
    names = {key: parse(value).name for key, value in kwargs.items() if "act_layer" in key and is_claimed(value)}
    kwargs.update({key: ActName(name) for key, name in names.items()})
    if "act_layer" in names:
        _unfix(kwargs)

    def build(**kwargs: Any) -> nn.Module:
        try:
            model: nn.Module = model_cls(**kwargs)
        except TypeError as error:
            if "act_layer" in names and "act_layer" in str(error):
                raise TypeError(f"{error}; use hf_gem.create_timm_model, or convert the stock model") from error
            raise
        if plan is not None:
            apply_plan(plan, model, get_activation)
        for module in model.modules():
            if isinstance(module, GemActivation):  # timm gives its device to every layer but activations
                module.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
                if "replaces" not in vars(module) and module.spec.name in names.values():
                    vars(module)[BUILT] = True  # not by a class as act_layer, which no config holds
        if plan is None:  # else it is as it was when it was saved
            _warn_of_what_is_left(names, model)
        return model

    model: Any = original(build, *args, **kwargs)
    if names:
        # As create_model of timm 1.0.31 records arguments; this does it for older versions and without create_model.
        model._model_args = {**getattr(model, "_model_args", {}), **names}
    return model  # type: ignore[no-any-return]


def _unfix(kwargs: dict[str, Any]) -> None:
    """Lets `act_layer` reach the blocks of an EfficientNet whose definition names another activation."""
    stages = kwargs.get("block_args")
    if isinstance(stages, list):  # elsewhere, a dict of another meaning
        kwargs["block_args"] = [[{**block, "act_layer": None} for block in stage] for stage in stages]
    se_layer = kwargs.get("se_layer")
    if isinstance(se_layer, functools.partial) and "force_act_layer" in se_layer.keywords:
        kwargs["se_layer"] = functools.partial(se_layer, force_act_layer=None)


def _warn_of_what_is_left(names: dict[str, str], model: nn.Module) -> None:
    if not names:
        return  # a model without our names, to be built no slower than timm builds it
    modules = list(model.modules())
    used = {module.spec.name for module in modules if isinstance(module, GemActivation)}
    used |= {value for module in modules for value in vars(module).values() if isinstance(value, ActName)}  # functions
    for key, name in names.items():
        if name not in used:
            warnings.warn(
                f"{type(model).__name__} takes {key}={name!r} and uses it nowhere: its activations are part of its "
                "normalisation layers, or not there",
                stacklevel=2,
            )
    if "act_layer" not in names:
        return
    left = [f"{kind(slot.occupant)} at {slot.path}" for slot in stock_slots(model) if is_stock(slot.occupant)]
    if left:
        warnings.warn(
            f"act_layer={names['act_layer']!r} does not reach {len(left)} of the activations of "
            f"{type(model).__name__}, such as {left[0]}, which stay as they are; hf_gem.convert replaces them",
            stacklevel=2,
        )


def _save_config(
    original: Any,
    model: nn.Module,
    config_path: Any,
    model_config: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Saves the names that a model was built with, and how it has been changed since."""
    if (problem := unnamed(model)) is not None:
        warnings.warn(problem, stacklevel=2)
    recorded: Any = getattr(model, "_model_args", {})
    recorded.pop(PLAN, None)  # the conversion it was loaded with; what counts is the one it has now
    ours: dict[str, Any] = {key: value for key, value in recorded.items() if is_claimed(value)}
    plan = plan_of(model)
    if plan is not None:
        ours[PLAN] = plan
    given = {**(model_config or {}).get("model_args", {}), **(model_args or {})}
    original(model, config_path, model_config, {**ours, **given}, *args, **kwargs)


def create_timm_model(name: str, act: str, **kwargs: Any) -> tuple[nn.Module, Conversion]:
    """`timm.create_model` with every activation of the family, whether or not the model takes an `act_layer`.

    A model with random weights is built with `act_layer=act` where it takes that, and the rest is converted. With
    `pretrained=True` all of it is converted once the weights are in. Saved with timm, the model is rebuilt the same.

    Args:
        name: Of a timm model.
        act: Of the family.
        kwargs: For `timm.create_model`.

    Returns:
        The model, and the report of `hf_gem.convert` on what `act_layer` left: print it.

    Raises:
        ValueError: the name of the activation is malformed, or the model has none to replace.
    """
    import timm

    parse(act)
    if "act_layer" in kwargs:
        raise ValueError(f"got act={act!r} and act_layer={kwargs['act_layer']!r}, which set the same thing; give act")
    model = None
    if not kwargs.get("pretrained"):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "act_layer=.* does not reach|.* uses it nowhere", module="hf_gem")
                model = timm.create_model(name, act_layer=act, **kwargs)
        except TypeError as error:
            if "act_layer" not in str(error):
                raise
    if model is None:
        model = timm.create_model(name, **kwargs)
    return model, convert(model, act)


INSTALLERS: dict[str, Installer] = {
    "timm.layers.create_act": lookups(
        "timm.layers.create_act",
        {"_ACT_LAYER_DEFAULT": _Layers, "_ACT_FN_DEFAULT": _Functions},
        beside=("_ACT_LAYER_ME", "_ACT_FN_ME"),
    ),
    "timm.models.nfnet": lookups("timm.models.nfnet", {"_nonlin_gamma": _Gammas}),
    "timm.models._builder": patch(
        "build_model_with_cfg",
        _build_model,
        "some models take the class of an activation only, none a saved conversion",
    ),
    "timm.models._hub": patch("save_config_for_hf", _save_config, "pass the activation of a saved model as model_args"),
}
