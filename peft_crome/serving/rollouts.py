"""Let TRL's trainers sample from the adapted model with vLLM: `use_vllm=True`."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from peft import PeftModel
from trl.generation.vllm_generation import VLLMGeneration

from ..backbone.model import unwrapped
from ..tuner.layer import crome_layers
from ..vlm import CromeVLMForConditionalGeneration
from .export import export, read_served, served_weights


def prepare(trainer: Any) -> None:
    """Refuse a trainer whose engine would have other weights; called once a trainer with `use_vllm` is made.

    Raises:
        ValueError: the composite has no adapter, or the trainer sends vLLM weights in a way of its own.
    """
    if any(crome_layers(trainer.model)):
        if hasattr(trainer, "_move_model_to_vllm"):
            raise ValueError(
                f"use_vllm=True: {type(trainer).__name__} sends vLLM merged weights, and a branch that reads images "
                "cannot be merged. Write use_vllm=False, or train with GRPOTrainer or RLOOTrainer."
            )
    elif any(isinstance(module, CromeVLMForConditionalGeneration) for module in trainer.model.modules()):
        raise ValueError("use_vllm=True: vLLM serves this composite only with a CROME adapter. Write use_vllm=False.")


class AdaptedGeneration(VLLMGeneration):
    """Sample from a model with a CROME adapter, by vLLM in the trainer's process.

    The engine loads a directory that `export` writes. Each step sends it the adapter's matrices, and the embedding
    table if a text branch is folded into it.
    """

    def _init_vllm(self) -> None:
        written = self._check()
        base = unwrapped(self.model)
        folder = Path(mkdtemp(prefix="crome-vllm-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        name, served = base.name_or_path, str(folder / "served")
        export(
            self.model, served, host=None if written else name or None, copy=False,
            revision=getattr(base.config, "_commit_hash", None), processor=self.processing_class,
            adapters=self.model.active_adapters,
        )  # fmt: skip
        base.name_or_path = served
        try:
            super()._init_vllm()
        finally:
            base.name_or_path = name

    def _check(self) -> bool:
        """Return whether the engine needs the host's weights from memory.

        Raises:
            ValueError: the engine could not have the trained model's weights.
        """
        settings = {
            'vllm_mode="server"': self.mode != "colocate",
            "vllm_enable_sleep_mode=True": self.enable_sleep_mode,  # it discards weights that are not sent again
            "FSDP": self._dist.is_fsdp,
            "DeepSpeed ZeRO-3": self._dist.is_zero3,
        }
        given = [name for name, is_set in settings.items() if is_set]
        if given:
            raise ValueError(f"use_vllm=True: a CROME adapter excludes {' and '.join(given)}. Write use_vllm=False.")
        if not isinstance(self.model, PeftModel) or len(self.model.active_adapters) != 1:
            raise ValueError(
                "use_vllm=True: vLLM takes one active adapter of a PeftModel. Write get_peft_model(model, config)."
            )
        try:
            _, folded = read_served(self.model, self.model.active_adapters)
        except ValueError as error:
            raise ValueError(f"use_vllm=True: {error} Or write use_vllm=False.") from error
        return folded or isinstance(unwrapped(self.model), CromeVLMForConditionalGeneration)

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        names = self.model.active_adapters
        yield from served_weights(self.model, names)
        for path, layer in crome_layers(unwrapped(self.model)):
            if isinstance(layer.table, torch.nn.Embedding) and any(layer.branches_of.get(name) for name in names):
                yield f"{path}.weight", layer.folded_table(names)

    def sync_weights(self) -> None:
        """Send the adapter's weights to vLLM, and drop embeddings of images that it computed with earlier ones."""
        super().sync_weights()
        self.llm.llm_engine.reset_encoder_cache()  # TRL resets the prefix cache alone (huggingface/trl#7198)


def _select(cls: type[VLLMGeneration], model: Any, *args: Any, **kwargs: Any) -> VLLMGeneration:
    return object.__new__(AdaptedGeneration if cls is VLLMGeneration and any(crome_layers(model)) else cls)


VLLMGeneration.__new__ = _select  # TRL's trainers take no other class
