"""Translate a recipe's names for quantization to bitsandbytes' settings."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from transformers import BitsAndBytesConfig

from ..vlm.configuration_crome_vlm import quantization_to_dict

Bits = Literal["4bit", "8bit"]  # nf4 with double quantization, or LLM.int8


def settings(bits: Bits | None) -> dict[str, Any] | None:
    """Return the settings that a configuration stores; bitsandbytes need not be installed."""
    return None if bits is None else {"quant_method": "bitsandbytes", f"load_in_{bits}": True}


def load_config(bits: Bits | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the quantization configuration for `from_pretrained`.

    Args:
        dtype: dtype in which 4-bit weights are computed.
    """
    if bits is None:
        return None
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # FSDP shards only weights with the dtype of the others
    )


def bits_of(quantization: Any) -> Bits | None:
    """Return how a quantization configuration, or its dictionary, packs weights; None for another library's."""
    values = quantization_to_dict(quantization) or {}
    return next((bits for bits in get_args(Bits) if values.get(f"load_in_{bits}")), None)
