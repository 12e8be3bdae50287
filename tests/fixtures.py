"""Fixtures that several folders share: tiny backbones on disk, a composite of them, rows of data and a recipe."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from peft_crome.vlm import CromeVLMForConditionalGeneration, CromeVLMProcessor
from tests.training.tiny import COLORS, QFORMER
from tests.vlm.tiny import CHAT_TEMPLATE, make_tokenizer, text_config, vision_config


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the directories of a tiny CLIP with its image processor and of a tiny Llama with its tokenizer. The CLIP
    has both towers."""
    torch.manual_seed(0)
    root: Path = tmp_path_factory.mktemp("backbones")
    words = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPConfig(vision_config=vision_config().to_dict(), text_config={**words, "vocab_size": 50})
    AutoModel.from_config(clip).save_pretrained(root / "vision")
    size = {"size": {"shortest_edge": 40}, "crop_size": {"height": 30, "width": 30}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(root / "vision")
    AutoModelForCausalLM.from_config(text_config()).save_pretrained(root / "language")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(root / "language")
    return str(root / "vision"), str(root / "language")


@pytest.fixture(scope="session")
def seq2seq_backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the directory of a tiny T5 with its tokenizer."""
    path = tmp_path_factory.mktemp("seq2seq")
    AutoModelForSeq2SeqLM.from_config(text_config("t5")).save_pretrained(path)
    make_tokenizer(pad_token="<unk>").save_pretrained(path)
    return str(path)


@pytest.fixture
def composite(backbones: tuple[str, str]) -> CromeVLMForConditionalGeneration:
    """Build a composite whose backbones have names, which are their directories."""
    torch.manual_seed(0)
    return CromeVLMForConditionalGeneration.from_backbones(vision=backbones[0], language=backbones[1])


@pytest.fixture
def processor(composite: CromeVLMForConditionalGeneration) -> CromeVLMProcessor:
    """Return the processor that fits `composite`."""
    return CromeVLMProcessor.from_backbones(config=composite.config)


@pytest.fixture
def photos() -> list[Image.Image]:
    """Return three images of different sizes and colors."""
    return [
        Image.new("RGB", size, color) for size, color in (((50, 37), "red"), ((20, 90), "green"), ((30, 30), "blue"))
    ]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write twelve rows about four images, one of them with text alone, and return their file."""
    root = tmp_path_factory.mktemp("dataset")
    (root / "images").mkdir()
    for number, color in enumerate(COLORS):
        Image.new("RGB", (40 + number, 50), color).save(root / "images" / f"{color}.png")
    rows: list[dict[str, Any]] = []
    for number in range(11):
        color = number % 4
        turns = [{"from": "human", "value": f"<image>\nw1 w{number}"}, {"from": "gpt", "value": f"w{40 + color}"}]
        rows.append({"id": number, "image": f"images/{COLORS[color]}.png", "conversations": turns})
    turns = [{"from": "human", "value": "w7 w8"}, {"from": "gpt", "value": "w50"}]
    rows.append({"id": "text-1", "conversations": turns})
    (root / "rows.json").write_text(json.dumps(rows))
    return root / "rows.json"


@pytest.fixture
def values(backbones: tuple[str, str], dataset: Path, tmp_path: Path) -> dict[str, Any]:
    """Return the values of a recipe for the first stage that runs in a second."""
    return {
        "stage": "pretrain",
        "output": str(tmp_path / "pretrain"),
        "backbones": {
            "vision": backbones[0],
            "language": backbones[1],
            "qformer": QFORMER,
            "qformer_tokenizer": backbones[1],
            "num_query_tokens": 4,
            "dtype": "float32",
        },
        "adapter": {"bottleneck_dim": 4},
        "data": [{"path": str(dataset)}],
        "training": {
            "batch_size": 4,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "logging_steps": 1,
            "save_steps": 3,
            "arguments": {"disable_tqdm": True},
        },
    }


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write thirteen rows, two of them with text alone, and return their folder. Their images are noise, so each crop
    looks different."""
    root = tmp_path_factory.mktemp("noise")
    chance = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(13):
        words = " ".join(f"w{chance.randrange(90)}" for _ in range(chance.randint(1, 5)))
        turns = [{"from": "human", "value": f"w{number}"}, {"from": "gpt", "value": words}]
        rows.append({"id": number, "conversations": turns})
        if number % 6 != 5:
            pixels = np.random.default_rng(number).integers(0, 256, (45, 40 + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{number}.png")
            turns[0]["value"] = f"<image>\nw{number}"
            rows[-1]["image"] = f"{number}.png"
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "more.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:5]))
    return root


@pytest.fixture
def recipe(values: dict[str, Any], noise: Path) -> dict[str, Any]:
    """Return a recipe's values with everything random: crops, mirror images and dropout. A step has two batches, and
    an epoch has three steps, since rows of text teach nothing."""
    values["data"] = [{"path": str(noise / "rows.json")}]
    values["images"] = {"random_crop": True, "horizontal_flip": True}
    values["adapter"]["dropout"] = 0.2
    values["training"] |= {"rows_per_device": 2, "max_steps": 9}
    return values


@pytest.fixture
def byte_processor(composite: CromeVLMForConditionalGeneration) -> CromeVLMProcessor:
    """Return a processor whose tokens are bytes, so that no white space is lost."""
    from tests.data.test_collator import CHATML  # not above: pytest rewrites the assertions of what it imports itself

    tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    composite.config.image_token_id = len(fast)
    whole = CromeVLMProcessor.from_backbones(language=fast, config=composite.config)
    whole.chat_template = CHATML
    return whole


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """Return a function that gives the directory of a family's tiny checkpoint (`tests/families`) and builds it
    once."""
    built: dict[str, Path] = {}

    def build(family: Any) -> Path:
        if family.missing():
            pytest.skip(f"{', '.join(family.missing())} not installed")
        if family.name not in built:
            directory = tmp_path_factory.mktemp(family.name)
            family.build(directory)
            built[family.name] = directory
        return built[family.name]

    return build
