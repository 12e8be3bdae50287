"""Test the three stages on tiny models: what trains, what a directory holds, and the errors when something does not
fit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from peft_crome import CromeVLMConfig, CromeVLMForConditionalGeneration, CromeVLMProcessor
from peft_crome.data import read_rows
from peft_crome.training import StageError, generate_answers, load_recipe, read_record, train
from tests.training.tiny import following, weights


@pytest.fixture
def stages(values: dict[str, Any], tmp_path: Path) -> dict[str, Path]:
    """Train all three stages and return their directories."""
    instruct = following(values, "instruct", tmp_path / "instruct")
    finetune = following(instruct, "finetune", tmp_path / "finetune")
    for recipe in (values, instruct, finetune):
        train(load_recipe(recipe))
    return {name: tmp_path / name for name in ("pretrain", "instruct", "finetune")}


def test_each_stage_trains_its_parts_alone(stages: dict[str, Path]) -> None:
    """Only the parts that a stage names change from one directory to the next, and nothing else is stored."""
    before = weights(stages["pretrain"])
    assert {key.split(".")[0] for key in before} == {"image_projection", "text_projection", "qformer", "base_model"}
    expected = {
        "instruct": {"image_projection", "text_projection", "qformer", "base_model"},
        "finetune": {"base_model"},
    }
    for name, parts in expected.items():
        after = weights(stages[name])
        assert after.keys() == before.keys()
        changed = {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])}
        assert changed == parts
        before = after
    trained = [stage["trained"] for stage in read_record(stages["finetune"])["stages"]]
    assert [list(part) for part in trained] == [
        ["image_projection", "text_projection", "adapter"],
        ["image_projection", "qformer", "text_projection", "adapter"],
        ["adapter"],
    ]
    assert trained[2]["adapter"] == 5 * 32 * 4


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_stages_on_quantized_backbones(quantization: str, values: dict[str, Any], tmp_path: Path) -> None:
    """All three stages train what they name beside quantized weights, and the last directory loads quantized."""
    values["backbones"] |= {"quantization": quantization, "vision_quantization": quantization, "dtype": "bfloat16"}
    instruct = following(values, "instruct", tmp_path / "instruct")
    finetune = following(instruct, "finetune", tmp_path / "finetune")
    stored, trained = [], []
    for recipe in (values, instruct, finetune):
        trained.append(list(train(load_recipe(recipe))["stages"][-1]["trained"]))
        stored.append(weights(Path(recipe["output"])))
    assert trained[1] == ["image_projection", "qformer", "text_projection", "adapter"]
    for before, after, parts in (
        (stored[0], stored[1], {"image_projection", "text_projection", "qformer", "base_model"}),
        (stored[1], stored[2], {"base_model"}),
    ):
        assert {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])} == parts
    model = CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "finetune")
    for part, kind in ((model.language_model, True), (model.vision_tower, True), (model.qformer, False)):
        kinds = {type(module).__name__ for module in part.modules()}
        assert bool(kinds & {"Linear4bit", "Linear8bitLt"}) == kind


LOAD = """
import json, sys, torch
from peft_crome import CromeVLMForConditionalGeneration, CromeVLMProcessor
from peft_crome.data import read_rows
from peft_crome.training import generate_answers
directory, data = sys.argv[1:]
model = CromeVLMForConditionalGeneration.from_pretrained(directory)
processor = CromeVLMProcessor.from_pretrained(directory)
rows = list(read_rows(data))
print(json.dumps(generate_answers(model, processor, rows, max_new_tokens=3, progress=False)))
"""


def test_last_directory_alone_answers_in_a_fresh_process(
    stages: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    rows = list(read_rows(dataset))
    model = CromeVLMForConditionalGeneration.from_pretrained(stages["finetune"])
    processor = CromeVLMProcessor.from_pretrained(stages["finetune"])
    here = generate_answers(model, processor, rows, max_new_tokens=3, progress=False)
    copied = tmp_path / "elsewhere"
    shutil.move(stages["finetune"], copied)
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(copied), str(dataset)], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout.splitlines()[-1]) == here
    assert len(set(here)) > 1


def test_loaded_model_is_the_trained_one(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of the model in memory at the end of training equal those of the model in its directory."""
    from peft_crome.training import run

    seen = {}

    def save(model: Any, processor: Any, *args: Any) -> None:
        batch = collate(processor)
        model.eval()
        with torch.no_grad():
            seen["logits"] = model(**batch).logits
        return original(model, processor, *args)

    def collate(processor: Any) -> dict[str, torch.Tensor]:
        rows = list(read_rows(values["data"][0]["path"]))[:3]
        return run.ConversationCollator(processor)(rows)

    original = run.save_stage
    monkeypatch.setattr(run, "save_stage", save)
    train(load_recipe(values))
    model = CromeVLMForConditionalGeneration.from_pretrained(values["output"])
    processor = CromeVLMProcessor.from_pretrained(values["output"])
    with torch.no_grad():
        torch.testing.assert_close(model(**collate(processor)).logits, seen["logits"], rtol=0, atol=0)


def test_card_says_what_was_trained_on_what(
    stages: dict[str, Path],
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    card = (stages["finetune"] / "README.md").read_text()
    for text in (values["backbones"]["language"], "| pretrain |", "| instruct |", "| finetune |"):
        assert text in card
    assert f"{values['data'][0]['path']} (11)" in card
    assert "1e-08 to 0.01 in 1 steps, cosine to 0" in card
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Image.new("RGB", (40, 40), "red").save("photo.png")
    said = []
    for part in card.split("```python\n")[1:]:
        code = part.split("```")[0].replace("<this repository or directory>", str(stages["finetune"]))
        exec(compile(code, "card", "exec"), {})
        said.append(capsys.readouterr().out.strip())
    assert len(said) == 2
    assert said[1]
    assert said[1] in said[0]
    assert "user" not in said[0] + said[1], "the prompt is no part of the answer"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": {"qformer": 0.5}}, r"training.learning_rates: \['qformer'\] do not train here"),
        ({"arguments": {"report_to": "dvclive"}}, "training.arguments: .*dvclive"),
        (
            {"arguments": {"dataloader_num_workers": "two", "optim": "adamw_torch"}},
            r"training.arguments: TrainingArguments does not take \{'dataloader_num_workers': 'two'\}: ",
        ),
    ],
)
def test_keys_that_cannot_do_anything_are_refused(
    changes: dict[str, Any], message: str, values: dict[str, Any]
) -> None:
    values["training"] |= changes
    with pytest.raises(ValueError, match=message):
        train(load_recipe(values))
    assert not Path(values["output"]).exists()


@pytest.mark.parametrize("key", ["vision", "language", "qformer_tokenizer"])
def test_backbone_that_is_nowhere_is_named(key: str, values: dict[str, Any]) -> None:
    values["backbones"][key] = "nobody/nothing"
    with pytest.raises(StageError, match=f"backbones.{key}: 'nobody/nothing' cannot be loaded"):
        train(load_recipe(values))


def test_words_that_the_qformer_does_not_know(values: dict[str, Any]) -> None:
    values["backbones"]["qformer"] = {**values["backbones"]["qformer"], "vocab_size": 20}
    with pytest.raises(
        StageError, match=r"backbones.qformer.vocab_size: 20 words, and .* has \d+. Write vocab_size: "
    ):
        train(load_recipe(values))


def test_folders_are_found_from_everywhere(values: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """Backbones that a recipe names by a relative path load from any working directory."""
    for key in ("vision", "language"):
        (tmp_path / key).symlink_to(values["backbones"][key])
        values["backbones"][key] = key
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)
        train(load_recipe(values))
    config = json.loads((Path(values["output"]) / "config.json").read_text())
    assert Path(config["text_model_name_or_path"]).is_absolute()
    CromeVLMForConditionalGeneration.from_pretrained(values["output"])
    assert "a folder of the machine that trained it" in (Path(values["output"]) / "README.md").read_text()


def test_adapter_that_is_missing_or_damaged_is_no_silence(values: dict[str, Any], tmp_path: Path) -> None:
    train(load_recipe(values))
    adapter = Path(values["output"]) / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        CromeVLMForConditionalGeneration.from_pretrained(values["output"])
    adapter.write_bytes(whole)
    (adapter.parent / "adapter_config.json").unlink()
    with pytest.raises(OSError, match=r"has no adapter_config.json, and should: .* Copy all of it again"):
        CromeVLMForConditionalGeneration.from_pretrained(values["output"])
    for name in ("adapter_model.safetensors", "crome_stage.json"):
        (adapter.parent / name).unlink()
    with pytest.raises(OSError, match=r"has no adapter_config.json, and should: config.json says has_adapter"):
        CromeVLMForConditionalGeneration.from_pretrained(values["output"])
    alone = CromeVLMForConditionalGeneration.from_pretrained(values["output"], adapter="ignore")
    alone.save_pretrained(tmp_path / "alone")
    CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "alone")
    config = CromeVLMConfig.from_pretrained(values["output"])
    CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "alone", config=config)


@pytest.mark.parametrize("how", ["mixture", "weights", "streaming", "without a Q-Former"])
def test_mixtures_train(how: str, values: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    """Mixtures of two data sets train, where one of the two is a table."""
    shown = {"a": "w9", "shown": "images/red.png"}
    (tmp_path / "table.jsonl").write_text("\n".join(json.dumps({"q": f"w{i}", **shown}) for i in range(40)))
    columns = {"question": "q", "answer": "a", "image": "shown"}
    table = {"path": str(tmp_path / "table.jsonl"), "columns": columns, "images": str(dataset.parent)}
    values["data"] = [*values["data"], table]
    if how == "mixture":
        values["mixture"] = {"temperature": 2}
    elif how in ("weights", "streaming"):
        for number, data in enumerate(values["data"]):
            data |= {"weight": number + 1, "streaming": how == "streaming"}
    else:
        for key in ("qformer", "qformer_tokenizer", "num_query_tokens"):
            del values["backbones"][key]
    record = train(load_recipe(values))["stages"][0]
    assert record["steps"] == 6
    assert [item["rows"] for item in record["data"]] == ([None, None] if how == "streaming" else [11, 40])
    assert "(streamed)" in (Path(values["output"]) / "README.md").read_text() or how != "streaming"


def test_batches_without_images_train_too(values: dict[str, Any]) -> None:
    """A text branch trains with one row a step on data with a row of text alone."""
    for key in ("qformer", "qformer_tokenizer", "num_query_tokens"):
        del values["backbones"][key]
    values["adapter"]["branches"] = ["text", "vision"]
    values["training"] |= {"rows_per_device": 1, "batch_size": 1, "max_steps": 12, "save_steps": 100}
    record = train(load_recipe(values))["stages"][0]
    assert [item["rows"] for item in record["data"]] == [12]
    assert len([loss for _, loss in record["losses"] if loss > 0]) == 12


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_loss_does_not_depend_on_how_a_batch_is_cut(
    kind: str, values: dict[str, Any], seq2seq_backbone: str, tmp_path: Path
) -> None:
    """The loss does not depend on how a batch is divided. The answers have one to four tokens, so a mean of means
    would differ."""
    rows = json.loads(Path(values["data"][0]["path"]).read_text())
    for number, row in enumerate(rows):
        row["conversations"][1]["value"] = " ".join(f"w{40 + number}" for _ in range(1 + number % 4))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    values["data"] = [{"path": str(tmp_path / "rows.json"), "images": str(Path(values["data"][0]["path"]).parent)}]
    if kind == "t5":
        shutil.copytree(seq2seq_backbone, tmp_path / "t5")
        config = json.loads((tmp_path / "t5" / "config.json").read_text())
        (tmp_path / "t5" / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.0}))
        values["backbones"]["language"] = str(tmp_path / "t5")
        values["chat_template"] = "t5"
    losses = []
    for rows_per_device in (1, 4):
        values["training"] |= {"rows_per_device": rows_per_device, "max_steps": 2}
        values["output"] += f"-{rows_per_device}"
        losses.append(train(load_recipe(values))["stages"][0]["losses"])
    for cut, whole in zip(*losses, strict=True):
        assert cut[1] == pytest.approx(whole[1], rel=1e-4)


def test_feature_cache_gives_the_same_run_and_is_shared(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with the feature cache has the losses of one without it, with three augmented views of each image. A
    second run computes none of them."""
    for color in ("red", "green", "blue", "white"):  # a plain image looks the same however it is cropped
        image = Image.new("RGB", (40, 50), color)
        image.paste("gray", (0, 0, 10, 50))
        (tmp_path / "images").mkdir(exist_ok=True)
        image.save(tmp_path / "images" / f"{color}.png")
    values["data"][0]["images"] = str(tmp_path)
    values["images"] = {"horizontal_flip": True, "random_crop": True, "views": 3}
    values["training"]["max_steps"] = 12
    values["training"]["warmup_steps"] = 1
    plain = train(load_recipe(values))["stages"][-1]
    values["feature_cache"] = {"directory": str(tmp_path / "features")}
    records = []
    for run in ("first", "second"):
        values["output"] = str(tmp_path / run)
        records.append(train(load_recipe(values))["stages"][-1])
        stored = len(list((tmp_path / "features").rglob("*.safetensors")))
        assert 4 < stored <= 12  # of four images
        monkeypatch.setattr("peft_crome.features.cache.FeatureStore.put", None)  # nothing is left to be written
    assert records[0]["losses"] == records[1]["losses"]
    for cached, direct in zip(records[0]["losses"], plain["losses"], strict=True):
        assert cached[1] == pytest.approx(direct[1], rel=1e-4)


def test_two_image_roots_for_one_file(values: dict[str, Any]) -> None:
    values["data"] = values["data"] * 2
    values["training"]["max_steps"] = 2
    record = train(load_recipe(values))["stages"][0]
    assert [item["rows"] for item in record["data"]] == [11, 11]


def test_missing_images_are_found_before_anything_is_loaded(values: dict[str, Any], tmp_path: Path) -> None:
    values["data"][0]["images"] = str(tmp_path)
    values["backbones"]["language"] = "not/looked-at"
    with pytest.raises(ValueError, match=r"Row '0': the image .*red.png is missing \(11 such files in all\)"):
        train(load_recipe(values))


def test_instruction_that_the_qformer_cannot_read_names_the_row(values: dict[str, Any], tmp_path: Path) -> None:
    rows = json.loads(Path(values["data"][0]["path"]).read_text())[:1]
    rows[0]["conversations"][0]["value"] += " w1" * 20
    (tmp_path / "long.json").write_text(json.dumps(rows))
    values["data"] = [{"path": str(tmp_path / "long.json"), "images": str(Path(values["data"][0]["path"]).parent)}]
    with pytest.raises(ValueError, match=r"Row '0': the instruction has 22 tokens, and the Q-Former reads 12"):
        train(load_recipe(values))


def test_seq2seq_and_no_qformer(values: dict[str, Any], seq2seq_backbone: str, tmp_path: Path, dataset: Path) -> None:
    values["backbones"] = {"vision": values["backbones"]["vision"], "language": seq2seq_backbone, "dtype": "float32"}
    values["chat_template"] = "t5"
    record = train(load_recipe(values))
    assert list(record["stages"][0]["trained"]) == ["image_projection", "adapter"]
    train(load_recipe(following(values, "finetune", tmp_path / "finetune")))
    model = CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "finetune")
    processor = CromeVLMProcessor.from_pretrained(tmp_path / "finetune")
    rows = list(read_rows(dataset))
    assert len(generate_answers(model, processor, rows, max_new_tokens=3, progress=False)) == len(rows)


@pytest.mark.slow
def test_three_stages_of_an_encoder_decoder_with_a_qformer(
    values: dict[str, Any], seq2seq_backbone: str, dataset: Path, tmp_path: Path
) -> None:
    """Each stage changes what it trains, on data whose rows have several images, one or none. The last directory
    answers."""
    rows = json.loads(dataset.read_text())
    two = [rows[0]["image"], rows[1]["image"]]
    turns = [{"from": "human", "value": "<image> w1 <image> w2"}, {"from": "gpt", "value": "w41 w42 w43"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "two", "image": two, "conversations": turns}, *rows]))
    values["data"] = [{"path": str(tmp_path / "rows.json"), "images": str(dataset.parent)}]
    values["backbones"]["language"] = seq2seq_backbone
    values |= {"chat_template": "t5", "images_after_text": True}
    instruct = following(values, "instruct", tmp_path / "instruct")
    finetune = following(instruct, "finetune", tmp_path / "finetune")
    stored = []
    for recipe in (values, instruct, finetune):
        train(load_recipe(recipe))
        stored.append(weights(Path(recipe["output"])))
    for before, after, parts in (
        (stored[0], stored[1], {"image_projection", "text_projection", "qformer", "base_model"}),
        (stored[1], stored[2], {"base_model"}),
    ):
        assert {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])} == parts
    model = CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "finetune")
    processor = CromeVLMProcessor.from_pretrained(tmp_path / "finetune")
    assert processor.images_after_text
    questions = list(read_rows(tmp_path / "rows.json", dataset.parent))
    together = generate_answers(model, processor, questions, max_new_tokens=3, progress=False)
    alone = generate_answers(model, processor, questions, max_new_tokens=3, progress=False, batch_size=1)
    assert together == alone
    assert len(together) == 13
