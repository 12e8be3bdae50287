"""The three stages on tiny models: what trains, what a directory holds, and what it says when it does not fit."""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors import safe_open
from transformers import TrainerCallback

from peft_crome import CromeVLMConfig, CromeVLMForConditionalGeneration, CromeVLMProcessor
from peft_crome.data import read_rows
from peft_crome.training import StageError, generate_answers, load_recipe, read_record, train
from tests.vlm.conftest import make_tokenizer


def following(values: dict[str, Any], stage: str, output: Path, **changes: Any) -> dict[str, Any]:
    """The recipe of the next stage, which takes everything else from the directory before it."""
    later = {key: copy.deepcopy(values[key]) for key in ("data", "training")}
    return {**later, "stage": stage, "previous": values["output"], "output": str(output), **changes}


@pytest.fixture
def stages(values: dict[str, Any], tmp_path: Path) -> dict[str, Path]:
    """Directories of all three stages."""
    instruct = following(values, "instruct", tmp_path / "instruct")
    finetune = following(instruct, "finetune", tmp_path / "finetune")
    for recipe in (values, instruct, finetune):
        train(load_recipe(recipe))
    return {name: tmp_path / name for name in ("pretrain", "instruct", "finetune")}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("model.safetensors", "adapter_model.safetensors"):
        with safe_open(directory / name, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    return found


def test_each_stage_trains_its_parts_alone(stages: dict[str, Path]) -> None:
    """What changes from one directory to the next is what the stage names, and nothing else is stored."""
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
def test_stages_on_quantised_backbones(quantization: str, values: dict[str, Any], tmp_path: Path) -> None:
    """All three stages train what they name beside quantised weights, and the last directory loads quantised."""
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
    """Logits of the model in memory at the end of training equal those of its directory."""
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
    assert f"{values['data'][0]['path']} (12)" in card
    assert "1e-08 to 0.01 in 1 steps, cosine to 0" in card
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Image.new("RGB", (40, 40), "red").save("picture.png")
    said = []
    for part in card.split("```python\n")[1:]:
        code = part.split("```")[0].replace("<this repository or directory>", str(stages["finetune"]))
        exec(compile(code, "card", "exec"), {})
        said.append(capsys.readouterr().out.strip())
    assert len(said) == 2
    assert said[1]
    assert said[1] in said[0]
    assert "user" not in said[0] + said[1], "the prompt is no part of the answer"


def test_interrupted_stage_goes_on(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies after step 3 and is started again ends with the weights of one that does not."""
    from peft_crome.training import run

    train(load_recipe({**values, "output": values["output"] + "-whole"}))

    class Die(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    class DyingTrainer(run.CromeTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[Die()], **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(run, "CromeTrainer", DyingTrainer)
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(values))
    assert not Path(values["output"]).exists()
    record = train(load_recipe(values))
    assert record["stages"][0]["resumed"]
    assert not (Path(values["output"]) / "recipe.json").exists()
    whole, resumed = weights(Path(values["output"] + "-whole")), weights(Path(values["output"]))
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0)
    assert not Path(values["output"] + ".checkpoints").exists()


def interrupt(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Die after the checkpoint of step 3; return the folder of checkpoints."""
    from peft_crome.training import run

    def train_three(self: Any, **kwargs: Any) -> None:
        original(self, **kwargs)
        raise KeyboardInterrupt

    original = run.CromeTrainer.train
    with monkeypatch.context() as patched:
        patched.setattr(run.CromeTrainer, "train", train_three)
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(values))
    return Path(values["output"] + ".checkpoints")


def test_each_step_of_a_run_has_the_rate_of_the_formula(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each part; over an interruption, and with rows that are added up from two batches a step."""
    from peft_crome.training import run

    peaks = {"image_projection": 1e-3, "text_projection": 1e-2, "adapter": 1e-2}
    values["training"] |= {"warmup_steps": 2, "rows_per_device": 2, "initial_learning_rate": 1e-4}
    values["training"]["learning_rates"] = {"image_projection": 1e-3}
    rates: dict[int, dict[str, float]] = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            groups = kwargs["optimizer"].param_groups
            rates[state.global_step] = {group["part"]: group["lr"] for group in groups}

    class WatchedTrainer(run.CromeTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[Watch()], **kwargs)

    monkeypatch.setattr(run, "CromeTrainer", WatchedTrainer)
    checkpoints = interrupt(values, monkeypatch)
    shutil.rmtree(checkpoints / "checkpoint-6")
    first, rates = rates, {}
    assert train(load_recipe(values))["stages"][0]["resumed"]
    assert (sorted(first), sorted(rates)) == ([0, 1, 2, 3, 4, 5], [3, 4, 5])
    for step, by_part in (*first.items(), *rates.items()):
        for part, peak in peaks.items():
            # Warm-up from 1e-4 of the common peak, 1e-2; then a cosine to 0 over the four steps that are left.
            share = (0.01 + 0.99 * step / 2) if step < 2 else (1 + math.cos(math.pi * (step - 2) / 4)) / 2
            assert by_part[part] == pytest.approx(peak * share, rel=1e-9), (step, part)


def test_cut_off_checkpoint_is_left_aside(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = interrupt(values, monkeypatch)
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    (checkpoints / "checkpoint-6" / "trainer_state.json").unlink()
    assert train(load_recipe(values))["stages"][0]["resumed"]


def test_checkpoints_of_another_recipe_are_refused(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(values, monkeypatch)
    values["training"]["learning_rate"] = 1e-4
    values["adapter"]["bottleneck_dim"] = 8
    with pytest.raises(StageError) as error:
        train(load_recipe(values))
    for text in ("training.learning_rate was 0.01, is 0.0001", "adapter.bottleneck_dim was 4, is 8", ".checkpoints"):
        assert text in str(error.value)
    assert not Path(values["output"]).exists()


def test_run_that_failed_before_a_checkpoint_does_not_lock_its_folder(values: dict[str, Any]) -> None:
    values["training"] |= {"max_steps": None, "epochs": 1, "warmup_steps": 10}
    with pytest.raises(ValueError, match=r"training.warmup_steps: 10 leaves nothing of 3 steps"):
        train(load_recipe(values))
    values["training"]["warmup_steps"] = 1
    assert train(load_recipe(values))["stages"][0]["steps"] == 3


def test_harmless_keys_may_change_and_data_may_not(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = json.loads(Path(values["data"][0]["path"]).read_text())
    images = str(Path(values["data"][0]["path"]).parent)
    values["data"] = [{"path": str(tmp_path / "rows.json"), "images": images}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    checkpoints = interrupt(values, monkeypatch)
    (checkpoints / "checkpoint-6" / "trainer_state.json").unlink()
    values["training"] |= {"logging_steps": 2, "save_steps": 100}
    (tmp_path / "rows.json").write_text(json.dumps(rows[:5]))
    with pytest.raises(StageError, match=r"holds checkpoints of another run: content of data.*rows.json was"):
        train(load_recipe(values))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert train(load_recipe(values))["stages"][0]["resumed"]


def test_faulty_row_in_the_middle_of_a_run_is_mended_and_the_run_goes_on(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A picture that cannot be read, found after a checkpoint; nothing of what was trained is lost."""
    rows = json.loads(Path(values["data"][0]["path"]).read_text())
    for name in ("red", "green", "blue", "white"):
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copy(Path(values["data"][0]["path"]).parent / "images" / f"{name}.png", tmp_path / "images")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    values["data"] = [{"path": str(tmp_path / "rows.json")}]
    checkpoints = interrupt(values, monkeypatch)
    shutil.rmtree(checkpoints / "checkpoint-6")
    (tmp_path / "images" / "red.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"Row '\d+'.*red.png"):
        train(load_recipe(values))
    (tmp_path / "rows.json").write_text(json.dumps([row for row in rows if "red" not in row.get("image", "")]))
    values["data"][0]["faulty"] = "drop"
    with pytest.raises(
        StageError, match=r"content of data.*rows.json was.*data.0.faulty was 'stop', is 'drop'.*--accept-changed-data"
    ):
        train(load_recipe(values))
    values["training"]["learning_rate"] = 1e-3
    with pytest.raises(StageError, match=r"training.learning_rate was"):
        train(load_recipe(values), accept_changed_data=True)
    values["training"] |= {"learning_rate": 1e-2, "max_length": 100}
    more = {**values, "data": [*values["data"], {"path": str(tmp_path / "more.json")}]}
    (tmp_path / "more.json").write_text(json.dumps(rows[-1:]))  # text alone
    with pytest.raises(StageError, match=r"data.1 was None, is .*more.json.*--accept-changed-data"):
        train(load_recipe(more))
    record = train(load_recipe(values), accept_changed_data=True)["stages"][0]
    assert record["resumed"]
    assert (record["steps"], record["data"][0]["rows"]) == (6, 9)
    assert "goes on with changed data" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "adapter_model.safetensors"])
def test_checkpoint_with_a_truncated_file_is_left_aside(
    name: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = interrupt(values, monkeypatch) / "checkpoint-6" / name
    file.write_bytes(file.read_bytes()[:-20])
    assert train(load_recipe(values))["stages"][0]["resumed"]
    assert "checkpoint-6 was not written in full; it is removed" in caplog.text


def test_recipe_of_checkpoints_that_cannot_be_read(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (interrupt(values, monkeypatch) / "recipe.json").write_text("{")
    with pytest.raises(StageError, match=r"nobody knows what its checkpoints belong to. Remove that folder"):
        train(load_recipe(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": {"qformer": 0.5}}, r"training.learning_rates: \['qformer'\] do not train here"),
        ({"arguments": {"report_to": "dvclive"}}, "training.arguments: .*dvclive"),
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
    """Backbones named by a relative path."""
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
def test_mixtures_train(how: str, values: dict[str, Any], tmp_path: Path) -> None:
    """Two sets, one of them a table without pictures."""
    (tmp_path / "table.jsonl").write_text("\n".join(json.dumps({"q": f"w{i}", "a": "w9"}) for i in range(40)))
    columns = {"question": "q", "answer": "a"}
    values["data"] = [*values["data"], {"path": str(tmp_path / "table.jsonl"), "columns": columns}]
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
    assert [item["rows"] for item in record["data"]] == ([None, None] if how == "streaming" else [12, 40])
    assert "(streamed)" in (Path(values["output"]) / "README.md").read_text() or how != "streaming"


def test_batches_without_pictures_train_too(values: dict[str, Any]) -> None:
    """Behind a Q-Former nothing that trains sees such a row."""
    values["training"] |= {"rows_per_device": 1, "batch_size": 1, "max_steps": 14, "save_steps": 100}
    record = train(load_recipe(values))["stages"][0]
    assert 0 in [loss for _, loss in record["losses"]] or len(record["losses"]) == 14


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_loss_does_not_depend_on_how_a_batch_is_cut(
    kind: str, values: dict[str, Any], seq2seq_backbone: str, tmp_path: Path
) -> None:
    """Answers of one to four tokens: a mean of means would be another number."""
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
    """Augmented pictures in three views each: a second run computes none of them."""
    for colour in ("red", "green", "blue", "white"):  # a plain picture looks the same however it is cropped
        picture = Image.new("RGB", (40, 50), colour)
        picture.paste("gray", (0, 0, 10, 50))
        (tmp_path / "images").mkdir(exist_ok=True)
        picture.save(tmp_path / "images" / f"{colour}.png")
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
        assert 4 < stored <= 12  # of four pictures
        monkeypatch.setattr("peft_crome.feature_cache.FeatureStore.put", None)  # nothing is left to be written
    assert records[0]["losses"] == records[1]["losses"]
    for cached, direct in zip(records[0]["losses"], plain["losses"], strict=True):
        assert cached[1] == pytest.approx(direct[1], rel=1e-4)


def test_two_image_roots_for_one_file(values: dict[str, Any]) -> None:
    values["data"] = values["data"] * 2
    values["training"]["max_steps"] = 2
    record = train(load_recipe(values))["stages"][0]
    assert [item["rows"] for item in record["data"]] == [12, 12]


def test_missing_pictures_are_found_before_anything_is_loaded(values: dict[str, Any], tmp_path: Path) -> None:
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
    """Several images in a row and rows without one; what each stage trains changes, and the last directory answers."""
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


def test_directory_of_another_architecture_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    train(load_recipe(values))
    later = following(values, "instruct", tmp_path / "instruct", backbones=copy.deepcopy(values["backbones"]))
    later["backbones"]["num_query_tokens"] = 8
    later["backbones"]["language"] = "another/model"
    later["adapter"] = {"bottleneck_dim": 16}
    with pytest.raises(StageError) as error:
        train(load_recipe(later))
    for text in ("'another/model' in the recipe", "num_query_tokens: 8 in the recipe, 4 there", "bottleneck_dim: 16"):
        assert text in str(error.value)
    assert "dtype" not in str(error.value)
    assert not (tmp_path / "instruct").exists()
    later["backbones"] = {"quantization": "4bit", **values["backbones"]}
    del later["adapter"]
    with pytest.raises(StageError, match=r"differs|backbones.quantization: '4bit' in the recipe, None there"):
        train(load_recipe(later))
    del later["backbones"]
    later["adapter"] = {"dropout": 0.5}
    train(load_recipe(later))
    adapter = json.loads((tmp_path / "instruct" / "adapter_config.json").read_text())
    assert adapter["dropout"] == 0.5


def test_another_qformer_is_another_architecture(
    values: dict[str, Any], backbones: tuple[str, str], tmp_path: Path
) -> None:
    """What a recipe leaves out is the directory's, a Q-Former and its tokenizer are not."""
    train(load_recipe(values))
    before = copy.deepcopy(values["backbones"])
    plain = {key: value for key, value in before.items() if key in ("vision", "language")}
    with pytest.raises(StageError, match=r"backbones.qformer: none in the recipe, one there"):
        train(load_recipe(following(values, "instruct", tmp_path / "instruct", backbones=plain)))
    make_tokenizer(extra_special_tokens=["<another>"]).save_pretrained(tmp_path / "tokenizer")
    other = {**before, "qformer_tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(StageError, match=r"another tokenizer for its Q-Former, and the recipe says backbones.qformer"):
        train(load_recipe(following(values, "instruct", tmp_path / "instruct", backbones=other)))
    small = {key: value for key, value in before["qformer"].items() if key != "num_hidden_layers"}
    other = {**before, "qformer": small}
    with pytest.raises(StageError, match=r"backbones.qformer.num_hidden_layers: 12 in the recipe, 2 there"):
        train(load_recipe(following(values, "instruct", tmp_path / "instruct", backbones=other)))
    assert not (tmp_path / "instruct").exists()


def test_backbones_that_have_moved_are_named_anew(
    values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the next stage's recipe, or in config.json by hand."""
    for key in ("vision", "language"):
        shutil.copytree(values["backbones"][key], tmp_path / key)
        values["backbones"][key] = str(tmp_path / key)
    train(load_recipe(values))
    now = copy.deepcopy(values["backbones"])
    for key in ("vision", "language"):
        now[key] = str((tmp_path / key).rename(tmp_path / f"{key}-now"))
    with pytest.raises(StageError, match=r"which are not there. If they have moved, write the `backbones`"):
        train(load_recipe(following(values, "instruct", tmp_path / "instruct")))
    tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    other = {**now, "language": str(tmp_path / "gpt2")}
    with pytest.raises(StageError, match=r"is another model than the one trained with: .*'gpt2', not 'llama'"):
        train(load_recipe(following(values, "instruct", tmp_path / "instruct", backbones=other)))
    train(load_recipe(following(values, "instruct", tmp_path / "instruct", backbones=now)))
    assert "is not there; text_model_name_or_path is taken from" in caplog.text
    config = json.loads((tmp_path / "instruct" / "config.json").read_text())
    assert config["vision_model_name_or_path"] == now["vision"]
    CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "instruct")

    file = Path(values["output"]) / "config.json"
    text = file.read_text()
    for key in ("vision", "language"):
        text = text.replace(f'"{values["backbones"][key]}"', f'"{now[key]}"')
    for broken in (text.replace('"vision_feature_layer": -1', '"vision_feature_layer": -2'), text[:-20]):
        file.write_text(broken)
        with pytest.raises(StageError, match=r"is incomplete: config.json \(of other content"):
            train(load_recipe(following(values, "instruct", tmp_path / "by-hand")))
    file.write_text(text)
    train(load_recipe(following(values, "instruct", tmp_path / "by-hand")))


@pytest.mark.parametrize("damage", ["no record", "missing", "truncated", "no directory"])
def test_half_written_directory_is_refused(damage: str, values: dict[str, Any], tmp_path: Path) -> None:
    directory = Path(values["output"])
    if damage != "no directory":
        train(load_recipe(values))
    if damage == "no record":
        (directory / "crome_stage.json").unlink()
    elif damage == "missing":
        (directory / "adapter_model.safetensors").unlink()
    elif damage == "truncated":
        data = (directory / "model.safetensors").read_bytes()
        (directory / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(StageError, match=r"no complete stage's directory|is incomplete: (adapter_)?model.safetensors"):
        train(load_recipe(following(values, "instruct", tmp_path / "instruct")))
    assert not (tmp_path / "instruct").exists()


def test_previous_that_is_nowhere_is_said_so(values: dict[str, Any], tmp_path: Path) -> None:
    for previous in ("runs/pretrain", str(tmp_path / "nowhere")):
        later = {**following(values, "instruct", tmp_path / "instruct"), "previous": previous}
        with pytest.raises(StageError, match=r"is neither a directory nor a Hub repository|is no complete stage's"):
            train(load_recipe(later))
    assert not (tmp_path / "instruct").exists()


def test_wrong_order_and_existing_output_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    train(load_recipe(values))
    before = weights(Path(values["output"]))
    with pytest.raises(StageError, match="is not overwritten"):
        train(load_recipe(values))
    with pytest.raises(StageError, match=r"'pretrain' starts from the backbones alone"):
        train(load_recipe(following(values, "pretrain", tmp_path / "again")))
    after = weights(Path(values["output"]))
    assert all(torch.equal(after[key], value) for key, value in before.items())
