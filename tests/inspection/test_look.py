"""Test the inspection from an adapter's directory to a page, with one adapter or two, and its errors."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image
from typer.testing import CliRunner

from peft_crome.cli import app
from peft_crome.inspection import look, write_inspection
from peft_crome.training import load_recipe, train
from tests.examples.tiny_llava import save_tokenizer_and_model
from tests.tuner.helpers import attach, randomize
from tests.vlm.tiny import make_tokenizer

look_module = sys.modules["peft_crome.inspection.look"]  # the package has a function of that name
runner = CliRunner()


def save(model: Any, folder: Path, seed: int = 3, **config: Any) -> str:
    """Save an adapter that is not an identity, and return its directory. The model has no adapter afterwards."""
    model = attach(model, **config)
    randomize(model, seed=seed)
    model.save_pretrained(folder)
    model.unload()
    return str(folder)


@pytest.fixture
def base(composite: Any, processor: Any, tmp_path: Path) -> str:
    """Return the directory of a composite with its processor. An adapter on it has this path in its configuration."""
    composite.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def adapters(base: str, tmp_path: Path) -> list[str]:
    """Return the directories of two adapters on one composite."""
    model = tf.AutoModelForImageTextToText.from_pretrained(base)
    return [save(model, tmp_path / name, seed) for seed, name in enumerate(("first", "second"))]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "image.png")
    return tmp_path / "image.png"


class Page(HTMLParser):
    """Parser that keeps the tags of an HTML page with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("kind", ["composite", "host"])
def test_images_are_read_as_the_models_own_processor_reads_them(
    kind: str, adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inspection reads images as the model's own processor does. A composite shows transparency on white, and
    processors of other models drop it."""
    adapter, model, prompt = adapters[0], None, "w1 w2"
    if kind == "host":
        model, prompt = str(tmp_path / "host"), "What color?"
        save_tokenizer_and_model(tmp_path / "host")
        adapter = save(tf.AutoModelForImageTextToText.from_pretrained(model), tmp_path / "on a host")
    path = tmp_path / "transparent.png"
    Image.new("RGBA", (60, 40), (200, 0, 0, 0)).save(path)
    processor = tf.AutoProcessor.from_pretrained(model or str(tmp_path / "base"))
    text = f"{processor.image_token} {prompt}"
    expected = processor(images=[str(path)], text=text, return_tensors="pt")["pixel_values"]
    seen: list[torch.Tensor] = []
    encode = look_module.encode

    def spy(*given: Any) -> Any:
        batch = encode(*given)
        seen.append(batch["pixel_values"])
        return batch

    monkeypatch.setattr(look_module, "encode", spy)
    look(adapter, prompt=prompt, images=[str(path)], model=model)
    assert torch.equal(seen[0], expected)
    assert (seen[0].amin() > 0) == (kind == "composite")


def test_composite_with_its_backbone(adapters: list[str], image: Path) -> None:
    view = look(adapters[0], prompt="w1 w2", images=[Image.open(image).convert("RGB")])
    found = {shown.activity.branch: shown for shown in view.branches}
    assert set(found) == {"text", "vision"}
    (drawn,) = found["vision"].maps
    assert drawn.cells.shape == (3, 3)
    assert drawn.image.size == (30, 30)  # cut out, as the tower reads it
    assert [text for text, _ in found["text"].words] == ["user:", "[9 image tokens]", "w1", "w2", "assistant:"]


def test_two_adapters_on_one_page(adapters: list[str], image: Path, tmp_path: Path) -> None:
    given = {"prompt": "w1 <b>", "images": [Image.open(image).convert("RGB")]}
    views = [look(adapter, **given) for adapter in adapters]
    files = write_inspection(views, tmp_path / "out")
    assert files == (tmp_path / "out.html", tmp_path / "out.png")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))) == [
        "out.html",
        "out.png",
    ]
    with Image.open(files[1]) as figure:
        assert figure.format == "PNG"
    page = Page(files[0])
    assert "w1 <b>" in page.text
    assert not [attributes for tag, attributes in page.tags if tag in ("b", "script", "link")]
    sources = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "srcset")]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"http-equiv", "", files[0].read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 1 + 2 * 3  # singular values; an image and two maps for each adapter
    assert all(attributes["alt"] for attributes in images)
    for adapter in adapters:
        assert f"{adapter} on this input" in page.text


def test_files_are_not_overwritten(adapters: list[str], tmp_path: Path) -> None:
    view = look(adapters[0])
    assert view.branches is None
    (tmp_path / "out.png").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.png exists already and is not overwritten"):
        write_inspection([view], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()
    assert (tmp_path / "out.png").read_text() == "mine"
    write_inspection([view], tmp_path / "out.html", overwrite=True)
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.size[0] > 100
    with pytest.raises(ValueError, match="there is no folder"):
        write_inspection([view], tmp_path / "no" / "out")


def test_backbone_that_cannot_be_had(adapters: list[str], base: str, tmp_path: Path) -> None:
    Path(base).rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"The backbone .*base of .*first cannot be loaded .*Write --model"):
        look(adapters[0], prompt="w1")
    assert look(adapters[0], prompt="w1", model=str(tmp_path / "moved")).branches
    assert look(adapters[0]).branches is None


def test_stage_directory_is_its_own_backbone(values: dict[str, Any], image: Path) -> None:
    train(load_recipe(values))
    view = look(values["output"], prompt="w1", images=[Image.open(image).convert("RGB")] * 2)
    found = {shown.activity.branch: shown for shown in view.branches}
    assert view.images == 2
    assert len(found["vision"].maps) == 2
    # A Q-Former's tokens are no places of the image.
    assert found["text"].maps == []
    assert [text for text, _ in found["text"].words] == [str(number) for number in range(1, 9)]


@pytest.fixture
def llava(tmp_path: Path) -> str:
    """Return the directory of a LLaVA with a processor but without a chat template."""
    tokenizer = make_tokenizer(pad_token="<unk>", extra_special_tokens={"image_token": "<image>"})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(hidden_size=16, image_size=28, patch_size=14, **sizes),
        text_config=tf.LlamaConfig(hidden_size=32, vocab_size=image_token + 1, pad_token_id=0, **sizes),
        image_token_index=image_token,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    tf.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    images = tf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    tf.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(tmp_path / "llava")
    return str(tmp_path / "llava")


def test_host_of_transformers_without_a_template(llava: str, image: Path, tmp_path: Path) -> None:
    model = tf.AutoModelForImageTextToText.from_pretrained(llava)
    adapter = save(model, tmp_path / "adapter")
    view = look(adapter, prompt="w1 w2", images=[Image.open(image).convert("RGB")])
    found = {shown.activity.branch: shown for shown in view.branches}
    assert found["vision"].maps[0].cells.tolist() == [[0, 1], [2, 3]]
    assert [text for text, _ in found["text"].words] == ["[4 image tokens]", "w1", "w2"]


def test_image_for_a_model_that_does_not_see(backbones: tuple[str, str], tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(backbones[1])
    adapter = save(model, tmp_path / "adapter", branches={"text": ["embed_tokens"]})
    (shown,) = look(adapter, prompt="w1 w2").branches
    assert shown.maps == []
    assert [text for text, _ in shown.words] == ["user:", "w1", "w2", "assistant:"]
    with pytest.raises(ValueError, match=r"has no branch that reads images, only \['text'\]"):
        look(adapter, prompt="w1", images=[Image.new("RGB", (8, 8))])


def test_command(adapters: list[str], image: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    result = runner.invoke(app, ["inspect", *adapters, "--prompt", "w1", "--image", str(image), "--output", out])
    assert result.exit_code == 0, result.output
    assert "first on this input" in result.stdout
    assert "out.html" in result.stdout
    assert (tmp_path / "out.png").is_file()
    result = runner.invoke(app, ["inspect", adapters[0]])
    assert result.exit_code == 0, result.output
    assert "base model" in result.stdout
    assert "on this input" not in result.stdout


@pytest.mark.usefixtures("adapters", "image")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/nowhere"], "is not a folder, and the Hub does not give it"),
        (["{}/first", "--image", "{}/image.png"], "need --prompt"),
        (["{}/first", "--prompt", "w1", "--image", "{}/no.png"], "cannot read the image"),
        (["{}/first", "--output", "{}/there"], "there.html exists already"),
        (["{}/first", "--prompt", "w1", "--device", "cuda"], "this PyTorch sees no accelerator"),
    ],
    ids=["no adapter", "no prompt", "no image", "file that is there", "no accelerator"],
)
def test_command_says_what_is_wrong(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text("")
    result = runner.invoke(app, ["inspect", *(argument.format(tmp_path) for argument in arguments)])
    assert result.exit_code == 1
    assert message in result.stderr
