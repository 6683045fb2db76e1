"""`hf-gem audit`, `convert` and `choose`: activations in models."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..training.errors import ConfigError
from .common import UNMET, AsJson, show, user_errors

if TYPE_CHECKING:
    from .choosing import Profile
    from .loading import Source

_MODEL = "A folder, a timm model, a model type of transformers such as gpt2, or USER/NAME of the Hub."
_NUMBER = "a number, fit or match"
_ARGUMENT = re.compile(r"\b(replace|skip|eps|data|per_layer)=('[^']*'|[\w.+-]*\w)?")


def audit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)],
    act: Annotated[
        str | None, typer.Option(help="Build the model with this activation, to see where it is used.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Load the weights too.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help=f"Exit with status {UNMET} unless all activations belong to the family.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a model once and list its activations.

    Without --pretrained, only the config is read, and the model needs no memory. A folder must have been written by
    save_pretrained, a recipe or timm.
    """
    from .. import audit as audit_model
    from .loading import build, find, load, with_activation

    source = find(model)
    with user_errors():
        found = audit_model(with_activation(load if pretrained else build, source, act))
    show(found.to_dict(), str(found), as_json)
    if check and not found.complete:
        raise typer.Exit(UNMET)


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder for the converted model.")],
    to: Annotated[str, typer.Option(help="The activation, such as egem or gem_n2.")],
    eps: Annotated[str | None, typer.Option(help=f"Overrides the eps in the name: {_NUMBER}.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="For fit and match: a text file, a folder of images, or an .npz file of inputs.")
    ] = None,
    num_batches: Annotated[int, typer.Option("--num-batches", min=1, help="Maximum number of batches of --data.")] = 4,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Number of samples in a batch.")] = 8,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Choose an eps for each layer.")] = False,
    replace: Annotated[list[str] | None, typer.Option(help="Activations to replace, such as tanh.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Paths to skip, such as '*.pooler.*'.")] = None,
    as_json: AsJson = False,
) -> None:
    """Replace the activations of a pretrained model and save it.

    --eps fit chooses n and eps so that the outputs change least on --data. --eps match is for a model that you are
    going to train: it sets the gate to the scale of the inputs.
    """
    from .. import convert as convert_model
    from .batches import read
    from .loading import find, load, save

    chosen = _eps(eps)
    if isinstance(chosen, str) and data is None:
        raise ConfigError(f"--eps {eps} needs --data. Give a text file, a folder of images or an .npz file.")
    if data is not None and not isinstance(chosen, str):
        raise ConfigError("--data needs --eps fit or match. Add one of them, or leave --data out.")
    if per_layer and not isinstance(chosen, str):
        raise ConfigError("--per-layer needs --eps fit or match. Add one of them, or leave --per-layer out.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder. Name a new one.")
    source = find(model)
    loaded = load(source, to_save=True)
    batches = None if data is None else read(data, loaded, source, num_batches, batch_size)
    with user_errors(_in_flags):
        report = convert_model(
            loaded, to, replace=replace or None, skip=skip or None, eps=chosen, data=batches, per_layer=per_layer
        )
        save(loaded, source, out)
    show({**report.to_dict(), "folder": str(out)}, f"{_in_flags(str(report))}\nModel: {out}", as_json)


def _in_flags(text: str) -> str:
    """Rewrites the arguments of `hf_gem.convert` in a message as the options of the command."""
    return _ARGUMENT.sub(_flag, text)


def _flag(argument: re.Match[str]) -> str:
    flag, value = f"--{argument[1].replace('_', '-')}", (argument[2] or "").strip("'")
    return flag if value in ("", "True") else f"{flag} {shlex.quote(value)}"  # so that it can be copied into a shell


def _eps(text: str | None) -> float | str | None:
    if text in (None, "fit", "match"):
        return text
    try:
        return float(str(text))
    except ValueError:
        raise ConfigError(f"--eps must be {_NUMBER}, got {text!r:.80}.") from None


def choose(model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)], as_json: AsJson = False) -> None:
    """Print which activation the studies support for a model.

    Only the config is read. Differences have 95 % intervals. Below 0 is better for a loss, above 0 for an accuracy.
    """
    from .choosing import profile
    from .loading import build, find

    source = find(model)
    found = profile(build(source))
    values: dict[str, Any] = {**vars(found), "findings": found.findings, "matched": found.matched}
    show(values, _advice(source, found), as_json)


def _advice(source: Source, found: Profile) -> str:
    from .choosing import caveat

    activations = ", ".join(found.activations) or "not known"
    lines = [f"{source.given} ({found.model})", f"  kind: {found.kind}", f"  activations: {activations}"]
    if found.rms is not None:
        lines.append(f"  rms of their inputs at the start of training: about {found.rms:.2g}")
    for row in found.findings:
        lines += ["", f"Studied: {row['model']}", f"  use: {row['use'] or 'not known'}", f"  evidence: {row['why']}"]
    if found.matched:
        lines.append(f"  matched here: {found.matched}, whose gate is half open at that rms")
    nothing = "Use: not known. Compare candidates yourself: hf-gem compare --help."
    lines += ["", caveat() if found.findings else nothing]
    if not source.is_type:  # these have no weights
        keep = f"hf-gem convert {source.given} OUT --to egem --eps fit --data FILE"
        lines.append(f"To keep what a trained model computes: {keep}.")
    return "\n".join(lines)
