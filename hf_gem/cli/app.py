"""The command `hf-gem`: registers its commands, prints errors in one line and sets the exit code."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from ..training.errors import TrainingError, missing_package
from . import environment, functions, models, records, timing, training
from .common import PASS_ON, STOPPED, stop
from .terminal import printable

# click's UsageError. Newer versions of typer contain their own copy of click.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
_USAGE = 2  # exit code for a wrong command line

app = typer.Typer(
    name="hf-gem",
    help="Activation functions of the GEM family: look at them, put them into models, train and compare.",
    epilog="Exit codes: 0 success, 1 error, 2 wrong command line, 3 failed check, 130 and 143 stopped.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command(name="list")(functions.list_families)
app.command(name="show")(functions.show_member)
app.command()(functions.plot)
app.command()(models.audit)
app.command()(models.convert)
app.command()(models.choose)
app.command(context_settings=PASS_ON)(training.train)
app.command(context_settings=PASS_ON, add_help_option=False)(training.compare)
app.command()(training.recipes)
app.command(context_settings=PASS_ON)(training.run)
app.command()(records.report)
app.command()(records.summary)
app.command()(records.card)
app.command()(timing.bench)
app.command()(environment.env)


@app.callback(invoke_without_command=True)
def _without_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
) -> None:
    if version:
        from .. import __version__

        print(f"hf-gem {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `hf-gem`. Exits the process if the exit code is not 0.

    Args:
        argv: The arguments. By default those of the process.
    """
    arguments = None if argv is None else list(argv)
    try:
        with printable(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {_one_line(message)}", file=sys.stderr)
            result = app(args=arguments, prog_name="hf-gem", standalone_mode=False)
    except _UsageError as error:
        _fail(error.format_message(), _USAGE)  # type: ignore[attr-defined]
    except TrainingError as error:
        _fail(error, error.exit_code)
    except OSError as error:  # a file that cannot be read, a full disk
        _fail(error, 1)
    except ModuleNotFoundError as error:
        _fail(missing_package(error), 1)
    except (typer.Abort, KeyboardInterrupt):
        stop()
    if callable(result):
        result()
    elif result == STOPPED:  # what typer makes of Ctrl-C
        stop()
    elif isinstance(result, int) and result:
        sys.exit(result)


def _fail(message: object, status: int) -> NoReturn:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    sys.exit(status)


def _one_line(message: object) -> str:
    """Returns a message without line breaks, and shortens words of more than 80 characters."""
    return re.sub(r"\S{81,}", lambda found: f"{found[0][:38]}...{found[0][-38:]}", " ".join(str(message).split()))
