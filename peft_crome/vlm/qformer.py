"""The Q-Former: learned queries that read an image, and the instruction, into a few tokens (InstructBLIP, BLIP-2)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    PreTrainedConfig,
)

QFORMERS = {
    InstructBlipQFormerConfig.model_type: InstructBlipQFormerModel,
    Blip2QFormerConfig.model_type: Blip2QFormerModel,
}


class QFormer(nn.Module):
    """Query tokens that run through transformers' Q-Former.

    Args:
        config: an InstructBLIP Q-Former's configuration (reads the instruction) or a BLIP-2 one's (does not).
        num_query_tokens: number of tokens that an image becomes.
    Raises:
        ValueError: the configuration belongs to another model.
    Source: InstructBLIP, arXiv 2305.06500; 32 queries of 768 in CROME, arXiv 2408.06610.
    """

    def __init__(self, config: PreTrainedConfig, num_query_tokens: int) -> None:
        super().__init__()
        model_class = QFORMERS.get(config.model_type)
        if model_class is None:
            raise ValueError(
                f"qformer_config is of model_type {config.model_type!r}; expected one of {list(QFORMERS)}. Write "
                "qformer_config=InstructBlipQFormerConfig(encoder_hidden_size=...)."
            )
        self.config = config
        self.query_tokens = nn.Parameter(torch.empty(1, num_query_tokens, config.hidden_size))
        nn.init.normal_(self.query_tokens, std=config.initializer_range)
        self.model = model_class(config)

    @property
    def reads_instructions(self) -> bool:
        """Whether it reads the instruction beside the image."""
        return isinstance(self.model, InstructBlipQFormerModel)

    def forward(
        self,
        vision_features: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read images into query tokens.

        Args:
            vision_features: (images, tokens, encoder_hidden_size).
            input_ids: (images, instruction tokens), ids of the Q-Former's tokenizer; one row per image.
            attention_mask: the same shape, 1 where a token counts; None: all do.
        Returns:
            (images, num_query_tokens, hidden_size).
        Raises:
            ValueError: the instruction is missing or too long, or its rows and the images differ in number.
        """
        images, device = vision_features.shape[0], vision_features.device
        queries = self.query_tokens.expand(images, -1, -1)
        arguments = {
            "query_embeds": queries,
            "encoder_hidden_states": vision_features,
            "encoder_attention_mask": torch.ones(vision_features.shape[:2], dtype=torch.long, device=device),
        }
        if self.reads_instructions:
            self.check_instructions(input_ids, images)
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            seen = torch.ones(queries.shape[:2], dtype=attention_mask.dtype, device=device)
            arguments |= {
                "input_ids": input_ids.to(device),
                "attention_mask": torch.cat([seen, attention_mask.to(device)], dim=1),
            }
        return self.model(**arguments).last_hidden_state[:, : queries.shape[1]]

    def check_instructions(self, input_ids: torch.Tensor | None, images: int) -> None:
        """Refuse instructions that do not fit the images.

        Raises:
            ValueError: as in `forward`.
        """
        if not self.reads_instructions:
            return
        if input_ids is None:
            raise ValueError(
                "qformer_input_ids is missing: this Q-Former reads the instruction beside the image. Make the inputs "
                "with the processor saved with the model, or pass qformer_input_ids=(images, tokens)."
            )
        if input_ids.ndim != 2 or input_ids.shape[0] != images:
            raise ValueError(
                f"qformer_input_ids has shape {tuple(input_ids.shape)}, expected ({images}, tokens): one instruction "
                "per image, in the order of the images. A row with two images needs its instruction twice."
            )
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"The instruction has {input_ids.shape[1]} tokens, and the Q-Former reads "
                f"{self.config.max_position_embeddings}. Shorten it, or pass another one: processor(..., "
                "qformer_text=...)."
            )
