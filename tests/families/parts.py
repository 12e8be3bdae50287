"""Functions that the builders share: they make tokenizers, image processors and random models, and save them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TEMPLATES = Path(__file__).parent / "templates"
WIDTH, VISION_WIDTH = 32, 16

TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": VISION_WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

# Words that are one token each, so that an answer is not bytes alone.
WORDS = (
    "the", "and", "is", "of", "in", "on", "a", "what", "this", "image", "picture", "color", "red", "green", "blue",
    "two", "cat", "dog", "User", "Assistant", "system", "user", "assistant", "model", "are", "you", "Yes", "No",
)  # fmt: skip


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return merges that build each word from its first character on."""
    merges = dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word)))
    return list(merges)


def _vocabulary(specials: Iterable[str], alphabet: Iterable[str], merges: list[tuple[str, str]]) -> dict[str, int]:
    pieces = [*specials, *alphabet, *(left + right for left, right in merges)]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def _fast(
    tokenizer: Tokenizer, specials: Iterable[str], *, starts_with_bos: bool, ends_with_eos: bool = False, **named: Any
) -> Any:
    """Wrap a tokenizer. `named` gives its special tokens by attribute, including those of the family."""
    usual = ("bos_token", "eos_token", "pad_token", "unk_token")
    extra = {name: token for name, token in named.items() if name not in usual and name.endswith("_token")}
    rest = {name: value for name, value in named.items() if name not in extra}
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=extra, **rest)
    fast.add_special_tokens({"additional_special_tokens": list(specials)}, replace_extra_special_tokens=False)
    if starts_with_bos:
        first, last = [(fast.bos_token, fast.bos_token_id)], [(fast.eos_token, fast.eos_token_id)] * ends_with_eos
        pieces = [[name for name, _ in first], ["$A"], [name for name, _ in last]]
        fast._tokenizer.post_processor = processors.TemplateProcessing(
            single=[piece for part in pieces for piece in part], special_tokens=[*first, *last]
        )
    return fast


def byte_level(specials: Iterable[str], *, starts_with_bos: bool = False, **named: Any) -> Any:
    """Return a tokenizer like those of GPT-2, Qwen and Llama 3, in which every byte has its own character."""
    specials = [*specials]
    merges = _merges([*WORDS, *("Ġ" + word for word in WORDS)])
    words = _vocabulary([], sorted(pre_tokenizers.ByteLevel.alphabet()), merges)
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, specials, starts_with_bos=starts_with_bos, **named)


def sentence_piece(
    specials: Iterable[str], *, first: Iterable[str], prefix: bool, starts_with_bos: bool = True, **named: Any
) -> Any:
    """Return a tokenizer like those of Llama 2, Mistral and Gemma. Spaces become ▁, and unknown text becomes bytes.

    Args:
        specials: special tokens that are added after the vocabulary.
        first: tokens at the beginning of the vocabulary.
        prefix: whether text gets a space in front, also after each special token, as in Llama 2.
    """
    specials = [*specials]
    letters = [chr(code) for code in range(33, 127)]
    merges = _merges([*WORDS, *("▁" + word for word in WORDS)])
    words = _vocabulary([*first, *(f"<0x{byte:02X}>" for byte in range(256))], ["▁", *letters], merges)
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return _fast(tokenizer, specials, starts_with_bos=starts_with_bos, unk_token="<unk>", **named)


def image_processor(name: str, **settings: Any) -> Any:
    """Return the image processor of this name, or its Pillow variant if torchvision is not installed."""
    if importlib.util.find_spec("torchvision") is None and not hasattr(tf, name + "Pil"):
        raise ImportError(f"{name} needs torchvision.")
    return getattr(tf, name if importlib.util.find_spec("torchvision") else name + "Pil")(**settings)


def template(name: str) -> str:
    """Return the chat template from `templates/`, without the line feed at its end."""
    return (TEMPLATES / f"{name}.jinja").read_text().removesuffix("\n")


def random_model(model_class: str, config: Any) -> Any:
    """Return a model in eval mode with a fixed seed. Its weights are so large that every part changes the logits."""
    torch.manual_seed(0)
    model = getattr(tf, model_class)(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 / max(parameter[0].numel(), 1) ** 0.25, generator=generator)
    return model


@contextmanager
def real_towers() -> Iterator[None]:
    """Remove the tower that `tests/zoo/gemma.py` registers in place of timm's, and restore it after the block."""
    registered = tf.AutoModel._model_mapping._extra_content
    kept = dict(registered)
    registered.clear()
    try:
        yield
    finally:
        registered.update(kept)


def save(directory: Path, model_class: str, config: Any, processor: Any, end: str | None = None) -> None:
    """Write a model with random weights, and its processor.

    Args:
        end: token that ends a generated answer, in addition to the tokenizer's eos_token.
    """
    tokenizer = processor.tokenizer
    model = random_model(model_class, config)
    ids = [tokenizer.eos_token_id, *([tokenizer.convert_tokens_to_ids(end)] if end else [])]
    model.generation_config.eos_token_id = list(dict.fromkeys(ids))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
