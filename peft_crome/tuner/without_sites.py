"""Take the sites off a model for a while: to resize its vocabulary, or to write it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..backbone.model import input_embeddings
from .layer import CromeLayer
from .weights import CromeWeights


@contextmanager
def without_sites(model: PreTrainedModel) -> Iterator[None]:
    """Run `sites_out` while a vocabulary changes its size. The adapters' weights do not depend on it.

    All sites are removed, since a vision site may share a weight that is tied again (UDOP).

    Raises:
        ValueError: a table or the output head trains as well and has a copy for each adapter, or an adapter is folded
            into the table.
    """
    sites = [module for module in model.modules() if isinstance(module, CromeLayer)]
    if not sites:
        yield
        return
    tables = [input_embeddings(model), *(site.base_layer for site in sites if isinstance(site.table, nn.Embedding))]
    copies = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    trained = {inner for copy in copies for inner in copy.modules()}
    for name, modules in {"embedding table": tables, "output head": [model.get_output_embeddings()]}.items():
        if trained.intersection(modules):
            raise ValueError(
                f"The {name} trains (modules_to_save or trainable_token_indices), and its copies do not change size "
                "with the vocabulary. Write model.resize_token_embeddings(...) before get_peft_model(...) or before "
                "loading."
            )
    if any(site.folded for site in sites):
        raise ValueError(
            "An adapter is folded into the embedding table. Write model.unmerge_adapter() first, then resize."
        )
    with sites_out(model):
        yield


@contextmanager
def sites_out(model: nn.Module) -> Iterator[None]:
    """Put the model's modules back in their places, without the adapters' weights, while the block runs.

    At the end each site wraps the module that is then in its place.
    """
    places = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    taken = [place for place in places if isinstance(place[2], (CromeLayer, CromeWeights))]
    for parent, name, child in taken:
        if isinstance(child, CromeLayer):
            parent._modules[name] = child.base_layer
        else:
            del parent._modules[name]
    try:
        yield
    finally:
        for parent, name, child in taken:
            if isinstance(child, CromeLayer):
                child.base_layer = parent._modules[name]
            parent._modules[name] = child  # a compiled module would forward a set attribute
