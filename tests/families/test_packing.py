"""Test that packed rows have the loss and gradients of padded rows. Models that cannot read packed rows get padded
ones and a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from PIL import Image

from peft_crome import CromeConfig, logits_at_labels, pack_rows
from peft_crome.backbone import packed_rows
from peft_crome.data import ConversationCollator
from peft_crome.data.packing import PackingOrder
from tests.losses import loss_and_gradients

from . import FAMILIES, Family
from .conversations import turn

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # GLM-4V's processor, with numpy 2.4
IMAGE = {"type": "image"}


def rows_of(family: Family, folder: Path) -> list[dict[str, Any]]:
    """Return conversations of several lengths, with one image, two images and no image, where the family accepts
    them."""
    files = []
    for number, size in enumerate([(181, 97), (97, 111), (60, 64)]):
        noise = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        files.append(str(folder / f"{number}.png"))
        Image.fromarray(noise.numpy()).save(files[-1])
    talk = [turn("assistant", "A cat."), turn("user", "Is it red? " * 9), turn("assistant", "A red cat. " * 7)]
    rows = [
        ([turn("user", IMAGE, "What is this?"), turn("assistant", "A red cat.")], files[:1]),
        ([turn("user", IMAGE, "What?"), *talk], files[1:2]),
        ([turn("user", IMAGE, "Look?"), turn("assistant", "A dog.")], files[2:]),
    ]
    if family.several_images:
        rows.append(([turn("user", IMAGE, IMAGE, "What differs?"), turn("assistant", "Colors.")], files[:2]))
    if family.text_only:
        rows.append(([turn("user", "What is two?"), turn("assistant", "A number.")], []))
    return [{"id": str(n), "messages": messages, "images": images} for n, (messages, images) in enumerate(rows)]


PADDED = ("gemma3", "molmo2")  # read images in both directions, by masks that do not look for boundaries
NAMES = ("gemma4", "idefics3", "internvl", "llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm", *PADDED)


@pytest.mark.parametrize("family", [FAMILIES[name] for name in NAMES], ids=NAMES)
def test_the_loss_of_padded_rows(
    family: Family,
    family_checkpoint: Callable[[Any], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    folder = family_checkpoint(family)
    host = getattr(tf, family.auto_class).from_pretrained(folder)
    model = get_peft_model(host, CromeConfig(bottleneck_dim=4, init_weights=False)).eval()
    collator = ConversationCollator(tf.AutoProcessor.from_pretrained(folder))
    rows = rows_of(family, tmp_path)
    longest = max(size.kept for size in collator.measure(rows))
    collator.max_length = 2 * longest
    batch, ordered = collator(rows), PackingOrder(collator)(rows)
    packed = pack_rows(model, ordered, collator.max_length)
    lines = [record.getMessage() for record in caplog.records if record.name == packed_rows.__name__]
    if family.name in PADDED:
        assert packed is ordered
        (line,) = lines
        assert "its logits change by" in line
        return
    assert not lines
    assert packed["input_ids"].numel() < batch["input_ids"].numel()
    loss, gradients = loss_and_gradients(model, {**batch, "num_items_in_batch": torch.tensor(50)})
    for form in (packed, logits_at_labels(model, packed)):
        again, others = loss_and_gradients(model, {**form, "num_items_in_batch": torch.tensor(50)})
        torch.testing.assert_close(again, loss, rtol=1e-4, atol=1e-5)
        for key, gradient in gradients.items():
            torch.testing.assert_close(others[key], gradient, rtol=1e-3, atol=1e-5)
