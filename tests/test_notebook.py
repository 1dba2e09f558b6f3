"""The notebook of `examples/` runs from its first cell to its last, and holds no output of another run."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from fakes import make_data_demo
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples/quickstart.ipynb"

# Without type information.
read: Any = nbformat.read
validate: Any = nbformat.validate


def text_of(cell: Any) -> str:
    """Return what a cell shows, as HTML where it has it."""
    shown = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        shown.append(str(data.get("text/html") or data.get("text/plain") or output.get("text", "")))
    return "".join(shown)


@pytest.mark.slow
# Jupyter's own event loop and paths warn on some platforms.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq", "ignore::DeprecationWarning:jupyter_client")
def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    make_data_demo()
    notebook = read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {cell["id"]: text_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"}
    assert "ActivationDataset" in shown["open"]
    assert "complete</div>" in shown["open"]
    assert "'kind': 'heldout'" in shown["catalog"]
    assert "'stream': 'resid_post'" in shown["sql"]
    assert "(4, 640)" in shown["read"]
    assert shown["context"].count("row ") == 4
    assert "batches of" in shown["stream"]
    assert "torch.Size([1024, 640])" in shown["resume"]


def test_the_notebook_is_kept_without_output() -> None:
    notebook = read(NOTEBOOK, as_version=4)
    validate(notebook)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]
