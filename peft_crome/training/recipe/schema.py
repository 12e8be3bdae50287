"""The keys of a recipe: what a stage trains, on what, how long. They are validated before anything is loaded."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from jinja2 import Environment, TemplateSyntaxError
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)
from transformers import InstructBlipQFormerConfig

from ...data.sources import check_columns
from ...data.templates import CHAT_TEMPLATES
from ...vlm.configuration_crome_vlm import IMAGE_OPTIONS
from ..quantization import Bits
from ..stages import PARTS

Share = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["bfloat16", "float16", "float32"]
Metric = Literal["exact_match", "vqa_accuracy", "multiple_choice", "cider", "rouge_l", "bleu", "chrf"]
# Fields of TrainingArguments for which a recipe has its own keys.
OWNED = (
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "adam_beta1", "adam_beta2",
    "weight_decay", "max_grad_norm", "gradient_checkpointing", "activation_checkpointing", "logging_steps",
    "save_steps", "seed", "data_seed", "remove_unused_columns", "label_names", "train_sampling_strategy",
    "length_column_name", "accelerator_config", "ddp_find_unused_parameters", "ignore_data_skip",
    "average_tokens_across_devices",
)  # fmt: skip


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError("expected a number; YAML's yes and true are none")
        return value


def _expanded(value: Any) -> Any:
    """Expand `~` in paths to the home folder, as a shell does; Hub names have none."""
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) else value


class Backbones(_Section):
    """The frozen backbones to join. A stage that starts from a directory takes them from it."""

    language: str = Field(description="Name or directory of the language model.")
    vision: str | None = Field(default=None, description="Name or directory of the vision tower.")
    instructblip: str | None = Field(
        default=None,
        description="InstructBLIP or BLIP-2 checkpoint to take tower and Q-Former from, instead of `vision`.",
    )
    qformer: dict[str, Any] | None = Field(
        default=None,
        description="Sizes of a new Q-Former between `vision` and the language model. {} takes InstructBLIP's.",
    )
    qformer_tokenizer: str | None = Field(
        default=None, description="Name or directory of the tokenizer with which the Q-Former reads the question."
    )
    num_query_tokens: int = Field(default=32, ge=1, description="Tokens per image that a new Q-Former gives.")
    image_token_order: list[Literal["query", "patch"]] | None = Field(
        default=None, description="Order of an image's tokens: the Q-Former's (query) and the tower's (patch)."
    )
    image_size: int | None = Field(
        default=None,
        ge=1,
        description="Height and width of an image in pixels. Default: the size that the tower's processor has.",
    )
    vision_feature_layer: int = Field(
        default=-1, description="Layer of the tower to take. -1 is its output, and -2 the layer before the last."
    )
    vision_pool_size: int = Field(
        default=1, ge=1, description="With n, each n x n patches of an image are averaged into one token."
    )
    quantization: Bits | None = Field(
        default=None, description="Load the language model in 4 or 8 bits, with bitsandbytes."
    )
    vision_quantization: Bits | None = Field(
        default=None, description="Load the vision tower in 4 or 8 bits. A Q-Former trains, so it is not quantized."
    )
    dtype: Dtype = Field(default="bfloat16", description="Dtype of the frozen weights.")
    vision_revision: str | None = Field(
        default=None, description="Branch, tag or commit of the vision tower, or of InstructBLIP, on the Hub."
    )
    text_revision: str | None = Field(
        default=None, description="Branch, tag or commit of the language model on the Hub."
    )

    _home = field_validator("language", "vision", "instructblip", "qformer_tokenizer")(_expanded)

    def image_options(self) -> dict[str, Any]:
        """Settings for image tokens, under the names of `CromeVLMConfig`."""
        return {name: getattr(self, name) for name in IMAGE_OPTIONS if name in type(self).model_fields}

    @model_validator(mode="after")
    def _one_tower(self) -> Backbones:
        if (self.vision is None) == (self.instructblip is None):
            raise ValueError("name exactly one of `vision` and `instructblip`")
        if self.instructblip is not None and self.qformer is not None:
            raise ValueError("`instructblip` brings its own Q-Former; leave `qformer` out")
        queries = type(self).model_fields["num_query_tokens"].default
        if self.instructblip is not None and self.num_query_tokens != queries:
            raise ValueError("`instructblip` brings its own query tokens; leave `num_query_tokens` out")
        known = InstructBlipQFormerConfig().to_dict()
        for key in self.qformer or {}:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise ValueError(f"qformer.{key}: no such key" + (f"; did you mean {near[0]!r}?" if near else ""))
        sizes = known | (self.qformer or {})
        wrong = [
            key for key in ("hidden_size", "num_attention_heads") if type(sizes[key]) is not int or sizes[key] < 1
        ]
        if wrong:
            raise ValueError(f"qformer.{wrong[0]}={sizes[wrong[0]]!r} is not a whole number above 0")
        if sizes["hidden_size"] % sizes["num_attention_heads"]:
            raise ValueError(
                f"qformer.hidden_size={sizes['hidden_size']} is not a multiple of qformer.num_attention_heads="
                f"{sizes['num_attention_heads']}; write both"
            )
        if self.qformer is not None and self.qformer_tokenizer is None:
            raise ValueError(
                "the Q-Former reads instructions; name its tokenizer, qformer_tokenizer: bert-base-uncased"
            )
        if self.qformer_tokenizer is not None and self.qformer is None and self.instructblip is None:
            raise ValueError("qformer_tokenizer is given without a Q-Former; take it out")
        return self


class Host(_Section):
    """A frozen vision-language model. A run that starts from an adapter takes the adapter's model."""

    name: str = Field(description="Hub name or directory of the model.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the model on the Hub.")
    quantization: Bits | None = Field(default=None, description="Load the model in 4 or 8 bits, with bitsandbytes.")
    dtype: Dtype | None = Field(default=None, description="Dtype of the frozen weights. Default: the checkpoint's.")
    attn_implementation: str | None = Field(
        default=None, description="Attention to use, such as sdpa or eager. Default: what `from_pretrained` takes."
    )
    processor: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings to change in the model's processor, such as max_pixels or do_image_splitting.",
    )

    _home = field_validator("name")(_expanded)


class Adapter(_Section):
    """The CROME adapter, as in `CromeConfig`. A stage that starts from a directory continues with its adapter."""

    bottleneck_dim: int | None = Field(
        default=None, ge=1, description="Hidden features. Default: 424 for one branch, 256 for two, 184 for three."
    )
    branches: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Kinds of embeddings to adapt. Default: those of images and sound. [text, vision] adapts words "
        "as well, which changes every prompt.",
    )
    gate_activation: Literal["silu", "sigmoid"] = Field(default="silu", description="Activation function of the gate.")
    dropout: Share = Field(default=0.0, description="Probability of dropping a hidden feature in training.")
    init_weights: bool | Literal["scaled", "normal"] = Field(
        default=True, description="How weights start. With true, the new adapter changes nothing until it is trained."
    )


class Images(_Section):
    """How training images are prepared. The processor that is saved with the model has these values."""

    random_crop: bool = Field(
        default=False, description="Cut out a random 50% to 100% of the area of each image, and resize it."
    )
    horizontal_flip: bool = Field(
        default=False, description="Mirror every second image. Leave it off if left and right matter for the answer."
    )
    views: int | None = Field(
        default=None,
        ge=1,
        description="Number of different crops and mirror images of an image. Default: a new one each time.",
    )
    resample: Literal["bicubic", "bilinear"] | None = Field(
        default=None, description="Filter to resize images with. Default: the one that the tower's processor has."
    )
    mean: tuple[float, float, float] | None = Field(
        default=None, description="Mean of each color channel, to normalize with. Default: the tower's."
    )
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = Field(
        default=None, description="Standard deviation of each color channel. Default: the tower's."
    )


class Source(_Section):
    """A source of rows, as in `peft_crome.data.read_rows`."""

    path: str = Field(
        description="A JSON, JSONL or parquet file, a folder that `datasets` can load, or the name of a Hub data set."
    )
    images: str | dict[str, str] | None = Field(
        default=None,
        description="Folder that holds the images, or {beginning of a path: folder}. Default: the folder of the file.",
    )
    columns: dict[Literal["question", "answer", "image", "video", "audio", "id", "options"], str] | None = Field(
        default=None,
        description="For a table: {what it holds: name of its column}, as in {question: query, answer: label}.",
    )
    prompt: str | None = Field(
        default=None, description="One question for all rows, for a table that has no column of questions."
    )
    name: str | None = Field(default=None, description="Configuration of a Hub data set.")
    split: str = Field(default="train", description="Split of a folder or a Hub data set.")

    _home = field_validator("path", "images")(_expanded)

    @model_validator(mode="after")
    def _columns(self) -> Source:
        check_columns(self.columns, self.prompt)  # type: ignore[arg-type]
        return self


class Data(Source):
    """One data set to train on, as in `peft_crome.data.load_rows`."""

    streaming: bool = Field(default=False, description="Read rows while training, and keep no copy on disk.")
    faulty: Literal["stop", "drop"] = Field(
        default="stop",
        description="Whether a row that cannot be read stops the run or is dropped. The doctor lists such rows.",
    )
    weight: float | None = Field(
        default=None, gt=0, description="How often rows of this data set come, relative to the other sets."
    )


class Questions(Source):
    """One data set to answer while training. Its rows must contain the inputs of its metrics."""

    split: str = Field(default="validation", description="Split of a folder or a Hub data set.")
    label: str | None = Field(
        default=None, description="Name in the log: scores appear as eval_LABEL_METRIC. Default: the name of the file."
    )
    metrics: list[Metric] = Field(
        default=["exact_match"], min_length=1, description="Scores to compute. docs/evaluation.md explains each."
    )

    @property
    def called(self) -> str:
        """The label of the set."""
        return self.label if self.label is not None else Path(self.path).stem


class Evaluation(_Section):
    """Data sets to answer by free generation at regular steps, and after the last one."""

    data: list[Questions] = Field(min_length=1, description="The data sets to answer.")
    steps: int = Field(default=500, ge=1, description="Number of optimizer steps between two evaluations.")
    max_rows: int | None = Field(
        default=1000, ge=1, description="Use only this many rows of each set. They are kept in memory. null uses all."
    )
    batch_size: int = Field(default=16, ge=1, description="Rows to answer at a time on each device.")
    max_new_tokens: int = Field(default=32, ge=1, description="Largest number of tokens in an answer.")

    @model_validator(mode="after")
    def _labels(self) -> Evaluation:
        labels = [questions.called for questions in self.data]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"{twice} are the labels of several sets; give each a `label` of its own")
        return self


class FeatureCache(_Section):
    """Keep the frozen tower's features, so that each image runs through it once in all epochs and runs."""

    directory: str = Field(description="Folder for the features. Several runs and machines may share it.")
    max_gigabytes: float = Field(
        default=50.0, gt=0, description="Size at which the folder is full. Later images are then computed each time."
    )

    _home = field_validator("directory")(_expanded)


class Mixture(_Section):
    """How often each data set is drawn from. Without it, and without weights, an epoch has every row once."""

    temperature: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=True,  # infinity draws all sets equally
        description="A set of N rows is drawn in proportion to N ** (1 / temperature). 1 draws by size.",
    )


class Training(_Section):
    """The optimizer, its schedule and the loop."""

    batch_size: int = Field(default=32, ge=1, description="Rows per optimizer step, over all devices.")
    rows_per_device: int | None = Field(
        default=None,
        ge=1,
        description="Rows per forward pass. Less takes less memory and more time. Default: all at once.",
    )
    epochs: float | None = Field(
        default=None, gt=0, description="Number of times that all rows are read. Or give `max_steps`."
    )
    max_steps: int | None = Field(default=None, ge=1, description="Number of optimizer steps. Or give `epochs`.")
    learning_rate: float = Field(default=1e-5, gt=0, description="Highest learning rate, after the warm-up.")
    learning_rates: dict[str, NonNegativeFloat] = Field(
        default_factory=dict, description="Highest learning rate of single parts, as in {image_projection: 0.0001}."
    )
    initial_learning_rate: float = Field(
        default=1e-8, ge=0, description="Learning rate at the beginning of the warm-up."
    )
    warmup_steps: int | Share = Field(
        default=1000, ge=0, description="Number of steps of the warm-up. Below 1, a share of all steps."
    )
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), description="The two betas of AdamW.")
    weight_decay: float = Field(default=0.05, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Larger gradients are scaled down to this norm. 0 leaves them as they are."
    )
    max_length: int | None = Field(
        default=None, ge=1, description="Longest row in tokens. Longer rows are cut at the end. Default: no limit."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations twice instead of keeping them: less memory, more time."
    )
    group_by_length: bool = Field(
        default=False, description="Put rows of about the same length into one batch, so that less is padding."
    )
    packing: bool = Field(
        default=False,
        description="Put several rows of a forward pass into one of at most max_length tokens, instead of padding. "
        "With flash attention, all rows share one.",
    )
    logging_steps: int = Field(default=10, ge=1, description="Number of steps between two lines of the log.")
    save_steps: int = Field(
        default=500,
        ge=1,
        description="Number of steps between two checkpoints. An interrupted run continues from the last one.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the new weights and of the order of the rows.")
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Other arguments of transformers' TrainingArguments, as in {report_to: tensorboard}.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give exactly one of `epochs` and `max_steps`, and set the other to null")
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} leaves nothing of max_steps={self.max_steps}; "
                f"write warmup_steps: {self.max_steps // 20}"
            )
        if self.rows_per_device is not None and self.batch_size % self.rows_per_device:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of rows_per_device={self.rows_per_device}"
            )
        if self.arguments.get("label_smoothing_factor"):
            raise ValueError(
                "arguments.label_smoothing_factor: transformers' Trainer smooths labels that it does not shift for "
                "vision-language models, so each token would be learned from itself; take it out"
            )
        reserved = [key for key in self.arguments if key in OWNED]
        if reserved:
            raise ValueError(f"arguments: {reserved} are set by keys of `training` itself, or fixed; take them out")
        return self


class Recipe(_Section):
    """All settings of a stage. `load_recipe` reads one from YAML."""

    stage: Literal["pretrain", "instruct", "finetune"] = Field(
        description="Which parts train. docs/stages.md explains the three stages."
    )
    output: str = Field(description="Directory to write. It must not exist, and appears when the run is complete.")
    previous: str | None = Field(
        default=None, description="Directory or Hub name of the adapter or stage to continue from."
    )
    model: Host | None = Field(
        default=None, description="The vision-language model to adapt. A name alone stands for `name`."
    )
    backbones: Backbones | None = Field(
        default=None, description="A language model and a vision tower to join, instead of `model`."
    )
    trains: list[str] = Field(
        default=["adapter"],
        description="With `model`: the adapter, and modules to train in full, as in [adapter, multi_modal_projector].",
    )
    adapter: Adapter | None = Field(default=None, description="Settings of the adapter.")
    images: Images = Field(default=Images(), description="How a joined model prepares images.")
    data: list[Data] = Field(min_length=1, description="The data sets to train on.")
    mixture: Mixture | None = Field(default=None, description="How often each data set is drawn from.")
    feature_cache: FeatureCache | None = Field(
        default=None, description="Keep what the frozen vision tower gives for each image on disk."
    )
    evaluation: Evaluation | None = Field(default=None, description="Score the model at intervals while it trains.")
    training: Training = Field(description="The optimizer, its schedule and the loop.")
    chat_template: str | None = Field(
        default=None,
        description="A Jinja template or words, and for a joined model vicuna, plain or t5. Default: the model's.",
    )
    images_after_text: bool | None = Field(
        default=None,
        description="With true, images come after the words of their turn, as in the paper. With false, they stay "
        "where the row has them. Default: as in the stage before, and false in the first.",
    )
    system: str | None = Field(default=None, description="System message for rows that have none.")

    _home = field_validator("output", "previous")(_expanded)

    @field_validator("model", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _where_from(self) -> Recipe:
        strange = [part for part in self.training.learning_rates if part not in PARTS]
        if strange and self.backbones is not None:
            raise ValueError(f"training.learning_rates.{strange[0]}: no such part; there are {sorted(PARTS)}")
        if self.model is None and self.trains != ["adapter"]:
            raise ValueError(
                "trains: without `model`, the stage or the adapter before decides what trains; take it out"
            )
        if self.model is not None:
            self._check_model()
        elif self.previous is None and self.stage == "finetune":
            raise ValueError(
                "`finetune` trains the adapter alone; give `model`, or `previous`, whose projections are trained"
            )
        elif self.previous is None and self.backbones is None:
            raise ValueError("give `model`, `previous`, the directory of the stage before, or `backbones`")
        if self.chat_template is not None and self.chat_template not in CHAT_TEMPLATES:
            _check_jinja(self.chat_template)
        return self

    def _check_model(self) -> None:
        if self.stage != "finetune":
            raise ValueError(f"`model` sees already, and stage {self.stage!r} teaches that; write stage: finetune")
        others = [key for key in ("previous", "backbones") if getattr(self, key) is not None]
        if others:
            raise ValueError(f"give one of `model` and {others}: each names what the adapter is attached to")
        if "adapter" not in self.trains:
            raise ValueError(f"trains={self.trains} leaves the adapter out; write trains: [adapter, ...]")

    @model_validator(mode="after")
    def _cached(self) -> Recipe:
        augmented = self.images.random_crop or self.images.horizontal_flip
        if self.images.views is not None and not augmented:
            raise ValueError("images.views counts crops and mirror images, and there are none; take it out")
        if self.feature_cache is not None and augmented and self.images.views is None:
            raise ValueError(
                "feature_cache: each time another crop or mirror image is another image, which is never found "
                "again; write images.views: 4, or take the augmentation out"
            )
        return self

    @model_validator(mode="after")
    def _mixed(self) -> Recipe:
        weighted = [data.weight is not None for data in self.data]
        if any(weighted) and (self.mixture is not None or not all(weighted)):
            raise ValueError("give a `weight` to every data set and write mixture: null, or no `weight`")
        streamed = any(data.streaming for data in self.data)
        if streamed and self.training.max_steps is None:
            raise ValueError("the length of an epoch of streamed data is unknown; give training.max_steps")
        if streamed and self.training.group_by_length:
            raise ValueError("the lengths of streamed rows are unknown; take training.group_by_length out")
        if streamed and len(self.data) > 1 and not all(weighted):
            raise ValueError("the number of streamed rows is unknown; give every data set a `weight`")
        return self


def _check_jinja(template: str) -> None:
    """Raise ValueError if transformers cannot parse a chat template as Jinja."""
    if "{{" not in template and "{%" not in template:
        raise ValueError(
            f"chat_template={template!r} is neither one of {list(CHAT_TEMPLATES)} nor Jinja, which has {{{{ }}}}"
        )
    words = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # transformers' own tags
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(words)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"chat_template is not valid Jinja: {error.message} (its line {error.lineno}). Fix it, or write one of "
            f"{list(CHAT_TEMPLATES)}"
        ) from error


SECTIONS: dict[str, type[BaseModel]] = {
    "training": Training, "model": Host, "backbones": Backbones, "adapter": Adapter, "images": Images, "data": Data,
    "mixture": Mixture, "feature_cache": FeatureCache, "evaluation": Evaluation, "evaluation.data": Questions,
}  # fmt: skip


def keys_at(location: tuple[Any, ...]) -> list[str]:
    """Return the keys of a section; `location` is pydantic's, with numbers for entries of a list."""
    section = SECTIONS.get(".".join(part for part in location if isinstance(part, str)), Recipe)
    return list(section.model_fields)
