"""Save tiny hosts for PEFT's tests in a cache with the Hub's layout. The tests load them by name, as from the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.vlm.tiny import build, make_batch
from tests.zoo.llava import llava

COMMIT = "0" * 40


def write_hosts(home: Path) -> None:
    """Save the hosts under `home`, which becomes HF_HOME, and a batch for each kind of host beside them."""
    case = llava()
    _save(case.model, home, "crome/tiny-llava")
    torch.save({key: value for key, value in case.batch.items() if key != "labels"}, home / "decoder.pt")
    for language in ("t5", "bart"):
        model: Any = build(language=language)
        _save(model, home, f"crome/tiny-{language}")
    batch = make_batch(model, images_per_row=(1, 1), side="right")
    batch["decoder_input_ids"] = torch.tensor([[1, 1, 1], [1, 2, 1]])
    torch.save(batch, home / "encoder_decoder.pt")


def _save(model: Any, home: Path, name: str) -> None:
    model.config.eos_token_id = 2  # PEFT's tests ask for it here, not in the language model's
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    model.save_pretrained(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
