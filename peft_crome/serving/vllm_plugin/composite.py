"""The composite as a vLLM model: transformers' tower and projection, and vLLM's language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from ...vlm import CromeVLMConfig, CromeVLMProcessor
from ...vlm.modeling_crome_vlm import FusionSite
from ...vlm.vision import build_tower, infer_layout, run_tower, size_arguments

IMAGE = "<image>"


class CompositeInfo(BaseProcessingInfo):
    """Give vLLM information about the composite's configuration and processor."""

    def get_hf_config(self) -> Any:
        """Return the composite's configuration."""
        return self.ctx.get_hf_config(CromeVLMConfig)

    def get_hf_processor(self, **kwargs: Any) -> Any:
        """Return the composite's processor."""
        return self.ctx.get_hf_processor(CromeVLMProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Allow as many images as fit."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the tokens of an image, which all images share."""
        return {"image": self.get_hf_config().image_seq_length}


class CompositeDummyInputs(BaseDummyInputsBuilder[CompositeInfo]):
    """Make images with which vLLM measures its memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return a placeholder for each image."""
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        """Return images of the size that the tower reads."""
        height, width = self.info.get_hf_config().image_height_width
        count, overrides = mm_counts.get("image", 0), mm_options.get("image")
        return {"image": self._get_dummy_images(width=width, height=height, num_images=count, overrides=overrides)}


class CompositeProcessing(BaseMultiModalProcessor[CompositeInfo]):
    """Turn images into pixel values and placeholders."""

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()
        token = config.image_token_id
        return [PromptReplacement(modality="image", target=[token], replacement=[token] * config.image_seq_length)]


@MULTIMODAL_REGISTRY.register_processor(CompositeProcessing, info=CompositeInfo, dummy_inputs=CompositeDummyInputs)
class CromeVLMForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """`vision_tower` -> `image_projection` -> `vision_fusion` -> `language_model`, as in transformers."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return an image's placeholder in a message."""
        return IMAGE

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        text = config.get_text_config()
        self.configure_mm_token_handling(text.vocab_size, [config.image_token_id])
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_tower = build_tower(config.vision_config, dtype=vllm_config.model_config.dtype).eval()
            self.vision_layout = infer_layout(config)
            self.image_projection = nn.Linear(
                self.vision_layout.hidden_size, text.hidden_size, bias=config.image_projection_bias
            )
            self.vision_fusion = FusionSite(text.hidden_size)
            self._tower_arguments = size_arguments(self.vision_tower, *config.image_height_width)
        # vLLM passes the outer configuration to the language model, and a composite leaves ties to its parts.
        config.tie_word_embeddings = getattr(text, "tie_word_embeddings", False)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=config.text_config, prefix=maybe_prefix(prefix, "language_model")
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Embed images: pixel_values, (images, channels, height, width) -> (images, tokens, hidden)."""
        pixel_values = kwargs["pixel_values"].to(self.image_projection.weight.dtype)
        features = run_tower(
            self.vision_tower, pixel_values, self.config.vision_feature_layer, **self._tower_arguments
        )
        strategy, pool_size = self.config.vision_feature_select_strategy, self.config.vision_pool_size
        patches = self.vision_layout.select(self.vision_layout.to_tokens(features), strategy, pool_size)
        return self.vision_fusion(self.image_projection(patches))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the language model over embeddings that hold the images."""
        inputs_embeds = None if intermediate_tensors is not None else inputs_embeds
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Compute logits by the language model."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load an exported composite's checkpoint."""
        return AutoWeightsLoader(self).load_weights(weights)
