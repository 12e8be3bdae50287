"""Handle a model whose weights are sharded by FSDP2 or DeepSpeed ZeRO-3: its requirements, and a whole copy."""

from __future__ import annotations

import torch
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import RecipeError
from ..stages import trained_parameters


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a shard of the trained weights."""
    return any(isinstance(value, DTensor) or hasattr(value, "ds_id") for _, _, value in trained_parameters(model))


def gather_trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gather the trained weights by name, whole and on the CPU. Every process must call it with its shard."""
    values = {name: value for _, name, value in trained_parameters(model)}
    with gather_params_ctx(values.values(), modifier_rank=None):
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().clone()
            for name, value in values.items()
        }


def put_trained(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put the values of `gather_trained` into a whole model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def check_storage(model: nn.Module, dtype: torch.dtype) -> None:
    """Check that 4-bit weights can be sharded.

    Args:
        dtype: dtype of the backbones.
    Raises:
        RecipeError: they are stored as integers, which FSDP2 does not shard.
    """
    for name, value in model.named_parameters():
        if type(value).__name__ == "Params4bit" and not value.is_floating_point():
            raise RecipeError(
                f"{name} is 4-bit in {value.dtype}, which FSDP2 does not divide. Load the language model with "
                f'bnb_4bit_quant_storage="{str(dtype).removeprefix("torch.")}" and save it again, or name one that is '
                "not quantized and write backbones.quantization: 4bit."
            )
