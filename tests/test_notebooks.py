import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {path.stem for path in FOLDER.glob("*.py")} != set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_its_script(path):
    """Edit the .py, then `jupytext --to ipynb notebooks/NAME.py`."""
    jupytext = pytest.importorskip("jupytext")
    notebook, script = (
        [(cell.cell_type, cell.source) for cell in jupytext.read(file).cells]
        for file in (path, path.with_suffix(".py"))
    )
    assert notebook == script
    assert not any(cell.get("outputs") for cell in jupytext.read(path).cells), "commit it without outputs"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_offline_and_shows_its_picture(path, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("JAXSKIP_FAST", "1")
    notebook = nbformat.read(path, as_version=4)
    # The notebook writes to ./runs: run it where that is nobody's folder, with the checkout reachable.
    for name in ("experiments", "jaxskip", "pallas_kernels", "pyproject.toml"):
        (tmp_path / name).symlink_to(FOLDER.parent / name)
    (tmp_path / "notebooks").mkdir()
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path / "notebooks"}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any((tmp_path / "runs").glob("*/*/report.json"))
