"""Test every tower of transformers that reads images of one size. It gives a feature for each patch, trains
and reloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import CONFIG_MAPPING, AutoModel

from peft_crome import CromeConfig, CromeVLMForConditionalGeneration
from tests.vlm.tiny import build

PLAIN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VIT = PLAIN | {"image_size": 32, "patch_size": 8}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
FOUR = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
SPATIAL = FOUR | {"num_attention_heads": [1, 1, 2, 4], "image_size": 64}
# model_type -> its configuration, patches of an image; a size beside it where the configuration has none
TOWERS: dict[str, tuple[dict[str, Any], int]] = {
    **dict.fromkeys(("aimv2_vision_model", "beit", "chinese_clip_vision_model", "clip_vision_model"), (VIT, 16)),
    **dict.fromkeys(("data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit"), (VIT, 16)),
    **dict.fromkeys(("idefics3_vision", "ijepa", "mlcd_vision_model", "siglip_vision_model"), (VIT, 16)),
    **dict.fromkeys(("smolvlm_vision", "tipsv2_vision_model", "vit", "vit_msn"), (VIT, 16)),
    "internvl_vision": (VIT | {"image_size": [32, 32], "patch_size": [8, 8]}, 16),
    "sam_vision_model": (VIT | {"output_channels": 16, "global_attn_indexes": [1], "window_size": 2}, 16),
    **dict.fromkeys(("donut-swin", "swin", "swinv2"), (WINDOWS, 64)),
    "focalnet": (
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "hidden_sizes": [8, 16]}
        | {"focal_levels": [1, 1], "focal_windows": [3, 3]},
        64,
    ),
    **dict.fromkeys(("convnext", "convnextv2", "dinov3_convnext"), (FOUR | {"image_size": 64}, 4)),
    "pvt": (SPATIAL, 4),
    "pvt_v2": (SPATIAL, 4),
    "segformer": ({key: value for key, value in SPATIAL.items() if key != "image_size"}, 4),
    "resnet": ({"embedding_size": 8, **FOUR, "layer_type": "basic"}, 4),
    "regnet": ({"embedding_size": 8, **FOUR, "groups_width": 8}, 4),
    "bit": ({"embedding_size": 32, "hidden_sizes": [128, 128, 128, 128], "depths": [1, 1, 1, 1]}, 4),
    "poolformer": ({"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, 4),
    **dict.fromkeys(("mobilenet_v1", "mobilenet_v2"), ({"image_size": 64, "depth_multiplier": 0.25}, 4)),
}


def joined(name: str) -> CromeVLMForConditionalGeneration:
    settings, _ = TOWERS[name]
    torch.manual_seed(0)
    tower = AutoModel.from_config(CONFIG_MAPPING[name](**settings))
    own = {} if "image_size" in settings else {"image_size": 64}
    return CromeVLMForConditionalGeneration.from_backbones(
        tower, build().language_model, image_token_id=100, **own
    ).eval()


@pytest.mark.parametrize("name", TOWERS)
def test_tower(name: str, tmp_path: Path) -> None:
    model = joined(name)
    height, width = model.config.image_height_width
    pixel_values = torch.randn(1, 3, height, width)
    with torch.no_grad():
        features = model.get_vision_features(pixel_values)
        assert features.shape == (1, TOWERS[name][1], model.vision_layout.hidden_size)
        assert (features != model.get_vision_features(torch.randn(1, 3, height, width))).any(dim=-1).all()
        assert torch.equal(features, model.get_vision_features(pixel_values))

    model.save_pretrained(tmp_path)
    loaded = CromeVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(features, loaded.get_vision_features(pixel_values))

    ids = torch.tensor([[1, *[100] * model.config.image_seq_length, 5, 6]])
    adapted = get_peft_model(model, CromeConfig(bottleneck_dim=4, modules_to_save=["image_projection"]))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values, "labels": ids}
    adapted.train()(**batch).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}


ALIKE = [name for name, (settings, _) in TOWERS.items() if settings == VIT]


@pytest.mark.parametrize("name", ALIKE)
def test_patches_lie_row_by_row(name: str) -> None:
    """A change in one corner of an image changes the feature of that corner most."""
    model = joined(name)
    grid = model.vision_layout
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model.get_vision_features(image)
        for row, column in ((0, 3), (3, 0)):
            other = image.clone()
            other[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 3 * torch.randn(1, 3, 8, 8)
            change = (model.get_vision_features(other) - before).norm(dim=-1)[0]
            assert int(change.argmax()) == row * grid.width + column


def test_docs_list_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "composite.md").read_text()
    listed = page.split("<!-- towers -->")[1].split("<!-- end of towers -->")[0]
    assert listed.strip() == ", ".join(f"`{name}`" for name in sorted([*TOWERS, "instructblip_vision_model"]))
