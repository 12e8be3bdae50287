"""Plan what attaching an adapter will do to a model: check it first, then do it, or undo all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...backbone.model import Host, read_host, replace_everywhere
from ...sharing.provenance import describe_backbone, record_backbone
from ...sharing.weight_checks import expected_shapes
from ..branches import TokenRanges, site_path, token_range
from ..config import CromeConfig
from ..layer import CromeLayer
from ..sites.find import default_bottleneck_dim, find_branches
from .also_trained import redirect_into_sites, redirect_token_indices
from .checks import check_names, find_hidden_size
from .rollback import make_room, restore_point, weights_on

# task_type -> what PEFT adds to modules_to_save: possible names of its head
CLASSIFIER = ("classifier", "score")
HEADS = {"SEQ_CLS": CLASSIFIER, "TOKEN_CLS": CLASSIFIER, "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Attachment:
    """One adapter that is about to be put on a model.

    Attributes:
        host: facts about the model that the adapter needs.
        hidden_size: width of the embeddings at every site.
        sites: path of each site -> the branches that it feeds, with their ranges of token ids.
        filled_in: fields of the configuration that this model determines.
    """

    model: nn.Module
    adapter_name: str
    config: CromeConfig
    host: Host
    hidden_size: int
    sites: dict[str, dict[str, TokenRanges]]
    filled_in: dict[str, Any]

    @property
    def branches(self) -> list[str]:
        """The names of the branches, in a fixed order."""
        return list(dict.fromkeys(branch for site in self.sites.values() for branch in site))

    def wrap(self, path: str, module: nn.Module) -> None:
        """Put the adapter on one site; another adapter may have wrapped it before."""
        weights = weights_on(self.model)
        if self.adapter_name not in weights.crome_up:
            weights.add(self.adapter_name, self.config, self.branches, self.hidden_size, self.host.rms)
            for linear in weights.linears_of(self.adapter_name).values():
                on_meta = linear.weight.is_meta  # it stays on meta until its weights are loaded
                linear.to(device=None if on_meta else self.host.device, dtype=self.host.dtype)
            weights.train(module.training)
        if isinstance(module, CromeLayer):
            layer = module
        else:
            layer = CromeLayer(module, weights, self.hidden_size)
            layer.training = module.training  # a wrapper around the host may have another mode
            replace_everywhere(self.model, module, layer)
        layer.branches_of[self.adapter_name] = self.sites[path]
        # Ovis 2 has a table of images as well.
        if "text" in self.sites[path] and isinstance(layer.table, nn.Embedding):
            layer.placeholders = self.host.placeholders
        layer._move_adapter_to_device_of_base_layer(self.adapter_name)

    @contextmanager
    def or_undone(self) -> Iterator[None]:
        """Fill in the configuration and make room. An error in the block restores model and configuration."""
        restore = restore_point(self.model, self.config.__dict__)
        record_backbone(self.config, describe_backbone(self.model, self.host, self.hidden_size))
        self.config.__dict__.update(self.filled_in)
        make_room(self.model, self.adapter_name)
        try:
            yield
        except BaseException:  # an interrupt restores as well
            restore()
            raise
        self.config.__dict__.pop("_file", None)  # its weights are loaded next; a later use is for another adapter


def plan(model: nn.Module, adapter_name: str, config: CromeConfig) -> Attachment:
    """Check everything that can be checked before a model is changed.

    Raises:
        ValueError: no sites are known, sites and model do not fit together, a name is taken, or the adapter file of
            the configuration does not fit; names what to write.
    """
    host = read_host(model)
    branches = find_branches(model, config.branches, of_before=config.trained_on is not None)
    hidden_size = find_hidden_size(model, branches)
    bottleneck_dim = config.bottleneck_dim or default_bottleneck_dim(len(branches))
    shapes = expected_shapes(branches, hidden_size, bottleneck_dim)
    check_names(model, adapter_name, shapes)
    if config._file is not None:
        config._file.check_fits(model, shapes, f"{host.name} (hidden_size {hidden_size})")
    paths = {path: module for path, module in model.named_modules() if path}
    heads = HEADS.get(str(config.task_type), ())
    named = [*(config.modules_to_save or ()), *heads]  # PEFT adds the heads later
    modules_to_save = redirect_into_sites(named, "modules_to_save", branches, paths, heads)
    table = next((path for path, module in paths.items() if module is host.embeddings), None)
    rows = getattr(host.embeddings, "num_embeddings", None)
    sites: dict[str, dict[str, TokenRanges]] = {}
    for branch, names in branches.items():
        for name in names:
            sites.setdefault(site_path(name), {}).setdefault(branch, []).extend(token_range(name))
    filled_in = {
        "branches": config.branches or list(branches),
        "bottleneck_dim": bottleneck_dim,
        "modules_to_save": list(modules_to_save) or config.modules_to_save,
        "trainable_token_indices": redirect_token_indices(
            config.trainable_token_indices, table, branches, paths, rows
        ),
    }
    return Attachment(model, adapter_name, config, host, hidden_size, sites, filled_in)
