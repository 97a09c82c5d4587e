import nbformat
import pytest
from nbclient import NotebookClient

from samples import ROOT


@pytest.mark.slow
def test_the_notebook_runs_to_its_end(here, monkeypatch):
    monkeypatch.setenv("EPOCHS", "2")
    notebook = nbformat.read(ROOT / "notebooks/fine_tune_vit.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(here)}}).execute()
    text = str([cell.get("outputs") for cell in notebook.cells])
    assert "Validation accuracy" in text
    assert "95 % interval" in text
    assert "image/png" in text
    assert "'score'" in text or '"score"' in text
    assert (here / "results/notebook/evaluation_results.json").is_file()
