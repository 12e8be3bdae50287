"""Process inputs of the composite: text with `<image>` and images -> input_ids, attention_mask, pixel_values."""

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_utils import is_pil_image, is_valid_image
from transformers.utils import logging

from ..backbone.compat import chat_arguments
from ..utils.read_image import read_image
from ..utils.shorten import short
from ..utils.turn_text import IMAGE_KEYS, turn_text
from .configuration_crome_vlm import CromeVLMConfig, revision_argument
from .image_size import with_image_size
from .image_token import ensure_image_token

MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values", "qformer_input_ids", "qformer_attention_mask")
QFORMER_TOKENIZER = "qformer_tokenizer"
CHAT_IMAGES = "chat_images"  # passed by `apply_chat_template`; transformers passes its own `images`

logger = logging.get_logger(__name__)


class Prompt(str):
    """A text written by a chat template, with the instruction that a Q-Former reads.

    Args:
        text: the rendered text.
        instruction: the user's words, without the template's marks and without the answers.
    """

    instruction: str

    def __new__(cls, text: str, instruction: str) -> "Prompt":
        prompt = super().__new__(cls, text)
        prompt.instruction = instruction
        return prompt

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.instruction  # for pickle: prompts are sent between processes


class CromeVLMProcessor(ProcessorMixin):
    """Join any image processor and any text tokenizer.

    A tokenizer without an image placeholder gets one, and a tokenizer without a pad token pads with its end token. The
    attention mask, made by length, separates end tokens from padding.

    Args:
        image_processor: makes `pixel_values` of one fixed size.
        tokenizer: the language model's tokenizer.
        image_seq_length: placeholders per image; the model's `config.image_seq_length`.
        chat_template: None: the tokenizer's, which need not support images.
        qformer_tokenizer: tokenizer of a Q-Former that reads the instruction. It is saved in a folder of that name.
        images_after_text: True: a chat template puts the images of a user's turn after its words, as in the paper,
            wherever the message has them. False: where the message has them.
    """

    reads_images = True  # in every form that `read_image` takes

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 1,
        chat_template: str | None = None,
        qformer_tokenizer: Any = None,
        images_after_text: bool = False,
        **kwargs: Any,
    ) -> None:
        self._qformer_tokenizer = qformer_tokenizer
        self.images_after_text = images_after_text
        self.image_seq_length = image_seq_length
        self.image_token, self.image_token_id = ensure_image_token(tokenizer)
        for part in filter(None, (tokenizer, qformer_tokenizer)):
            if part.pad_token is None and part.eos_token is not None:
                part.pad_token = part.eos_token
        if chat_template is None:
            chat_template = getattr(tokenizer, "chat_template", None)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @property
    def qformer_tokenizer(self) -> Any:
        """The tokenizer of the instructions that a Q-Former reads; None: no Q-Former reads instructions."""
        return self._qformer_tokenizer

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return the parts that every composite has. transformers would count the optional tokenizer as one."""
        return ["image_processor", "tokenizer"]

    def to_dict(self) -> dict[str, Any]:
        """Convert the settings to JSON-ready values, without the tokenizers."""
        return super().to_dict() | ({"has_qformer_tokenizer": True} if self.qformer_tokenizer is not None else {})

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """Save all parts; the Q-Former's tokenizer goes into a separate folder."""
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.save_pretrained(os.path.join(save_directory, QFORMER_TOKENIZER))
        return super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, name: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        arguments = super()._get_arguments_from_pretrained(name, processor_dict, **dict(kwargs))
        if processor_dict is not None and processor_dict.pop("has_qformer_tokenizer", False):
            folder = os.path.join(kwargs.pop("subfolder", None) or "", QFORMER_TOKENIZER)
            processor_dict[QFORMER_TOKENIZER] = AutoTokenizer.from_pretrained(name, subfolder=folder, **kwargs)
        return arguments

    @classmethod
    def from_backbones(
        cls,
        vision: Any = None,
        language: Any = None,
        *,
        config: CromeVLMConfig,
        qformer_tokenizer: Any = None,
        **kwargs: Any,
    ) -> "CromeVLMProcessor":
        """Make the processor that fits a model made by `from_backbones`.

        Args:
            vision: name of an image processor, or the object; None: from the tower's repository.
            language: name of a tokenizer, or the object, which is copied; None: from the language model's repository.
            config: the model's configuration, with the image size, the tokens per image and the image token.
            qformer_tokenizer: name of the Q-Former's tokenizer, or the object; None: from the Q-Former's checkpoint.
            kwargs: arguments of both `from_pretrained` (`cache_dir`, `token`, `local_files_only`, ...).
        Returns:
            The processor; it pads on the left for decoder-only models, as generation needs.
        Raises:
            ValueError: a part is unknown, or the tokenizer's image token differs from the model's.
        """
        vision = vision if vision is not None else _source(config, "vision")
        language = language if language is not None else _source(config, "text")
        if vision is None or language is None or config.image_seq_length is None:
            raise ValueError(
                f"The image processor ({vision}), the tokenizer ({language}) or image_seq_length "
                f"({config.image_seq_length}) is unknown. Write CromeVLMProcessor.from_backbones("
                "vision=image_processor, language=tokenizer, config=model.config) with the config of a built model."
            )
        if isinstance(vision, str):
            vision = AutoImageProcessor.from_pretrained(vision, **revision_argument(config.vision_revision), **kwargs)
        if isinstance(language, str):
            language = AutoTokenizer.from_pretrained(language, **revision_argument(config.text_revision), **kwargs)
        tokenizer = copy.deepcopy(language)
        image_processor = with_image_size(vision, *config.image_height_width)
        tokenizer.padding_side = "right" if config.is_encoder_decoder else "left"
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # it would not be saved otherwise
        reader = _qformer_tokenizer(qformer_tokenizer, config, kwargs)
        processor = cls(image_processor, tokenizer, image_seq_length=config.image_seq_length, qformer_tokenizer=reader)
        if processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"The tokenizer's image token {processor.image_token!r} has id {processor.image_token_id}, the model "
                f"expects {config.image_token_id}. Build the model with from_backbones(..., "
                f"image_token_id={processor.image_token_id}), or pass the tokenizer it was built with."
            )
        return processor

    @property
    def unused_input_names(self) -> list[str]:
        """Names that the parts return and the model does not take, such as token_type_ids."""
        parts = (self.image_processor, self.tokenizer)
        return [name for part in parts for name in part.model_input_names if name not in MODEL_INPUTS]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        qformer_text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn text and images into the model's inputs.

        Args:
            images: one image, a list in reading order over the batch, or per row a list, an image or None
                (`[[a, b], [], None, c]`). `read_image` reads each of them, and gives every form of one image the same
                pixels: a path, an address, a data URI, base64, bytes, {"bytes", "path"} as in `datasets`, a PIL
                image, an array or a tensor. With do_rescale=False, arrays and tensors are taken as prepared.
            text: one string or a list; each `<image>` stands for one image.
            qformer_text: the instruction of each row, for a Q-Former that reads it; None: the user's words in a text
                that `apply_chat_template` returned, else the text without `<image>`.
            kwargs: arguments of the tokenizer (`padding`, `return_tensors`, ...) and of the image processor.
        Returns:
            input_ids and attention_mask, (batch, tokens), with image_seq_length placeholders per image;
            pixel_values, (images, channels, height, width), absent without images; with a Q-Former's tokenizer also
            qformer_input_ids and qformer_attention_mask, (images, instruction tokens), a row per image.
        Raises:
            ValueError: an image cannot be read, a row's placeholders and images differ, truncation would cut an image,
                or the instructions are not one per row.
        """
        images = kwargs.pop(CHAT_IMAGES, images)
        rows = None if images is None else self._read(_image_rows(images), kwargs)
        texts = [text] if isinstance(text, str) else text
        if texts is not None:
            self._check_rows(rows or [], list(texts))
        flat = [image for row in rows or [] for image in row]
        inputs = super().__call__(images=flat or None, text=None if texts is None else list(texts), **kwargs)
        if self.qformer_tokenizer is not None and flat and texts is not None:
            read = self._instructions(list(texts), qformer_text)
            encoded = self.qformer_tokenizer(read, padding=True, return_tensors=kwargs.get("return_tensors"))
            inputs.update({f"qformer_{name}": encoded[name] for name in ("input_ids", "attention_mask")})
        return inputs

    def _read(self, rows: list[list[Any]], kwargs: dict[str, Any]) -> list[list[Any]]:
        """Read the images' pixels; arrays that need no rescaling stay as the image processor expects them."""
        of_images = kwargs.get("images_kwargs") or {}
        settings = {**kwargs, **of_images}
        if settings.get("do_rescale") is False:
            return [[image if _is_array(image) else read_image(image) for image in row] for row in rows]
        channels = settings.get("input_data_format")
        if channels is not None:  # read images have their channels last
            kwargs.pop("input_data_format", None)
            kwargs["images_kwargs"] = {**of_images, "input_data_format": None}
        return [[read_image(image, channels) for image in row] for row in rows]

    def _instructions(self, texts: list[str], qformer_text: str | Sequence[str] | None) -> list[str]:
        """Return the instruction of each image's row, once per image."""
        if qformer_text is None:
            if any(not isinstance(sample, Prompt) and self._is_templated(sample) for sample in texts):
                logger.warning_once(
                    "The Q-Former reads the chat template's marks, and answers where the text holds them. Hand over "
                    "what apply_chat_template returns, unchanged, or pass the instructions: processor(..., "
                    "qformer_text=...)."
                )
            qformer_text = [
                sample.instruction if isinstance(sample, Prompt) else self._words(sample) for sample in texts
            ]
        instructions = [qformer_text] if isinstance(qformer_text, str) else list(qformer_text)
        if len(instructions) != len(texts):
            raise ValueError(
                f"Got {len(instructions)} instructions in qformer_text for {len(texts)} texts. Pass one per text."
            )
        counts = [sample.count(self.image_token) for sample in texts]
        return [instruction for instruction, count in zip(instructions, counts, strict=True) for _ in range(count)]

    def _is_templated(self, text: str) -> bool:
        """Whether a text contains marks of the chat template, so that it is more than an instruction."""
        special = {*self.tokenizer.all_special_tokens} - {self.image_token, self.tokenizer.unk_token}
        if any(token in text for token in special):
            return True
        ending = self._generation_ending()
        return bool(ending) and ending in text

    def _generation_ending(self) -> str:
        """The ending of a prompt before an answer in the chat template; empty if it cannot be determined."""
        if self.chat_template is None:
            return ""
        asked = [{"role": "user", "content": "(question)"}]
        try:
            prompt = super().apply_chat_template(asked, add_generation_prompt=True)
        except (ValueError, TemplateError):
            return ""  # several templates, or one that rejects such a conversation
        return prompt.rpartition("(question)")[2].strip()

    def instruction(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Extract the instruction for a Q-Former: the words of the user's turns, without image placeholders."""
        asked = [{**message, **self._flatten(message, [])} for message in messages if message.get("role") == "user"]
        return self._words(" ".join(str(message["content"] or "") for message in asked))

    def _words(self, text: str) -> str:
        return " ".join(text.replace(self.image_token, " ").split())

    def _check_rows(self, rows: list[list[Any]], texts: list[str]) -> None:
        """Compare placeholders with images, row by row if the images are given by row."""
        wanted = [sample.count(self.image_token) for sample in texts]
        image_counts = [len(row) for row in rows]
        if len(rows) == 1 and len(texts) > 1:  # in a flat list only the sum can be compared
            if sum(wanted) != sum(image_counts):
                raise ValueError(
                    f"The texts hold {sum(wanted)} {self.image_token} ({wanted} per row), but {sum(image_counts)} "
                    "images were passed. Pass one image per placeholder, or a list of images per row."
                )
            return
        if rows and len(rows) != len(texts):
            raise ValueError(
                f"Got images for {len(rows)} rows and {len(texts)} texts. Pass one list of images per text, [] or "
                "None for a text without."
            )
        for row, (expected, got) in enumerate(zip(wanted, image_counts or [0] * len(texts), strict=True)):
            if expected != got:
                raise ValueError(
                    f"Row {row} has {expected} {self.image_token} in its text and {got} images. Write "
                    f"{self.image_token} once per image."
                )

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the placeholders of one image in the prompt."""
        return self.image_token * self.image_seq_length

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        """Refuse ids from which truncation has cut image tokens. Called after the text is tokenized."""
        for row, (sample, ids) in enumerate(zip(text, text_inputs["input_ids"], strict=False)):
            wanted, got = sample.count(self.image_token), list(map(int, ids)).count(self.image_token_id)
            if wanted != got:
                raise ValueError(
                    f"Row {row} has {wanted} image tokens, of which truncation keeps {got}. Write truncation=False, "
                    f"or a max_length above {wanted} plus the row's text tokens."
                )

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation with the language model's chat template, which gets plain strings.

        A content that is a list of parts becomes one string, with `<image>` for each image. A Q-Former reads the
        user's words, without the template's marks.

        Args:
            conversation: messages, or a batch of conversations. Content is a string, or a list of
                {"type": "text", "text": ...} and {"type": "image", "image" | "url" | "path" | "base64": ...}.
            chat_template: None: the processor's.
            processor_kwargs: for `__call__`, with tokenize=True; {"images": ...} if messages contain bare images.
            kwargs: as in transformers (`add_generation_prompt`, `tokenize`, `return_dict`, `return_tensors`, ...).
        Returns:
            Text or ids; with tokenize=True and return_dict=True the result of `__call__`.
        Raises:
            ValueError: there is no chat template, or a part is neither text nor image.
        """
        if chat_template is None and self.chat_template is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} of this language model has no chat template. Write the prompt "
                f"yourself, processor(images=image, text='{self.image_token}\\nWhat is this?'), or set "
                "processor.chat_template = '...' (Jinja)."
            )
        is_batch = bool(conversation) and not isinstance(conversation[0], Mapping)
        flat, images, asked = [], [], []
        for messages in conversation if is_batch else [conversation]:
            conversation_images: list[Any] = []
            messages = getattr(messages, "messages", messages)  # a pipeline's Chat
            flat.append([{**message, **self._flatten(message, conversation_images)} for message in messages])
            images.append(conversation_images)
            asked.append(self.instruction(flat[-1]))
        processor_kwargs = dict(processor_kwargs or {})
        chat_images = (images if is_batch else images[0]) if any(images) else processor_kwargs.pop("images", None)
        if kwargs.get("tokenize"):
            if chat_images:
                processor_kwargs[CHAT_IMAGES] = chat_images
            if self.qformer_tokenizer is not None:
                processor_kwargs.setdefault("qformer_text", asked)
            # Keep only special tokens that the template writes.
            processor_kwargs.setdefault("add_special_tokens", False)
            named = inspect.signature(super().apply_chat_template).parameters
            others = {key: kwargs.pop(key) for key in list(kwargs) if key not in named}
            kwargs |= chat_arguments(processor_kwargs, others)
        made = super().apply_chat_template(
            flat if is_batch else flat[0], chat_template, processor_kwargs=processor_kwargs, **kwargs
        )
        if kwargs.get("tokenize") or self.qformer_tokenizer is None:
            return made
        return list(map(Prompt, made, asked)) if is_batch else Prompt(made, asked[0])

    def _flatten(self, message: Mapping[str, Any], images: list[Any]) -> dict[str, str]:
        """Join a message's content into one string, and append its images to `images`."""
        content = message.get("content")
        reorder = self.images_after_text and message.get("role") == "user"
        if content is None or (isinstance(content, str) and not reorder):
            return {}
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        for part in content:
            kind = part.get("type")
            if kind not in ("text", "image", "image_url"):
                raise ValueError(f"Content part of type {short(kind)} is not supported; expected 'text' or 'image'.")
            sources = [part[key] for key in IMAGE_KEYS if kind != "text" and part.get(key) is not None]
            images.extend(sources[:1])
        text = turn_text(content, {"image": self.image_token, "image_url": self.image_token})
        if reorder and (count := text.count(self.image_token)):
            words = " ".join(piece.strip() for piece in text.split(self.image_token) if piece.strip())
            text = f"{words}\n{self.image_token * count}" if words else self.image_token * count
        return {"content": text}


def _source(config: CromeVLMConfig, part: str) -> str | None:
    """Return where "vision", "text" or "qformer" came from, which also has its processor; None if unknown."""
    name = getattr(config, f"{part}_model_name_or_path")
    return name if name is not None else getattr(config, f"{part}_config").name_or_path or None


def _qformer_tokenizer(tokenizer: Any, config: CromeVLMConfig, kwargs: dict[str, Any]) -> Any:
    """Load the tokenizer of a Q-Former that reads instructions; None without such a Q-Former."""
    if getattr(config.qformer_config, "model_type", None) != "instructblip_qformer":
        return None
    if isinstance(tokenizer, str):
        return AutoTokenizer.from_pretrained(tokenizer, **kwargs)
    if tokenizer is not None:
        return tokenizer
    name = _source(config, "qformer")
    if name is None:
        raise ValueError(
            "The Q-Former reads instructions, and its tokenizer is unknown. Write CromeVLMProcessor.from_backbones("
            "config=model.config, qformer_tokenizer='bert-base-uncased'), or the tokenizer it was trained with."
        )
    revision = revision_argument(config.qformer_revision)
    return AutoTokenizer.from_pretrained(name, subfolder=QFORMER_TOKENIZER, **revision, **kwargs)


def _is_array(image: Any) -> bool:
    return is_valid_image(image) and not is_pil_image(image)


def _image_rows(images: Any) -> list[list[Any]]:
    """Group images by row; a flat list is one row."""
    if isinstance(images, str | bytes | Mapping | os.PathLike) or hasattr(images, "read"):
        return [[images]]
    if is_valid_image(images):
        return [list(images)] if getattr(images, "ndim", 3) == 4 else [[images]]
    if any(entry is None or isinstance(entry, (list, tuple)) for entry in images):
        rows = [[] if entry is None else entry for entry in images]
        return [list(row) if isinstance(row, (list, tuple)) else [row] for row in rows]
    return [list(images)]


__all__ = ["CromeVLMProcessor"]
