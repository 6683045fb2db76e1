"""Errors that a person can fix; `run_recipe` prints them without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..files import redact


class TrainingError(Exception):
    """What went wrong, and what to do about it, in one line without secrets. Whatever was saved before stays good."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        # Other libraries' messages, quoted in ours, may have many lines, and addresses with passwords.
        super().__init__(redact(" ".join(message.split())))


class ConfigError(TrainingError, ValueError):
    """Values that do not fit together, or that this machine cannot do."""


@contextlib.contextmanager
def needed_for(purpose: str) -> Iterator[None]:
    """Says of imports in a `with` block what they are for, where a package is missing that not every run needs.

    Raises:
        ConfigError: one is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{purpose}: {missing_package(error)}") from error


def missing_package(error: ModuleNotFoundError) -> str:
    """What a person has to do about a package that is not installed."""
    name = str(error.name).partition(".")[0]
    extra = name if name in ("transformers", "timm") else "train"
    return f'the package {name} is not installed. Install it with: pip install "hf-gem[{extra}]"'


class DataError(TrainingError, ValueError):
    """The data cannot be read or is too small."""


class CheckpointError(TrainingError, RuntimeError):
    """A checkpoint cannot be written, read or continued from."""


class PushError(TrainingError, RuntimeError):
    """The Hub did not take what was pushed; it is here, whole."""


class Interrupted(TrainingError):  # noqa: N818  # a stop that was asked for is no error
    """Stopped by a signal.

    Args:
        message: What was saved and how to go on.
        signal_number: The signal; the process exits with 128 more, as shells expect.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
