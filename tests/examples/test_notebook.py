"""Test that the notebook runs from top to bottom on small real parts, and that its results are those it promises."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from examples.easy_vqa.model import backbone, processor

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "finetune_your_vlm.ipynb"
MODEL = re.compile(r'^MODEL = ".*"$', re.M)


def test_one_line_names_the_model_and_no_output_is_stored() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert len(MODEL.findall("\n".join(cell.source for cell in cells))) == 1
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_notebook_teaches_a_model_of_real_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # SmolLM2-135M and DINOv2-small behind a projection that has seen no image.
    backbone("projection", torch.float32).save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = MODEL.sub('MODEL = "model"', cell.source)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    share = {when: int(percent) for when, percent in re.findall(r"right (\w+ \w+): (\d+)%", printed)}
    assert set(share) == {"before training", "after training", "after loading"}, printed
    assert share["before training"] < 20 < 60 < share["after training"] == share["after loading"], printed
    assert "equal: True" in printed
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
