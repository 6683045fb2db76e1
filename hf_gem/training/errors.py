"""Errors that a person can mend; recipes print them without a traceback."""


class TrainingError(Exception):
    """What went wrong, and what to do about it, in one line. Whatever was saved before stays good."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # other libraries' messages, quoted in ours, may have many lines


class ConfigError(TrainingError, ValueError):
    """Values that do not fit together, or that this machine cannot do."""


class DataError(TrainingError, ValueError):
    """The data cannot be read or is too small."""


class CheckpointError(TrainingError, RuntimeError):
    """A checkpoint cannot be written, read or continued from."""
