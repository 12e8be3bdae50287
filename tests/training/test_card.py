"""Test the model card of a stage's directory with names that contain special characters of Markdown and Jinja."""

import json
from types import SimpleNamespace

from peft_crome.training.directory.card import stage_card

WORDS = "{{ 7 * 7 }} {% include 'x' %}"
SYSTEM = f'"{WORDS}"'


def test_names_with_bars_and_braces_stand_in_the_card_as_they_are() -> None:
    training = {
        "batch_size": 8, "initial_learning_rate": 1e-8, "learning_rate": 1e-3, "learning_rates": {"qformer": 1e-5},
        "warmup_steps": 10, "betas": [0.9, 0.95], "weight_decay": 0.05,
    }  # fmt: skip
    score = {"step": 20, "data": "a|b", "metric": "vqa", "score": 0.5, "stderr": None, "n": 1200}
    stage = {
        "stage": "a|b", "trained": {"adapter": 640}, "data": [{"path": f"{WORDS}|.json", "rows": 4000}], "steps": 20,
        "losses": [], "scores": [score | {"step": 10}, score],
        "recipe": {"system": SYSTEM, "training": training},
    }  # fmt: skip
    composite = SimpleNamespace(
        vision_model_name_or_path="user/tower", vision_revision="abc", vision_quantization_config=None,
        text_model_name_or_path=None, text_revision=None, text_quantization_config={"bits": 4},
        text_config=SimpleNamespace(model_type="llama"), image_height_width=(224, 336), is_encoder_decoder=False,
    )  # fmt: skip
    card = stage_card({"stages": [stage]}, composite)
    for line in (
        "- vision tower: `user/tower`, revision `abc`, images of 224 x 336",
        "- language model: `stored here`, quantized when loaded",
        f'    {{"role": "system", "content": {json.dumps(SYSTEM)}}},',
        f"| a\\|b | adapter: 640 | {WORDS}\\|.json (4,000) | 8 | 20 "
        "| 1e-08 to 0.001<br>qformer: 1e-05 in 10 steps, cosine to 0 | - |",
        "| a\\|b | a\\|b | vqa | 50.0% | 1,200 | 20 |",
    ):
        assert f"\n{line}\n" in card
    assert card.count("| vqa |") == 1
