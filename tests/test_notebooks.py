"""Every notebook runs from top to bottom, and is committed without outputs."""

import os
import pathlib
import sys

import pytest

PROJECT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
TIMEOUT_S = 300  # a cell


def read(path):
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_stripped(path):
    for cell in code_cells(read(path)):
        assert not cell.outputs and cell.execution_count is None, cell.source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs_without_errors(path, monkeypatch, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    notebook = read(path)
    # The kernel is this interpreter, whatever kernels are installed; imports resolve from the root.
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    text = f'{{"argv": {command!r}, "display_name": "here", "language": "python"}}'
    (kernel / "kernel.json").write_text(text.replace("'", '"'))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    )
    client = nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(PROJECT)}},
    )
    client.execute()  # raises CellExecutionError with the traceback of the cell
    cells = code_cells(notebook)
    assert all(cell.execution_count for cell in cells if cell.source.strip())
    printed = "".join(o.get("text", "") for cell in cells for o in cell.outputs)
    assert "largest difference of logits" in printed or path.name != "quickstart.ipynb"
