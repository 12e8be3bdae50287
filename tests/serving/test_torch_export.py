"""Test the image encoder as a program of `torch.export`, and in ONNX with onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

from peft_crome.serving import ImageEncoder
from tests.tuner.helpers import attach, randomize
from tests.zoo import ZOO

HOSTS = ("llava", "gemma3", "internvl")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Images(nn.Module):
    """Return the image features of a host, as the class in docs/serving.md does."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self.host.get_image_features(pixel_values=pixel_values).pooler_output


def encoder_of(name: str) -> tuple[Images, torch.Tensor, torch.Tensor]:
    """Return the encoder, images, and their embeddings of shape (tokens of all images, hidden)."""
    case = ZOO[name]()
    model = attach(case.model, branches=["vision"])
    randomize(model)
    expected = torch.cat(ImageEncoder(model)(**case.batch))
    return Images(model.get_base_model()).eval(), case.batch["pixel_values"], expected


def rows(output: Any) -> torch.Tensor:
    parts = [output] if isinstance(output, torch.Tensor) else output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_torch_export(name: str) -> None:
    encoder, pixel_values, expected = encoder_of(name)
    program = torch.export.export(encoder, (pixel_values,))
    torch.testing.assert_close(rows(program.module()(pixel_values)), expected)


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_onnx(name: str, tmp_path: Path) -> None:
    encoder, pixel_values, expected = encoder_of(name)
    torch.onnx.export(encoder, (pixel_values,), dynamo=True).save(tmp_path / "encoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: pixel_values.numpy()})
    torch.testing.assert_close(rows([torch.from_numpy(part) for part in found]), expected, rtol=1e-4, atol=1e-4)
