"""Test recipes: the paper's presets, and the errors for wrong recipes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_crome.training import RecipeError, load_recipe
from peft_crome.training.recipe.file import PRESETS, parse_overrides, preset_text

COMPLETE = {"output": "out", "data": [{"path": "rows.json"}]}
SAID = {"instructblip": "blip", "language": "llm"}


@pytest.mark.parametrize(
    ("stage", "batch_size", "length"),
    [("pretrain", 32, "epochs"), ("instruct", 16, "max_steps"), ("finetune", 16, "")],
)
def test_presets_are_the_papers(stage: str, batch_size: int, length: str) -> None:
    previous = {} if stage == "pretrain" else {"previous": "before"}
    recipe = load_recipe({"preset": stage, **COMPLETE, **previous})
    training = recipe.training
    assert training.batch_size == batch_size
    if length:
        assert getattr(training, length) == {"epochs": 5, "max_steps": 2_000_000}[length]
    assert (training.initial_learning_rate, training.learning_rate, training.warmup_steps) == (1e-8, 1e-5, 1000)
    assert (training.betas, training.weight_decay) == ((0.9, 0.999), 0.05)
    if stage == "pretrain":
        images = recipe.images
        assert images.mean == (0.48145466, 0.4578275, 0.40821073)
        assert images.std == (0.26862954, 0.26130258, 0.27577711)
        assert (images.resample, images.random_crop, images.horizontal_flip) == ("bicubic", True, True)
        assert recipe.backbones is not None
        assert recipe.backbones.image_size == 224
        assert recipe.images_after_text, "the language model reads the instruction first"


def test_preset_is_named_in_a_file_and_changed_there_and_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: pretrain\noutput: out\ndata: [{path: a.json}]\ntraining: {batch_size: 64}\n")
    settings = parse_overrides(["training.epochs=null", "training.max_steps=2e3", "data.0.images=images"])
    recipe = load_recipe(file, settings)
    assert (recipe.training.batch_size, recipe.training.epochs, recipe.training.max_steps) == (64, None, 2000)
    assert recipe.training.learning_rate == 1e-5
    assert recipe.data[0].images == "images"


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    assert yaml.safe_load("1e-5") == "1e-5"
    file = tmp_path / "mine.yaml"
    file.write_text(preset_text("pretrain") + "\noutput: out\ndata: [{path: a.json}]\n")
    text = file.read_text().replace("learning_rate: 1.0e-5", "learning_rate: 1e-5")
    file.write_text(text)
    assert load_recipe(file).training.learning_rate == 1e-5
    assert load_recipe(file, parse_overrides(["training.learning_rate=3e-4"])).training.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"learning_rte": 1}}, r"training.learning_rte: no such key; did you mean 'learning_rate'\?"),
        ({"trainig": {}}, r"trainig: no such key; did you mean 'training'\?"),
        ({"output": None}, "output: .*string"),
        ({"data": []}, "data: .*at least 1"),
        ({"data": [{"pth": "a"}]}, r"data.0.path: missing(.|\n)*data.0.pth: no such key; did you mean 'path'"),
        ({"stage": "tune"}, r"stage: .*'pretrain'.* \(given: 'tune'\)"),
        ({"preset": "pretrian"}, "preset='pretrian' is unknown; expected one of"),
        ({"training": {"batch_size": 0}}, r"training.batch_size: .*greater than or equal to 1 \(given: 0\)"),
        ({"training": {"max_steps": 10}}, "give exactly one of `epochs` and `max_steps`"),
        ({"training": {"epochs": None, "max_steps": 60}}, "leaves nothing of max_steps=60; write warmup_steps: 3"),
        ({"training": {"rows_per_device": 5}}, "batch_size=32 is not a multiple of rows_per_device=5"),
        ({"training": {"learning_rates": {"tower": 1e-4}}}, "training.learning_rates.tower"),
        ({"backbones": {"vision": "a", "instructblip": "b"}}, "name exactly one of `vision` and `instructblip`"),
        ({"backbones": {"qformer": {}}}, "`instructblip` brings its own Q-Former"),
        ({"backbones": {"num_query_tokens": 8}}, "`instructblip` brings its own query tokens; leave"),
        (
            {"backbones": {"vision": "a", "qformer": {"hidden_size": 16, "num_attention_heads": 3}}},
            "qformer.hidden_size=16 is not a multiple of qformer.num_attention_heads=3; write both",
        ),
        ({"backbones": {"vision": "a", "qformer": {"num_attention_heads": 0}}}, "heads=0 is not a whole"),
        ({"backbones": {"vision": "a", "qformer": {"hidden_size": "16"}}}, "hidden_size='16' is not a whole number"),
        (
            {"backbones": {"vision": "a", "qformer": {"hiden_size": 8}}},
            r"qformer.hiden_size: no such key; did you mean 'hidden_size'\?",
        ),
        ({"backbones": {"vision": "a", "qformer": {}}}, "the Q-Former reads instructions; name its tokenizer"),
        ({"backbones": {"vision": "a", "qformer_tokenizer": "b"}}, "qformer_tokenizer is given without a Q-Former"),
        (
            {"data": [{"path": "a", "weight": 1}, {"path": "b"}]},
            "give a `weight` to every data set and write mixture: null",
        ),
        (
            {"data": [{"path": "a", "weight": 1}], "mixture": {}},
            "give a `weight` to every data set and write mixture: null",
        ),
        ({"mixture": {"temperature": 0}}, "mixture.temperature: .*greater than 0"),
        ({"mixture": {"temprature": 2}}, r"mixture.temprature: no such key; did you mean 'temperature'\?"),
        (
            {"data": [{"path": "a", "streaming": True}]},
            "the length of an epoch of streamed data is unknown; give training.max_steps",
        ),
        ({"data": [{"path": "a", "columns": {"answer": "b"}}]}, r"data.0: .*expected the names of `answer` and"),
        ({"training": {"arguments": {"max_steps": 2}}}, r"arguments: \['max_steps'\] are set by keys"),
        ({"training": {"arguments": {"label_smoothing_factor": 0.1}}}, "label_smoothing_factor: .*take it out"),
        (
            {"chat_template": "vicunna"},
            r"chat_template='vicunna' is neither one of \['vicuna', 'plain', 't5', 'words'\] nor",
        ),
        ({"chat_template": "{{ messages"}, r"chat_template is not valid Jinja: .*\(its line 1\)\. Fix it, or write"),
        ({"training": {"seed": -1}}, r"training.seed: .*greater than or equal to 0 \(given: -1\)"),
        ({"training": {"betas": [2, 3]}}, r"training.betas.0: .*less than 1 \(given: 2\)"),
        ({"training": {"learning_rate": float("inf")}}, r"training.learning_rate: .*finite number"),
        ({"training": {"learning_rate": float("nan")}}, r"training.learning_rate: .*\(given: nan\)"),
        (
            {"training": {"learning_rates": {"adapter": -1}}},
            r"training.learning_rates.adapter: .*greater than or equal to 0",
        ),
        ({"training": {"batch_size": True}}, r"training.batch_size: expected a number; YAML's yes .*\(given: True\)"),
        ({"training": {"epochs": True}}, r"training.epochs: expected a number"),
        ({"images": {"std": [0, 0, 0]}}, r"images.std.0: .*greater than 0"),
        ({"stage": "finetune"}, "`finetune` trains the adapter alone; give `model`, or `previous`"),
        ({"backbones": None}, "give `model`, `previous`, the directory of the stage before, or `backbones`"),
    ],
)
def test_wrong_recipe_names_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({"preset": "pretrain", **COMPLETE, **changes})


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        pytest.param({"backbones": {"vision": "tower"}}, None, id="in the recipe"),
        pytest.param({"backbones": {}}, {"backbones.vision": "tower"}, id="on the command line"),
        pytest.param({"backbones": SAID}, {"backbones.vision": "tower"}, id="over the recipe's own"),
        pytest.param(
            {"preset": "instruct", "backbones": SAID}, {"backbones.vision": "tower"}, id="over that of another preset"
        ),
    ],
)
def test_a_tower_takes_the_place_of_the_presets_instructblip(
    changes: dict[str, Any], overrides: dict[str, Any] | None
) -> None:
    recipe = load_recipe({"preset": "pretrain", **COMPLETE, **changes}, overrides)
    assert recipe.backbones is not None
    assert (recipe.backbones.vision, recipe.backbones.instructblip) == ("tower", None)


def test_image_settings_of_a_preset_are_for_its_own_tower() -> None:
    values = {"preset": "pretrain", **COMPLETE}
    own = load_recipe(values)
    assert own.backbones is not None
    same = load_recipe({**values, "backbones": {"instructblip": own.backbones.instructblip, "dtype": "float32"}})
    assert same.images == own.images
    assert same.backbones is not None
    assert same.backbones.image_size == 224


@pytest.mark.parametrize("place", ["in the recipe", "on the command line"])
@pytest.mark.parametrize("tower", ["vision", "instructblip"])
def test_another_tower_has_its_own_size_mean_and_deviation(tower: str, place: str) -> None:
    values = {"preset": "pretrain", **COMPLETE}
    if place == "in the recipe":
        recipe = load_recipe({**values, "backbones": {tower: "another"}})
    else:
        recipe = load_recipe(values, {f"backbones.{tower}": "another"})
    assert recipe.backbones is not None
    assert (recipe.backbones.image_size, recipe.images.mean, recipe.images.std) == (None, None, None)
    assert (recipe.images.resample, recipe.images.random_crop) == ("bicubic", True)


@pytest.mark.parametrize("tower", ["vision", "instructblip"])
def test_image_settings_that_are_said_beside_another_tower_stay(tower: str) -> None:
    values = {"preset": "pretrain", **COMPLETE, "backbones": {tower: "another"}}
    recipe = load_recipe(values, {"backbones.image_size": 384, "images.mean": [0.5] * 3})
    assert recipe.backbones is not None
    assert (recipe.backbones.image_size, recipe.images.mean, recipe.images.std) == (384, (0.5,) * 3, None)


def test_what_is_given_stays_as_it_is() -> None:
    """Loading a recipe leaves the given mapping and overrides unchanged. A sweep loads one mapping repeatedly, each
    time with other overrides."""
    values = {"preset": "pretrain", **COMPLETE, "training": {"batch_size": 8}, "backbones": {"vision": "tower"}}
    overrides = {"training.batch_size": 16, "data.0.path": "b.json", "data.0.columns": {"answer": "a"}}
    overrides |= {"data.0.columns.question": "q"}
    before, changes = copy.deepcopy(values), copy.deepcopy(overrides)
    assert load_recipe(values, overrides).data[0].path == "b.json"
    assert (values, overrides) == (before, changes)
    assert load_recipe(values).training.batch_size == 8


def test_home_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(
        {
            "preset": "instruct",
            "output": "~/out",
            "previous": "~/before",
            "data": [{"path": "~/rows.json", "images": "~/images"}, {"path": "a/b", "images": {"coco": "~/coco"}}],
            "feature_cache": {"directory": "~/features"},
            "images": {"views": 2},
            "evaluation": {"data": [{"path": "~/test.json", "images": "~/images"}]},
            "backbones": {"vision": "~/tower", "language": "~/llm"},
        }
    )
    said = recipe.model_dump_json()
    assert "~" not in said
    assert said.count(f'"{tmp_path}/') == 10
    assert recipe.data[1].path == "a/b"


def test_a_template_of_transformers_own_tags_is_sound() -> None:
    template = "{% for m in messages %}{%- generation -%}{{ m }}{% endgeneration %}{% continue %}{% endfor %}"
    assert load_recipe({"preset": "pretrain", **COMPLETE, "chat_template": template}).chat_template == template


def test_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: pretrain\ntraining:\n  epochs: 1\n  epochs: 2\n")
    with pytest.raises(RecipeError, match=r"mine.yaml.*the key 'epochs' stands in line 3 and again in line 4"):
        load_recipe(file)
    with pytest.raises(RecipeError, match=r"--set 'data=.*the key 'path' stands in line 1 and again in line 2"):
        parse_overrides(["data=[{path: a,\n path: b}]"])
    with pytest.raises(RecipeError, match=r"the key 'path' stands in line 1 and again in line 1"):
        parse_overrides(["data=[{path: a, path: b}]"])
    file.write_text(
        "preset: pretrain\noutput: out\ndata:\n  - &first {path: a, split: test}\n  - {<<: *first, path: b}\n"
    )
    assert [(data.path, data.split) for data in load_recipe(file).data] == [("a", "test"), ("b", "test")]


@pytest.mark.parametrize(
    ("language", "template"), [("lmsys/vicuna-13b-v1.5", "vicuna"), ("google/flan-t5-xxl", None), ("Qwen/Qwen3", None)]
)
def test_vicunas_template_is_for_vicuna(language: str, template: str | None) -> None:
    """The preset's template is for Vicuna alone, and a template in the recipe itself stays. Another language model has
    its own, or the collator asks for one."""
    values = {"preset": "pretrain", **COMPLETE, "backbones": {"language": language}}
    assert load_recipe(values).chat_template == template
    assert load_recipe({**values, "backbones": {}}, {"backbones.language": language}).chat_template == template
    assert load_recipe({**values, "chat_template": "plain"}).chat_template == "plain"
    assert load_recipe(values, {"chat_template": "t5"}).chat_template == "t5"


def test_quoted_numbers_stay_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text('preset: pretrain\noutput: "2024"\ndata: [{path: a.json}]\n')
    assert load_recipe(tmp_path / "mine.yaml").output == "2024"


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a file nor a preset; presets are \['pretrain'"):
        load_recipe(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match="holds list; expected keys"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("stage: [pretrain\n")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(tmp_path / "broken.yaml")
    with pytest.raises(RecipeError, match=r"write --set training.max_steps=100"):
        parse_overrides(["training.max_steps"])
    with pytest.raises(RecipeError, match=r"cannot set 'output.name': output has no (keys|such entry)"):
        load_recipe({"preset": "pretrain", **COMPLETE}, {"output.name": 1})


@pytest.mark.parametrize("stage", PRESETS)
def test_presets_lack_only_what_the_user_knows(stage: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(stage)
    missing = [line.split(":")[0].strip() for line in str(error.value).splitlines() if ": missing; write it" in line]
    assert missing == ["output", "data"]
