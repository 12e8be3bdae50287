"""Generate text: embed the prompt once, then run the language model's generation."""

from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from ..backbone.positions import check_positions
from .image_token import move_padding, neutral_token_id
from .language_inputs import arguments_by_token, generator


class CromeVLMGenerationMixin(GenerationMixin):
    """`generate` of the composite. Every strategy and cache is the language model's."""

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The language model's generation configuration."""
        language_model = self._modules.get("language_model")
        return getattr(language_model, "generation_config", None)

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if "language_model" in self._modules:
            self.language_model.generation_config = value

    def _supports_logits_to_keep(self) -> bool:
        return bool(self.language_model._supports_logits_to_keep())

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.LongTensor | ModelOutput:
        """Generate text with the language model's `generate`: greedy, beams, sampling, any cache.

        Args:
            inputs: same as input_ids, for callers that pass it first.
            generation_config: None: the language model's.
            input_ids: (batch, tokens); images as in `forward`. Padding is moved to the language model's side:
                left for decoder-only, right for encoder-decoder.
            pixel_values: (images, channels, height, width), in reading order over the batch.
            vision_features: (images, tokens, vision_width) from `get_vision_features`, instead of pixel_values.
            qformer_input_ids: (images, instruction tokens), for a Q-Former that reads the instruction.
            qformer_attention_mask: the same shape, 1 where a token counts.
            attention_mask: (batch, tokens); None: pads are recognized by id, as in transformers.
            inputs_embeds: (batch, tokens, hidden), instead of input_ids, with any images already in place.
            kwargs: all arguments of the language model's `generate`. With the `past_key_values` of a conversation,
                pass all input_ids or only the new ones, with the images of the new tokens. With only new tokens,
                attention_mask still counts every token, (batch, cached + tokens).
        Returns:
            The language model's output; for decoder-only models input_ids, with their image ids, come first.
        Raises:
            ValueError: as in `forward`, or tokens would be guessed (`assistant_model`, `prompt_lookup_num_tokens`,
                `assistant_early_exit`).
        """
        _refuse_guessing(generation_config or self.language_model.generation_config, kwargs)
        if inputs is not None and input_ids is not None:
            raise ValueError("Got both inputs and input_ids; pass input_ids alone.")
        input_ids = input_ids if input_ids is not None else inputs
        language_model = generator(self.language_model)
        if input_ids is None or inputs_embeds is not None:
            if pixel_values is not None or vision_features is not None:
                raise ValueError(
                    "Images need input_ids, and no inputs_embeds; model.embed_inputs(input_ids, pixel_values) makes "
                    "inputs_embeds that hold the images."
                )
            arguments = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
            arguments = {name: value for name, value in arguments.items() if value is not None}
            if inputs_embeds is not None:
                arguments |= arguments_by_token(language_model, None, kwargs)
            return language_model.generate(generation_config=generation_config, **arguments, **kwargs)
        cached = 0 if self.config.is_encoder_decoder else cached_tokens(kwargs.get("past_key_values"))
        unseen = _unseen_tokens(cached, input_ids, attention_mask)  # cached tokens that input_ids leave out
        neutral = neutral_token_id(self.language_model.config, self.generation_config)
        prompt_ids = torch.cat([input_ids.new_full((input_ids.shape[0], unseen), neutral), input_ids], dim=1)
        if attention_mask is None:
            attention_mask = torch.ones_like(prompt_ids) if cached else self._infer_mask(input_ids, generation_config)
        images = (pixel_values, vision_features, qformer_input_ids, qformer_attention_mask)
        valid_ids, inputs_embeds = self._embed_prompt(prompt_ids, cached, images)
        kwargs["generation_config"] = generation_config
        if self.config.is_encoder_decoder:
            if attention_mask.ndim == 2:
                attention_mask, inputs_embeds = move_padding("right", attention_mask, inputs_embeds)
            check_positions(language_model, inputs_embeds, None)
            return language_model.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        ends_padded = attention_mask.ndim == 2 and not bool(attention_mask[:, -1].all())
        if ends_padded and not cached and "position_ids" not in kwargs:
            padded = move_padding("left", attention_mask, prompt_ids, valid_ids, inputs_embeds)
            attention_mask, prompt_ids, valid_ids, inputs_embeds = padded
        kwargs |= arguments_by_token(language_model, valid_ids, kwargs)
        outputs = language_model.generate(
            input_ids=valid_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        copies = sequences.shape[0] // prompt_ids.shape[0]  # beams or num_return_sequences
        prompt = prompt_ids.repeat_interleave(copies, dim=0).to(sequences.device)
        sequences[:, : prompt.shape[1]] = prompt
        if isinstance(outputs, torch.Tensor):
            return outputs[:, unseen:]
        outputs.sequences = sequences[:, unseen:]
        return outputs

    def _embed_prompt(
        self, input_ids: torch.LongTensor, cached: int, images: tuple[torch.Tensor | None, ...]
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """Return valid ids and embeddings of a prompt. Cached tokens do not need their images again."""
        num_images = next((value.shape[0] for value in images[:2] if value is not None), 0)
        wanted = int((input_ids == self.config.image_token_id).sum())
        if cached and num_images * self.image_seq_length != wanted:
            neutral = neutral_token_id(self.language_model.config, self.generation_config)
            before = input_ids[:, :cached]  # the language model does not read their embeddings again
            before = before.masked_fill(before == self.config.image_token_id, neutral)
            input_ids = torch.cat([before, input_ids[:, cached:]], dim=1)
        return self.embed_inputs(input_ids, *images)[:2]

    def _infer_mask(self, input_ids: torch.LongTensor, generation_config: GenerationConfig | None) -> torch.Tensor:
        """Build a mask by the pad id if it is not an end id; otherwise every token counts."""
        config = generation_config if generation_config is not None else self.generation_config
        pad, eos = config.pad_token_id, config.eos_token_id
        ends = eos if isinstance(eos, (list, tuple)) else [eos]
        if pad is None or pad in ends:
            return torch.ones_like(input_ids)
        return input_ids.ne(pad).long()


def cached_tokens(past_key_values: Cache | None) -> int:
    """Count the tokens in a cache; 0 without one."""
    return 0 if past_key_values is None else int(past_key_values.get_seq_length())


def _unseen_tokens(cached: int, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> int:
    """Count the cached tokens that input_ids do not repeat: all or none.

    Raises:
        ValueError: neither number fits the attention mask.
    """
    tokens = input_ids.shape[1]
    counted = (tokens if tokens > cached else cached + tokens) if attention_mask is None else attention_mask.shape[-1]
    if cached and (counted not in (tokens, cached + tokens) or counted <= cached):
        raise ValueError(
            f"past_key_values hold {cached} tokens, input_ids have {tokens} and attention_mask counts {counted}. Pass "
            f"the new tokens alone and a mask over all of them, (batch, {cached + tokens}), or all tokens again."
        )
    return counted - tokens if cached else 0


def _refuse_guessing(generation_config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    # After `inputs_embeds`, transformers checks guesses against the wrong logits and changes the text.
    named = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
    options = [name for name in named if kwargs.get(name, getattr(generation_config, name, None)) is not None]
    if options:
        raise ValueError(
            f"{options[0]} does not work here: transformers guesses wrongly after inputs_embeds, as which images "
            "enter. Leave it out."
        )
