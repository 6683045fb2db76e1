"""Errors that the user can fix. `run_recipe` prints them without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..files import redact

# Package -> the extra that brings it, for those that hf_gem imports.
_EXTRAS = {
    **{"transformers": "transformers", "timm": "timm"},
    **dict.fromkeys(("PIL", "accelerate", "datasets", "evaluate", "filelock", "huggingface_hub", "jinja2"), "train"),
    **dict.fromkeys(("markdown_it", "matplotlib", "numpy", "safetensors", "scipy", "tokenizers"), "train"),
    **dict.fromkeys(("torchvision", "tqdm", "trackio", "yaml"), "train"),
}
_MOST_QUOTED = 400  # characters of another library's message: it may repeat a long value in full


class TrainingError(Exception):
    """An error whose message says what went wrong and what to do, in one line without secrets.

    Anything that was saved before the error is still good.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        # Our messages quote those of other libraries, which may span lines and contain URLs with passwords.
        super().__init__(redact(" ".join(message.split())))


class ConfigError(TrainingError, ValueError):
    """Values that do not fit together, or that this machine does not support."""


@contextlib.contextmanager
def needed_for(purpose: str) -> Iterator[None]:
    """Turns a failed import of an optional package in a `with` block into an error that says what needs it.

    Args:
        purpose: The subject of the error message, such as "judging a study".

    Raises:
        ConfigError: A package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{purpose} needs a package. {missing_package(error)}") from error


def missing_package(error: ModuleNotFoundError) -> str:
    """Says how to install a package that is missing."""
    name = str(error.name).partition(".")[0]
    how = f' with: pip install "hf-gem[{_EXTRAS[name]}]"' if name in _EXTRAS else "."
    return f"The package {name} is not installed. Install it{how}"


def reason(error: Exception) -> str:
    """Quotes another library's error for a message of ours: type and text in one line, without secrets or a period."""
    text = redact(" ".join(f"{type(error).__name__}: {error}".split())).rstrip(".: ")
    return text if len(text) <= _MOST_QUOTED else f"{text[: _MOST_QUOTED // 2]} ... {text[-_MOST_QUOTED // 2 :]}"


class DataError(TrainingError, ValueError):
    """The data cannot be read, or there is too little of it."""


class CheckpointError(TrainingError, RuntimeError):
    """A checkpoint cannot be written, read or resumed from."""


class PushError(TrainingError, RuntimeError):
    """A push to the Hub failed. All files are still on the local disk."""


class Interrupted(TrainingError):  # noqa: N818  # a requested stop is not an error
    """A signal stopped the run.

    Args:
        message: What was saved, and how to continue.
        signal_number: The number of the signal. The exit status is 128 plus this number, as shells expect.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
