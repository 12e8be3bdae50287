"""Read patch features from any vision tower: which tokens are patches, their grid and their width."""

import copy
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.initialization import no_init_weights
from transformers.utils import ModelOutput

from .configuration_crome_vlm import CromeVLMConfig


@dataclass(frozen=True)
class VisionLayout:
    """Layout of one image's features: prefix tokens, then a row-major grid of patches.

    Args:
        num_prefix_tokens: tokens before the patches (CLS, registers); 0 for feature maps.
        height: rows of patches.
        width: columns of patches.
        hidden_size: features per token.
        channel_axis: axis of the features in a (batch, ..., ...) map; None if the tower returns tokens.
    """

    num_prefix_tokens: int
    height: int
    width: int
    hidden_size: int
    channel_axis: int | None

    @property
    def num_tokens(self) -> int:
        """Tokens per image from the tower, with the prefix."""
        return self.num_prefix_tokens + self.height * self.width

    def num_selected(self, strategy: str, pool_size: int) -> int:
        """Count the tokens per image after selection and pooling.

        Raises:
            ValueError: the grid cannot be cut into pool_size x pool_size squares.
        """
        if self.height % pool_size or self.width % pool_size:
            sizes = [n for n in range(1, min(self.height, self.width) + 1) if not (self.height % n or self.width % n)]
            raise ValueError(
                f"vision_pool_size={pool_size} does not divide the {self.height} x {self.width} patch grid; "
                f"choose one of {sizes}, or another image_size."
            )
        prefix = self.num_prefix_tokens if strategy == "full" else 0
        return prefix + (self.height // pool_size) * (self.width // pool_size)

    def to_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Lay a feature map out as tokens, row by row. Tokens are unchanged.

        Args:
            features: (images, tokens, hidden), or a map with the features on `channel_axis`.
        Returns:
            (images, tokens, hidden).
        """
        if features.ndim == 3:
            return features
        return features.movedim(self.channel_axis or 1, -1).flatten(1, 2)

    def select(self, features: torch.Tensor, strategy: str, pool_size: int) -> torch.Tensor:
        """Drop or keep the prefix tokens and average the patch grid.

        Args:
            features: (images, num_tokens, hidden).
            strategy: "default" drops the prefix, "full" keeps it.
            pool_size: side of the squares to average.
        Returns:
            (images, num_selected, hidden).
        """
        prefix, patches = features.split([self.num_prefix_tokens, self.height * self.width], dim=1)
        patches = self.pool(patches, pool_size)
        return torch.cat([prefix, patches], dim=1) if strategy == "full" and self.num_prefix_tokens else patches

    def pool(self, patches: torch.Tensor, pool_size: int) -> torch.Tensor:
        """Average pool_size x pool_size neighbors of (images, height * width, hidden)."""
        if pool_size == 1:
            return patches
        grid = patches.transpose(1, 2).unflatten(2, (self.height, self.width))
        return nn.functional.avg_pool2d(grid, pool_size).flatten(2).transpose(1, 2)


def find_vision_model(model: PreTrainedModel) -> PreTrainedModel:
    """Find the part that reads pixels: the tower without a head, or the vision half of a dual model such as CLIP.

    Raises:
        ValueError: no part of the model takes `pixel_values` alone and returns features of every patch.
    """
    vision_config = getattr(model.config, "vision_config", None)
    if vision_config is not None:
        for part in model.modules():
            if isinstance(part, PreTrainedModel) and part is not model and type(part.config) is type(vision_config):
                return part
    inputs = _inputs(model)
    if "pixel_values" not in inputs or "input_ids" in inputs:
        raise ValueError(
            f"{type(model).__name__} is not a vision tower: its forward takes {inputs[:6]}, expected "
            "pixel_values without input_ids. Pass the tower's name or model object as vision=."
        )
    # Without the head of a ...ForImageClassification or ...WithProjection. `base_model` may be unset, or be DINOv3's
    # encoder, which comes after the patch embedding.
    bare = AutoModel._model_mapping.get(type(model.config), ())
    tower = next((part for part in model.modules() if isinstance(part, bare)), model)
    why_not = _why_no_features(tower)
    if why_not:
        raise ValueError(f"{type(tower).__name__} {why_not}. Pass another tower as vision=.")
    return tower


def _why_no_features(tower: PreTrainedModel) -> str | None:
    """Return why a tower does not give the features of every patch of an image; None if it does."""
    parameters = inspect.signature(tower.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if isinstance(tower, BackboneMixin):
        return "gives feature maps for detection; load the same checkpoint with AutoModel"
    if "noise" in _inputs(tower):
        return "may hide patches at random, for its own training (ViT-MAE: load the checkpoint with ViTModel)"
    if set(needed) > {"pixel_values"}:
        return f"reads {needed}, so images are cut up before it; expected a tower that reads pixel_values alone"
    return None


def vision_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the tower for a configuration: AutoModel's, else the one beside the configuration.

    Raises:
        ValueError: transformers has no tower for it.
    """
    if type(config) in AutoModel._model_mapping or "AutoModel" in (getattr(config, "auto_map", None) or {}):
        return AutoModel
    name = type(config).__module__.replace("configuration_", "modeling_")
    if name.startswith("transformers.models."):
        for part in vars(importlib.import_module(name)).values():
            if getattr(part, "config_class", None) is type(config) and "pixel_values" in _inputs(part):
                return part
    raise ValueError(
        f"transformers has no vision tower for {type(config).__name__}. Pass the tower as a model object, "
        "vision=..., or use one that AutoModel loads."
    )


def _inputs(model: PreTrainedModel | type[PreTrainedModel]) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def build_tower(config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Build a tower with random weights; kwargs are arguments of `from_config` (`dtype`)."""
    model_class = vision_class(config)
    build = model_class.from_config if model_class is AutoModel else model_class._from_config
    return build(config, **kwargs)


def size_arguments(tower: PreTrainedModel, height: int, width: int) -> dict[str, bool]:
    """Return the arguments that the tower's forward needs to read images of height x width; often none."""
    native = getattr(tower.config, "image_size", None)
    native = (native, native) if isinstance(native, int) else native
    if native is None or tuple(native) == (height, width) or "interpolate_pos_encoding" not in _inputs(tower):
        return {}
    return {"interpolate_pos_encoding": True}


def run_tower(tower: PreTrainedModel, pixel_values: torch.Tensor, layer: int, **kwargs: bool) -> torch.Tensor:
    """Compute one layer's features, in the tower's layout.

    Args:
        tower: model that reads pixel_values.
        pixel_values: (images, channels, height, width).
        layer: -1: `last_hidden_state`; else an index into `hidden_states`.
        kwargs: result of `size_arguments`.
    Returns:
        (images, tokens, hidden), or a four-dimensional feature map.
    Raises:
        ValueError: the tower has no such layer.
    """
    return _pick_layer(tower, _call(tower, pixel_values, layer, **kwargs), layer)


def _call(tower: PreTrainedModel, pixel_values: torch.Tensor, layer: int, **kwargs: bool) -> ModelOutput:
    output: ModelOutput = tower(pixel_values, output_hidden_states=layer != -1, return_dict=True, **kwargs)
    return output


def _pick_layer(tower: PreTrainedModel, output: ModelOutput, layer: int) -> torch.Tensor:
    if layer == -1:
        return output.last_hidden_state
    hidden_states = getattr(output, "hidden_states", None) or ()
    if not -len(hidden_states) <= layer < len(hidden_states):
        raise ValueError(
            f"vision_feature_layer={layer}: {type(tower).__name__} has {len(hidden_states)} hidden states; choose "
            f"from {-len(hidden_states)} to {len(hidden_states) - 1}."
        )
    return hidden_states[layer]


def infer_layout(config: CromeVLMConfig) -> VisionLayout:
    """Determine the layout of a tower's features from its shapes, without its weights.

    A copy of the tower runs on the meta device. Patches are counted from the patch convolution, and halved per
    stage for hierarchical towers; the remaining tokens before them are the prefix.

    Raises:
        ValueError: the tower cannot read images of this size, or its features cannot be laid out as a grid.
    """
    height, width = config.image_height_width
    try:
        tower, output = _dry_run(config, "meta")
    except (NotImplementedError, RuntimeError):  # some towers compute sizes from values, which meta tensors lack
        tower, output = _dry_run(config, "cpu")
    features = _pick_layer(tower, output, config.vision_feature_layer)
    if features.ndim == 4:
        return _map_layout(features.shape, config.vision_config)
    if features.ndim != 3:
        raise ValueError(
            f"{type(tower).__name__} gives features of shape {tuple(features.shape)}; expected (images, tokens, "
            "hidden) or a feature map. Use a tower that gives one feature vector per patch."
        )
    num_tokens, (rows, columns) = features.shape[1], _patch_grid(tower, height, width)
    while rows * columns > num_tokens:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    return VisionLayout(num_tokens - rows * columns, rows, columns, features.shape[2], channel_axis=None)


def _dry_run(config: CromeVLMConfig, device: str) -> tuple[PreTrainedModel, ModelOutput]:
    """Run a copy of the tower with arbitrary weights on one blank image; return both the copy and its output."""
    vision_config = copy.deepcopy(config.vision_config)
    vision_config._attn_implementation = "eager"
    channels = getattr(vision_config, "num_channels", 3)
    with torch.device(device), no_init_weights(), torch.no_grad():
        tower = build_tower(vision_config, dtype=torch.float32).eval()
        pixel_values = torch.zeros(1, channels, *config.image_height_width)
        kwargs = size_arguments(tower, *config.image_height_width)
        try:
            return tower, _call(tower, pixel_values, config.vision_feature_layer, **kwargs)
        except Exception as error:
            if device == "meta" and isinstance(error, (NotImplementedError, RuntimeError)):
                raise
            size = getattr(vision_config, "image_size", None)
            other = f"Write image_size={size}, or pass" if size not in (None, config.image_size) else "Pass"
            raise ValueError(
                f"{type(tower).__name__} cannot read pixel_values of shape {tuple(pixel_values.shape)}: "
                f"{str(error).rstrip('.')}. {other} another tower as vision=."
            ) from error


def _map_layout(shape: torch.Size, vision_config: PreTrainedConfig) -> VisionLayout:
    """Find the layout of a (1, a, b, c) map: the feature axis is as wide as the configuration's hidden size."""
    widths = {getattr(vision_config, "hidden_size", None), *(getattr(vision_config, "hidden_sizes", None) or ())}
    is_last = shape[1] not in widths and (shape[3] in widths or shape[1] == shape[2] != shape[3])
    rows, columns, hidden_size = shape[1:] if is_last else (*shape[2:], shape[1])
    return VisionLayout(0, rows, columns, hidden_size, channel_axis=3 if is_last else 1)


def _patch_grid(tower: PreTrainedModel, height: int, width: int) -> tuple[int, int]:
    """Count rows and columns of patches before any merging: output size of the tower's first convolution.

    Raises:
        ValueError: the tower has neither a patch convolution nor a `patch_size`.
    """
    conv = next((part for part in tower.modules() if isinstance(part, nn.Conv2d)), None)
    if conv is not None:
        padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
        sizes = zip((height, width), padding, conv.kernel_size, conv.stride, strict=True)
        rows, columns = ((size + 2 * pad - kernel) // stride + 1 for size, pad, kernel, stride in sizes)
        return rows, columns
    patch_size = getattr(tower.config, "patch_size", None)
    if patch_size is None:
        raise ValueError(
            f"{type(tower).__name__} has no patch convolution and no patch_size, so its patch grid is unknown. "
            "Use a tower that splits images into patches."
        )
    patch_height, patch_width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    return height // patch_height, width // patch_width
