"""Commands in the documentation name targets, files, modules and options that exist; `test_readme.py` runs some."""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import os
import re
import shlex
import sys
from unittest import mock

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from tests.helpers import ROOT

MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
MAKEFILE = (ROOT / "Makefile").read_text()
ASSIGNMENT = re.compile(r"[A-Z_]+=")
NOT_OURS = {"cd", "git", "hf", "rsync", "trackio", "vllm"}


def commands(page):
    """The lines of shell blocks and indented blocks, and inline code, that begin with a program."""
    found = []
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    for token in itertools.chain(tokens, *(token.children or () for token in tokens)):
        lines = token.content.replace("\\\n", "").splitlines()
        if token.type == "fence" and token.info in ("bash", "sh", "console"):
            found += [line for line in lines if line.strip()]
        elif token.type in ("fence", "code_block", "code_inline"):
            found += [line for line in lines if re.match(rf"({'|'.join(CHECKS)}) \S", without_variables(line))]
    return found


def without_variables(line):
    return re.sub(r"^\s*([A-Z_]+=\S+ )*", "", line)


def check(line):
    words = [word for word in shlex.split(without_variables(line), comments=True) if word not in ("...", "…")]
    program, *arguments = words
    if program not in NOT_OURS:
        assert program in CHECKS, f"{program} is no program that is checked here"
        CHECKS[program](arguments)


def check_make(arguments):
    for argument in arguments:
        if ASSIGNMENT.match(argument):
            name = argument.partition("=")[0]
            assert re.search(rf"\$\(?{name}\b", MAKEFILE), f"the Makefile does not use {name}"
        else:
            assert re.search(rf"^{argument}:", MAKEFILE, re.MULTILINE), f"there is no target {argument}"


def check_python(arguments):
    if arguments[0] == "-m":
        file = ROOT / (arguments[1].replace(".", "/") + ".py")
        if arguments[1].split(".")[0] in ("benchmarks", "recipes", "tests"):
            check_flags(file, arguments[2:])
    else:
        check_flags(ROOT / arguments[0], arguments[1:])


def check_accelerate(arguments):
    assert arguments[0] == "launch"
    check_launched(launch_command_parser(), arguments[1:])


def check_torchrun(arguments):
    check_launched(get_args_parser(), arguments)


def check_launched(parser, arguments):
    if "hf_gem" in arguments:  # a launcher starts python -m hf_gem
        check_hf_gem(arguments[arguments.index("hf_gem") + 1 :])
        return
    if not any(argument.endswith(".py") or argument.startswith("hf_gem.") for argument in arguments):
        # A part of a command, named in the text.
        assert all(argument in parser.format_help() for argument in arguments), arguments
        return
    with contextlib.redirect_stderr(io.StringIO()) as said:
        parsed = ended(parser.parse_args, arguments)
    assert isinstance(parsed, argparse.Namespace), said.getvalue()
    config = getattr(parsed, "config_file", None)
    assert config is None or (ROOT / config).is_file(), f"there is no {config}"
    script = parsed.training_script
    if parsed.module:  # the package has the recipes too
        script = script.removeprefix("hf_gem.").replace(".", "/") + ".py"
    check_flags(ROOT / script, parsed.training_script_args)


def check_flags(file, arguments):
    """The options of one of our programs."""
    assert file.is_file(), f"there is no {file.name}"
    for name, value in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if not name.startswith("--"):
            continue
        flag, _, given = name[2:].partition("=")
        value = given or value
        assert flag in options(file), f"{file.name} has no --{flag}"
        if flag in ("config", "plan"):
            assert (ROOT / value).is_file(), f"there is no {value}"
        if flag == "preset":
            assert value in recipe(file).PRESETS, f"{file.name} has no preset {value}"


# What `hf-gem train` takes for a recipe in the documentation -> its file.
RECIPES = {"gpt2": "gpt2_pretrain.py", "bert": "bert_pretrain.py", "vision_train": "vision_train.py", "pinn": "pinn.py"}


def recipe(file):
    return importlib.import_module(f"recipes.{file.stem}")


@functools.cache
def options(file):
    """The names of the options: fields of the config of a recipe, elsewhere what the source adds to a parser."""
    if file.parent.name == "recipes" and file.stem != "compare":
        return {"config", "preset", *(field.name for field in dataclasses.fields(recipe(file).Config))}
    sources = [file, *([file.parent / "common.py"] if file.parent.name == "benchmarks" else [])]
    return set(re.findall(r'"--([\w-]+)"', "".join(path.read_text() for path in sources)))


def check_hf_gem(arguments):
    names = itertools.takewhile(lambda word: re.fullmatch("[a-z]+", word), arguments)
    command = next(names, None)
    said = help_of(command) if command else help_of()
    if command == "run":  # what follows the script is for it
        script = next((i for i, argument in enumerate(arguments) if argument.endswith(".py")), len(arguments))
        arguments = arguments[:script]
    if command == "train":  # what follows the recipe is for it
        place = next((i for i, argument in enumerate(arguments) if argument in RECIPES), len(arguments))
        if arguments[place + 1 :]:
            check_flags(ROOT / "recipes" / RECIPES[arguments[place]], arguments[place + 1 :])
        arguments = arguments[:place]
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument.partition("=")[0]
            assert re.search(rf"{flag}\b", said), f"hf-gem {command} has no {flag}"


@functools.cache
def help_of(*command):
    from hf_gem.cli import main

    with (
        contextlib.redirect_stdout(io.StringIO()) as said,
        mock.patch.object(sys, "argv", ["hf-gem", *command, "--help"]),
        mock.patch.dict(os.environ, {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}),
    ):
        code = ended(main)
    assert code in (0, None), f"there is no hf-gem {' '.join(command)}"
    return said.getvalue()


def ended(call, *arguments):
    """What a call exits with."""
    try:
        return call(*arguments)
    except SystemExit as stop:
        return stop.code


def check_pytest(arguments):
    for argument in arguments:
        if argument.startswith("tests/"):
            assert (ROOT / argument.partition("::")[0]).exists(), argument


def check_pip(arguments):
    assert arguments[0] in ("install", "show")
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"[\w,]+(?=\])", " ".join(arguments)):
        for name in extra.split(","):
            assert re.search(rf"^{name} = \[", project, re.MULTILINE), f"there is no extra {name}"


CHECKS = {
    "make": check_make,
    "python": check_python,
    "accelerate": check_accelerate,
    "torchrun": check_torchrun,
    "hf-gem": check_hf_gem,
    "pytest": check_pytest,
    "pip": check_pip,
}


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_page(page):
    for line in commands(page):
        try:
            check(line)
        except AssertionError as error:
            raise AssertionError(f"{page.name}: {line}: {error}") from None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("make nothing", "no target nothing"),
        ("make test NOTHING=1", "does not use NOTHING"),
        ("python recipes/nothing.py", "no nothing.py"),
        ("python -m benchmarks.sweep --nothing", "no --nothing"),
        ("accelerate launch recipes/pinn.py --preset nothing", "no preset nothing"),
        ("accelerate launch recipes/pinn.py --nothing 1", "no --nothing"),
        ("accelerate launch --nothing recipes/pinn.py", "nothing"),
        ("accelerate launch --config_file nothing.yaml recipes/pinn.py", "nothing.yaml"),
        ("python recipes/compare.py --plan recipes/plans/nothing.yaml", "nothing.yaml"),
        ("torchrun --nothing recipes/pinn.py", "nothing"),
        ("hf-gem report STUDY --nothing", "no --nothing"),
        ("hf-gem nothing", "nothing"),
        ("pytest tests/test_nothing.py", "test_nothing.py"),
        ('pip install -e ".[nothing]"', "no extra nothing"),
        ("nothing", "no program"),
    ],
)
def test_a_wrong_command_is_found(line, message):
    with pytest.raises(AssertionError, match=message):
        check(line)
