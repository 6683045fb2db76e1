"""Configs as documented dataclasses, read from presets, YAML files and the command line."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import difflib
import math
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.activations import ACT2FN
from transformers.hf_argparser import string_to_bool

from ..family.names import GemSpec, is_claimed, parse
from ..files import read_yaml, redact
from ..fit import MATCH_C
from ..surgery.scales import check_match

Config = TypeVar("Config", bound="TrainConfig")
WholeOrAuto = int | Literal["auto"]


def option(default: Any, help: str) -> Any:
    """A config field with the line that documents it, on the command line too."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """What every recipe has: schedule, optimizer, precision, evaluation, checkpoints, tracking."""

    # Fields that may differ when a run is resumed: they leave its results as they are, but for rounding and, where
    # micro_batch_size splits other batches, the masks of dropout, mixup, and the statistics of batch normalisation.
    runtime: ClassVar[frozenset[str]] = frozenset(
        (
            "eps",  # what it comes to is in hidden_act
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

    # What eps may be besides a number: ways to choose it.
    eps_choices: ClassVar[tuple[str, ...]] = ("match",)

    hidden_act: str = option("gem_n2", "Activation: a name of the family or one that transformers knows, e.g. gelu.")
    eps: str | None = option(
        None, "A number in place of the eps in --hidden_act; or match, to choose it by the scale of what arrives there."
    )
    match_c: float = option(MATCH_C, "With --eps match, where the gate is half open, in units of that scale, the rms.")
    output_dir: str = option("", "Folder of the run; by default runs/ and a name made of recipe, preset and seed.")
    seed: int = option(0, "Seed of initial weights and dropout.")
    data_seed: int = option(0, "Seed of the sample order.")

    steps: int = option(1000, "Number of optimizer steps.")
    global_batch_size: int = option(64, "Samples in one optimizer step, over all processes and micro-batches.")
    micro_batch_size: int | Literal["auto"] = option(
        16,
        "Samples in one forward pass of one process, at most; the batch is split evenly. auto: as many as fit into "
        "the memory of the GPU, by trying; 16 on a CPU.",
    )
    optimizer: Literal["adamw", "sgd"] = option("adamw", "Optimizer.")
    learning_rate: float = option(6e-4, "Peak learning rate.")
    lr_schedule: Literal["cosine", "linear", "step"] = option(
        "cosine", "Decay of the learning rate after the warm-up; step: a tenth from half of all steps on, then 3/4."
    )
    min_lr_ratio: float = option(0.1, "Final learning rate, as a fraction of the peak.")
    warmup_steps: int = option(100, "Steps of linear warm-up.")
    weight_decay: float = option(0.1, "Weight decay of matrices and filters; nothing else is decayed.")
    momentum: float = option(0.9, "Momentum of SGD.")
    adam_beta1: float = option(0.9, "AdamW beta 1.")
    adam_beta2: float = option(0.95, "AdamW beta 2.")
    adam_eps: float = option(1e-8, "AdamW epsilon.")
    grad_clip: float = option(1.0, "Largest norm of the gradient; 0 switches clipping off.")
    ema_decay: float = option(0.0, "Decay of an average of the weights, which is evaluated and saved; 0: none.")

    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None, "Precision of the forward pass; by default what `accelerate launch` was told."
    )
    compress_gradients: Literal["bf16"] | None = option(
        None, "What DDP rounds gradients to before it adds them up over processes; by default it adds them as they are."
    )
    compile: bool = option(False, "Run the model through torch.compile.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    deterministic: bool = option(False, "Ask torch for deterministic GPU kernels: bit-equal reruns, slower.")

    log_every: int = option(10, "Steps between log lines.")
    eval_every: int = option(200, "Steps between evaluations over the whole validation set; 0: first and last only.")
    save_every: int = option(200, "Steps between checkpoints; 0: at the end only.")
    keep_checkpoints: int = option(2, "Complete checkpoints to keep; older ones are deleted.")
    resume: str = option("auto", "auto: go on from the newest complete checkpoint; never: refuse to; or its path.")
    on_nonfinite: Literal["stop", "skip", "rollback"] = option(
        "stop",
        "When loss or gradient is not finite: stop; skip the step, which makes each wait for the device; or rollback "
        "to the newest checkpoint, and pass over the batches since.",
    )
    report_to: Literal["auto", "none", "trackio", "tensorboard", "wandb"] = option(
        "auto", "Experiment tracker; auto is trackio where it is installed."
    )
    project: str = option("hf-gem", "Project name at the tracker.")

    push_to_hub: str | None = option(None, "USER/NAME: push the finished run to this repository of the Hub.")
    hub_strategy: Literal["end", "checkpoint"] = option(
        "end", "checkpoint: push every checkpoint too, while training goes on, as last-checkpoint."
    )
    hub_public: bool = option(False, "Make the repository a public one, if it has to be made.")
    license: str = option("apache-2.0", "Licence of the trained model, for its card.")

    def validate(self) -> None:
        """Raises ValueError, naming the field, when a value makes no sense."""
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"--hidden_act {self.hidden_act!r} is not known; it can be a name of the family such as gem_n2, egem "
                f"or segem_eps0.01, or one of {', '.join(ACT2FN)}. A family of your own is known where HF_GEM_FAMILIES "
                "names its file"
            )
        if is_claimed(self.hidden_act):
            self.hidden_act = parse(self.hidden_act).name  # or ValueError, with the nearest valid name
        self._check_eps()
        at_least(self, 1, "steps", "global_batch_size", "micro_batch_size", "log_every", "keep_checkpoints")
        at_least(self, 0, "seed", "data_seed", "warmup_steps", "weight_decay", "grad_clip", "eval_every", "save_every")
        for name in ("momentum", "adam_beta1", "adam_beta2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("learning_rate", "adam_eps"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0 and finite")
        if self.push_to_hub is not None:
            sound = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub))
            require(sound, "push_to_hub", self.push_to_hub, "USER/NAME, as the Hub has it")
        folder = Path(self.output_dir)
        free = folder.is_dir() or not folder.exists()
        require(free, "output_dir", self.output_dir, "a folder, there or to be made")
        known = self.resume in ("auto", "never") or Path(self.resume).is_dir()
        require(known, "resume", self.resume, "auto, never or the folder of a checkpoint")
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        require(self.warmup_steps <= self.steps, "warmup_steps", self.warmup_steps, f"at most steps = {self.steps}")

    def _check_eps(self) -> None:
        """Checks eps, and puts a number into the name, where it replaces another."""
        matches = self.eps == "match"
        require(matches or self.match_c == MATCH_C, "match_c", self.match_c, "left out without --eps match")
        if self.eps is None:
            return
        chosen = self.eps in self.eps_choices
        allowed = f"a finite number above 0, or {' or '.join(self.eps_choices)}"
        require(chosen or is_positive(self.eps), "eps", self.eps, allowed)
        require(is_claimed(self.hidden_act), "eps", self.eps, f"left out: --hidden_act {self.hidden_act} has none")
        spec = parse(self.hidden_act)
        if matches:
            check_match(spec, self.match_c)
        elif not chosen:
            self.hidden_act = GemSpec(spec.family, spec.n, float(self.eps), spec.learnable).name

    @property
    def act_label(self) -> str:
        """The activation as it is asked for, in names of folders: `gelu`, `egem_n2-match`."""
        return self.hidden_act + ("-match" if self.eps == "match" else "")


def at_least(config: Any, least: int, *names: str) -> None:
    """Requires some fields to be numbers of at least `least`, or auto where their type has it."""
    for name in names:
        value = getattr(config, name)
        require(value == "auto" or least <= value < math.inf, name, value, f"at least {least}")


def is_positive(text: str) -> bool:
    """Whether this is a finite number above 0."""
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def require(condition: bool, name: str, got: object, allowed: str) -> None:
    """Raises ValueError, naming the flag, what came and what is allowed, unless `condition` holds."""
    if not condition:
        raise ValueError(f"--{name} must be {allowed}, got {got}")


def trajectory(config: Any) -> dict[str, Any]:
    """The fields that decide the result of a run."""
    runtime = frozenset().union(*(vars(base).get("runtime", ()) for base in type(config).__mro__))
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in runtime}


def parse_config(
    cls: type[Config], presets: Mapping[str, Mapping[str, Any]], default_preset: str, argv: Sequence[str] | None = None
) -> tuple[Config, str]:
    """Reads a config; what comes later wins: field defaults, `--preset NAME`, `--config FILE.yaml`, other flags.

    Args:
        cls: A dataclass of `option` fields with a `validate` method.
        presets: Preset name -> values of fields.
        default_preset: The preset without `--preset`.
        argv: The command line; by default that of the process.

    Returns:
        The config and the name of its preset. A wrong flag, field, value or file ends the process with status 2 and a
        message that names the nearest valid one.
    """
    description = (sys.modules[cls.__module__].__doc__ or "").strip()
    parser = _Parser(cls, allow_abbrev=False, description=description)  # type: ignore[arg-type]  # a TypeVar of one
    parser.add_argument("--preset", choices=list(presets), help=f"Named set of values (default: {default_preset}).")
    parser.add_argument("--config", metavar="FILE.yaml", help="Values of the same fields, over those of the preset.")
    hints = get_type_hints(cls)
    types = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    unset = object()  # tells what was given from what has its default
    values = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(types, unset))))
    given = {name: values[name] for name in types if values[name] is not unset}
    try:
        from_file = _read_yaml(values["config"]) if values["config"] else {}
        named = from_file.pop("preset", None)
        preset = values["preset"] or str(named or default_preset)
        if preset not in presets:
            raise ValueError(f"{values['config']}: unknown preset {preset!r}{_nearest(preset, presets)}")
        chosen = {
            **_converted(presets[preset], types, f"preset {preset}"),
            **_converted(from_file, types, str(values["config"])),
            **given,
        }
        config = cls(**{name: value for name, value in chosen.items() if value is not None})
        config.validate()
    except ValueError as error:
        parser.error(str(error))
    return config, preset


class _Parser(HfArgumentParser):
    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
        if field.type == WholeOrAuto:  # transformers knows no such union
            field.type = _whole_or_auto  # what argparse takes for a type
        HfArgumentParser._parse_dataclass_field(parser, field)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((a for a in unknown if a.startswith("-")), unknown[0]).split("=")[0]
            self.error(f"unknown argument {flag!r}{_nearest(flag, self._option_string_actions)}; --help lists all")
        return values

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {redact(message)}\n")


def _nearest(name: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold one `field: value` a line, got a {type(values).__name__}")
    return {str(name): value for name, value in values.items()}


def _converted(values: Mapping[str, Any], types: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Values of fields, each as the type of its field; None, which takes a field back to its default, stays.

    Raises:
        ValueError: a field is unknown, or a value does not fit; the message names the source.
    """
    found = {}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{source}: unknown field {name!r}{_nearest(name, types)}")
        try:
            found[name] = None if value is None else _as_type(value, types[name])
        except (ValueError, TypeError, OverflowError, argparse.ArgumentTypeError):
            allowed = _allowed(types[name])
            raise ValueError(f"{source}: --{name} must be {allowed}, got {reprlib.repr(value)}") from None
    return found


def _as_type(value: Any, kind: Any) -> Any:
    """A value out of a preset or of YAML as the type of a field: bool, int, float, str or Literal, optional or not."""
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
    """The type of a field without its None."""
    kinds = [part for part in get_args(kind) if part is not type(None)]
    return kinds[0] if get_origin(kind) in (Union, UnionType) and len(kinds) == 1 else kind


def _whole_or_auto(text: str) -> WholeOrAuto:
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {_allowed(WholeOrAuto)}, got {text!r}") from None


def _allowed(kind: Any) -> str:
    kind = _required(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if kind == WholeOrAuto:
        return "a whole number or auto"
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")
