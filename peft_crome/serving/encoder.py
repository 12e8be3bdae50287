"""Compute image embeddings with the adapter applied, in the shapes that engines take."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from peft import PeftModel

from ..backbone.model import unwrapped
from ..tuner import CromeLayer
from ..vlm import CromeVLMForConditionalGeneration
from ..vlm.language_inputs import arguments_by_token

# model_type of hosts, or of their towers, whose image embeddings vLLM 0.32 rejects. LLaVA-NeXT's and OneVision's fail
# inside the engine if two images of a batch differ in length.
NOT_IN_VLLM = (
    "gemma3", "glm4v", "idefics3", "llava_next", "llava_onevision", "mistral3", "paligemma", "pixtral", "smolvlm",
)  # fmt: skip
GRID = "image_grid_thw"  # input from which an engine numbers positions

logger = logging.getLogger(__name__)


class ImageEncoder:
    """Compute everything before the language model of an adapted model.

    Args:
        model: a model with an active adapter. It is put into evaluation mode.
    Raises:
        ValueError: the adapter has no vision branch, or the model's class has no `get_image_features`.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model.eval()
        self.host: Any = unwrapped(model)
        if not callable(getattr(self.host, "get_image_features", None)):
            raise ValueError(
                f"{type(self.host).__name__} has no get_image_features, which turns images into embeddings."
            )
        if not self._sites():
            raise ValueError(f"The adapter on {type(self.host).__name__} has no branch beside its text.")

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> list[torch.Tensor]:
        """Compute the embeddings of each image, as the language model reads them.

        Args:
            inputs: outputs of the host's processor; text is ignored.
        Returns:
            (tokens, hidden) for each image, in order.
        Raises:
            ValueError: there is no image, or the host gives the language model more than embeddings (Qwen3-VL adds
                features in its layers).
        """
        taken = inspect.signature(self.host.get_image_features).parameters
        arguments = {key: value for key, value in inputs.items() if key in taken and value is not None}
        if not any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in arguments.values()):
            raise ValueError(f"inputs have {sorted(inputs)}; expected images: processor(images=..., text=...).")
        seen: list[CromeLayer] = []
        handles = [site.register_forward_hook(lambda site, *_: seen.append(site)) for site in self._sites()]
        try:
            output = self.host.get_image_features(**arguments)
        finally:
            for handle in handles:
                handle.remove()
        embeddings = getattr(output, "pooler_output", output)
        more = sorted(key for key in getattr(output, "keys", list)() if "deepstack" in key)
        if more or not seen:
            reason = f"also reads {more} inside" if more else "does not go through the adapter's vision branch there"
            raise ValueError(
                f"{type(self.host).__name__} {reason}, so embeddings alone are not what the adapted model computes. "
                "Serve it with images: peft_crome.serving.export(...), or with transformers."
            )
        if isinstance(embeddings, torch.Tensor):
            embeddings = list(embeddings) if embeddings.dim() == 3 else [embeddings]
        return [part.reshape(-1, part.shape[-1]) for part in embeddings]

    def multi_modal_data(self, **inputs: Any) -> dict[str, Any]:
        """Return image embeddings as vLLM's `multi_modal_data`, for an engine started with `enable_mm_embeds=True`.

        Returns:
            {"image": (images, tokens, hidden), or a list if images differ in length}; for hosts that number
            positions by a grid, {"image": {"image_embeds": (all tokens, hidden), "image_grid_thw": (images, 3)}}.
        Raises:
            ValueError: as in a call.
        Source: vLLM's documentation of multimodal inputs, "Embedding Inputs".
        """
        config = getattr(self.host, "config", None)
        types = [getattr(part, "model_type", None) for part in (config, getattr(config, "vision_config", None))]
        if refused := [model_type for model_type in types if model_type in NOT_IN_VLLM]:
            logger.warning(
                "vLLM 0.32 does not serve image embeddings of %r. Give it images: peft_crome.serving.export(...).",
                refused[0],
            )
        embeddings = self(**inputs)
        if inputs.get(GRID) is not None:
            return {"image": {"image_embeds": torch.cat(embeddings).cpu(), GRID: inputs[GRID].cpu()}}
        parts = [part.cpu() for part in embeddings]
        return {"image": torch.stack(parts) if len({len(part) for part in parts}) == 1 else parts}

    @torch.no_grad()
    def prompt_embeds(self, **inputs: Any) -> list[torch.Tensor]:
        """Return whole prompts of a composite as embeddings, for an engine that runs only its language model.

        Args:
            inputs: the outputs of the composite's processor.
        Returns:
            (tokens, hidden) for each row, without padding: vLLM's `prompt_embeds`.
        Raises:
            ValueError: the model is not a composite, since other hosts number positions and mask images differently.
                Or its language model is an encoder-decoder or looks up more than embeddings by token (Gemma 3n,
                Gemma 4).
        """
        host = self.host
        if not isinstance(host, CromeVLMForConditionalGeneration) or host.config.is_encoder_decoder:
            raise ValueError(
                "prompt_embeds are for a composite with a decoder-only language model. Write "
                "ImageEncoder.multi_modal_data(...) for other hosts, which engines know."
            )
        arguments_by_token(host.language_model, None, {})  # an engine gets only the embeddings
        taken = inspect.signature(host.embed_inputs).parameters
        mask = inputs.get("attention_mask")
        _, embeddings, _ = host.embed_inputs(**{key: value for key, value in inputs.items() if key in taken})
        keep = torch.ones(embeddings.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return [row[kept.to(row.device)].cpu() for row, kept in zip(embeddings, keep, strict=True)]

    def _sites(self) -> list[CromeLayer]:
        sites = [module for module in self.host.modules() if isinstance(module, CromeLayer)]
        return [site for site in sites if not isinstance(site.table, torch.nn.Embedding)]
