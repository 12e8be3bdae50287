"""A model for lmms-eval: a host or a composite with a CROME adapter, which answers by `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

MOST_NEW_TOKENS = 1024  # if a task sets no limit


class AdaptedModel(lmms):
    """Answer the tasks of lmms-eval. Arguments come as `--model_args name=value,...`.

    Args:
        pretrained: name or directory of a vision-language model, of a composite, or of an adapter, which then names
            its backbone.
        adapter: name or directory of an adapter for it.
        processor: name or directory of the processor; None: the one beside `pretrained`.
        dtype: as in `from_pretrained`.
        device: "cuda:0", "cpu"; with several processes each has a separate device.
        batch_size: value of `--batch_size`.
        system_prompt: text before each conversation, or a file that contains it.
    Raises:
        ValueError: a task has videos or sound, or asks for likelihoods.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        processor: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        system_prompt: str = "",
        max_batch_size: Any = None,  # lmms-eval passes it to every model
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        several = self.accelerator.num_processes > 1
        self.device = self.accelerator.device if several or device is None else torch.device(device)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        self.model = model.to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(processor or pretrained)
        self.processor.tokenizer.padding_side = "left"  # answers begin directly after prompts

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer in the order of the requests. Rows of a batch have the same generation arguments."""
        arguments = [request.args for request in requests]
        groups = Collator(arguments, lambda args: -len(args[0]), itemgetter(2), grouping=True)
        answers = []
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="Answering")
        for chunk in groups.get_batched(n=self.batch_size, batch_fn=None):
            rows = [
                self._messages(to_messages(self.task_dict[task][split][number]))
                for _, to_messages, _, number, task, split in chunk
            ]
            results = self._answer(rows, dict(chunk[0][2]))
            answers += results
            for (context, _, settings, *_), answer in zip(chunk, results, strict=True):
                self.cache_hook.add_partial("generate_until", (context, settings), answer.text)
            progress.update(len(chunk))
        progress.close()
        return groups.get_original(answers)

    def _messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        asked = ChatMessages(messages=self._apply_system_prompt(messages, self.system_prompt))
        _, videos, sounds = asked.extract_media()
        if videos or sounds:
            raise ValueError("The task asks with videos or sound; this model answers about images. Name another.")
        return asked.to_hf_messages()

    def _answer(self, rows: list[list[dict[str, Any]]], settings: dict[str, Any]) -> list[GenerationResult]:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else until
        greedy = not settings.get("temperature")  # lmms-eval writes 0
        names = ("num_beams",) if greedy else ("num_beams", "temperature", "top_p", "top_k")
        chosen = {name: settings[name] for name in names if settings.get(name) is not None}
        inputs = self.processor.apply_chat_template(
            rows, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        ).to(self.device, dtype=self.model.dtype)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                do_sample=not greedy,
                max_new_tokens=settings.get("max_new_tokens") or MOST_NEW_TOKENS,
                **chosen,
            )
        prompt_length = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        tokens = output[:, prompt_length:]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [
            GenerationResult(text=_cut(text, stops), token_counts=TokenCounts(output_tokens=len(row)))
            for text, row in zip(texts, tokens, strict=True)
        ]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: the paper's benchmarks are answered by generation."""
        raise ValueError("The task asks for likelihoods; this model answers by generation. Name other tasks.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: conversations of several rounds are not supported."""
        raise ValueError("The task asks in several rounds; this model answers once. Name other tasks.")


def _cut(text: str, stops: Sequence[str]) -> str:
    """Cut a text at the first of the stop words."""
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()
