"""`hf-gem train`, `compare`, `recipes` and `run`: start training, studies and scripts of your own."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import itertools
import runpy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..files import closest
from ..recipes import FOLDER, plan_files, recipe_files
from ..training.errors import ConfigError, missing_package
from .common import AsJson, Script, show, stop


def _complete_recipe(incomplete: str) -> list[str]:
    return [name for name in recipe_files() if name.startswith(incomplete)]


def _complete_launcher(incomplete: str) -> list[str]:
    return [path.stem for path in sorted(FOLDER.glob("accelerate/*.yaml")) if path.stem.startswith(incomplete)]


def train(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe of `hf-gem recipes`, or the start of its name.",
            autocompletion=_complete_recipe,
        ),
    ],
    launcher: Annotated[
        str | None,
        typer.Option(
            help="Start processes with accelerate. Give a launcher of `hf-gem recipes`, such as multi_gpu, or a file.",
            autocompletion=_complete_launcher,
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option("--num-processes", "--num_processes", min=1, help="Number of processes to start with --launcher."),
    ] = None,
) -> Script:
    """Train a model by a recipe.

    What follows RECIPE goes to the recipe: `hf-gem train gpt2 --preset demo --hidden_act gem_n2`.
    `hf-gem train gpt2 --help` lists its options. After Ctrl-C the same command resumes.
    """
    name = _recipe_named(recipe)
    if launcher is not None:
        return _launch(name, launcher, num_processes, context.args)
    if num_processes is not None:
        raise ConfigError(f"got --num-processes {num_processes} without --launcher. Add --launcher multi_gpu or cpu.")
    return partial(_run_recipe, name, context.args)


def compare(context: typer.Context) -> Script:
    """Run a study by its plan and write its report."""
    return partial(_run_recipe, "compare", context.args)


def recipes(as_json: AsJson = False) -> None:
    """List recipes, plans of studies and configs of launchers."""
    scripts = {name: _headline(path) for name, path in recipe_files().items()}
    plans = plan_files()
    configs = {path.stem: str(path) for path in sorted((FOLDER / "accelerate").glob("*.yaml"))}
    about = {name: _first_sentence(path) for name, path in plans.items()}
    width = max(map(len, [*scripts, *plans]))
    lines = [
        f"Folder: {FOLDER}",
        "Recipes, for hf-gem train:",
        *(f"  {name:<{width}}  {text}" for name, text in scripts.items()),
        "Plans, for hf-gem compare --plan:",
        *(f"  {name:<{width}}  {text}" for name, text in about.items()),
        f"Launchers, for hf-gem train --launcher: {', '.join(configs)}",
    ]
    files = {name: str(path) for name, path in plans.items()}
    found = {"folder": str(FOLDER), "recipes": scripts, "plans": files, "about_plans": about, "launchers": configs}
    show(found, "\n".join(lines), as_json)


def run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(metavar="SCRIPT", help="A Python script; with -m, a module.")],
    module: Annotated[bool, typer.Option("-m", help="Run a module instead of a file.")] = False,
) -> Script:
    """Run any script with the names registered.

    transformers and timm then take `gem_n2`, `egem` and all others. What follows SCRIPT goes to the script:
    `hf-gem run train.py --model resnet18 --model-kwargs act_layer=gem_n2`.
    A launcher takes it as a module: `torchrun --nproc_per_node 8 -m hf_gem run train.py`.
    """
    if module:
        sys.path.insert(0, str(Path.cwd()))
        if not _is_module(str(script)):
            raise ConfigError(f"there is no module {str(script)!r} that can run. Give one that `python -m` can run.")
        return partial(_run_module, str(script), context.args)
    if not script.is_file():
        raise ConfigError(f"there is no script {str(script)!r}. Give the path of a Python file, or -m and a module.")
    return partial(_run_file, script, context.args)


def _recipe_named(given: str) -> str:
    known = recipe_files()
    found = [given] if given in known else [name for name in known if name.startswith(given.replace("-", "_"))]
    if len(found) == 1:
        return found[0]
    problem = f"could be {' or '.join(found)}" if found else "is not known"
    starts = {name[: len(given)]: name for name in known}
    near = closest(given, starts)
    hint = f" Did you mean {starts[near]}?" if near and not found else ""
    raise ConfigError(f"the recipe {given!r:.80} {problem}. The recipes are {', '.join(known)}.{hint}")


def _run_recipe(name: str, arguments: list[str]) -> None:
    sys.path.insert(0, str(Path.cwd()))
    with _errors():
        _run_module(f"hf_gem.recipes.{name}", arguments)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Ends the process with one line for what a recipe or a launcher does not catch itself."""
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(f"error: {missing_package(error)}")
    except KeyboardInterrupt:  # while a recipe was imported, or for the second time
        stop()


def _run_file(script: Path, arguments: list[str]) -> None:
    """Runs a file as `python FILE` would. The import of hf_gem has registered the names before."""
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


def _run_module(name: str, arguments: list[str]) -> None:
    """Runs a module as `python -m MODULE` would."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _is_module(name: str) -> bool:
    """Returns whether there is a module or a package with a `__main__`. An error in a package shows when it runs."""
    try:
        found = importlib.util.find_spec(name)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        return not f"{name}.".startswith(f"{error.name}.")
    except Exception:
        return True
    return found is not None


def _launch(recipe: str, launcher: str, num_processes: int | None, arguments: list[str]) -> Script:
    """Returns a script that starts several processes of a recipe, as `accelerate launch` does."""
    named = FOLDER / "accelerate" / f"{launcher}.yaml"
    config = named if named.is_file() else Path(launcher)
    if not config.is_file():
        raise ConfigError(
            f"the launcher {launcher!r} is not known. Give {', '.join(_complete_launcher(''))}, or a config file."
        )
    from accelerate.commands.launch import launch_command, launch_command_parser

    processes = [] if num_processes is None else [f"--num_processes={num_processes}"]
    command = [f"--config_file={config}", *processes, "-m", f"hf_gem.recipes.{recipe}", *arguments]

    def launch() -> None:
        with _errors():
            launch_command(launch_command_parser().parse_args(command))

    return launch


def _headline(path: Path) -> str:
    """Returns the first sentence of a script's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0].partition(": ")[0]


def _first_sentence(plan: Path) -> str:
    """Returns the first sentence of the comment at the top of a plan."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), plan.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines).partition(". ")[0].rstrip(".")
