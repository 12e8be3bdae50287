"""Where embeddings of the language model's width are produced: a few rules, and a table for what they miss."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..backbone import input_embeddings, possible_widths, text_hidden_size
from ..checks import Branches, check_not_nested, no_regex, no_such_module, no_vision_site, site_path

# What the module between a tower and a language model is called, as the last part of its path.
PROJECTOR = re.compile(
    r"((multi_?modal|mm|vision|visual|image|image_to_text|language|audio|speech)_)?"
    r"(projector|projection|connector|aligner|adapter|adaptor|merger|resampler|patch_merger)(_model)?"
    r"|embed_(vision|image|audio|speech)|(vision|image)_embed_tokens"
)
AUDIO = re.compile(r"audio|speech|sound")

# model_type -> branch -> last parts of the paths of its sites, for architectures that the rules miss. Adding one is a
# line. Branches that a line does not name are found by the rules.
HOSTS: dict[str, dict[str, list[str]]] = {
    "crome_vlm": {"text": ["text_fusion"], "vision": ["vision_fusion"]},
    "qwen2_5_omni_thinker": {"audio": ["audio_tower.proj"]},
    "qwen3_omni_moe_thinker": {"audio": ["audio_tower.proj2"]},
    "muse_glimmer": {"vision": ["perception_emb_norm"]},
    "muse_spark": {"vision": ["perception_emb_norm"], "audio": ["audio_tower.post_proj_norm"]},
    "inkling_mm_model": {"vision": ["vision_tower.final_norm"], "audio": ["audio_tower.norm"]},
    "phi4_multimodal": {
        "vision": ["img_projection_down"],
        "audio": ["down_proj_for_speech", "down_proj_for_vision_speech"],
    },
    "ovis2": {"vision": ["visual_embeddings_table"]},
    "pix2struct": {"vision": ["encoder.layernorm"]},
    "pp_formulanet": {"text": ["decoder.embed_tokens"]},
    "vision-encoder-decoder": {"vision": ["enc_to_dec_proj"]},
    "udop": {"vision": ["encoder.embed_patches"]},
    "granite4_vision": {"vision": ["out_linear"]},
    "evolla": {"protein": ["sequence_compressor_resampler"]},
}


def find_branches(model: nn.Module, branches: dict[str, list[str] | str] | None) -> Branches:
    """Resolve a configuration's `branches`, or look the architecture up, to full module paths.

    A path may end in a range of token ids, "embed_tokens[4:8196]": only these tokens' embeddings are the branch's.

    Raises:
        ValueError: nothing is known of the architecture, or a name matches no module or two branches.
    """
    paths = dict(adaptable_modules(model))
    if branches is None:
        return _find_by_rules(model, paths)
    found = {branch: _match(branch, wanted, paths) for branch, wanted in branches.items()}
    check_not_nested(found)
    return found


def adaptable_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yield path and module of what an adapter may wrap: not the model itself, nothing inside a PEFT layer."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (path + ".",)
            if not hasattr(module, "base_layer"):
                continue  # the container of the adapters' weights
        yield path, module


def _find_by_rules(model: nn.Module, paths: dict[str, nn.Module]) -> Branches:
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    table = HOSTS.get(model_type, {})
    named = {
        branch: [path for path in paths for suffix in suffixes if f".{path}".endswith("." + suffix)]
        for branch, suffixes in table.items()
    }
    text = named.get("text") or _text_sites(model, paths)
    found: Branches = {"text": text} if text else {}
    found |= _by_token_id(model, text) or _projectors(model, paths, text)
    found |= {branch: sites for branch, sites in named.items() if sites}
    if not text or len(found) == 1:
        raise no_vision_site(model, paths, text, [suffix for suffixes in table.values() for suffix in suffixes])
    return found


def _text_sites(model: nn.Module, paths: dict[str, nn.Module]) -> list[str]:
    """The input embeddings, and the modules that share their table: an encoder-decoder has one for each half."""
    embeddings = input_embeddings(model)
    table = getattr(embeddings, "weight", None)
    return [
        path
        for path, module in paths.items()
        if module is embeddings
        or (
            table is not None
            and isinstance(module, (nn.Embedding, BaseTunerLayer))
            and getattr(module, "weight", None) is table
        )
    ]


def _projectors(model: nn.Module, paths: dict[str, nn.Module], text: list[str]) -> Branches:
    """Modules named like a projector that have the language model's width: the shallowest of each modality."""
    hidden_size = text_hidden_size(model)
    modalities = getattr(model, "input_modalities", None) or ()
    takes = {modalities} if isinstance(modalities, str) else set(modalities)
    takes |= {key.split("_")[0] for key in getattr(getattr(model, "config", None), "sub_configs", {})}
    neutral = "audio" if "audio" in takes and not takes & {"vision", "image"} else "vision"
    language_model = tuple(path.rsplit(".", 1)[0] + "." for path in text if path.count(".") > 1)
    found: Branches = {}
    ranks: dict[str, tuple[int, bool]] = {}
    for path in sorted(paths, key=lambda path: path.count(".")):
        *parents, name = path.split(".")
        if not PROJECTOR.fullmatch(name) or path.startswith(language_model):
            continue
        widths = possible_widths(paths[path])
        inside = any(parent.isdigit() or parent.startswith("patch_embed") for parent in parents)
        if inside or (widths and hidden_size not in widths):
            continue  # a projection inside a layer or where a tower begins, or into another width
        branch = "audio" if AUDIO.search(path) else neutral
        rank = (path.count("."), not widths)  # a module that states no width is a pooling beside the projector
        if rank == ranks.setdefault(branch, rank):
            found.setdefault(branch, []).append(path)
        elif rank < ranks[branch]:
            ranks[branch], found[branch] = rank, [path]
    return found


def _by_token_id(model: nn.Module, text: list[str]) -> Branches:
    """Hosts whose images are tokens of the vocabulary (Chameleon, Emu3): their rows of the table are vision."""
    for module in model.modules():
        ids = getattr(getattr(module, "vocabulary_mapping", None), "image_tokens", None)
        if text and isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids):
            return {"vision": [f"{path}[{start}:{stop}]" for path in text for start, stop in _ranges(ids)]}
    return {}


def _ranges(ids: list[int]) -> Iterator[tuple[int, int]]:
    """Half-open ranges that hold exactly these numbers."""
    ids = sorted(set(ids))
    breaks = [i for i, (a, b) in enumerate(pairwise(ids), start=1) if b != a + 1]
    for start, stop in pairwise([0, *breaks, len(ids)]):
        yield ids[start], ids[stop - 1] + 1


def _match(branch: str, wanted: list[str] | str, paths: dict[str, nn.Module]) -> list[str]:
    if isinstance(wanted, str):
        try:
            sites = [path for path in paths if re.fullmatch(wanted, path)]
        except re.error as error:
            raise no_regex(branch, wanted, error) from error
        missing = [] if sites else [wanted]
    else:
        sites, missing = [], []
        for given in wanted:
            name = site_path(given)
            hits = [path for path in paths if path == name or path.endswith("." + name)]
            sites += [site for path in hits if (site := path + given[len(name) :]) not in sites]
            missing += [] if hits else [given]
    if missing:
        raise no_such_module(branch, missing, paths)
    return sites
