"""What is released: the wheel, the source distribution, and the files that forges read."""

import re
import tarfile
import zipfile

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import hf_gem
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


def test_the_wheel_has_the_package_whole_and_nothing_else(built):
    wheel, _, metadata = built
    kinds = (".py", ".cpp", ".j2", ".md", ".typed", ".json")
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "hf_gem").rglob("*")
        if path.suffix in kinds or path.name == "py.typed"
    }
    assert package <= wheel
    assert {name.split("/")[0] for name in wheel} == {"hf_gem", f"hf_gem-{hf_gem.__version__}.dist-info"}
    assert f"Version: {hf_gem.__version__}\n" in metadata
    assert "Description-Content-Type: text/markdown" in metadata


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
    assert called == {"test", "test-slow", "test-oldest"}
    assert called <= targets
    (compare,) = (command for command in commands if command.startswith("grep"))
    line = re.search(r"__version__ = .*", compare)[0].split('" ')[0].replace("\\", "")
    assert line.replace("${GITHUB_REF_NAME#v}", hf_gem.__version__) in (ROOT / "hf_gem" / "__init__.py").read_text()


def test_tokens_are_read_by_the_one_job_that_publishes():
    """All else can read the repository, and nothing more."""
    for flow in WORKFLOWS.values():
        assert flow["permissions"] == {"contents": "read"}
    writers = {name: job["permissions"] for name, job in WORKFLOWS["release"]["jobs"].items() if "permissions" in job}
    assert writers == {"publish": {"id-token": "write"}}


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2604.21677"}]
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        template = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= template.keys()
