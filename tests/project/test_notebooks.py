"""The notebooks run from top to bottom, their own assertions included, and are stored as a reader wants them."""

import os
import re
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ["01_deq_layer", "02_neural_dynamics", "03_attacking_a_deq", "04_regulating", "05_your_own_parts"]
LARGEST = 300_000  # bytes


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """What all cells print; without what the compiler may report on a slow machine."""
    outputs = (output for cell in code_cells(notebook) for output in cell.outputs)
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def without_numbers(text):
    """Nor the layout: both depend on versions and machines."""
    return " ".join(re.sub(r"[-+]?\d+(\.\d+)?(e[-+]\d+)?", " # ", text).split())


def figures(notebook):
    return sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)


def run(notebook, folder):
    """The notebook run anew with `folder` as its current one, on the devices that a reader has."""
    notebook = deepcopy(notebook)
    for cell in code_cells(notebook):
        cell.update(outputs=[], execution_count=None)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    client = NotebookClient(
        notebook, timeout=1800, coalesce_streams=True, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)
    return notebook


def test_no_notebook_is_forgotten():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_stored_notebook_is_whole_small_and_portable(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST
    assert notebook.metadata.kernelspec.name == "python3"
    assert "pip install -e '.[notebooks]'" in notebook.cells[0].source
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, 1 + len(cells)))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type == "display_data" or output.name == "stdout" for output in outputs)
    text = "\n".join([*(cell.source for cell in notebook.cells), printed(notebook)])
    assert not re.search(r"/home/|/root/|/tmp/|Warning|Traceback", text)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_and_prints_what_is_stored(name, tmp_path):
    stored = read(name)
    again = run(stored, tmp_path)
    assert without_numbers(printed(again)) == without_numbers(printed(stored))
    assert figures(again) == figures(stored) >= 2
    assert not list(tmp_path.iterdir())
