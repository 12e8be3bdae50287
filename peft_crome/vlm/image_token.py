"""The image placeholder, by one rule for the model and the processor."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.import_utils import is_fake_tensor

IMAGE_TOKEN = "<image>"


def ensure_image_token(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """Return the tokenizer's image placeholder and its id. If it has none, append `<image>` as a special token.

    The tokenizer's `image_token` comes first, then `<image>` if it is one token already. The embedding table is
    never resized, since the model does not look the id up.
    """
    token = str(getattr(tokenizer, "image_token", None) or IMAGE_TOKEN)
    if token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    return token, int(tokenizer.convert_tokens_to_ids(token))


def neutral_token_id(config: Any, generation_config: Any) -> int:
    """Choose an id inside the embedding table that replaces image placeholders wherever the language model sees ids.

    It is the pad id, unless that ends a text: a repetition penalty would then count every image token as an end.
    """
    eos = generation_config.eos_token_id if generation_config is not None else None
    eos = eos if eos is not None else getattr(config, "eos_token_id", None)
    ends = set(eos) if isinstance(eos, (list, tuple)) else {eos}
    pad = getattr(config, "pad_token_id", None)
    candidates = [pad] if isinstance(pad, int) and pad >= 0 else []
    return next(token_id for token_id in [*candidates, *range(len(ends) + 1)] if token_id not in ends)


def check_image_tokens(is_image: torch.Tensor, num_images: int, image_seq_length: int) -> Callable[[], None]:
    """Refuse a prompt whose image tokens do not match its images: at once, or on a GPU when the result is called.

    On a GPU the counts are copied to the host in the background, so that work can be queued before they are read.
    Nothing is checked in a compiled graph or on the meta device.

    Args:
        is_image: (batch, tokens), true at image placeholders.
        num_images: images passed with the whole batch.
        image_seq_length: placeholders per image.
    Raises:
        ValueError: a row cuts an image's tokens, or the counts of tokens and images differ.
    """
    if torch.compiler.is_compiling() or is_fake_tensor(is_image):
        return lambda: None
    counts = is_image.sum(dim=1)
    if not counts.is_cuda:
        _compare(counts.tolist(), num_images, image_seq_length)
        return lambda: None
    on_host = torch.empty_like(counts, device="cpu", pin_memory=True).copy_(counts, non_blocking=True)
    copied = torch.cuda.current_stream(counts.device).record_event()

    def check() -> None:
        copied.synchronize()  # waits for the copy only, not for later work
        _compare(on_host.tolist(), num_images, image_seq_length)

    return check


def _compare(per_row: list[int], num_images: int, image_seq_length: int) -> None:
    for row, count in enumerate(per_row):
        if count % image_seq_length:
            raise ValueError(
                f"Row {row} has {count} image tokens, which is not a multiple of {image_seq_length} (one image): it "
                "was truncated inside an image, or the placeholders were not expanded. Build it with the processor, "
                "without truncation or with a larger max_length."
            )
    if sum(per_row) != num_images * image_seq_length:
        raise ValueError(
            f"Image features and image tokens do not match: {sum(per_row)} image tokens ({per_row} per row), but "
            f"{num_images} images give {num_images * image_seq_length} image features. Pass one image per `<image>` "
            "of the text, in reading order over the batch."
        )


def move_padding(
    side: Literal["left", "right"], attention_mask: torch.Tensor, *tensors: torch.Tensor
) -> list[torch.Tensor]:
    """Move every row's padding to one side, in the mask and in each tensor. The order of other tokens is kept.

    Args:
        side: side to move the padding to.
        attention_mask: (batch, tokens), 1 where a token counts.
        tensors: (batch, tokens) or (batch, tokens, hidden) each.
    Returns:
        The mask and the tensors, in the order of the arguments.
    """
    counts = attention_mask.ne(0)
    order = (counts if side == "left" else ~counts).long().argsort(dim=1, stable=True)
    indices = [order if tensor.ndim == 2 else order.unsqueeze(-1).expand_as(tensor) for tensor in tensors]
    return [attention_mask.gather(1, order), *(t.gather(1, i) for t, i in zip(tensors, indices, strict=True))]
