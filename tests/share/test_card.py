"""Test the model card. It has what the Hub and its readers need for this adapter, and it keeps a user's own words."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel, get_peft_model
from PIL import Image

from peft_crome import CromeConfig, describe_adapter
from peft_crome.sharing.card import END, correct_card, write_card
from tests.examples.tiny_llava import save_tokenizer_and_model
from tests.tuner.helpers import adapted, attach
from tests.zoo.case import TEXT
from tests.zoo.llava import llava

RESULT = EvalResult(
    task_type="visual-question-answering",
    dataset_type="user/colors",
    dataset_name="Colors",
    dataset_split="test",
    metric_type="accuracy",
    metric_value=0.93,
)
PUSHED = "This is the model card of a 🤗 transformers model that has been pushed on the Hub. It is made by a machine."
RECORD = {
    "stages": [
        {
            "stage": "task",
            "trained": {"adapter": 640},
            "data": [{"path": "colors.json", "rows": 4000}],
            "steps": 20,
            "losses": [[20, 0.25]],
            "recipe": {
                "training": {
                    "batch_size": 8,
                    "initial_learning_rate": 1e-8,
                    "learning_rate": 1e-3,
                    "learning_rates": {},
                    "warmup_steps": 10,
                }
            },
        }
    ]
}


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def code_of(card: ModelCard) -> str:
    return card.text.split("```python\n")[1].split("```")[0]


def run_code(card: ModelCard, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    code = code_of(card).replace("<this repository>", str(folder)).replace("max_new_tokens=32", "max_new_tokens=2")
    exec(compile(code, "card", "exec"), {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapted(llava()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_metadata_is_the_hub_s_and_names_no_folder(folder: Path) -> None:
    data = card_of(folder).data
    assert (data.library_name, data.pipeline_tag) == ("peft", "image-text-to-text")
    assert {"crome", "peft", "transformers"} <= set(data.tags)
    assert not [tag for tag in data.tags if "base_model" in tag]
    assert not data.base_model
    assert not list(folder.glob("*.tmp"))


def test_a_base_on_the_hub_is_named_with_its_revision(tmp_path: Path) -> None:
    host = llava()
    host.model.name_or_path = "user/base"
    host.model.config._name_or_path = "user/base"
    model = adapted(host)
    model.peft_config["default"].trained_on["revision"] = "0123456789abcdef"
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.data.base_model == "user/base"
    assert card.data.base_model_relation == "adapter"
    assert "base_model:adapter:user/base" in card.data.tags
    assert 'from_pretrained("user/base", revision="0123456789abcdef")' in card.text
    assert "`user/base`, revision `0123456789abcdef`" in card.text


def test_facts_are_those_of_the_file(folder: Path) -> None:
    text = card_of(folder).text
    assert text.lstrip().startswith("# CROME adapter")
    size = (folder / "adapter_model.safetensors").stat().st_size
    for part in (
        f"| size | 640 weights, {size / 1e3:.1f} kB (F32) |",
        "| architecture | llava |",
        "model type clip_vision_model",
        "| bottleneck | 4 hidden features, silu |",
        "| weights of the base | not quantized |",
        "peft_crome 0.",
        "KeyError: 'CROME'",
    ):
        assert part in text
    assert "More Information Needed" not in text


def test_details_that_the_author_gives_are_told(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "shown.PNG")
    model = adapted(llava(), modules_to_save=["lm_head"])
    describe_adapter(
        model,
        task="Tells colors.",
        datasets=["user/colors", "images of my own"],
        results=[RESULT],
        image=tmp_path / "shown.PNG",
        license="apache-2.0",
        language="en",
        record=RECORD,
    )
    model.save_pretrained(tmp_path / "a")
    card = card_of(tmp_path / "a")
    assert (card.data.license, card.data.language, card.data.datasets) == ("apache-2.0", "en", ["user/colors"])
    assert card.data.eval_results[0].metric_value == 0.93
    assert card.data.to_dict()["model-index"][0]["results"][0]["dataset"]["type"] == "user/colors"
    assert (tmp_path / "a" / "example_image.png").read_bytes() == (tmp_path / "shown.PNG").read_bytes()
    for part in (
        "Tells colors.", "![What this adapter does](example_image.png)", "`images of my own`",
        "| Colors | test | accuracy | 0.93 |", "| task | adapter: 640 | colors.json (4,000) | 8 | 20 |",
        "1e-08 to 0.001 in 10 steps, cosine to 0 | 0.2500 |", "| also trained | `lm_head",
    ):  # fmt: skip
        assert part in card.text
    assert "task" not in json.loads((tmp_path / "a" / "adapter_config.json").read_text()).get("card", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter_name": "other"}, "No CROME adapter 'other'"),
        ({"datasets": "user/data"}, r"Write datasets=\['user/data'\]"),
        ({"results": [{"accuracy": 1}]}, "is not a huggingface_hub.EvalResult"),
        ({"image": "nowhere.png"}, "is not a file"),
        ({"image": __file__}, "with one of the endings"),
    ],
)
def test_wrong_details_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        describe_adapter(attach(llava().model), **arguments)


def test_the_code_for_a_model_that_sees_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer_and_model(tmp_path / "base")
    model = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    attach(model).save_pretrained(tmp_path / "adapter")
    card = card_of(tmp_path / "adapter")
    assert "a folder of the machine that trained it" in card.text
    run_code(card, tmp_path / "adapter", tmp_path, monkeypatch)


def test_the_code_for_a_run_loads_the_processor_that_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's code loads the processor of the run. Its chat template and settings may differ from those of the
    base, which has no template in this test."""
    save_tokenizer_and_model(tmp_path / "base")
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    model = attach(tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "base"))
    describe_adapter(model, record=RECORD)
    model.save_pretrained(tmp_path / "adapter")
    run_code(card_of(tmp_path / "adapter"), tmp_path / "adapter", tmp_path, monkeypatch)


def test_the_code_for_the_composite_runs(
    tmp_path: Path, composite: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    composite.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model = type(composite).from_pretrained(tmp_path / "base")
    get_peft_model(model, CromeConfig(bottleneck_dim=4)).save_pretrained(tmp_path / "adapter")
    card = card_of(tmp_path / "adapter")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "CromeVLMForConditionalGeneration" in code_of(card)
    run_code(card, tmp_path / "adapter", tmp_path, monkeypatch)


def test_the_code_for_a_text_model_is_its_own(tmp_path: Path) -> None:
    attach(tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)), branches={"text": ["embed_tokens"]}).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.data.pipeline_tag == "text-generation"
    assert "AutoModelForCausalLM.from_pretrained" in code_of(card)
    compile(code_of(card), "card", "exec")


def test_a_quantized_base_is_loaded_as_in_training(tmp_path: Path) -> None:
    model = attach(llava().model)
    config = model.peft_config["default"]
    config.trained_on["quantization"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.save_pretrained(tmp_path)
    assert "quantization_config=BitsAndBytesConfig(load_in_4bit=True)" in code_of(card_of(tmp_path))
    assert "import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig" in code_of(card_of(tmp_path))


def test_saving_twice_changes_nothing(folder: Path) -> None:
    before = (folder / "README.md").read_bytes()
    host = llava()
    PeftModel.from_pretrained(host.model, folder).save_pretrained(folder)
    assert (folder / "README.md").read_bytes() == before


def test_words_of_a_user_stay_and_facts_are_brought_up_to_date(folder: Path) -> None:
    path = folder / "README.md"
    text = path.read_text().replace("# CROME adapter", "# My gauges\n\nFor the plant.", 1)
    path.write_text(text.replace("---\n", "---\nlicense: mit\n", 1) + "\n## Thanks\n\nTo Ann.\n")
    model = PeftModel.from_pretrained(llava().model, folder)
    describe_adapter(model, task="Reads gauges.")
    model.to(torch.bfloat16).save_pretrained(folder)
    card = card_of(folder)
    assert card.data.license == "mit"
    for part in ("# My gauges\n\nFor the plant.", "## Thanks\n\nTo Ann.", "Reads gauges.", "(BF16)"):
        assert part in card.text
    assert card.text.count("## How to load this adapter") == 1


def test_our_part_edited_by_hand_is_kept_with_a_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "README.md"
    path.write_text(path.read_text().replace("## What it is", "## What it is, in my words"))
    with caplog.at_level(logging.WARNING, "peft_crome"):
        PeftModel.from_pretrained(llava().model, folder).save_pretrained(folder)
    assert "has been edited by hand and is kept" in caplog.text
    assert "## What it is, in my words" in path.read_text()


def test_a_card_of_a_user_s_own_gets_our_part_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntags: [gauges]\n---\n\n# All mine\n")
    attach(llava().model).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "# All mine" in card.text.split("<!--")[0]
    assert card.text.rstrip().endswith(END)
    assert "import peft_crome" in card.text


def test_each_named_adapter_has_its_card(tmp_path: Path) -> None:
    model = attach(llava().model, "gauges")
    model.save_pretrained(tmp_path)
    assert "import peft_crome" in (tmp_path / "gauges" / "README.md").read_text()


@pytest.mark.parametrize("folder", ["", "gauges"], ids=["of the repository", "of the adapter"])
def test_a_repository_of_named_adapters_has_a_page(folder: str, tmp_path: Path) -> None:
    model = attach(llava().model, "gauges")
    model.save_pretrained(tmp_path)
    template = ModelCard.from_template(ModelCardData(), model_description=PUSHED).text
    (tmp_path / "README.md").write_text(f"---\ntags: []\n---\n{template}")
    assert correct_card(tmp_path, "user/gauges")
    assert correct_card(tmp_path / "gauges", "user/gauges", "gauges")
    text = card_of(tmp_path / folder).text
    assert 'PeftModel.from_pretrained(model, "user/gauges", subfolder="gauges")' in text
    assert "| size | 640 weights" in text
    assert "More Information Needed" not in text


def test_cards_of_others_are_not_even_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The card of another method is not read, so invalid metadata causes no warning. The card of a folder without an
    adapter stays unchanged."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "README.md").write_text("---\n: [no yaml\n---\n")
    before = (tmp_path / "README.md").read_bytes()
    assert not correct_card(tmp_path, "user/other")
    ModelCard("---\ntags: [mine]\n---\n\n# All mine\n").save(tmp_path / "own" / "README.md")
    assert "peft_crome" not in (tmp_path / "own" / "README.md").read_text()
    assert (tmp_path / "README.md").read_bytes() == before
    assert not caplog.text


def test_a_card_that_a_machine_wrote_over_ours_is_put_right_on_disk(folder: Path) -> None:
    ModelCard("---\nlibrary_name: transformers\n---\n\n# Model card\n\n## Quick start\n\n```python\n"
              "pipeline('text-generation')\n```\n\n## Training\n").save(folder / "README.md")  # fmt: skip
    text = card_of(folder).text
    assert "import peft_crome  # tells PEFT the method" in text
    assert "pipeline(" not in text
    assert text.index("## How to load this adapter") < text.index("## Training")
    assert card_of(folder).data.library_name == "peft"


def test_a_card_that_cannot_be_read_is_left_with_a_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "README.md").write_text("---\n: [no yaml\n---\n")
    with caplog.at_level(logging.WARNING, "peft_crome"):
        assert not correct_card(folder, "user/adapter")
    assert "could not be put into the model card" in caplog.text


def test_a_name_with_quotes_cannot_break_out_of_the_code(tmp_path: Path) -> None:
    config = CromeConfig()
    config.base_model_name_or_path = 'x"); import os; os.system("true'
    config.trained_on = {"model_type": "llava"}
    write_card(tmp_path, config)
    code = code_of(card_of(tmp_path))
    assert 'from_pretrained("x\\"); import os' in code
    compile(code, "card", "exec")


def test_words_with_bars_and_braces_stand_in_the_card_as_they_are(tmp_path: Path) -> None:
    words = "{{ 7 * 7 }} {% include 'x' %} {# gone #}"
    model = attach(llava().model)
    result = EvalResult(
        task_type="visual-question-answering",
        dataset_type="user/colors",
        dataset_name=f"Colors | shades\nand {words}",
        metric_type="accuracy",
        metric_value=0.93,
    )
    stage = RECORD["stages"][0] | {"stage": f"a|b {words}", "data": [{"path": "a|b.json", "rows": None}]}
    describe_adapter(model, task=f"| {words} |", datasets=[words], results=[result], record={"stages": [stage]})
    model.save_pretrained(tmp_path)
    text = card_of(tmp_path).text
    for part in (
        f"\n| {words} |\n", f"Data: `{words}`.", f"\n| Colors \\| shades and {words} |  | accuracy | 0.93 |\n",
        f"\n| a\\|b {words} | adapter: 640 | a\\|b.json (streamed) | 8 |",
    ):  # fmt: skip
        assert part in text
