"""The wheel in an environment of its own, where nothing of the clone is: with torch alone, and with each library."""

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ON_CPU, ROOT, TINY, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # each test starts several processes

# Of all that this environment has, the packages that the wheel asks for, and those that these ask for.
HIDE = """
import sys
from importlib.machinery import PathFinder

HIDDEN = frozenset({hidden})


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if path is None and fullname in HIDDEN else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def clean_variables():
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def needed(wheel, *extras):
    """The distributions that `pip install hf-gem[EXTRAS]` brings, `wheel` being hf-gem."""
    found, left = set(), [("hf-gem", frozenset(extras))]
    while left:
        asked = left.pop()
        if asked in found:
            continue
        found.add(asked)
        name, extras = asked
        try:
            requires = (wheel if name == "hf-gem" else metadata.distribution(name)).requires or []
        except metadata.PackageNotFoundError:  # for another system
            continue
        for requirement in map(Requirement, requires):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                left.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the wheel and the source distribution; the wheel is built from the latter, as pip does it."""
    build = pytest.importorskip("hatchling.build")
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        source = build.build_sdist(str(folder))
        subprocess.run(["tar", "xf", source], cwd=folder, check=True)
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    code = f"import hatchling.build as build; build.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=unpacked, check=True)
    return folder


def make_environment(folder):
    """A virtual environment that sees the packages of this one, but not hf_gem; returns its own folder of packages."""
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(packages))
    pip = folder / "bin" / "pip"  # which takes what is there: there is no network
    flags = "--no-deps --no-index --no-build-isolation --force-reinstall --quiet"
    pip.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip --python "{folder}/bin/python" "$@" {flags}\n')
    pip.chmod(0o755)
    return site


@pytest.fixture(scope="module")
def environment(dist, tmp_path_factory):
    """The folder of a virtual environment with the wheel, and what its metadata says."""
    folder = tmp_path_factory.mktemp("environment")
    site = make_environment(folder)
    (wheel,) = dist.glob("*.whl")
    subprocess.run([str(folder / "bin" / "pip"), "install", str(wheel)], check=True, env=clean_variables())
    return folder, metadata.PathDistribution(next(site.glob("hf_gem-*.dist-info")))


@pytest.fixture
def run(environment, tmp_path):
    """Runs a program of the environment in an empty folder, where only some of the packages are installed."""

    root, wheel = environment

    def run(program, *arguments, extras=(), code=0):
        site = tmp_path / "hidden"
        site.mkdir(exist_ok=True)
        there, names = needed(wheel, *extras), metadata.packages_distributions()
        kept = {top for top, owners in names.items() if there & set(map(canonicalize_name, owners))}
        (site / "sitecustomize.py").write_text(HIDE.format(hidden=sorted(names.keys() - kept)))
        folder = tmp_path / "work"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            [str(root / "bin" / program), *map(str, arguments)],
            cwd=folder,
            env={
                **clean_variables(),
                **ON_CPU,
                "PYTHONPATH": str(site),
                "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "clone" not in done.stdout + done.stderr
        return done

    return run


def test_twine_finds_nothing_wrong(dist):
    pytest.importorskip("twine")
    files = [str(path) for path in dist.iterdir() if path.suffix in (".whl", ".gz")]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


# Runs commands of hf-gem in one process: prints [exit code, standard output, standard error] of each.
COMMANDS = """
import contextlib, io, json, sys
import torch  # without NumPy, it warns when it is imported
from hf_gem.cli import main

for command in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(command)
        except SystemExit as stop:
            code = stop.code or 0
            if isinstance(code, str):
                code = print(code, file=err) or 1
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
LIBRARIES = """
import importlib.util, json, torch, hf_gem

y = hf_gem.GEM(2)(torch.ones(3, requires_grad=True))
y.sum().backward()
others = ("transformers", "timm", "accelerate", "yaml", "matplotlib")
print(json.dumps([y.tolist(), hf_gem.__file__, [name for name in others if importlib.util.find_spec(name)]]))
"""


@pytest.fixture
def commands(run):
    def commands(*given, extras=()):
        done = run("python", "-c", COMMANDS, json.dumps([command.split() for command in given]), extras=extras)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return commands


def test_with_torch_alone(run, commands, environment):
    values, file, others = json.loads(run("python", "-c", LIBRARIES).stdout)
    assert values == [0.5, 0.5, 0.5]
    assert Path(file).is_relative_to(environment[0])
    assert others == []
    assert run("hf-gem", "--version").stdout == f"hf-gem {environment[1].version}\n"
    families, shown, here, there = commands("list", "show gem", "env", "recipes --json")
    assert "E-GEM" in families[1]
    assert "gate half open" in shown[1]
    assert f"hf-gem: {environment[1].version}" in here[1]
    found = json.loads(there[1])
    assert Path(found["folder"]).is_relative_to(environment[0])
    assert "gpt2_pretrain" in found["recipes"]
    assert {"smoke", "gpt2-124m"} <= found["plans"].keys()
    assert "multi_gpu" in found["launchers"]
    for code, out, err in commands("plot gem", "report x", "train gpt2", "train --launcher cpu gpt2", "choose a/b"):
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert 'pip install "hf-gem[' in err


def test_with_transformers(commands):
    audit, choose = commands("audit gpt2 --act gem_n2 --check", "choose bert", extras=("transformers",))
    assert audit[:2] == [0, "12 of 12 activation calls are GEM: 12 x gem_n2\n"]
    assert "use: not known" in choose[1]


def test_with_timm(commands):
    (audit,) = commands("audit test_vit --act gem --check", extras=("timm",))
    assert audit[:2] == [0, "6 of 6 activation calls are GEM: 6 x gem\n"]


def test_recipes_train_from_the_wheel(run, tmp_path):
    """`hf-gem train`, and accelerate's launcher with the module: they write the same curve, and how they were run."""
    flags = [*TINY, f"--dataset={write_corpus(tmp_path / 'corpus.txt')}", f"--cache_dir={tmp_path / 'cache'}"]
    module = "hf_gem.recipes.gpt2_pretrain"
    launch = ("-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no")
    run("hf-gem", "train", "gpt2", *flags, "--output_dir=one", extras=("train",))
    run("python", *launch, "--dynamo_backend=no", "-m", module, *flags, "--output_dir=two", extras=("train",))
    one, two = (json.loads((tmp_path / "work" / name / "record.json").read_text()) for name in ("one", "two"))
    assert one["curves"] == two["curves"]
    assert one["sessions"][0]["command"].startswith(f"python -m {module} --n_layer=2")
    assert two["sessions"][0]["command"].startswith(f"accelerate launch -m {module} --n_layer=2")
    assert one["sessions"][0]["commit"] is None  # of whatever lies around the environment
    out = run("hf-gem", "compare", "--plan", "smoke", "--dry_run", extras=("train",)).stdout
    assert "smoke: 3 arms" in out


def test_a_newcomer_needs_five_commands(tmp_path):
    """Those of the page, from a clone to a picture and an audited model."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone, from which another one could be made")
    page = (ROOT / "docs" / "cli.md").read_text()
    block = page.split("## In five commands")[1].split("```bash\n")[1].split("```")[0]
    assert block.count("\n") == 5
    make_environment(tmp_path / "environment")
    done = subprocess.run(
        ["bash", "-ec", block.replace("REPOSITORY", shlex.quote(f"file://{ROOT}"))],
        cwd=tmp_path,
        env={**clean_variables(), "PATH": f"{tmp_path}/environment/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf_gem" / "family.png").read_bytes().startswith(b"\x89PNG")
    assert "12 of 12 activation calls are GEM: 12 x gem_n2" in done.stdout
