"""Pass the adapter's name from a request's `mm_processor_kwargs` to the model and into vLLM's caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.exceptions import VLLMNotFoundError
from vllm.multimodal.inputs import MultiModalFieldConfig

from ..served import ARGUMENT, BASE, Served

FIELD = "crome_adapter_"  # + modality: the adapter's number, shared by all items of a batch
COUNT = "crome_items_"


def choosing(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a factory of a host's processor so that the processor also reads the adapter's name."""

    def make(*args: Any, **kwargs: Any) -> Any:
        kind = type(factory(*args, **kwargs))  # some factories select the class by the host
        return type(kind.__name__, (Choosing, kind), {})(*args, **kwargs)

    return make


class Choosing:
    """Mix-in in front of the class of a host's processor.

    vLLM hashes an item with its `mm_processor_kwargs`, and the hash is the key of its caches: of processed items, of
    embeddings, and of prompt prefixes. An image therefore has a different key for each adapter. Items of one
    batch have the same value in a shared field, so the tower runs for one adapter at a time.
    """

    def _choose(self, kwargs: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        rest = dict(kwargs)
        name = rest.pop(ARGUMENT, None)
        served = Served.of(self.info.get_hf_config())  # type: ignore[attr-defined]
        try:
            return served.number(name), rest
        except KeyError as error:
            raise VLLMNotFoundError(error.args[0]) from None

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        name = next(iter(Served.of(self.info.get_hf_config()).adapters))  # type: ignore[attr-defined]
        inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, ARGUMENT: name}
        return inputs

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        number, rest = self._choose(hf_kwargs)
        processed = super()._apply_hf_processor_main(mm_items, rest)  # type: ignore[misc]
        for modality, items in mm_items.items():
            given = items.get_passthrough_data()  # embeddings, which the model takes as they are
            processed[FIELD + modality] = torch.tensor(BASE if given else number)
            processed[COUNT + modality] = items.get_count()
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        _, rest = self._choose(hf_processor_mm_kwargs)
        fields = dict(super()._get_mm_fields_config(hf_inputs, rest))  # type: ignore[misc]
        modalities = [key.removeprefix(COUNT) for key in hf_inputs if key.startswith(COUNT)]
        for modality in modalities:
            if count := hf_inputs[COUNT + modality]:
                fields[FIELD + modality] = MultiModalFieldConfig.shared(modality, count, keep_on_cpu=True)
        return fields

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], *args: Any) -> Any:
        _, rest = self._choose(hf_processor_mm_kwargs)
        return super()._get_mm_prompt_updates(mm_items, rest, *args)  # type: ignore[misc]

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Mapping[str, Any]) -> Any:
        # TRL passes placeholders that are expanded, and vLLM would expand them again (huggingface/trl#6294).
        found = self._find_mm_placeholders(token_ids, mm_prompt_updates)  # type: ignore[attr-defined]
        if all(len(found.get(modality, [])) == len(items) for modality, items in mm_prompt_updates.items()):
            return token_ids, found
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)  # type: ignore[misc]
