"""Rules that find, by names and widths, where embeddings enter a language model; `find.py` applies them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from ...backbone.model import (
    PLACEHOLDER,
    input_embeddings,
    original_module,
    possible_widths,
    text_hidden_size,
    unwrapped,
)
from ..branches import Branches

# Names of the module between a tower and a language model, as the last part of its path.
PROJECTOR = re.compile(
    r"((multi_?modal|mm|vision|visual|image|image_to_text|language|audio|speech)_)?"
    r"(projector|projection|connector|aligner|adapter|adaptor|merger|resampler|patch_merger)(_model)?"
    r"|embed_(vision|image|audio|speech)|(vision|image)_embed_tokens"
)
AUDIO = re.compile(r"audio|speech|sound")


def text_sites(model: nn.Module, paths: dict[str, nn.Module]) -> list[str]:
    """Find the input embeddings and the modules that share their table: an encoder-decoder has one for each half."""
    embeddings = input_embeddings(model)
    table = getattr(embeddings, "weight", None)
    return [
        path
        for path, module in paths.items()
        if module is embeddings
        or (
            table is not None
            and isinstance(original_module(module), nn.Embedding)
            and getattr(module, "weight", None) is table
        )
    ]


def projectors(model: nn.Module, paths: dict[str, nn.Module], text: list[str]) -> Branches:
    """Find modules named like a projector that have the language model's width: the shallowest of each modality."""
    hidden_size = text_hidden_size(model)
    host = unwrapped(model)
    modalities = getattr(host, "input_modalities", None) or ()
    takes = {modalities} if isinstance(modalities, str) else set(modalities)
    config = getattr(host, "config", None)
    settings = vars(config).items() if config is not None else ()
    tokens = [key for key, value in settings if PLACEHOLDER.fullmatch(key) and value is not None]
    takes |= {key.split("_")[0] for key in [*getattr(config, "sub_configs", {}), *tokens]}
    neutral = "audio" if "audio" in takes and not takes & {"vision", "image"} else "vision"
    language_model = tuple(path.rsplit(".", 1)[0] + "." for path in text if path.count(".") > 1)
    branches: Branches = {}
    ranks: dict[str, tuple[int, bool]] = {}
    for path in sorted(paths, key=lambda path: path.count(".")):
        *parents, name = path.split(".")
        if not PROJECTOR.fullmatch(name) or path.startswith(language_model):
            continue
        widths = possible_widths(paths[path])
        inside = any(parent.isdigit() or parent.startswith("patch_embed") for parent in parents)
        if inside or (widths and hidden_size not in widths):
            continue  # a projection in a layer, at the start of a tower, or into another width
        branch = "audio" if AUDIO.search(path) else neutral
        rank = (path.count("."), not widths)  # a module of unknown width is a pooling beside the projector
        if rank == ranks.setdefault(branch, rank):
            branches.setdefault(branch, []).append(path)
        elif rank < ranks[branch]:
            ranks[branch], branches[branch] = rank, [path]
    return branches


def by_token_id(model: nn.Module, text: list[str]) -> Branches:
    """Find rows of the table that are images, in hosts whose images are tokens of the vocabulary (Chameleon, Emu3)."""
    for module in model.modules():
        ids = getattr(getattr(module, "vocabulary_mapping", None), "image_tokens", None)
        if text and isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids):
            return {"vision": [f"{path}[{start}:{stop}]" for path in text for start, stop in _ranges(ids)]}
    return {}


def _ranges(ids: list[int]) -> Iterator[tuple[int, int]]:
    """Yield half-open ranges that contain exactly these numbers."""
    ids = sorted(set(ids))
    breaks = [i for i, (a, b) in enumerate(pairwise(ids), start=1) if b != a + 1]
    for start, stop in pairwise([0, *breaks, len(ids)]):
        yield ids[start], ids[stop - 1] + 1
