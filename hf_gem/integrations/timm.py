"""timm: hooks into its activation registries, the arguments of models, and the configs of saved models.

If a name is not in the memory-efficient (`_ME`) dicts of `timm.layers.create_act`, timm looks it up in the `_DEFAULT`
dicts. Scriptable and exportable modes only read these. So it is enough to replace the two `_DEFAULT` dicts. Every model
is built by `build_model_with_cfg`, so a name becomes an `ActName` there, and saved conversions are restored there.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeGuard

from torch import Tensor, nn

from .. import functional
from ..family.names import GemSpec, is_claimed, parse
from ..files import shown
from ..init import gain
from ..modules import GemActivation, get_activation, module_factory
from ..surgery.convert import Conversion, convert
from ..surgery.kinds import is_stock, kind, stock_slots
from ..surgery.plans import PLAN, apply_plan, plan_of, unnamed
from ..surgery.reports import counted
from ..surgery.slots import BUILT
from .registry import Installer, NameLookup, lookups, patch


class ActName(str):
    """A name that can also be called: with a tensor it applies the activation, otherwise it builds the layer.

    Some models look up `act_layer` and others call it. This works for both, and a config can still be saved as JSON.
    """

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        spec = parse(self)
        if args and not isinstance(args[0], bool):
            return _make_function(spec)(*args, **kwargs)
        return module_factory(spec)(**kwargs)  # drops a positional `inplace`, which has no effect


def _function(x: Tensor, n: int, eps: float, family: str, inplace: bool = False) -> Tensor:
    """Computes an activation, with the signature of timm's. Ignores `inplace`, and never overwrites the input.

    The backward pass keeps the input, because nfnet multiplies the result in place.
    """
    return functional.activation(x, family, n, eps, save="input")


def _make_function(spec: GemSpec) -> Callable[..., Tensor]:
    if spec.learnable:
        fixed = spec.name.removesuffix("_learnable")
        raise ValueError(
            f"got {spec.name!r} for get_act_fn. A function cannot own the parameter of a learnable eps. Use "
            f"get_act_layer, or use {fixed!r} in a model that takes a function."
        )
    return functools.partial(_function, n=spec.n, eps=spec.eps, family=spec.family)


class _Layers(NameLookup):
    make = staticmethod(lambda spec: ActName(spec.name))


class _Functions(NameLookup):
    make = staticmethod(_make_function)


class _Gammas(NameLookup):
    make = staticmethod(lambda spec: gain(spec.name, centered=True))


def _is_ours(value: object) -> TypeGuard[str]:
    """Returns whether an argument is meant as one of the family. Names in timm's registries belong to who put them."""
    if not is_claimed(value):
        return False
    from timm.layers import create_act

    layers = (create_act._ACT_LAYER_DEFAULT, create_act._ACT_LAYER_ME)
    return not any(dict.__contains__(registry, value.lower()) for registry in layers)  # `in` includes the family


def _build_model(original: Any, model_cls: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """Builds a model with names that can be called, and restores a saved conversion before weights are loaded.

    The conversion is stored as an argument of the model. Without hf_gem, timm rejects this argument.
    """
    plan = kwargs.pop(PLAN, None)
    names = {key: parse(value).name for key, value in kwargs.items() if "act_layer" in key and _is_ours(value)}
    kwargs.update({key: ActName(name) for key, name in names.items()})
    if "act_layer" in names:
        _unfix(kwargs)

    def build(**kwargs: Any) -> nn.Module:
        try:
            model: nn.Module = model_cls(**kwargs)
        except TypeError as error:
            if "act_layer" in names and "act_layer" in str(error):
                raise TypeError(f"{error}. Use hf_gem.create_timm_model, or convert the original model.") from error
            raise
        if plan is not None:
            apply_plan(plan, model, get_activation)
        for module in model.modules():
            if isinstance(module, GemActivation):  # timm passes the device to every layer except activations
                module.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
                if "replaces" not in vars(module) and module.spec.name in names.values():
                    vars(module)[BUILT] = module.spec.name  # not if act_layer is a class, which no config can store
        if plan is None:  # a saved model is in the state in which it was saved
            _warn_of_what_is_left(names, model)
        return model

    model: Any = original(build, *args, **kwargs)
    if names:
        # create_model of timm 1.0.31 records arguments in this way. Older versions and direct calls do not.
        model._model_args = {**getattr(model, "_model_args", {}), **names}
    return model  # type: ignore[no-any-return]


def _unfix(kwargs: dict[str, Any]) -> None:
    """Makes `act_layer` reach EfficientNet blocks whose definition names another activation."""
    stages = kwargs.get("block_args")
    if isinstance(stages, list):  # in other models this is a dict with another meaning
        kwargs["block_args"] = [[{**block, "act_layer": None} for block in stage] for stage in stages]
    se_layer = kwargs.get("se_layer")
    if isinstance(se_layer, functools.partial) and "force_act_layer" in se_layer.keywords:
        kwargs["se_layer"] = functools.partial(se_layer, force_act_layer=None)


def _warn_of_what_is_left(names: dict[str, str], model: nn.Module) -> None:
    if not names:
        return  # keeps building as fast as in plain timm if no name of the family is used
    modules = list(model.modules())
    used = {module.spec.name for module in modules if isinstance(module, GemActivation)}
    used |= {value for module in modules for value in vars(module).values() if isinstance(value, ActName)}  # functions
    for key, name in names.items():
        if name not in used:
            warnings.warn(
                f"{type(model).__name__} accepts {key}={name!r} but does not use it: its activations are part of its "
                "normalisation layers, or it has none. List them with hf_gem.audit(model).",
                stacklevel=2,
            )
    if "act_layer" not in names:
        return
    left = [f"{kind(slot.occupant)} at {slot.path}" for slot in stock_slots(model) if is_stock(slot.occupant)]
    if left:
        warnings.warn(
            f"{type(model).__name__} has {counted(len(left), 'activation')} that did not pick up "
            f"act_layer={names['act_layer']!r}, such as {left[0]}. Replace them with "
            f"hf_gem.convert(model, {names['act_layer']!r}).",
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
    """Saves the names that a model was built with, and its conversion."""
    if (problem := unnamed(model)) is not None:
        warnings.warn(problem, stacklevel=2)
    recorded: Any = getattr(model, "_model_args", {})
    recorded.pop(PLAN, None)  # the conversion it was loaded with, which may have changed since
    ours: dict[str, Any] = {key: value for key, value in recorded.items() if _is_ours(value)}
    plan = plan_of(model)
    if plan is not None:
        ours[PLAN] = plan
    given = {**(model_config or {}).get("model_args", {}), **(model_args or {})}
    original(model, config_path, model_config, {**ours, **given}, *args, **kwargs)


def create_timm_model(name: str, act: str, **kwargs: Any) -> tuple[nn.Module, Conversion]:
    """Creates a timm model in which every activation is one of the family, whether or not it takes an `act_layer`.

    A model with random weights is built with `act_layer=act` if it accepts that, and its other activations are
    converted. With `pretrained=True`, all activations are converted after the weights are loaded. If you save the model
    with timm, loading restores its activations.

    Args:
        name: Name of a timm model.
        act: Name of an activation of the family.
        **kwargs: Further arguments of `timm.create_model`.

    Returns:
        The model, and the report of `hf_gem.convert` on the activations that `act_layer` did not reach. Print it.

    Raises:
        ValueError: The name of the activation is malformed, or the model has no activation to replace.
    """
    import timm

    parse(act)
    if "act_layer" in kwargs:
        raise ValueError(
            f"got act={shown(act)} and act_layer={shown(kwargs['act_layer'])}. Both set the same activation. Pass only "
            "act."
        )
    model = None
    if not kwargs.get("pretrained"):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* did not pick up act_layer=|.* does not use it", module="hf_gem")
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
        "some models then only accept the class of an activation, and no model restores a saved conversion",
    ),
    "timm.models._hub": patch(
        "save_config_for_hf", _save_config, "pass the activation of a model as model_args when you save it"
    ),
}
