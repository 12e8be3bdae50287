"""Split a language model from its head, and check that the head alone turns the decoder's output into logits."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..backbone.modes import evaluating
from .language_inputs import arguments_by_token

_proven: WeakSet[nn.Module] = WeakSet()


def decoder_of(language_model: PreTrainedModel) -> nn.Module:
    """Return the part of a decoder-only language model that comes before its head.

    Raises:
        ValueError: the model has no such part, as in encoder-decoder models.
    """
    base = language_model.base_model
    decoder = base if base is not language_model else getattr(language_model, "model", None)  # Llama 4 has `model`
    if language_model.config.is_encoder_decoder or decoder is None:
        raise ValueError(
            f"{type(language_model).__name__} has no decoder that reads prompt and answer as one sequence, which is "
            "what model.model(...) and TRL's trainers run. Train an encoder-decoder with transformers.Trainer or "
            "peft-crome train."
        )
    return decoder


def check_head(language_model: PreTrainedModel) -> None:
    """Check, once for each language model, that its head alone turns the decoder's last hidden states into logits.

    Two random embeddings run through it, without dropout. Code that computes logits from hidden states, as TRL's
    does, applies `get_output_embeddings()`, a factor and a cap that the configuration names, and nothing else.

    Raises:
        ValueError: the language model does more (BERT transforms before the head), or has no decoder.
    """
    if language_model in _proven:
        return
    decoder = decoder_of(language_model)
    head, table = language_model.get_output_embeddings(), language_model.get_input_embeddings()
    weight = next(table.parameters())
    dtype = weight.dtype if weight.is_floating_point() else language_model.dtype
    width = getattr(table, "embedding_dim", None) or weight.shape[-1]
    embeddings = torch.linspace(-1, 1, 2 * width, dtype=dtype, device=weight.device).reshape(1, 2, width)
    ids = torch.ones(1, 2, dtype=torch.long, device=weight.device)
    arguments = {"use_cache": False, "return_dict": True, **arguments_by_token(language_model, ids, {})}
    with evaluating(language_model), torch.no_grad():
        logits = language_model(inputs_embeds=embeddings.clone(), **arguments).logits  # CTRL scales it in place
        hidden = decoder(inputs_embeds=embeddings, **arguments).last_hidden_state
        fits = getattr(head, "in_features", hidden.shape[-1]) == hidden.shape[-1]
        again = scaled(language_model.config.get_text_config(), head(hidden)).to(logits) if fits else None
    bound = 8 * torch.finfo(logits.dtype).eps * logits.abs().max()
    if again is None or again.shape != logits.shape or (again - logits).abs().max() > bound:
        raise ValueError(
            f"{type(language_model).__name__} does more than its head between the last hidden states and the logits, "
            "so model.model(...) and TRL's trainers, which compute logits by the head, would get others. Train it "
            "with transformers.Trainer or peft-crome train."
        )
    _proven.add(language_model)


def scaled(config: PreTrainedConfig, logits: torch.Tensor) -> torch.Tensor:
    """Scale and cap the head's output by the names that TRL reads (`add_fused_lm_head`)."""

    def named(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    scale, divisor = named("logit_scale", "output_multiplier", "lm_head_multiplier"), named("logits_scaling")
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    logits = logits if scale is None else logits * scale
    cap = named("final_logit_softcapping")
    return logits if cap is None else torch.tanh(logits / cap) * cap
