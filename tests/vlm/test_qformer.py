"""Test the composite with a Q-Former. With InstructBLIP's parts it computes what InstructBLIP computes."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from PIL import Image

from peft_crome import CromeConfig, CromeLayer
from peft_crome.vlm import CromeVLMConfig, CromeVLMForConditionalGeneration, CromeVLMProcessor
from tests.vlm.tiny import CHAT_TEMPLATE, FULL_VIT, IMAGE_ID, build, make_batch, make_tokenizer, text_config

WIDTH, QUERIES = 32, 4
PARTS = ("vision_tower", "qformer")
QFORMER: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "encoder_hidden_size": 24, "vocab_size": 50, "max_position_embeddings": 12,
}  # fmt: skip


def upstream(kind: str = "instructblip", language: str = "llama") -> Any:
    """Build a random InstructBLIP or BLIP-2 of transformers."""
    torch.manual_seed(0)
    names = {"instructblip": "InstructBlip", "blip-2": "Blip2"}
    text = text_config(language).to_dict()
    if language == "opt":
        text["word_embed_proj_dim"] = WIDTH  # upstream projects to hidden_size, which must be the table's width
    qformer = getattr(tf, f"{names[kind]}QFormerConfig")(**QFORMER)
    config = getattr(tf, f"{names[kind]}Config")(
        vision_config=FULL_VIT, qformer_config=qformer.to_dict(), text_config=text,
        num_query_tokens=QUERIES, image_token_index=IMAGE_ID - 1,
    )  # fmt: skip
    model = getattr(tf, f"{names[kind]}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def composed(kind: str = "instructblip", language: str = "llama", **kwargs: Any) -> tuple[Any, Any]:
    """Return an upstream model and the composite of its parts. Both hold the same language model object."""
    theirs = upstream(kind, language)
    ours = CromeVLMForConditionalGeneration.from_instructblip(
        theirs, language=theirs.language_model, image_token_id=IMAGE_ID - 1, **kwargs
    )
    return theirs, ours


def inputs(images: int = 2) -> dict[str, torch.Tensor]:
    """Build rows of one image each, with the image before the text, as InstructBLIP's processor writes them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[IMAGE_ID - 1] * QUERIES + [1, 10 + row, 11, 12] for row in range(images)])
    return {
        "pixel_values": torch.randn(images, 3, 30, 30, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "qformer_input_ids": torch.tensor([[5, 6 + row, 7] for row in range(images)]),
        "qformer_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])[:images],
    }


@pytest.mark.parametrize("language", ["llama", "opt", "t5"])
@pytest.mark.parametrize("kind", ["instructblip", "blip-2"])
def test_logits_equal_upstream(kind: str, language: str) -> None:
    """Tower and Q-Former give the same bits as upstream. The logits do too when the Q-Former's tokens are the only
    image tokens."""
    theirs, ours = composed(kind, language, image_token_order=["query"])
    batch = inputs()
    if language == "t5":
        batch["decoder_input_ids"] = torch.tensor([[0, 5], [0, 6]])
    instruction = {name: batch.pop(name) for name in ("qformer_input_ids", "qformer_attention_mask")}
    instruction = instruction if kind == "instructblip" else {}
    with torch.no_grad():
        expected = theirs(**batch, **instruction)
        features = ours.get_vision_features(batch["pixel_values"])
        torch.testing.assert_close(features, expected.vision_outputs[0], rtol=0, atol=0)
        queries = ours.qformer(features, *instruction.values())
        torch.testing.assert_close(queries, expected.qformer_outputs[0][:, :QUERIES], rtol=0, atol=0)
        torch.testing.assert_close(ours(**batch, **instruction).logits, expected.logits, rtol=0, atol=0)


def with_qformer(language: str = "llama", **kwargs: Any) -> CromeVLMForConditionalGeneration:
    qformer = tf.InstructBlipQFormerConfig(**QFORMER)
    return build(language=language, qformer_config=qformer, num_query_tokens=QUERIES, **kwargs)


def qformer_batch(model: Any, **kwargs: Any) -> dict[str, Any]:
    batch = make_batch(model, **kwargs)
    images = len(batch["pixel_values"])
    return batch | {"qformer_input_ids": torch.arange(3).repeat(images, 1) + torch.arange(images)[:, None]}


@pytest.mark.parametrize("order", [["query", "patch"], ["patch", "query"]])
def test_order_of_an_images_tokens(order: list[str]) -> None:
    model = with_qformer(image_token_order=order)
    assert model.image_seq_length == QUERIES + 9
    batch = qformer_batch(model)
    pixel_values, instruction = batch["pixel_values"], batch["qformer_input_ids"]
    with torch.no_grad():
        tokens = model.get_image_features(pixel_values, qformer_input_ids=instruction).pooler_output
        features = model.get_vision_features(pixel_values)
        expected = {
            "query": model.text_projection(model.qformer(features, instruction)),
            "patch": model.image_projection(features[:, 1:]),  # without the class token, which the Q-Former reads too
        }
    torch.testing.assert_close(tokens, torch.cat([expected[kind] for kind in order], dim=1))


GENERATE: dict[str, Any] = {
    "max_new_tokens": 3,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_rows_of_any_number_of_images(language: str) -> None:
    """A row gives the same logits alone and in a padded batch, and from cached features. Generation starts with the
    logits of `forward`."""
    model = with_qformer(language)
    batch = qformer_batch(model, images_per_row=(1, 0, 2))
    target = {"decoder_input_ids": torch.tensor([[0, 5]] * 3)} if language == "t5" else {}
    with torch.no_grad():
        together = model(**batch, **target).logits
        row = {
            "input_ids": batch["input_ids"][2:],
            "attention_mask": batch["attention_mask"][2:],
            "vision_features": model.get_vision_features(batch["pixel_values"][1:]),
            "qformer_input_ids": batch["qformer_input_ids"][1:],
        }
        alone = model(**row, **{name: value[2:] for name, value in target.items()}).logits
    torch.testing.assert_close(together[2:, -2:], alone[:, -2:], atol=1e-5, rtol=1e-5)
    if language == "llama":
        first = model.generate(**batch, **GENERATE).logits[0]
        torch.testing.assert_close(first, together[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beams", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("language", ["llama", "t5"])
def test_rows_of_any_number_of_images_generate(language: str, beams: dict[str, int]) -> None:
    model = with_qformer(language)
    batch = qformer_batch(model, images_per_row=(1, 0, 2))
    assert model.generate(**batch, **GENERATE, **beams).sequences.shape[0] == 3


def test_the_instruction_changes_what_is_read() -> None:
    model = with_qformer()
    batch = qformer_batch(model)
    with torch.no_grad():
        first = model(**batch).logits
        second = model(**batch | {"qformer_input_ids": batch["qformer_input_ids"] + 9}).logits
    assert not torch.allclose(first, second)


def test_adapter_reads_query_tokens_and_patches() -> None:
    """The text branch comes after the text projection and the vision branch after the image projection, as in the
    paper. All adapter weights get gradients."""
    model = get_peft_model(with_qformer(), CromeConfig(bottleneck_dim=4))
    sites = {path: list(m.branches) for path, m in model.get_base_model().named_modules() if isinstance(m, CromeLayer)}
    assert sites == {"text_fusion": ["text"], "vision_fusion": ["vision"]}
    assert model.get_nb_trainable_parameters()[0] == 5 * WIDTH * 4
    batch = qformer_batch(model.get_base_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "crome_up" in name:
                parameter.normal_()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_adapter_reads_query_tokens_alone() -> None:
    model = get_peft_model(with_qformer(image_token_order=["query"]), CromeConfig(bottleneck_dim=4))
    assert [path for path, m in model.get_base_model().named_modules() if isinstance(m, CromeLayer)] == ["text_fusion"]
    assert model.get_nb_trainable_parameters()[0] == 3 * WIDTH * 4


@pytest.mark.parametrize("named", [True, False])
def test_saved_and_loaded(named: bool, tmp_path: Path) -> None:
    """Parts with a name are not stored. A Q-Former without a name, or one that was trained, is stored."""
    theirs = upstream()
    theirs.save_pretrained(tmp_path / "instructblip")
    theirs.language_model.save_pretrained(tmp_path / "llama")
    checkpoint = str(tmp_path / "instructblip") if named else theirs
    model = CromeVLMForConditionalGeneration.from_instructblip(
        checkpoint, language=str(tmp_path / "llama"), image_token_id=IMAGE_ID - 1, image_size=30
    )
    if named:
        torch.testing.assert_close(model.qformer.query_tokens, theirs.query_tokens, rtol=0, atol=0)
    batch = inputs() | {"input_ids": torch.tensor([[IMAGE_ID - 1] * (QUERIES + 9) + [1, 10, 11]] * 2)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])

    def saved() -> tuple[set[str], Any]:
        model.save_pretrained(tmp_path / "composite")
        from safetensors import safe_open

        with safe_open(tmp_path / "composite" / "model.safetensors", "pt") as file:
            stored = {key.split(".")[0] for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        return stored, CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "composite")

    stored, loaded = saved()
    assert stored == {"image_projection", "text_projection"} | (set() if named else {"qformer", "vision_tower"})
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)
        model.qformer.requires_grad_(True).query_tokens.add_(1.0)
    stored, loaded = saved()
    assert "qformer" in stored
    model.qformer.requires_grad_(False)  # as the loaded one is: kernels are chosen by it
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_tower_beside_a_qformer_that_can_train(bits: int, tmp_path: Path) -> None:
    """A quantized tower leaves the Q-Former and the checkpoint's projection in full precision. A trained Q-Former is
    stored and loaded in full."""
    theirs = upstream()
    theirs.save_pretrained(tmp_path / "instructblip")
    theirs.language_model.save_pretrained(tmp_path / "llama")
    four = {"bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {}
    model = CromeVLMForConditionalGeneration.from_instructblip(
        str(tmp_path / "instructblip"),
        language=str(tmp_path / "llama"),
        vision_quantization_config=tf.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **four),
        image_token_id=IMAGE_ID - 1,
        image_size=30,
    )
    torch.testing.assert_close(model.text_projection.weight, theirs.language_projection.weight, rtol=0, atol=0)
    model.qformer.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.qformer.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "composite")
    loaded = CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "composite")
    for composite in (model, loaded):
        kinds = {part: {type(m).__name__ for m in getattr(composite, part).modules()} for part in PARTS}
        assert {"Linear4bit", "Linear8bitLt"} & kinds["vision_tower"]
        assert not {"Linear4bit", "Linear8bitLt"} & kinds["qformer"]
    batch = inputs() | {"input_ids": torch.tensor([[IMAGE_ID - 1] * (QUERIES + 9) + [1, 10, 11]] * 2)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)

    whole = tf.InstructBlipForConditionalGeneration.from_pretrained(
        tmp_path / "instructblip", quantization_config=tf.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    )
    whole.save_pretrained(tmp_path / "packed")
    for packed in (whole, str(tmp_path / "packed")):
        with pytest.raises(ValueError, match=r"is quantized, its Q-Former and projection too.*not: from_instructblip"):
            CromeVLMForConditionalGeneration.from_instructblip(packed, language=str(tmp_path / "llama"))


def test_adapter_of_a_qformer_composite_goes_to_a_file(tmp_path: Path) -> None:
    model = get_peft_model(with_qformer(), CromeConfig(bottleneck_dim=4, init_weights=False)).eval()
    batch = qformer_batch(model.get_base_model())
    model.requires_grad_(False)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(with_qformer(), tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qformer_input_ids": None}, "qformer_input_ids is missing"),
        ({"qformer_input_ids": torch.zeros(1, 3, dtype=torch.long)}, r"expected \(3, tokens\)"),
        ({"qformer_input_ids": torch.zeros(3, 13, dtype=torch.long)}, "reads 12"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "generate"])
def test_bad_instructions(method: str, change: dict[str, Any], message: str) -> None:
    model = with_qformer()
    batch = qformer_batch(model) | change
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(**batch)


def test_bad_configurations() -> None:
    with pytest.raises(ValueError, match="encoder_hidden_size=24"):
        build(qformer_config=tf.InstructBlipQFormerConfig(**QFORMER | {"encoder_hidden_size": 8}))
    with pytest.raises(ValueError, match=r"image_token_order=\['patch'\]"):
        build(image_token_order=["query", "patch"])
    with pytest.raises(ValueError, match="leaves the Q-Former without use"):
        with_qformer(image_token_order=["patch"])
    with pytest.raises(ValueError, match="expected one of"):
        CromeVLMForConditionalGeneration.from_instructblip(build(), language=build().language_model)
    with pytest.raises(ValueError, match="num_query_tokens=0"):
        CromeVLMConfig(num_query_tokens=0)


def qformer_processor(model: Any) -> CromeVLMProcessor:
    """Build a processor whose Q-Former tokenizer has another pad token than the text's, so that a mix-up changes
    the ids."""
    reader = make_tokenizer()
    reader.pad_token = "<unk>"
    image_processor = tf.CLIPImageProcessor(size={"shortest_edge": 30}, crop_size=30)
    processor = CromeVLMProcessor.from_backbones(
        image_processor, make_tokenizer(chat_template=CHAT_TEMPLATE), config=model.config, qformer_tokenizer=reader
    )
    return processor


def reader() -> tuple[CromeVLMForConditionalGeneration, CromeVLMProcessor]:
    """Return a composite with a Q-Former and the processor that writes its inputs."""
    model = with_qformer()
    model.config.image_token_id = 95  # the first id that the tokenizer's words leave
    return model, qformer_processor(model)


TEXTS = ["<image> w1 w2", "w3", "<image> w4 <image> w5 w6"]


def test_processor_reads_instructions() -> None:
    """The processor writes one instruction per image, without the chat template's marks."""
    model, processor = reader()
    image = Image.new("RGB", (40, 30), "red")
    inputs = processor([[image], [], [image, image]], TEXTS, padding=True, return_tensors="pt")
    assert inputs["qformer_input_ids"].tolist() == [[6, 7, 0], [9, 10, 11], [9, 10, 11]]
    assert inputs["qformer_attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert model(**inputs).logits.isfinite().all()
    assert "qformer_input_ids" not in processor(text="w3", return_tensors="pt")

    own = processor([[image]], ["<image> w1"], qformer_text=["w9"], return_tensors="pt")
    assert own["qformer_input_ids"].tolist() == [[14]]
    with pytest.raises(ValueError, match="2 instructions"):
        processor([[image]], ["<image> w1"], qformer_text=["w9", "w8"])

    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "w1 w2"}]}]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    templated = processor.apply_chat_template(chat, **settings)
    assert templated["qformer_input_ids"].tolist() == [[6, 7]]
    assert model.generate(**templated, max_new_tokens=2).shape[1] == templated["input_ids"].shape[1] + 2

    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    in_two_steps = processor([[image]], prompt, return_tensors="pt", add_special_tokens=False)
    assert {k: v.tolist() for k, v in in_two_steps.items()} == {k: v.tolist() for k, v in templated.items()}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "w9"}]}
    parts = [{"type": "image"}, {"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    assert processor.instruction([{"role": "user", "content": parts}, answer, *chat]) == "w1 w2 w1 w2"


@pytest.mark.parametrize(
    "again",
    [lambda prompts: prompts, lambda prompts: pickle.loads(pickle.dumps(prompts)), copy.deepcopy],
    ids=["as they are", "pickled", "copied"],
)
def test_an_answer_is_not_for_the_qformer(again: Callable[[Any], Any]) -> None:
    _, processor = reader()
    image = Image.new("RGB", (40, 30), "red")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "w1 w2"}]}]
    answered = [*chat, {"role": "assistant", "content": [{"type": "text", "text": "w9"}]}]
    prompts = processor.apply_chat_template([answered, chat])
    assert "w9" in prompts[0]
    both = processor([[image], [image]], again(prompts), padding=True, return_tensors="pt")
    assert both["qformer_input_ids"].tolist() == [[6, 7]] * 2


@pytest.mark.parametrize("auto", [CromeVLMProcessor, tf.AutoProcessor])
def test_processor_with_instructions_is_saved_and_loaded(auto: Any, tmp_path: Path) -> None:
    model, processor = reader()
    image = Image.new("RGB", (40, 30), "red")
    inputs = processor([[image], [], [image, image]], TEXTS, padding=True, return_tensors="pt")
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)([[image], [], [image, image]], TEXTS, padding=True, return_tensors="pt")
    assert {name: value.tolist() for name, value in again.items()} == {
        name: value.tolist() for name, value in inputs.items()
    }


@pytest.mark.parametrize(
    ("text_of", "warned"),
    [
        pytest.param(lambda prompt, answered: prompt.strip(), True, id="a prompt that was changed"),
        pytest.param(lambda prompt, answered: answered.strip(), True, id="an answer that was changed"),
        pytest.param(lambda prompt, answered: "<s> <image> w1", True, id="a mark"),
        pytest.param(lambda prompt, answered: prompt, False, id="a prompt"),
        pytest.param(lambda prompt, answered: "<image> w1", False, id="words"),
    ],
)
def test_template_in_an_instruction_is_no_silence(
    text_of: Callable[[str, str], str], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning appears when the Q-Former's instruction contains the chat template's marks. A prompt that was changed
    on the way has lost its instruction."""
    _, processor = reader()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    answered = processor.apply_chat_template([*chat, {"role": "assistant", "content": "w9"}])
    tf.utils.logging.enable_propagation()
    tf.utils.logging.get_logger("transformers").warning_once.cache_clear()
    caplog.clear()
    processor([[Image.new("RGB", (40, 30))]], [text_of(prompt, answered)], return_tensors="pt")
    assert ("The Q-Former reads the chat template's marks" in caplog.text) == warned


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('a system turn first') }}", {"one": "{{ 1 }}", "two": "{{ 2 }}"}],
    ids=["one that refuses", "several"],
)
def test_what_needs_no_template_does_not_ask_it(template: str | dict[str, str]) -> None:
    _, processor = reader()
    processor.chat_template = template
    assert processor([[Image.new("RGB", (40, 30))]], ["<image> w1"])["qformer_input_ids"] == [[6]]


def test_processor_takes_the_checkpoints_tokenizer(tmp_path: Path) -> None:
    """The processor takes the Q-Former's tokenizer from the checkpoint. InstructBLIP's repositories keep it in a
    folder of its own."""
    upstream().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path / "qformer_tokenizer")
    model = CromeVLMForConditionalGeneration.from_instructblip(
        str(tmp_path), language=upstream().language_model, image_token_id=95, image_size=30
    )
    processor = CromeVLMProcessor.from_backbones(tf.CLIPImageProcessor(), make_tokenizer(), config=model.config)
    assert processor.qformer_tokenizer("w1")["input_ids"] == [6]


def test_half_precision_beside_query_tokens_in_float32() -> None:
    """Logits equal upstream's where the model is in bfloat16 and the query tokens are in float32. Upstream loads
    InstructBLIP this way in bfloat16."""
    theirs = upstream().to(torch.bfloat16)
    theirs.query_tokens.data = theirs.query_tokens.data.float()
    model = CromeVLMForConditionalGeneration.from_instructblip(
        theirs, language=theirs.language_model, image_token_id=IMAGE_ID - 1, image_token_order=["query"]
    )
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs()).logits, theirs(**inputs()).logits, rtol=0, atol=0)


def test_processor_needs_the_qformers_tokenizer() -> None:
    model = with_qformer()
    with pytest.raises(ValueError, match="qformer_tokenizer="):
        CromeVLMProcessor.from_backbones(tf.CLIPImageProcessor(), make_tokenizer(), config=model.config)
