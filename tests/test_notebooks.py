"""The notebooks of examples/: committed with outputs, and executed from the first cell to the last."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need the extra 'dev'")
nbclient = pytest.importorskip("nbclient", reason="notebooks need the extra 'dev'")

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def read(path: Path):
    return nbformat.read(path, as_version=4)


def outputs(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def kinds(notebook) -> set[str]:
    """Types of what is shown: text, HTML, pictures."""
    return {kind for output in outputs(notebook) for kind in output.get("data", {})}


def test_there_are_four():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_with_its_outputs(path):
    notebook = read(path)
    shown = outputs(notebook)
    assert not [output for output in shown if output.output_type == "error" or output.get("name") == "stderr"]
    assert kinds(notebook) & {"image/png", "image/svg+xml"}
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    text = path.read_text()
    assert "/tmp/" not in text.replace("/tmp/tmp", "")
    assert str(Path.home()) not in text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path):
    pytest.importorskip("ipykernel", reason="notebooks need the extra 'dev'")
    notebook = read(path)
    expected = kinds(notebook)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    assert kinds(notebook) == expected
