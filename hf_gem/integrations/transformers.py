"""transformers: hooks into `ACT2FN`, `ACT2CLS`, configs, and the building, training and saving of models.

All importers share one `ACT2FN`, so it gets a class that knows the names of the family. `ACT2CLS` is a plain dict. The
class of a plain dict cannot be changed, so every module that holds `ACT2CLS` gets a new dict.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import sys
import warnings
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from ..family.names import parse
from ..family.table import FAMILIES
from ..files import closest, shown
from ..modules import CALLED, GemActivation, get_activation, module_factory
from ..surgery.audit import say_what_did_not_run
from ..surgery.configs import mask, unmask, write_plan
from ..surgery.fields import (
    activation_fields,
    declares,
    is_activation_key,
    is_body,
    is_config,
    is_ours,
    nested_configs,
    plain_name,
    set_activation,
)
from ..surgery.kinds import is_stock, kind, stock_slots
from ..surgery.plans import PLAN, apply_plans, complete, parts_inside, parts_of, shared_eps, specs, unnamed
from ..surgery.reports import counted
from ..surgery.slots import BUILT, join, slot_at, spec_of
from .peft import write_adapter_plan
from .registry import Installer, NameLookup, both, holding, lookups, patch, refuse_conflicts, replace_everywhere
from .weights import warn_of_weights_alone


class _Act2Cls(NameLookup):
    make = staticmethod(module_factory)


class _Instances(NameLookup):
    make = staticmethod(lambda spec: module_factory(spec)())


def _install_activations(module: ModuleType) -> None:
    if isinstance(module.ACT2CLS, _Act2Cls):
        return
    refuse_conflicts(module.ACT2FN, "transformers.activations.ACT2FN")
    refuse_conflicts(module.ACT2CLS, "transformers.activations.ACT2CLS")
    instantier = type(module.ACT2FN)  # its __getitem__ instantiates the class that a lookup returns

    def reduced(self: dict[str, Any]) -> Any:  # pickle cannot find a class that is created in a function
        return _instantier_with_names, (instantier,), None, None, iter(self.items())

    ours = {"make": _Act2Cls.make, "__reduce__": reduced}
    module.ACT2FN.__class__ = type(f"Gem{instantier.__name__}", (NameLookup, instantier), ours)
    replace_everywhere("ACT2CLS", module.ACT2CLS, _Act2Cls(module.ACT2CLS))


def _instantier_with_names(instantier: Any) -> Any:
    """Returns an empty dict of the type of `ACT2FN`, for copies and pickles. Unpickling imports hf_gem to find this."""
    copied, shared = instantier(), sys.modules["transformers.activations"].ACT2FN
    if issubclass(type(shared), instantier):  # otherwise nothing is registered, or transformers has another version
        copied.__class__ = type(shared)
    return copied


def _uninstall_activations(module: ModuleType) -> None:
    if not isinstance(module.ACT2CLS, _Act2Cls):
        return
    module.ACT2FN.__class__ = type(module.ACT2FN).__mro__[2]
    replace_everywhere("ACT2CLS", module.ACT2CLS, dict(module.ACT2CLS))


# ---- configs: `hidden_act` for configs whose field has another name

# Model types whose configs replace any `hidden_act` by "silu" whenever they are created or loaded.
_OVERWRITTEN = {"minimax_m3_vl_text", "step3p5"}
# Whether a saved config is being read. The configs inside one do not have its `transformers_version`.
_reading: ContextVar[bool] = ContextVar("_reading", default=False)


def _config_post_init(original: Any, config: Any, **kwargs: Any) -> None:
    """Applies a keyword for an activation that is not a field of this config to the field that the config reads."""
    from_file = config.transformers_version is not None or _reading.get()
    if type(config) is sys.modules["transformers.configuration_utils"].PreTrainedConfig:
        original(config, **kwargs)  # the base class, which can read any file
        return
    # Other keys in a file may have been derived from fields. `pooling="gem"` means generalised-mean pooling.
    asked = (key for key, value in kwargs.items() if is_ours(value) and is_activation_key(key))
    keys = [key for key in asked if key == "hidden_act" or not from_file]
    names = {key: kwargs.pop(key) for key in keys}
    original(config, **kwargs)
    if config.model_type in _OVERWRITTEN and is_ours(config.hidden_act) and PLAN not in vars(config):
        warnings.warn(
            f"{type(config).__name__} replaces hidden_act={shown(config.hidden_act)} by 'silu' whenever it is created "
            "or loaded. Set it afterwards with hf_gem.set_activation(config, name), or convert the model.",
            stacklevel=2,
        )
    for key, name in names.items():
        if from_file or not is_body(key):
            fields = ", ".join(f"{field.path}={shown(field.value)}" for field in activation_fields(config))
            warnings.warn(
                f"ignoring {key}={shown(name)}, which is not a field of {type(config).__name__}"
                + (". The saved model was built without it" if from_file else "")
                + f". The config has {fields or 'no field that selects an activation'}. "
                + ("Set one of these, or use hf_gem.set_activation." if fields else "Use hf_gem.convert."),
                stacklevel=2,
            )
            continue
        name = parse(name).name
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        for field in activation_fields(config):
            own = field.owner is config and field.is_body
            if own and plain_name(field.value) != name and field.value != defaults.get(field.key, ""):
                raise ValueError(
                    f"{type(config).__name__} got {field.key}={shown(field.value)} and {key}={name!r}. Both set the "
                    f"same activation. Pass only {field.key}={field.prefixed(name)!r}."
                )
        _redirect(config, name)


def _config_from_dict(original: Any, cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
    """Supports `from_pretrained(..., hidden_act=name)`. The config would drop a keyword that it does not know."""
    name = kwargs.get("hidden_act")
    with holding(_reading, _reading.get() or config_dict.get("transformers_version") is not None):
        result = original(cls, config_dict, **kwargs)
    config, unused = result if isinstance(result, tuple) else (result, {})
    if is_ours(name) and not declares(config, "hidden_act"):
        unused.pop("hidden_act", None)
        _redirect(config, parse(name).name)
    elif "hidden_act" not in unused and not hasattr(config, "hidden_act"):  # neither given back nor kept: dropped
        _say_what_is_not_read(config, name)
    return result


def _redirect(config: Any, name: str) -> None:
    """Sets every activation field of the body. If there is none, keeps `hidden_act`, and building the model warns."""
    try:
        set_activation(config, name)
    except ValueError:
        config.hidden_act = name
    else:
        if not declares(config, "hidden_act"):
            vars(config).pop("hidden_act", None)


def _kind_named(name: str) -> str | None:
    from transformers.activations import ACT2FN

    return kind(ACT2FN[name]) if name in ACT2FN else None


def _say_what_is_not_read(config: Any, name: object, built: frozenset[str | None] | None = None) -> None:
    """Warns about a `hidden_act` that is not ours, if the config has no such field and the model runs another function.

    Setting the field would be another function than transformers alone computes, also for old code and files. `built`
    are the kinds of activations in the model, if there is one. Without a model and a field, only its code says them.
    """
    if not isinstance(name, str) or is_ours(name) or declares(config, "hidden_act") or PLAN in vars(config):
        return
    from transformers.activations import ACT2FN

    fields = [field for field in activation_fields(config) if field.is_body]
    if name in {plain_name(field.value) for field in fields}:
        return
    runs = {_kind_named(field.looked_up) for field in fields} if built is None else built
    if name in ACT2FN and (_kind_named(name) in runs - {None} or (built is None and not fields)):
        return
    selected = ", ".join(f"{field.path}={shown(field.value)}" for field in fields if field.value)
    fix = "Set another one with hf_gem.set_activation(config, name)." if fields else "hf_gem.audit(model) lists them."
    near = closest(name, [*FAMILIES, *ACT2FN])
    unknown = "" if name in ACT2FN else f" No activation has this name.{f' Did you mean {near!r}?' if near else ''}"
    warnings.warn(
        f"{type(config).__name__} has no field hidden_act, and transformers ignores hidden_act={shown(name)}.{unknown} "
        f"The model runs {selected or 'its own activations'}. {fix}",
        stacklevel=2,
    )


# ---- models: applying configs and conversions, and warning about activations that do not pick up a name


def _model_init(original: Any, model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    """Applies names that were assigned to a config after its creation, before any layer is built from it."""
    if is_config(config):
        name = vars(config).get("hidden_act")
        if is_ours(name) and not declares(config, "hidden_act"):
            _redirect(config, parse(name).name)
        unmask(config)
    original(model, config, *args, **kwargs)


def _model_post_init(original: Any, model: Any) -> None:
    """Applies conversions as part of building a model, before its weights are initialised or loaded."""
    constructors = _constructors()
    _mark_built(model)
    outermost = all(built is model for built in constructors)
    unfinished = len(constructors) > 1  # the constructor of a subclass continues when this one returns
    if outermost:
        complete(model, get_activation)
        _expect(model, apply_plans(model, get_activation, unfinished))
    original(model)
    if outermost and not unfinished:
        _say_what_is_not_used(model)
        _say_what_is_left(model)
        _say_what_a_plan_leaves(model)


def _mark_built(model: Any) -> None:
    """Marks the activations that a model is built with, but not those that are put in by hand later.

    A part with its own config was marked by its own `post_init`, and may have been changed since. Nothing is marked if
    the saved config will not select the activation again: a plan then restores it.
    """
    if model.config.model_type in _OVERWRITTEN:
        return
    inner = parts_inside(parts_of(model), "")
    for path, module in model.named_modules():
        if isinstance(module, GemActivation) and "replaces" not in vars(module) and not path.startswith(inner):
            vars(module)[BUILT] = module.spec.name


def _expect(model: Any, missing: dict[str, str]) -> None:
    """Prevents a model from running while its conversion is incomplete: its class adds parts after `post_init`."""
    handle = vars(model).pop("_hf_gem_missing", None)
    if handle is not None:
        handle.remove()
    if missing:
        model._hf_gem_missing = model.register_forward_pre_hook(functools.partial(_refuse, missing))


def _refuse(missing: dict[str, str], model: Any, _: Any) -> None:
    for path, name in missing.items():
        spec = None
        with contextlib.suppress(KeyError):
            spec = spec_of(slot_at(model, path).occupant)
        if spec is None or spec.name != name:  # otherwise its own code put it there
            cls = type(model).__name__
            raise ValueError(
                f"{cls} was saved with {shown(name)} at {shown(path)}, but was built without it. Only self.post_init() "
                f"restores a conversion. Call that at the end of {cls}.__init__, after the parts it adds, and load the "
                "model again."
            )
    _expect(model, {})


def _constructors() -> list[Any]:
    """Returns the models whose `__init__` is running, innermost first.

    Only the call stack shows this, since a model and its parts share a config. Models around a `from_pretrained` do not
    count: it loads the weights of the model in it before they continue.
    """
    library = sys.modules["transformers.modeling_utils"]
    models = []
    frame: Any = sys._getframe(2)
    # By name and place: others may have wrapped the method.
    while frame is not None and (frame.f_code.co_name != "from_pretrained" or frame.f_globals is not vars(library)):
        if frame.f_code.co_name == "__init__" and frame.f_code.co_argcount:
            model = frame.f_locals.get(frame.f_code.co_varnames[0])  # self
            if isinstance(model, library.PreTrainedModel):
                models.append(model)
        frame = frame.f_back
    return models


def _say_what_is_not_used(model: Any) -> None:
    """Warns about a `hidden_act` of transformers that a config keeps although its model does not read it."""
    for part in parts_of(model).values():
        name = vars(part.config).get("hidden_act")
        if not isinstance(name, str) or is_ours(name) or declares(part.config, "hidden_act"):
            continue
        # Some models read it although no field declares it.
        built = frozenset(kind(slot.occupant) for slot in stock_slots(part))
        _say_what_is_not_read(part.config, name, built)


def _say_what_is_left(model: Any) -> None:
    """Warns if a part of the model does not use the name in its config, or not for all of its activations."""
    from transformers.activations import ACT2FN

    parts = parts_of(model)
    unused, left = [], []
    name = ""
    for path, part in parts.items():
        fields = [field for field in activation_fields(part.config) if field.owner is part.config]
        named = {field.path: plain_name(field.value) for field in fields}
        if not declares(part.config, "hidden_act"):
            named["hidden_act"] = vars(part.config).get("hidden_act", "")
        named = {key: value for key, value in named.items() if is_ours(value)}
        if not named:
            continue
        used = specs(part, replaced=True)  # a name that a conversion replaced was used before
        for key, value in named.items():
            if parse(value) not in used:
                name = parse(value).name
                unused.append(f"{type(part.config).__name__} has {key}={shown(value)}")
            elif is_body(key) and PLAN not in vars(part.config):  # a saved model is in the state in which it was saved
                name = parse(value).name
                # Inner parts are checked on their own, and activations that another field selects are intended.
                inner = parts_inside(parts, path)
                spared = {kind(ACT2FN[field.value]) for field in fields if field.path not in named}
                slots = {slot.path: kind(slot.occupant) for slot in stock_slots(part) if is_stock(slot.occupant)}
                left += [
                    f"{what} at {join(path, slot)}"
                    for slot, what in slots.items()
                    if what not in spared and not slot.startswith(inner)
                ]
    if unused:
        warnings.warn(
            f"{'; '.join(unused)}, but {type(model).__name__} does not read it and runs its own activations. List them "
            f"with hf_gem.audit(model), and replace them with hf_gem.convert(model, {name!r}).",
            stacklevel=2,
        )
    elif left:
        warnings.warn(
            f"{type(model).__name__} has {counted(len(set(left)), 'activation')} that did not pick up {name!r} from "
            f"the config, such as {left[0]}. Replace them with hf_gem.convert(model, {name!r}).",
            stacklevel=2,
        )


def _say_what_a_plan_leaves(model: Any) -> None:
    """Warns about activations in a head that the converted model did not have."""
    parts = parts_of(model)
    for path, part in parts.items():
        plan, base = vars(part.config).get(PLAN), part.base_model_prefix
        if plan is None or plan["model"] == type(part).__name__ or not (base and hasattr(part, base)):
            continue
        elsewhere = (f"{base}.", *parts_inside(parts, path))
        slots = [slot for slot in stock_slots(part) if is_stock(slot.occupant) and not slot.path.startswith(elsewhere)]
        if slots:
            name = min(plan["activations"])
            warnings.warn(
                f"{type(part).__name__} has {counted(len(slots), 'activation')} that the converted "
                f"{plan['model']:.80} did not have, such as {kind(slots[0].occupant)} at {join(path, slots[0].path)}. "
                f"Replace them with hf_gem.convert(model, {name!r}).",
                stacklevel=2,
            )


# ---- conversions in configs


def _config_to_dict(original: Any, config: Any) -> dict[str, Any]:
    if PLAN in vars(config):
        config = copy.deepcopy(config)
        mask(config)
    saved: dict[str, Any] = original(config)
    return saved


def _save_pretrained(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Writes the plan from the current model before saving, since a part of a converted model has none yet."""
    if (problem := unnamed(model)) is not None:
        warnings.warn(problem, stacklevel=2)  # not an error, which could lose a finished training run
    inner = nested_configs(model.config).values()
    before = [vars(config).get(PLAN) for config in inner]
    write_plan(model)
    if any(parameter.grad is not None for parameter in model.parameters()):
        say_what_did_not_run(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        write_adapter_plan(model, model.peft_config)
    try:
        return original(model, *args, **kwargs)
    finally:
        for config, plan in zip(inner, before, strict=True):
            vars(config).pop(PLAN, None)
            if plan is not None:
                config.hf_gem = plan


def _initialize_weights(original: Any, model: Any, module: Any, *args: Any, **kwargs: Any) -> None:
    """Initialises a learnable eps that is not in the checkpoint. transformers would leave its memory uninitialised."""
    if isinstance(module, GemActivation) and not getattr(module, "_is_hf_initialized", False):
        module.reset_parameters()  # transformers' guard skips parameters that were in the checkpoint
    original(model, module, *args, **kwargs)


def _training_step(original: Any, trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Warns after the first step about activations of the family that did not run in it."""
    loss = original(trainer, model, *args, **kwargs)
    if not vars(trainer).get(CALLED):
        vars(trainer)[CALLED] = True
        if (problem := shared_eps(model)) is not None:
            warnings.warn(problem, stacklevel=3)  # now rather than at the first checkpoint, hours later
        say_what_did_not_run(model)
    return loss


def _trainer_save(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
    original(trainer, *args, **kwargs)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if not hasattr(model, "save_pretrained"):  # neither a transformers nor a PEFT model
        warn_of_weights_alone(model, "transformers.Trainer")


def _decay_parameter_names(original: Any, trainer: Any, model: Any, *args: Any, **kwargs: Any) -> list[str]:
    """Excludes a learnable eps from weight decay, like biases. Decay would pull it back to its initial value."""
    names = original(trainer, model, *args, **kwargs)
    activations = {f"{path}.log_ratio" for path, module in model.named_modules() if isinstance(module, GemActivation)}
    return [name for name in names if name not in activations]


_method = functools.partial(
    patch,
    lost="it was added in transformers 5.17. Without it, names of the family work in every activation field, but "
    "`hidden_act` is not passed on to the field that a config reads, a learnable eps must be in the checkpoint, and "
    "conversions are not restored. Upgrade transformers.",
)

INSTALLERS: dict[str, Installer] = {
    "transformers.activations": (_install_activations, _uninstall_activations),
    # This model has its own dict, in which it looks up `afn`.
    "transformers.models.openai.modeling_openai": lookups(
        "transformers.models.openai.modeling_openai", {"ACT_FNS": _Instances}
    ),
    "transformers.configuration_utils": both(
        _method("PreTrainedConfig.__post_init__", _config_post_init),
        _method("PreTrainedConfig.from_dict", _config_from_dict),
        _method("PreTrainedConfig.to_dict", _config_to_dict),
    ),
    "transformers.trainer": both(
        _method("Trainer.get_decay_parameter_names", _decay_parameter_names),
        _method("Trainer._save", _trainer_save),
        _method("Trainer.training_step", _training_step),
    ),
    "transformers.modeling_utils": both(
        _method("PreTrainedModel.__init__", _model_init),
        _method("PreTrainedModel.post_init", _model_post_init),
        _method("PreTrainedModel._initialize_weights", _initialize_weights),
        _method("PreTrainedModel.save_pretrained", _save_pretrained),
    ),
}
