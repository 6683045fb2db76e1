"""The command line as a whole: help, exit codes, errors of one line, completion, and what it imports."""

import ast
import contextlib
import json
import os
import re
import shlex
import signal
import sys
import warnings
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_gem as package
from hf_gem.cli import app, main
from hf_gem.files import shown
from hf_gem.training.errors import missing_package
from tests.helpers import ROOT, run_python

DOCS = (ROOT / "docs" / "cli.md").read_text()
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


def test_version(hf_gem):
    assert hf_gem("--version") == (0, f"hf-gem {package.__version__}\n", "")


def test_help_names_every_command(hf_gem):
    code, out, err = hf_gem("--help")
    assert code == 0
    assert err == ""
    listed = [line.split()[0] for line in out.split("Commands:\n")[1].split("\n\n")[0].splitlines()]
    assert listed == COMMANDS
    assert "..." not in out.split("Commands:\n")[1]  # a summary that was cut off


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "compare"])
def test_each_command_explains_itself(hf_gem, command):
    code, out, _ = hf_gem(command, "-h")
    assert code == 0
    assert f"Usage: hf-gem {command}" in out
    assert all(parameter.help for parameter in typer.main.get_command(app).commands[command].params)
    assert f"`hf-gem {command}" in DOCS


def test_without_arguments_it_shows_its_help(hf_gem):
    assert hf_gem() == hf_gem("--help")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("bogus",), 2),
        (("show",), 2),
        (("show", "gem", "--nope"), 2),
        (("bench", "--rounds", "many"), 2),
        (("show", "gem_n0"), 1),
        (("show", "gem_n" + "9" * 100_000), 1),
        (("audit", "no_such_model"), 1),
        (("audit", "x" * 100_000), 1),
        (("convert", "gpt2", "out", "--to", "egem", "--eps", "small"), 1),
        (("plot", "--figure", "nope"), 1),
        (("report", "nowhere"), 1),
        (("run", "nope.py"), 1),
        (("run", "-m", "nope"), 1),
        (("run", "-m", "json.nope"), 1),
        (("run", "-m", "nope.json"), 1),
        (("run", "-m", "json"), 1),  # a package without __main__
        (("train", "nope"), 1),
        (("train", "--num-processes", "2", "gpt2"), 1),
    ],
)
def test_a_mistake_takes_one_line(hf_gem, arguments, status):
    code, out, err = hf_gem(*arguments)
    assert code == status
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert len(err) < 700
    assert "Traceback" not in err


def test_a_missing_package_is_named_with_what_brings_it(hf_gem, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = hf_gem("plot", "gem")
    assert code == 1
    assert err == 'error: The package matplotlib is not installed. Install it with: pip install "hf-gem[train]"\n'


@pytest.mark.parametrize(
    ("module", "hint"),
    [
        ("transformers.models", ' with: pip install "hf-gem[transformers]"'),
        ("yaml", ' with: pip install "hf-gem[train]"'),
        ("helper_mod", "."),
    ],
)
def test_an_extra_is_named_for_what_it_contains(module, hint):
    assert missing_package(ModuleNotFoundError(name=module)).endswith(f"is not installed. Install it{hint}")


def test_the_named_extra_is_that_of_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core, extras = brought_by(project["dependencies"]), project["optional-dependencies"]
    extras["train"] = [*extras["train"][1:], *extras["transformers"], *extras["timm"]]  # the first names these two
    brought = {extra: brought_by(extras[extra]) for extra in ("transformers", "timm", "train")}
    nodes = [node for path in (ROOT / "hf_gem").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    targets = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    targets += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imported = {target.split(".")[0] for target in targets}
    for name, distributions in packages_distributions().items():
        of = set(map(canonicalize_name, distributions))
        named = re.search(r'"hf-gem\[(\w+)\]"$', missing_package(ModuleNotFoundError(name=name)))
        assert named is None or of & brought[named[1]], f"{named[1]} does not bring {name}"
        optional = name in imported and not of & core
        assert named or not optional or not of & brought["train"], f"train brings {name}, but the error does not say so"


def brought_by(requirements):
    """The packages that are installed for these and, in turn, for them."""
    found, left = set(), list(map(Requirement, requirements))
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            with contextlib.suppress(PackageNotFoundError):
                left += map(Requirement, requires(name) or ())
    return found


def test_a_warning_takes_one_line(hf_gem, monkeypatch):
    monkeypatch.setattr(
        "hf_gem.cli.models._advice", lambda *_: warnings.warn("of two\nlines", stacklevel=1) or "advice"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert hf_gem("choose", "gpt2") == (0, "advice\n", "warning: of two lines\n")


@pytest.fixture
def ctrl_c():
    """Does what Ctrl-C does in a terminal. In the background of a shell, SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda *_, **__: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "arguments",
    [
        *(("show", "gem"), ("train", "gpt2"), ("train", "--launcher", "cpu", "gpt2"), ("compare",)),
        *(("report", "study"), ("summary", "study"), ("card", "run", "study", "--record", ROOT / "pyproject.toml")),
    ],
)
def test_ctrl_c_stops_at_once_with_one_line(hf_gem, monkeypatch, ctrl_c, arguments):
    monkeypatch.setattr("hf_gem.cli.member.describe", ctrl_c)
    monkeypatch.setattr("runpy.run_module", ctrl_c)  # while the recipe is imported
    monkeypatch.setattr("accelerate.commands.launch.launch_command", ctrl_c)
    monkeypatch.setattr("hf_gem.compare.study.Study", ctrl_c)
    monkeypatch.setattr("hf_gem.training.record.read_record", lambda _: {})  # before `card` reads the study
    assert hf_gem(*arguments) == (130, "", "stopped\n")


@pytest.mark.parametrize(("arguments", "text"), [(("list",), None), (("--help",), "1 / 0")])
def test_a_faulty_family_takes_one_line(tmp_path, arguments, text):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    done = run_python("-m", "hf_gem", *arguments, HF_GEM_FAMILIES=str(file))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"error: HF_GEM_FAMILIES contains {shown(str(file))}, which cannot be imported (")


def test_a_faulty_family_is_an_error_that_other_programs_can_catch(tmp_path):
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("try:\n    import hf_gem\nexcept ImportError:\n    print('caught')\n")
    (package / "__main__.py").write_text("")
    search = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = run_python("-m", "theirs", "hf_gem", HF_GEM_FAMILIES="none.py", PYTHONPATH=search)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caught\n", "")


COMPLETION = {"_HF_GEM_COMPLETE": "complete_bash", "COMP_WORDS": "hf-gem train gp", "COMP_CWORD": "2"}


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [*(([*command, "--help"], {}) for command in ((), ("show",), ("train",))), (["--version"], {}), ([], COMPLETION)],
)
def test_it_imports_no_library_before_a_command_needs_it(arguments, environment):
    heavy = ("torch", "numpy", "transformers", "timm", "accelerate", "matplotlib", "scipy", "yaml", "rich")
    code = f"""
import atexit, sys
atexit.register(lambda: print([name for name in {heavy} if name in sys.modules], file=sys.stderr))
from hf_gem.cli import main
main()
"""
    done = run_python("-c", code, *arguments, **environment)
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr == "[]\n"


def test_completion_and_the_module():
    """`python -m hf_gem` is the command, and completes like it."""
    assert run_python("-m", "hf_gem", **COMPLETION).stdout.split() == ["gpt2_pretrain"]


def test_the_commands_of_the_page(hf_gem, tmp_path, monkeypatch):
    """Those that take a second run here; the others are in the tests of their files, and of the wheel."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("hf-gem ")]
    assert {line[1] for line in lines} - {"--install-completion"} <= set(COMMANDS)
    quick = [line[1:] for line in lines if line[1] in ("list", "show", "plot", "audit", "choose", "recipes")]
    assert len(quick) > 8
    for arguments in quick:
        assert hf_gem(*arguments)[0] == 0, arguments
    assert {path.name for path in tmp_path.iterdir()} == {"gem.svg", "eps.png", "family.png"}


def test_json_is_json(hf_gem):
    for arguments in (("list",), ("show", "gem"), ("recipes",), ("env",), ("choose", "gpt2"), ("audit", "gpt2")):
        code, out, _ = hf_gem(*arguments, "--json")
        assert code == 0
        assert json.loads(out)


def test_main_takes_the_arguments_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf-gem", "--version"])
    main()
    assert capsys.readouterr().out.startswith("hf-gem ")
