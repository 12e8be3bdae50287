"""Translate a recipe's names for quantization to bitsandbytes' settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from transformers import BitsAndBytesConfig

Bits = Literal["4bit", "8bit"]  # nf4 with double quantization, or LLM.int8


def settings(bits: Bits) -> dict[str, Any]:
    """Return the settings that a configuration stores; bitsandbytes need not be installed."""
    return {"quant_method": "bitsandbytes", f"load_in_{bits}": True}


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


def stored_bits(config: Any) -> Bits | None:
    """Return how bitsandbytes quantized a loaded model, from its configuration."""
    stored = getattr(config, "quantization_config", None)
    return bits_of(stored if isinstance(stored, dict | None) else stored.to_dict())


def bits_of(stored: Mapping[str, Any] | None) -> Bits | None:
    """Return the quantization of a stored configuration; None for none, or for another library's."""
    return next((bits for bits in get_args(Bits) if (stored or {}).get(f"load_in_{bits}")), None)
