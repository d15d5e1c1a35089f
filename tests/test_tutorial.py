"""The notebook docs/tutorial.ipynb: its cells run, shortened, and what is stored of a full run is fit to be shown."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"
SHORT = 'ROW_STEPS, PIXEL_STEPS, READERS, SOURCE = 40, 4, 20, "embedded"'


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def settings(notebook):
    """Where the cell of settings stands."""
    (index,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    return index


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts_and_pictures(notebook):
    """What cells print, and how many of their outputs are pictures."""
    texts = [output.text for output in outputs(notebook) if output.output_type == "stream"]
    return texts, sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_the_notebook_is_a_valid_one(notebook):
    nbformat.validate(notebook)


def test_the_short_settings_are_the_settings(notebook):
    given = ast.parse(notebook.cells[settings(notebook)].source)
    names = {target.id for node in given.body for target in node.targets}
    (short,) = ast.parse(SHORT).body
    assert {target.id for target in short.targets[0].elts} == names


def test_it_holds_what_a_whole_run_gave(notebook):
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert not [
        output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"
    ]
    texts, pictures = texts_and_pictures(notebook)
    assert pictures >= 12
    assert not re.search(r"/(home|root|tmp|work|Users)/", "".join(texts)), "a path of a machine"
    assert PATH.stat().st_size < 1 << 20


@pytest.mark.slow  # half a minute, most of it compiling
def test_the_cells_run(notebook):
    notebook.cells.insert(settings(notebook) + 1, nbformat.v4.new_code_cell(SHORT))
    stored = texts_and_pictures(notebook)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    texts, pictures = texts_and_pictures(notebook)
    assert pictures == stored[1]
    assert "bit for bit the same: True" in "".join(texts)
    assert "".join(texts).count("test accuracy") == "".join(stored[0]).count("test accuracy") > 0
