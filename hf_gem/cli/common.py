"""What commands share: options, output as JSON, and which exceptions are mistakes of the user."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from ..files import to_json
from ..training.errors import ConfigError, TrainingError

UNMET = 3  # exit code of a check that was asked for and failed
# Of a command that hands all that follows its arguments on to a script.
PASS_ON: dict[str, Any] = {"allow_extra_args": True, "allow_interspersed_args": False, "ignore_unknown_options": True}
Script = Callable[[], None]  # what such a command returns: `main` runs it, and its errors are its own
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextlib.contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Takes what the library raises in a `with` block for a mistake of the user, who gets its message in one line.

    Args:
        prefix: What stands before the message.

    Raises:
        ConfigError: in place of the usual errors.
    """
    try:
        yield
    except (TrainingError, ModuleNotFoundError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError, ImportError) as error:
        raise ConfigError(f"{prefix}{error or type(error).__name__}") from error


def show(values: Mapping[str, Any] | Sequence[Any], text: str, as_json: bool) -> None:
    """Prints a result, for a machine or for a person."""
    print(to_json(values, indent=2) if as_json else text)
