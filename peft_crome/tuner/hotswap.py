"""Replace a loaded adapter's weights in place. PEFT's hot-swap supports LoRA only."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

from ..backbone.model import unwrapped
from ..sharing.provenance import record_backbone
from ..sharing.weight_checks import check_shapes, token_lists
from .branches import Branches, with_ranges
from .config import CromeConfig
from .layer import crome_layers
from .sites.find import find_branches


def hotswap_adapter(
    model: PeftModel, model_id: str | os.PathLike, adapter_name: str = "default", **hub_kwargs: Any
) -> None:
    """Replace the weights of `adapter_name` by another adapter's, in place. No module or tensor is replaced.

    Args:
        model: model with the adapter. torch.compile or DDP may have wrapped it.
        model_id: directory or Hub repository of the adapter to swap in.
        adapter_name: name of the adapter whose weights are replaced. It keeps its name.
        hub_kwargs: `revision`, `subfolder`, `token`, `cache_dir`, ...
    Raises:
        ValueError: the adapter is unknown or merged, or the new one differs in more than its weights. The model is
            unchanged.

    Example:
        >>> hotswap_adapter(model, "user/other-adapter")  # doctest: +SKIP
    """
    model = unwrapped(model, PeftModel)
    old = model.peft_config.get(adapter_name)
    if not isinstance(old, CromeConfig):
        raise ValueError(
            f"No CROME adapter {adapter_name!r} on this model; there are {list(model.peft_config)}. "
            f"Write model.load_adapter({str(model_id)!r}, adapter_name={adapter_name!r})."
        )
    if any(adapter_name in getattr(module, "merged_adapters", ()) for module in model.modules()):
        raise ValueError(f"Adapter {adapter_name!r} is merged. Call model.unmerge_adapter() first.")
    new = CromeConfig.from_pretrained(str(model_id), **hub_kwargs)
    for name in ("bottleneck_dim", "gate_activation", "modules_to_save"):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(
                f"{model_id} has {name}={getattr(new, name)!r}, the adapter to replace has {getattr(old, name)!r}. "
                f"Write model.load_adapter({str(model_id)!r}, adapter_name=...) instead."
            )
    old_tokens, new_tokens = (token_lists(config.trainable_token_indices) for config in (old, new))
    if old_tokens != new_tokens:
        raise ValueError(
            f"{model_id} trained the tokens {new_tokens}, the adapter to replace {old_tokens}. "
            f"Write model.load_adapter({str(model_id)!r}, adapter_name=...) instead."
        )
    host = model.get_base_model()
    sites: Branches = {}
    for path, layer in crome_layers(host):
        for branch, ranges in layer.branches_of.get(adapter_name, {}).items():
            sites.setdefault(branch, []).extend(with_ranges(path, ranges))
    others = find_branches(host, new.branches)
    if {branch: set(paths) for branch, paths in sites.items()} != {b: set(paths) for b, paths in others.items()}:
        raise ValueError(
            f"{model_id} has the branches {others}, the adapter to replace {sites}. Load it onto a model of its own: "
            f"PeftModel.from_pretrained(host, {str(model_id)!r})."
        )
    weights = load_peft_weights(str(model_id), device="cpu", **hub_kwargs)
    present = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    shapes, expected = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (weights, present))
    check_shapes(shapes, expected, f"adapter {adapter_name!r}")
    if new._file is not None:
        new._file.check_values()
    if new.trained_on and old.trained_on:
        record_backbone(new, old.trained_on)
    set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
