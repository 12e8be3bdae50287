"""Provide what some language models need beside `inputs_embeds`: token ids, and a `generate` that takes both."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def check_takes_embeddings(language_model: PreTrainedModel) -> None:
    """Refuse a language model that reads token ids only, since no image could enter.

    Raises:
        ValueError: its `forward` takes no `inputs_embeds` (CPM-Ant), it routes tokens by id (DeepSeek V4), or it
            masks the future only if it gets ids (FSMT).
    """
    named = inspect.signature(language_model.forward).parameters
    config = language_model.config.get_text_config()
    because = None
    if "input_ids" in named and "inputs_embeds" not in named:
        because = "takes token ids alone, no inputs_embeds"
    elif "hash_moe" in (getattr(config, "mlp_layer_types", None) or ()):
        because = "chooses experts by token id (mlp_layer_types has 'hash_moe')"
    elif config.model_type == "fsmt":
        because = "masks its decoder's future only where it gets token ids, in transformers"
    if because is not None:
        raise ValueError(
            f"{type(language_model).__name__} {because}, and an image has none. Pass another language model."
        )


def arguments_by_token(
    language_model: PreTrainedModel, input_ids: torch.LongTensor | None, arguments: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Look up what the layers of Gemma 3n, Gemma 4 and Qwen 4 read by token id, beside the input embeddings.

    Args:
        input_ids: (batch, tokens) with valid ids at image placeholders, as in those models; None: the caller has
            only embeddings.
        arguments: arguments of the caller for the language model.
    Returns:
        The argument to add: `per_layer_inputs`, (batch, tokens, layers, width), or `ple_input_ids`, (batch, tokens);
        empty if the caller passes it, and for all other models.
    Raises:
        ValueError: the argument is needed, and there are no ids to look up.
    """
    needed = _needed(language_model)
    if needed is None or needed in arguments:
        return {}
    if input_ids is None:
        raise ValueError(
            f"{type(language_model).__name__} looks up more than one embedding by token id, and got inputs_embeds "
            f"alone. Pass input_ids and pixel_values, or {needed} as well."
        )
    if needed == "ple_input_ids":
        return {needed: input_ids}
    look_up = language_model.get_decoder().get_per_layer_inputs
    takes_embeddings = "inputs_embeds" in inspect.signature(look_up).parameters  # true for Gemma 4, false for Gemma 3n
    return {needed: look_up(input_ids, None) if takes_embeddings else look_up(input_ids)}


def generator(language_model: PreTrainedModel) -> PreTrainedModel:
    """Return the language model, or a view whose `generate` takes `inputs_embeds` and the arguments by token.

    transformers looks for `inputs_embeds` among the named arguments of `prepare_inputs_for_generation`. Some models
    (Bamba, Falcon H1, Nemotron H) pass it on without naming it.
    """
    named = inspect.signature(language_model.prepare_inputs_for_generation).parameters
    if language_model.config.is_encoder_decoder or ("inputs_embeds" in named and _needed(language_model) is None):
        return language_model
    view = copy.copy(language_model)  # shares modules and weights, and leaves the model unchanged
    base = type(language_model)
    view.__class__ = type(base.__name__, (_TakesEmbeddings, base), {"__module__": base.__module__})
    return view


def _needed(language_model: PreTrainedModel) -> str | None:
    config = language_model.config.get_text_config()
    if getattr(config, "hidden_size_per_layer_input", 0):
        return "per_layer_inputs"
    return "ple_input_ids" if getattr(config, "ple_layer_ids", None) else None


class _TakesEmbeddings(nn.Module):
    """Name the arguments that the class behind it passes on in `prepare_inputs_for_generation`, and check them."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None = None,
        per_layer_inputs: torch.Tensor | None = None,
        ple_input_ids: torch.LongTensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if inputs_embeds is None or not is_first_iteration:
            return prepared
        embeddings = prepared.get("inputs_embeds")
        if embeddings is None or prepared.get("input_ids") is not None:
            raise ValueError(
                f"{type(self).__name__}.generate takes token ids alone in transformers, so it cannot read an image. "
                "Choose another language model; forward and training work with this one."
            )
        by_token = {"per_layer_inputs": per_layer_inputs, "ple_input_ids": ple_input_ids}
        num_tokens = embeddings.shape[1]
        return prepared | {name: value[:, -num_tokens:] for name, value in by_token.items() if value is not None}
