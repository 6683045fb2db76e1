"""Configs as documented dataclasses, read from presets, YAML files and the command line."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.activations import ACT2FN
from transformers.hf_argparser import string_to_bool

from ..family.names import GemSpec, parse
from ..files import closest, redact, shown
from ..fit import MATCH_C
from ..surgery.fields import is_ours
from ..surgery.scales import check_match

Config = TypeVar("Config", bound="TrainConfig")
WholeOrAuto = int | Literal["auto"]
_LONG_QUOTE = re.compile(r"('[^']{75})[^']{4,}'")


def option(default: Any, help: str) -> Any:
    """Declares a config field, with the line that documents it here and in --help."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """The options of every recipe: schedule, optimizer, precision, evaluation, checkpoints, tracking."""

    # Fields that may change when a run is resumed. They do not change its results except for rounding. If
    # micro_batch_size splits batches differently, dropout masks, mixup and batch-norm statistics change as well.
    runtime: ClassVar[frozenset[str]] = frozenset(
        (
            "eps",  # its value is in hidden_act
            "match_c",
            "output_dir",
            "micro_batch_size",
            "log_every",
            "eval_every",
            "save_every",
            "keep_checkpoints",
            "resume",
            "report_to",
            "project",
            "on_nonfinite",
            "push_to_hub",
            "hub_strategy",
            "hub_public",
            "license",
        )
    )

    given = frozenset[str]()  # the fields that the command line set; without a type, which would make it a field
    # The values of eps that are not numbers: ways to choose it.
    eps_choices: ClassVar[tuple[str, ...]] = ("match",)

    hidden_act: str = option("gem_n2", "Activation: a name of the family, or one of transformers, such as gelu.")
    eps: str | None = option(
        None, "A number that replaces the eps in --hidden_act, or match to choose eps by the rms of the inputs."
    )
    match_c: float = option(MATCH_C, "With --eps match: the input at which the gate is half open, in units of the rms.")
    output_dir: str = option("", "Output folder; by default a folder in runs/ named by recipe, preset and seed.")
    seed: int = option(0, "Seed of initial weights and dropout.")
    data_seed: int = option(0, "Seed of the sample order.")

    steps: int = option(1000, "Number of optimizer steps.")
    global_batch_size: int = option(64, "Samples in one optimizer step, over all processes and micro-batches.")
    micro_batch_size: int | Literal["auto"] = option(
        16,
        "Largest number of samples in one forward pass of one process; the batch is split evenly. auto tries how many "
        "fit into the GPU's memory, and takes 16 on a CPU.",
    )
    optimizer: Literal["adamw", "sgd"] = option("adamw", "Optimizer.")
    learning_rate: float = option(6e-4, "Peak learning rate.")
    lr_schedule: Literal["cosine", "linear", "step"] = option(
        "cosine", "Decay of the learning rate after the warm-up; step divides it by 10 at 1/2 and at 3/4 of all steps."
    )
    min_lr_ratio: float = option(0.1, "Final learning rate as a fraction of the peak.")
    warmup_steps: int = option(100, "Number of linear warm-up steps.")
    weight_decay: float = option(0.1, "Weight decay of matrices and filters; nothing else is decayed.")
    momentum: float = option(0.9, "Momentum of SGD.")
    adam_beta1: float = option(0.9, "AdamW beta 1.")
    adam_beta2: float = option(0.95, "AdamW beta 2.")
    adam_eps: float = option(1e-8, "AdamW epsilon.")
    grad_clip: float = option(1.0, "Maximum gradient norm; 0 turns clipping off.")
    ema_decay: float = option(
        0.0, "Decay of the moving average of the weights, which is then evaluated and saved; 0 turns it off."
    )

    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None, "Precision of the forward pass; by default the one given to `accelerate launch`."
    )
    compress_gradients: Literal["bf16"] | None = option(
        None, "Precision in which DDP sums gradients over processes; by default that of the gradients."
    )
    compile: bool = option(False, "Compile the model with torch.compile.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    deterministic: bool = option(False, "Use deterministic GPU kernels: reruns are bit-identical, but slower.")

    log_every: int = option(10, "Steps between log lines.")
    eval_every: int = option(200, "Steps between evaluations on the whole validation set; 0: only first and last.")
    save_every: int = option(200, "Steps between checkpoints; 0: only at the end.")
    keep_checkpoints: int = option(2, "Number of complete checkpoints to keep; older ones are deleted.")
    resume: str = option(
        "auto", "auto resumes from the newest complete checkpoint, never refuses to; or the path of a checkpoint."
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = option(
        "stop",
        "What to do when loss or gradient is not finite: stop; skip the step (every step then waits for the device); "
        "or rollback to the newest checkpoint and skip the batches since.",
    )
    report_to: Literal["auto", "none", "trackio", "tensorboard", "wandb"] = option(
        "auto", "Experiment tracker; auto is trackio if it is installed."
    )
    project: str = option("hf-gem", "Project name in the tracker.")

    push_to_hub: str | None = option(None, "USER/NAME of a Hub repository to push the finished run to.")
    hub_strategy: Literal["end", "checkpoint"] = option(
        "end", "checkpoint also pushes each checkpoint during training, as last-checkpoint."
    )
    hub_public: bool = option(False, "Make the Hub repository public if it does not exist yet.")
    license: str = option("apache-2.0", "Licence of the trained model, shown in its card.")

    def validate(self) -> None:
        """Raises ValueError, naming the field, if a value makes no sense."""
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"unknown --hidden_act {shown(self.hidden_act)}. It can be a name of the family, such as gem_n2, egem "
                f"or segem_eps0.01, or one of {', '.join(ACT2FN)}. To use a family of your own, name its file in "
                "HF_GEM_FAMILIES."
            )
        if is_ours(self.hidden_act):
            self.hidden_act = parse(self.hidden_act).name  # or ValueError, with the nearest valid name
        self._check_eps()
        at_least(self, 1, "steps", "global_batch_size", "micro_batch_size", "log_every", "keep_checkpoints")
        at_least(self, 0, "warmup_steps", "weight_decay", "grad_clip", "eval_every", "save_every")
        for name in ("seed", "data_seed"):  # torch and NumPy keep seeds in 64 bits
            require(0 <= getattr(self, name) < 2**63, name, getattr(self, name), "from 0 to 2**63 - 1")
        for name in ("momentum", "adam_beta1", "adam_beta2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("learning_rate", "adam_eps"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0 and finite")
        if self.push_to_hub is not None:
            sound = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub))
            require(sound, "push_to_hub", self.push_to_hub, "USER/NAME, as on the Hub")
        folder = Path(self.output_dir)
        free = folder.is_dir() or not folder.exists()
        require(free, "output_dir", self.output_dir, "a folder or a new path")
        named = Path(self.resume)
        rotated = named.parent.name == "checkpoints" and named.parent.is_dir()  # a run may have deleted it since
        known = self.resume in ("auto", "never") or named.is_dir() or rotated
        require(known, "resume", self.resume, "auto, never, or the folder of a checkpoint")
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        require(self.warmup_steps <= self.steps, "warmup_steps", self.warmup_steps, f"at most steps = {self.steps}")
        others = ("momentum",) if self.optimizer == "adamw" else ("adam_beta1", "adam_beta2", "adam_eps")
        not_given(self, f"with --optimizer {self.optimizer}", *others)
        if self.lr_schedule == "step":
            not_given(self, "with --lr_schedule step", "min_lr_ratio")
        if self.push_to_hub is None:
            not_given(self, "without --push_to_hub", "hub_strategy", "hub_public")

    def _check_eps(self) -> None:
        """Checks eps. If it is a number, puts it into the name of the activation."""
        matches = self.eps == "match"
        require(matches or self.match_c == MATCH_C, "match_c", self.match_c, "left out without --eps match")
        if self.eps is None:
            return
        chosen = self.eps in self.eps_choices
        allowed = f"a finite number above 0, or {' or '.join(self.eps_choices)}"
        require(chosen or is_positive(self.eps), "eps", self.eps, allowed)
        require(is_ours(self.hidden_act), "eps", self.eps, f"left out: --hidden_act {self.hidden_act} has none")
        spec = parse(self.hidden_act)
        if matches:
            check_match(spec, self.match_c)
        elif not chosen:
            self.hidden_act = GemSpec(spec.family, spec.n, float(self.eps), spec.learnable).name

    @property
    def act_label(self) -> str:
        """The activation as requested, for use in folder names: `gelu`, `egem_n2-match`."""
        return self.hidden_act + ("-match" if self.eps == "match" else "")


def at_least(config: Any, least: int, *names: str) -> None:
    """Requires fields to be at least `least`, or "auto" if their type allows it."""
    for name in names:
        value = getattr(config, name)
        require(value == "auto" or least <= value < math.inf, name, value, f"at least {least}")


def is_positive(text: str) -> bool:
    """Returns whether this is a finite number above 0."""
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def require(condition: bool, name: str, got: object, allowed: str) -> None:
    """Raises ValueError unless `condition` holds; the message names the flag, its value and the allowed ones."""
    if not condition:
        raise ValueError(f"--{name} must be {allowed}, got {shown(got)}")


def not_given(config: Any, why: str, *names: str) -> None:
    """Requires that the command line did not set some fields, since they have no effect. A preset or file may."""
    for name in names:
        require(name not in getattr(config, "given", ()), name, getattr(config, name), f"left out {why}")


def trajectory(config: Any) -> dict[str, Any]:
    """Returns the fields that determine the result of a run."""
    runtime = frozenset().union(*(vars(base).get("runtime", ()) for base in type(config).__mro__))
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in runtime}


def parse_config(
    cls: type[Config], presets: Mapping[str, Mapping[str, Any]], default_preset: str, argv: Sequence[str] | None = None
) -> tuple[Config, str]:
    """Reads a config from field defaults, `--preset NAME`, `--config FILE.yaml` and other flags; later ones win.

    A wrong flag, field, value or file exits the process with status 2 and a message that names the nearest valid one.

    Args:
        cls: A dataclass of `option` fields with a `validate` method.
        presets: Preset name -> values of fields.
        default_preset: The preset to use without `--preset`.
        argv: The command line; by default that of the process.

    Returns:
        The config and the name of its preset.
    """
    description = (sys.modules[cls.__module__].__doc__ or "").strip()
    parser = _Parser(cls, allow_abbrev=False, description=description)  # type: ignore[arg-type]  # a TypeVar of one
    parser.add_argument("--preset", choices=list(presets), help=f"Named set of values (default: {default_preset}).")
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of the same fields; overrides the preset.")
    hints = get_type_hints(cls)
    types = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    unset = object()  # tells flags that were given from flags that have their default
    values = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(types, unset))))
    given = {name: values[name] for name in types if values[name] is not unset}
    try:
        from_file = _read_config(values["config"]) if values["config"] else {}
        named = from_file.pop("preset", None)
        preset = values["preset"] or str(named or default_preset)
        if preset not in presets:
            known = f"The presets are {', '.join(presets)}."
            raise ValueError(f"{values['config']}: unknown preset {shown(preset)}. {known}{_nearest(preset, presets)}")
        chosen = {
            **_converted(presets[preset], types, f"preset {preset}"),
            **_converted(from_file, types, str(values["config"])),
            **given,
        }
        config = cls(**{name: _at_home(value) for name, value in chosen.items() if value is not None})
        config.given = frozenset(given)
        config.validate()
    except ValueError as error:
        parser.fail(str(error))
    return config, preset


class _Parser(HfArgumentParser):
    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
        if field.type == WholeOrAuto:  # transformers does not know this union
            field.type = _whole_or_auto  # argparse accepts a function as a type
        HfArgumentParser._parse_dataclass_field(parser, field)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((a for a in unknown if a.startswith("-")), unknown[0]).split("=")[0]
            nearest = _nearest(flag, self._option_string_actions)
            self.error(f"unknown argument {shown(flag)}.{nearest} Run with --help to list all arguments.")
        return values

    def error(self, message: str) -> NoReturn:
        self.fail(_LONG_QUOTE.sub(r"\1...'", message))  # argparse quotes a value in full

    def fail(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {redact(message)}\n")


def _at_home(value: Any) -> Any:
    """Expands a path that begins with the home folder, as a shell does only if the path is a word of its own."""
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def _nearest(name: str, allowed: Iterable[str]) -> str:
    near = closest(name, allowed)
    return f" Did you mean {near!r}?" if near else ""


def read_yaml(text: str) -> Any:
    """Reads YAML from an untrusted source.

    Raises:
        ValueError: The text cannot be read. PyYAML raises many kinds of errors for malformed numbers and dates.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(reason if len(reason) <= 300 else f"{reason[:200]} ... {reason[-90:]}") from error


def _read_config(path: str) -> dict[str, Any]:
    try:
        values = read_yaml(Path(_at_home(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"cannot read --config {shown(path)}: {reason}. Name a file with YAML in it.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"--config {shown(path)} holds a {type(values).__name__}. It must be a mapping of fields to values. Write "
            "one `field: value` per line."
        )
    return {str(name): value for name, value in values.items()}


def _converted(values: Mapping[str, Any], types: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Converts values to the types of their fields. None stays: it resets a field to its default.

    Raises:
        ValueError: A field is unknown, or a value does not fit. The message names the source.
    """
    found = {}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{source}: unknown field {shown(name)}.{_nearest(name, types)}")
        try:
            found[name] = None if value is None else _as_type(value, types[name])
        except (ValueError, TypeError, OverflowError, argparse.ArgumentTypeError):
            allowed = _allowed(types[name])
            raise ValueError(f"{source}: --{name} must be {allowed}, got {shown(value)}") from None
    return found


def _as_type(value: Any, kind: Any) -> Any:
    """Converts a value from a preset or YAML to a field's type: bool, int, float, str or Literal, or one with None."""
    kind = _required(kind)
    if kind == WholeOrAuto:
        return "auto" if value == "auto" else _as_type(value, int)
    if isinstance(value, bool) and kind is not bool:
        value = "yes" if value else "no"  # YAML reads a bare `no` as false
    if kind is bool:
        return string_to_bool(str(value))
    if kind in (int, float):
        if not isinstance(value, (int, str) if kind is int else (int, float, str)):
            raise TypeError(value)
        return kind(value)
    if not isinstance(value, (str, int, float, datetime.date)):
        raise TypeError(value)
    if get_origin(kind) is Literal and str(value) not in get_args(kind):
        raise ValueError(value)
    return str(value)


def _required(kind: Any) -> Any:
    """Returns the type of a field without its None."""
    kinds = [part for part in get_args(kind) if part is not type(None)]
    return kinds[0] if get_origin(kind) in (Union, UnionType) and len(kinds) == 1 else kind


def _whole_or_auto(text: str) -> WholeOrAuto:
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {_allowed(WholeOrAuto)}, got {shown(text)}") from None


def _allowed(kind: Any) -> str:
    kind = _required(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if kind == WholeOrAuto:
        return "a whole number or auto"
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")
