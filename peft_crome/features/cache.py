"""Compute a frozen vision tower's features once per image, and read them from a folder afterwards."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..backbone.model import unwrapped
from ..backbone.modes import evaluating
from .store import FeatureStore

Features = dict[str, torch.Tensor]
# Names in a file of a tower's output: one hidden state, their number, the index of the last hidden state.
LAYER, COUNT, LAST = "hidden_states.", "num_hidden_states", "last_is"


class _States(tuple):
    """Hidden states, some of which are not kept."""

    def __getitem__(self, index: Any) -> Any:
        state = super().__getitem__(index)
        if isinstance(state, torch.Tensor) and not state.numel():
            raise ValueError(
                f"The model reads hidden state {index} of its tower, beside those that its vision_feature_layer "
                "names, so it is unknown what to keep. Train without a feature cache."
            )
        return state


class FeatureCache:
    """A cache of a frozen tower's features, as `cache_features` attaches it to a model.

    Attributes:
        hits: number of images whose features were read.
        misses: number of images whose features were computed.
        store: the folder with the features.
    """

    def __init__(self, model: nn.Module, tower: PreTrainedModel, store: FeatureStore) -> None:
        self.model = model
        self.tower = tower
        self.store = store
        self.hits = self.misses = 0
        self._key = weights_key(tower)

    def detach(self) -> None:
        """Detach the cache from the model. The folder stays."""
        if hasattr(self.model, "feature_cache"):  # only the composite has it
            self.model.feature_cache = None
        else:
            self.tower.__dict__.pop("forward", None)

    def lookup(
        self, images: torch.Tensor, rows: list[bytes], compute: Callable[[torch.Tensor], list[Features]]
    ) -> list[Features]:
        """Return the features of each image: read from the store, or computed together and stored.

        Args:
            images: (images, channels, height, width), as the tower reads them.
            rows: per image, everything else that its features depend on.
            compute: function from indices of images to the features of each.
        """
        if any(parameter.requires_grad for parameter in self.tower.parameters()):
            raise ValueError(
                "The vision tower trains, so its features change from step to step. Call cache.detach() first."
            )
        keys = [self._image_key(image, row) for image, row in zip(images, rows, strict=True)]
        image_features = [self.store.get(key) for key in keys]
        missing = [number for number, features in enumerate(image_features) if features is None]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            for number, features in zip(missing, compute(torch.tensor(missing)), strict=True):
                image_features[number] = features
                self.store.put(keys[number], features)
        return [
            {name: value.to(images.device) for name, value in (features or {}).items()} for features in image_features
        ]

    def _image_key(self, image: torch.Tensor, row: bytes) -> str:
        digest = hashlib.blake2b(self._key, digest_size=20)
        digest.update(f"{image.dtype} {tuple(image.shape)} ".encode())
        device = self.tower.device.type
        if torch.is_autocast_enabled(device):  # autocast changes the precision of the features
            digest.update(f"autocast {torch.get_autocast_dtype(device)} ".encode())
        digest.update(_bytes(image))
        digest.update(row)
        return digest.hexdigest()

    # ---- the composite ----

    def of_composite(
        self, pixel_values: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return the result of the composite's `get_vision_features`, (images, tokens, vision_width)."""
        config = self.model.config
        setting = (config.vision_feature_layer, config.vision_feature_select_strategy, config.vision_pool_size)
        row = repr((*setting, config.qformer_config is None)).encode()

        def features_of(missing: torch.Tensor) -> list[Features]:
            return [{"features": one} for one in compute(pixel_values[missing.to(pixel_values.device)])]

        image_features = self.lookup(pixel_values, [row] * len(pixel_values), features_of)
        return torch.stack([features["features"] for features in image_features])

    # ---- any other model ----

    def of_tower(self, forward: Callable[..., Any], pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return a tower's output as a `BaseModelOutputWithPooling`, with the hidden states that the model reads."""
        names = list(inspect.signature(forward).parameters)
        kwargs = dict(zip(names[1:], args, strict=False)) | kwargs
        count = len(pixel_values)
        batched = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.ndim and v.shape[0] == count}
        rest = {k: v for k, v in kwargs.items() if k not in batched}
        rest_key = repr(sorted((key, value) for key, value in rest.items() if value is not None)).encode()
        rows = [rest_key + b"".join(_bytes(value[number]) for value in batched.values()) for number in range(count)]

        def features_of(missing: torch.Tensor) -> list[Features]:
            chosen = missing.to(pixel_values.device)
            picked = {key: value[missing.to(value.device)] for key, value in batched.items()}
            with torch.no_grad(), evaluating(self.tower):
                output = forward(pixel_values[chosen], **picked, **rest)
            return self._per_image(output, len(missing))

        image_features = self.lookup(pixel_values, rows, features_of)
        whole = {name: torch.stack([features[name] for features in image_features]) for name in image_features[0]}
        count, last = (int(whole.pop(name)[0]) for name in (COUNT, LAST))
        empty = pixel_values.new_empty(0)  # stands for states that the model does not read
        layers = {int(name.split(".")[1]): value for name, value in whole.items() if name.startswith(LAYER)}
        return BaseModelOutputWithPooling(
            last_hidden_state=whole.get("last_hidden_state", layers.get(last, empty)),
            pooler_output=whole.get("pooler_output"),
            hidden_states=_States(layers.get(number, empty) for number in range(count)) or None,
        )

    def _per_image(self, output: Any, count: int) -> list[Features]:
        fields = {name: value for name, value in output.items() if value is not None}
        states = fields.pop("hidden_states", ())
        layers = _layers_read(self.model.config, len(states))
        kept = {f"{LAYER}{layer}": states[layer] for layer in layers}
        last = fields.get("last_hidden_state")
        same = [layer for layer in layers if states[layer] is last]
        if same or (layers and len(states) - 1 not in layers):  # stored already, or not read
            fields.pop("last_hidden_state", None)
        kept |= fields
        wrong = [name for name, value in kept.items() if not isinstance(value, torch.Tensor) or len(value) != count]
        if wrong or not set(fields) <= {"last_hidden_state", "pooler_output"} or not kept:
            raise ValueError(
                f"{type(self.tower).__name__} gives {wrong or sorted(fields)}, which cannot be divided by image, "
                "or not be joined again. Train without a feature cache."
            )
        numbers = {COUNT: torch.tensor(len(states)), LAST: torch.tensor(same[0] if same else -1)}
        return [{**{name: value[i] for name, value in kept.items()}, **numbers} for i in range(count)]


def cache_features(model: nn.Module, directory: str | os.PathLike, max_gigabytes: float = 50.0) -> FeatureCache:
    """Keep a frozen tower's features in a folder, so that each image goes through the tower once.

    This works for all epochs and runs. The key of an image is the pixels that the tower gets, so a changed file or
    other image processing gives a new key. Features of different weights, dtypes, settings and autocast are kept
    apart. Several processes and runs may share the folder, and a killed process leaves nothing half-written.

    Args:
        model: the composite, a model of transformers whose tower reads `pixel_values` image by image, or a PEFT model
            around either.
        directory: folder for the features.
        max_gigabytes: limit of the folder, in units of 1e9 bytes. Images beyond it are computed each time.
    Returns:
        The cache, with `hits`, `misses` and `detach()`.
    Raises:
        ValueError: the tower trains, is not found, or reads several images at once. Or the limit leaves no room.

    Example:
        >>> cache = cache_features(model, "features", max_gigabytes=20)  # doctest: +SKIP
    """
    host = unwrapped(model)
    composite = hasattr(host, "feature_cache")
    tower = host.vision_tower if composite else _tower_of(host)
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError(
            f"{type(tower).__name__} trains, so its features change from step to step. Freeze it first: "
            "tower.requires_grad_(False), or attach the adapter before."
        )
    if getattr(host, "feature_cache", None) is not None or "forward" in tower.__dict__:
        raise ValueError(f"{type(tower).__name__} has a cache or another hook already. Call its detach() first.")
    cache = FeatureCache(host, tower, FeatureStore(directory, int(max_gigabytes * 1e9)))
    if composite:
        host.feature_cache = cache
    else:
        forward = tower.forward

        @functools.wraps(forward)
        def cached(pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return cache.of_tower(forward, pixel_values, *args, **kwargs)

        tower.forward = cached
    return cache


def weights_key(tower: PreTrainedModel) -> bytes:
    """Hash everything that distinguishes towers: class, configuration, and every weight."""
    digest = hashlib.blake2b(type(tower).__name__.encode(), digest_size=20)
    config = {k: v for k, v in tower.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(str(tower.config._attn_implementation).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(_bytes(tensor))
    return digest.digest()


def _tower_of(host: nn.Module) -> PreTrainedModel:
    config = getattr(getattr(host, "config", None), "vision_config", None)
    inside: set[nn.Module] = set()
    towers = []
    for part in host.modules():
        is_tower = isinstance(part, PreTrainedModel) and part is not host and type(part.config) is type(config)
        if is_tower and part not in inside:
            towers.append(part)
            inside |= set(part.modules())
    if len(towers) != 1:
        raise ValueError(
            f"{type(host).__name__} has {len(towers)} vision towers that its configuration describes (vision_config), "
            "and a feature cache serves one. Train without it."
        )
    names = list(inspect.signature(towers[0].forward).parameters)
    if names[:1] != ["pixel_values"]:
        raise ValueError(
            f"{type(towers[0]).__name__} reads {names[:3]}: the patches of all images at once, which cannot be kept "
            "by image. Train without a feature cache."
        )
    return towers[0]


def _layers_read(config: Any, count: int) -> list[int]:
    """Return the hidden states that a model reads; all of them if its configuration does not specify any."""
    layers = getattr(config, "vision_feature_layer", None)
    if layers is None or not count:
        return list(range(count))
    return sorted({layer % count for layer in (layers if isinstance(layers, (list, tuple)) else [layers])})


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
