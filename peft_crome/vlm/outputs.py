"""What the composite returns."""

from dataclasses import dataclass, fields

import torch
from transformers import Cache
from transformers.utils import ModelOutput


@dataclass
class CromeVLMOutput(ModelOutput):
    """What the language model returned, plus the image embeddings that it read.

    Args:
        loss: language modelling loss, a scalar; present with `labels`.
        logits: (batch, tokens, vocabulary).
        past_key_values: the language model's cache.
        hidden_states: per layer (batch, tokens, hidden); decoder-only.
        attentions: per layer (batch, heads, tokens, tokens); decoder-only.
        decoder_hidden_states, decoder_attentions, cross_attentions, encoder_last_hidden_state,
            encoder_hidden_states, encoder_attentions: as encoder-decoder models return them.
        image_hidden_states: (images, image_seq_length, hidden), as they entered the language model.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None


OUTPUT_FIELDS = frozenset(field.name for field in fields(CromeVLMOutput))
