"""The composite's outputs."""

from dataclasses import dataclass, fields

import torch
from transformers import Cache
from transformers.utils import ModelOutput


@dataclass
class CromeVLMOutput(ModelOutput):
    """The language model's output, plus the image embeddings that it read.

    Args:
        loss: language modeling loss, a scalar; present with `labels`.
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


@dataclass
class CromeVLMModelOutput(ModelOutput):
    """The output of the language model's decoder, plus the image embeddings that it read.

    Args:
        last_hidden_state: (batch, tokens, hidden), the input of the language model's head.
        past_key_values, hidden_states, attentions, image_hidden_states: as in `CromeVLMOutput`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None


OUTPUT_NAMES = frozenset(field.name for field in fields(CromeVLMOutput))  # torch.compile reads these
MODEL_OUTPUT_NAMES = frozenset(field.name for field in fields(CromeVLMModelOutput))


def as_output(outputs: ModelOutput, image_features: torch.Tensor | None, headless: bool) -> ModelOutput:
    """Convert the language model's output to the composite's, with all of its values."""
    output_class, names = (CromeVLMModelOutput, MODEL_OUTPUT_NAMES) if headless else (CromeVLMOutput, OUTPUT_NAMES)
    result = output_class(**{k: v for k, v in outputs.items() if k in names}, image_hidden_states=image_features)
    for name, value in outputs.items():
        if name not in names:
            result[name] = value  # some models return more, such as router logits
    return result
