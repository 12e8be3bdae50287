"""Each tiny checkpoint loads in the ordinary way, and its model takes what its processor makes of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image

from . import FAMILIES, Family

# Processors of PaliGemma, GLM-4V and MiniCPM-V call numpy 2.4 on tensors (transformers 5.23).
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SENTENCE = "It's 37% \"ok\" - a café's naïve test; 2 < 3, no?\n\tTabs, the color of  two spaces."


@pytest.fixture(scope="module", autouse=True)
def _without_stand_ins() -> Iterator[None]:
    """tests/zoo/gemma.py registers a tower in the place of timm's."""
    registered = dict(tf.AutoModel._model_mapping._extra_content)
    tf.AutoModel._model_mapping._extra_content.clear()
    yield
    tf.AutoModel._model_mapping._extra_content.update(registered)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    built: dict[str, Path] = {}

    def build(family: Family) -> Path:
        if family.missing():
            pytest.skip(f"{', '.join(family.missing())} not installed")
        if family.name not in built:
            built[family.name] = tmp_path_factory.mktemp(family.name)
            family.build(built[family.name])
        return built[family.name]

    return build


def picture(width: int, height: int) -> dict[str, Any]:
    """A part with an image whose pixels differ, drawn from its size."""
    noise = torch.Generator().manual_seed(width * height)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=noise)
    return {"type": "image", "image": Image.fromarray(pixels.numpy())}


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one image": [turn("user", picture(701, 419), "What is this?"), turn("assistant", "A red cat.")],
    "two images": [
        turn("user", picture(211, 130), picture(64, 150), "What differs?"),
        turn("assistant", "The colors do."),
    ],
    "text": [turn("user", "What is two?"), turn("assistant", "A number.")],
    "two turns": [
        turn("user", picture(97, 181), "What is this?"),
        turn("assistant", "A red cat."),
        turn("user", "Is it a dog?"),
        turn("assistant", "No, a cat."),
    ],
}

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def render(processor: Any, conversation: list[dict[str, Any]], **options: Any) -> Any:
    """`apply_chat_template`, for Phi-4's processor as well, which leaves its template to the tokenizer when loaded."""
    template = processor.chat_template or processor.tokenizer.chat_template
    return processor.apply_chat_template(conversation, chat_template=template, **options)


def load(family: Family, directory: Path) -> tuple[Any, Any]:
    return tf.AutoProcessor.from_pretrained(directory), getattr(tf, family.auto_class).from_pretrained(directory)


def encode(processor: Any, family: Family, conversation: list[dict[str, Any]]) -> Any:
    if family.chat_template:
        return render(processor, conversation, tokenize=True, return_dict=True, return_tensors="pt")
    parts = conversation[0]["content"]
    images = [part["image"] for part in parts if part["type"] == "image"]
    text = next(part["text"] for part in parts if part["type"] == "text")
    answer = conversation[1]["content"][0]["text"]
    if family.encoder_decoder:
        inputs = processor(images=images or None, text=text, return_tensors="pt")
        inputs["labels"] = processor.tokenizer(answer, return_tensors="pt")["input_ids"]
        return inputs
    return processor(
        images=[images], text=[family.image_token * len(images) + text], suffix=[answer], return_tensors="pt"
    )


@each_family
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_the_model_takes_what_the_processor_makes(
    family: Family, kind: str, checkpoint: Callable[[Family], Path]
) -> None:
    if kind == "two images" and not family.several_images:
        pytest.skip("one image to a conversation")
    if kind in ("text", "two turns") and not family.chat_template:
        pytest.skip("no chat template")
    processor, model = load(family, checkpoint(family))
    # Llama 4's image processor gives bfloat16.
    inputs = encode(processor, family, CONVERSATIONS[kind]).to(model.dtype)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.isfinite(logits).all()
    token = processor.tokenizer.convert_tokens_to_ids(family.image_token)
    images = sum(part["type"] == "image" for message in CONVERSATIONS[kind] for part in message["content"])
    placeholders = (inputs["input_ids"] == token).sum().item()
    assert (placeholders >= images) if images else (placeholders == 0)
    assert inputs["input_ids"].max() < model.get_input_embeddings().weight.shape[0]


@each_family
def test_a_model_answers(family: Family, checkpoint: Callable[[Family], Path]) -> None:
    processor, model = load(family, checkpoint(family))
    question = CONVERSATIONS["one image"][:1]
    if family.chat_template:
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = render(processor, question, **options)
    else:
        image, text = question[0]["content"]
        prompt = text["text"] if family.encoder_decoder else family.image_token + text["text"]
        inputs = processor(images=[image["image"]], text=[prompt], return_tensors="pt")
    before = 1 if family.encoder_decoder else inputs["input_ids"].shape[1]
    answer = model.generate(**inputs.to(model.dtype), max_new_tokens=3, do_sample=False)
    assert before < answer.shape[1] <= before + 3


@each_family
def test_an_image_changes_the_answer(family: Family, checkpoint: Callable[[Family], Path]) -> None:
    """Features land on the placeholders: another image, other logits behind it."""
    processor, model = load(family, checkpoint(family))
    inputs = encode(processor, family, CONVERSATIONS["one image"]).to(model.dtype)
    other = {name: -value if "pixel_values" in name else value for name, value in inputs.items()}
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits[:, -1], model(**other).logits[:, -1])


VIDEO = {
    "type": "video",
    "video": torch.arange(8 * 64 * 96 * 3).remainder(251).to(torch.uint8).view(8, 64, 96, 3).numpy(),
}
SOUND = {"type": "audio", "audio": torch.sin(torch.arange(16000) / 9).numpy()}


@pytest.mark.parametrize(
    ("family", "part"),
    [
        pytest.param(family, part, id=f"{name}-{part['type']}")
        for name, family in FAMILIES.items()
        for part in [VIDEO] * family.video + [SOUND] * family.audio
    ],
)
def test_the_model_takes_video_and_sound(
    family: Family, part: dict[str, Any], checkpoint: Callable[[Family], Path]
) -> None:
    processor, model = load(family, checkpoint(family))
    conversation = [turn("user", part, "What is this?"), turn("assistant", "A cat.")]
    # Frames without their times are taken as they are.
    options = {"do_sample_frames": False} if part["type"] == "video" else {}
    inputs = render(
        processor, conversation, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
    )
    with torch.no_grad():
        assert torch.isfinite(model(**inputs.to(model.dtype)).logits).all()
    assert any("video" in name or "pixel" in name or "feature" in name for name in inputs)


@each_family
def test_text_comes_back(family: Family, checkpoint: Callable[[Family], Path]) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(checkpoint(family))
    assert tokenizer.decode(tokenizer(SENTENCE)["input_ids"], skip_special_tokens=True) == SENTENCE
    assert tokenizer.is_fast
    assert tokenizer.pad_token_id is not None


@each_family
def test_a_processor_is_the_same_when_saved_again(
    family: Family, checkpoint: Callable[[Family], Path], tmp_path: Path
) -> None:
    processor = tf.AutoProcessor.from_pretrained(checkpoint(family))
    processor.save_pretrained(tmp_path)
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        if (checkpoint(family) / name).exists():
            assert (tmp_path / name).read_text() == (checkpoint(family) / name).read_text(), name


@each_family
def test_a_checkpoint_is_small_and_always_alike(
    family: Family, checkpoint: Callable[[Family], Path], tmp_path: Path
) -> None:
    first = checkpoint(family)
    family.build(tmp_path)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert all((first / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
    assert sum((first / name).stat().st_size for name in names) < 3e6


with_template = pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES.values() if family.chat_template],
    ids=[name for name, family in FAMILIES.items() if family.chat_template],
)


@with_template
def test_the_end_of_a_turn(family: Family, checkpoint: Callable[[Family], Path]) -> None:
    processor = tf.AutoProcessor.from_pretrained(checkpoint(family))
    first, last = (message["content"][0]["text"] for message in CONVERSATIONS["two turns"][1::2])
    text = render(processor, CONVERSATIONS["two turns"])
    between, after = text.partition(first)[2], text.partition(last)[2]
    if family.end_of_turn is None:
        assert not after.strip()
        assert family.name == "glm4v" or "<" not in between
        return
    assert family.end_of_turn in between
    assert (family.end_of_turn in after) == family.closes_last
    tokenizer = processor.tokenizer
    ids = tokenizer.encode(family.end_of_turn, add_special_tokens=False)
    assert ids == [tokenizer.convert_tokens_to_ids(family.end_of_turn)]
    generation = tf.GenerationConfig.from_pretrained(checkpoint(family))
    assert ids[0] in generation.eos_token_id


@with_template
def test_rows_with_and_without_images_make_a_batch(family: Family, checkpoint: Callable[[Family], Path]) -> None:
    processor, model = load(family, checkpoint(family))
    rows = [CONVERSATIONS["text"], CONVERSATIONS["two turns"], CONVERSATIONS["two images"]]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
    inputs = render(processor, rows, **options).to(model.dtype)
    assert inputs["input_ids"].shape[0] == 3
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


@with_template
def test_what_a_template_does_with_words_and_images(family: Family, checkpoint: Callable[[Family], Path]) -> None:
    processor = tf.AutoProcessor.from_pretrained(checkpoint(family))
    asked = [turn("user", "before", picture(64, 64), " after "), turn("assistant", " said "), turn("user", "more")]
    text = render(processor, asked)
    between = text.partition("before")[2].partition("after")[0]
    assert (not between.strip()) == family.images_first
    assert (" said " not in text) == family.strips
    for refused in ([turn("user", "one"), *asked], [turn("assistant", "one"), *asked]):
        if family.alternates:
            with pytest.raises(Exception, match="alternate"):
                render(processor, refused)
        else:
            assert render(processor, refused)


@with_template
def test_a_system_message(family: Family, checkpoint: Callable[[Family], Path]) -> None:
    processor = tf.AutoProcessor.from_pretrained(checkpoint(family))
    conversation = [turn("system", "Be brief."), *CONVERSATIONS["text"]]
    if not family.system:
        with pytest.raises(Exception, match="alternate"):
            render(processor, conversation)
    else:
        assert "Be brief." in render(processor, conversation[:2], add_generation_prompt=True)
        assert ("Be brief." in render(processor, conversation)) == family.keeps_system


@with_template
def test_what_a_prompt_and_its_answer_share(family: Family, checkpoint: Callable[[Family], Path]) -> None:
    processor = tf.AutoProcessor.from_pretrained(checkpoint(family))
    asked = [turn("system", "Be brief.")] * family.system + CONVERSATIONS["two turns"][:1]
    answered = asked + CONVERSATIONS["two turns"][1:2]
    prompt = render(processor, asked, add_generation_prompt=True)
    said = render(processor, answered)
    assert said.startswith(prompt) == family.prompt_is_prefix
    assert render(processor, answered + CONVERSATIONS["two turns"][2:]).startswith(said) == family.keeps_turns


@with_template
def test_words_that_the_template_marks(family: Family, checkpoint: Callable[[Family], Path]) -> None:
    processor = tf.AutoProcessor.from_pretrained(checkpoint(family))
    template = processor.chat_template or processor.tokenizer.chat_template
    assert ("generation %}" in template.replace("{%- ", "{% ")) == family.generation
    if not family.generation:
        return
    inputs = render(
        processor, CONVERSATIONS["two turns"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, mask in zip(inputs["input_ids"][0], inputs["assistant_masks"][0], strict=True) if mask]
    # LLaVA 1.5 marks the space behind an answer as well, whose token is the next turn's "▁U".
    text = processor.tokenizer.decode(marked).replace("USER", "").replace("U", "")
    assert text.split() == ["A", "red", "cat.", "No,", "a", "cat."]
