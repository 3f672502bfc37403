"""The notebook runs from top to bottom in a kernel of its own, and its fit is worth it."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_fit.ipynb"
if not NOTEBOOK.exists():
    pytest.skip("the wheel holds no examples", allow_module_level=True)


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_short_and_holds_no_results(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count]
    assert sum(len(cell.source.splitlines()) for cell in code) <= 60
    assert NOTEBOOK.stat().st_size < 10_000


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    told = {
        cell.id: "".join(each.text for each in cell.outputs if each.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert "verdict: 8 evaluations: " in told["fit"]
    assert "42 of 50 steps forecast" in told["compare"]
    found = re.findall(r"^(.*\S) +(\d+\.\d) dB from the full run$", told["compare"], re.M)
    decibels = {name: float(value) for name, value in found}
    assert list(decibels) == ["predictor", "reuse", "taylor 2"]
    assert decibels["predictor"] > max(decibels["reuse"], decibels["taylor 2"]) + 1
    (shown,) = [cell for cell in notebook.cells if cell.id == "pictures"]
    assert [each.output_type for each in shown.outputs] == ["display_data"]
    assert shown.outputs[0].data["image/png"]
    assert (tmp_path / "runs" / "first_fit" / "readout_8" / "model.safetensors").is_file()
