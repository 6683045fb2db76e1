"""What is released: the wheel, the source distribution, and the files that forges read."""

import importlib
import re
import tarfile
import zipfile

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import hf_gem.recipes
from tests.helpers import ROOT

tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Names of the files in the wheel and in the source distribution, and the metadata."""
    build = pytest.importorskip("hatchling.build")
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        paths = folder / build.build_wheel(str(folder)), folder / build.build_sdist(str(folder))
    with zipfile.ZipFile(paths[0]) as wheel, tarfile.open(paths[1]) as source:
        metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("METADATA"))
        return set(wheel.namelist()), {name.partition("/")[2] for name in source.getnames()}, metadata


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_the_wheel_has_the_package_whole_and_nothing_else(built):
    wheel, _, metadata = built
    info = f"hf_gem-{hf_gem.__version__}.dist-info"
    package = {str(path.relative_to(ROOT)) for path in files(ROOT / "hf_gem")}
    recipes = {f"hf_gem/{path.relative_to(ROOT)}" for path in files(ROOT / "recipes")}
    assert {name for name in wheel if not name.startswith(info)} == package | recipes
    assert {"hf_gem/recipes/plans/smoke.yaml", "hf_gem/recipes/accelerate/multi_gpu.yaml"} <= recipes
    assert {"hf_gem/training/templates/card.md", "hf_gem/cli/choosing.yaml"} <= package
    assert f"{info}/entry_points.txt" in wheel
    assert f"Version: {hf_gem.__version__}\n" in metadata
    assert "Description-Content-Type: text/markdown" in metadata


def test_an_editable_install_has_one_copy_of_the_recipes(tmp_path, monkeypatch):
    build = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build.build_editable(str(tmp_path))) as wheel:
        assert not any(name.endswith((".py", ".yaml")) for name in wheel.namelist())
    assert hf_gem.recipes.FOLDER == ROOT / "recipes"
    assert importlib.import_module("hf_gem.recipes.gpt2_pretrain").__file__ == str(
        ROOT / "recipes" / "gpt2_pretrain.py"
    )


def test_the_source_has_what_the_tests_need(built):
    _, source, _ = built
    for name in ("README.md", "SECURITY.md", "CITATION.cff", "LICENSE", "Makefile", "pyproject.toml"):
        assert name in source
    for folder in ("hf_gem", "recipes", "benchmarks", "tests", "docs", "results", "model_cards", "notebooks"):
        assert any(name.startswith(f"{folder}/") for name in source), folder
    assert not any(".venv" in name or "__pycache__" in name for name in source)


def test_python_versions_are_those_that_are_tested():
    tested = WORKFLOWS["tests"]["jobs"]["newest"]["strategy"]["matrix"]["python"]
    classifiers = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert classifiers == tested
    assert all(version in SpecifierSet(PROJECT["requires-python"]) for version in tested)


def test_workflows_call_targets_and_files_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = [
        step["run"]
        for flow in WORKFLOWS.values()
        for job in flow["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]
    called = set(re.findall(r"make ([\w-]+)", "\n".join(commands)))
    assert called == {"test", "test-slow", "test-oldest", "docs"}
    assert called <= targets
    (compare,) = (command for command in commands if command.startswith("grep"))
    line = re.search(r"__version__ = .*", compare)[0].split('" ')[0].replace("\\", "")
    assert line.replace("${GITHUB_REF_NAME#v}", hf_gem.__version__) in (ROOT / "hf_gem" / "__init__.py").read_text()


def test_jobs_that_publish_can_write_and_no_others():
    """All else can read the repository, and nothing more."""
    for flow in WORKFLOWS.values():
        assert flow["permissions"] == {"contents": "read"}
    writers = {
        (name, job): values["permissions"]
        for name, flow in WORKFLOWS.items()
        for job, values in flow["jobs"].items()
        if "permissions" in values
    }
    assert writers == {
        ("release", "publish"): {"id-token": "write"},
        ("docs", "deploy"): {"pages": "write", "id-token": "write"},
    }


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2604.21677"}]
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        template = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= template.keys()
