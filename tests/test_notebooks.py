"""The notebooks run from their first cell to their last, and are stored without outputs."""

import pytest

from tests.helpers import ROOT

nbformat = pytest.importorskip("nbformat", reason="reads notebooks")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["convert_and_finetune", "quickstart"]


@notebooks
def test_nothing_is_stored_that_running_adds(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert [cell.execution_count for cell in code] == [None] * len(code)
    assert not any(cell.metadata for cell in notebook.cells)


@notebooks
def test_the_first_cell_says_how_to_install(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert 'pip install -e ".[train]"' in first.source


@pytest.mark.slow
@notebooks
def test_it_runs(path, tmp_path):
    pytest.importorskip("ipykernel", reason="runs the cells")
    client = pytest.importorskip("nbclient", reason="runs notebooks").NotebookClient
    notebook = nbformat.read(path, as_version=4)
    client(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not any(tmp_path.iterdir())
