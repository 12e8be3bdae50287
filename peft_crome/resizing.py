"""A vocabulary of another size under an adapter, whose weights do not depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .backbone import input_embeddings, original_module
from .tuner import CromeLayer


@contextmanager
def without_sites(model: nn.Module) -> Iterator[None]:
    """Put wrapped modules in the places of the sites around them, and the sites back around what is there then.

    All of them, since a vision site may share a weight that is tied anew (UDOP).

    Raises:
        ValueError: a table trains as well, and has a copy for each adapter, or an adapter is folded into it.
    """
    if not any(isinstance(module, CromeLayer) for module in model.modules()):
        yield
        return
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, CromeLayer)
    ]
    tables = [input_embeddings(model), *(site.base_layer for _, _, site in places)]
    if any(original_module(module) is not module and _is_table(module) for module in tables if module is not None):
        raise ValueError(
            "The embedding table trains (modules_to_save or trainable_token_indices), and its copies do not change "
            "size with it. Write model.resize_token_embeddings(...) before get_peft_model(...) or before loading."
        )
    if any(site.merged for _, _, site in places):
        raise ValueError(
            "An adapter is folded into the embedding table. Write model.unmerge_adapter() first, then resize."
        )
    for parent, name, site in places:
        setattr(parent, name, site.base_layer)
    try:
        yield
    finally:
        for parent, name, site in places:
            site.base_layer = getattr(parent, name)
            if _is_table(site.base_layer):
                site.in_features = site.base_layer.num_embeddings
            setattr(parent, name, site)


def _is_table(module: nn.Module) -> bool:
    return isinstance(original_module(module), nn.Embedding)
