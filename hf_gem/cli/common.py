"""Options, JSON output and error handling that the commands share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn

import typer

from ..files import to_json
from ..training.errors import ConfigError, TrainingError

UNMET = 3  # exit code if a requested check fails
STOPPED = 130  # exit code after Ctrl-C
# Settings of a command that passes further arguments on to a script.
PASS_ON: dict[str, Any] = {"allow_extra_args": True, "allow_interspersed_args": False, "ignore_unknown_options": True}
Script = Callable[[], None]  # such a command returns one; `main` calls it and does not catch its errors
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextlib.contextmanager
def user_errors(wording: Callable[[str], str] = str) -> Iterator[None]:
    """Turns exceptions in a `with` block into a ConfigError, which the user sees as one line.

    Args:
        wording: Rewrites the message.

    Raises:
        ConfigError: The block raised an exception that a mistake of the user can cause.
    """
    try:
        yield
    except (TrainingError, ModuleNotFoundError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError, ImportError) as error:
        raise ConfigError(wording(str(error)) or type(error).__name__) from error


def show(values: Mapping[str, Any] | Sequence[Any], text: str, as_json: bool) -> None:
    """Prints a result as JSON or as text."""
    print(to_json(values, indent=2) if as_json else text)


def stop() -> NoReturn:
    """Ends the process after Ctrl-C."""
    print("stopped", file=sys.stderr)
    sys.exit(STOPPED)
