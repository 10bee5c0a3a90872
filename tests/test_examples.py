"""Execute the notebooks of examples/ as they are, on the miniature."""

import json
from pathlib import Path

import pytest

from tests.helpers.notebook import code_cells, run_cells
from tests.helpers.scripted_hub import ScriptedHub

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow(20)
def test_the_first_run_learns_forgets_is_cured_and_published(tmp_path, monkeypatch):
    cells = code_cells(EXAMPLES / "first-run.ipynb")
    for old, new in (('Path("runs/first-run")', f'Path("{tmp_path}")'), ('NAME = ""', 'NAME = "me/apothecary"')):
        assert sum(cell.count(old) for cell in cells) == 1
        cells = [cell.replace(old, new) for cell in cells]
    monkeypatch.chdir(EXAMPLES)
    with ScriptedHub(monkeypatch) as hub:
        ended, shown = run_cells(cells)
    assert ended == [("trainer.run", 0), ("trainer.run", 0), ("trainer.gate", 3), ("trainer.run", 0), ("trainer.gate", 0),
                     ("trainer.publish", 0)], shown
    assert "[[" in shown and "alone: FAIL" in shown and "kept: PASS" in shown and "# kept" in shown and f"published: {hub.url}" in shown
    assert hub.repos == {"me/apothecary": True} and ("me/apothecary", "adapter_model.safetensors") in hub.files


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_of_the_format_that_jupyter_reads_and_hold_no_outputs(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] == 5 and notebook["metadata"]["language_info"]["name"] == "python"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and cell["source"] and cell["metadata"] == {}
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
