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
from ..stages import STAGES

Share = Annotated[float, Field(ge=0, lt=1)]
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
        description="InstructBLIP or BLIP-2 checkpoint: its tower and its trained Q-Former, instead of `vision`.",
    )
    qformer: dict[str, Any] | None = Field(
        default=None, description="Configuration of a new Q-Former (beside `vision`)."
    )
    qformer_tokenizer: str | None = Field(
        default=None, description="Tokenizer of the instructions that the Q-Former reads."
    )
    num_query_tokens: int = Field(default=32, ge=1, description="Tokens that a new Q-Former reads an image into.")
    image_token_order: list[Literal["query", "patch"]] | None = Field(
        default=None, description="Order of an image's tokens."
    )
    image_size: int | None = Field(
        default=None, ge=1, description="Pixels; by default what the tower's processor makes."
    )
    vision_feature_layer: int = Field(default=-1, description="-1: the tower's output; -2: its penultimate layer.")
    vision_pool_size: int = Field(default=1, ge=1, description="n averages n x n patches into one token.")
    quantization: Bits | None = Field(default=None, description="How the language model is loaded.")
    vision_quantization: Bits | None = Field(
        default=None, description="How the tower is loaded; a Q-Former stays as it is, since it trains."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(default="bfloat16", description="Of what is frozen.")
    vision_revision: str | None = Field(
        default=None, description="Branch, tag or commit of the tower or InstructBLIP."
    )
    text_revision: str | None = Field(default=None, description="Branch, tag or commit of the language model.")

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
        wrong = [key for key in ("hidden_size", "num_attention_heads") if not _is_count(sizes[key])]
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


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class Host(_Section):
    """A frozen vision-language model. A run that starts from an adapter takes the adapter's model."""

    name: str = Field(description="Name or directory of the model.")
    revision: str | None = Field(default=None, description="Branch, tag or commit.")
    quantization: Bits | None = Field(default=None, description="How the model is loaded.")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None, description="Of what is frozen; None: as the checkpoint is stored."
    )
    attn_implementation: str | None = Field(default=None, description="As in `from_pretrained`: sdpa, eager, ...")
    processor: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the model's processor: min_pixels, do_image_splitting, ..."
    )

    _home = field_validator("name")(_expanded)


class Adapter(_Section):
    """The CROME adapter, as in `CromeConfig`. A stage that starts from a directory continues with its adapter."""

    bottleneck_dim: int | None = Field(default=None, ge=1, description="None: about 1280 weights per unit of width.")
    branches: list[str] | None = Field(
        default=None,
        min_length=1,
        description="By default what carries images; [text, vision] adapts words as well, in every prompt.",
    )
    gate_activation: Literal["silu", "sigmoid"] = "silu"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    init_weights: bool | Literal["scaled", "normal"] = True


class Images(_Section):
    """How training images are prepared. The processor that is saved with the model has these values."""

    random_crop: bool = Field(default=False, description="Crop 50% to 100% of the area, then resize.")
    horizontal_flip: bool = Field(
        default=False, description="Mirror every second image; not where left and right matter."
    )
    views: int | None = Field(
        default=None,
        ge=1,
        description="Crops and mirror images that an image has, always the same; None: each time another one.",
    )
    resample: Literal["bicubic", "bilinear"] | None = Field(default=None, description="None: the tower's processor's.")
    mean: tuple[float, float, float] | None = None
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None


class Source(_Section):
    """A source of rows, as in `peft_crome.data.read_rows`."""

    path: str = Field(description="JSON, JSONL or parquet file, a folder of `datasets`, or a data set of the Hub.")
    images: str | dict[str, str] | None = Field(
        default=None, description="Folder that image paths start from, or a folder per beginning of them."
    )
    columns: dict[Literal["question", "answer", "image", "video", "audio", "id", "options"], str] | None = Field(
        default=None, description="Of a table instead of conversations: what its columns are called."
    )
    prompt: str | None = Field(default=None, description="The question, for a table without questions (captions).")
    name: str | None = Field(default=None, description="Configuration of a data set of the Hub.")
    split: str = Field(default="train", description="Of a folder or a data set of the Hub.")

    _home = field_validator("path", "images")(_expanded)

    @model_validator(mode="after")
    def _columns(self) -> Source:
        check_columns(self.columns, self.prompt)  # type: ignore[arg-type]
        return self


class Data(Source):
    """One data set to train on, as in `peft_crome.data.load_rows`."""

    streaming: bool = Field(default=False, description="Read while training; keep nothing on disk.")
    faulty: Literal["stop", "drop"] = Field(
        default="stop", description="What to do at rows that cannot be read; `peft-crome doctor` shows them all."
    )
    weight: float | None = Field(
        default=None, gt=0, description="How often this set is drawn from, relative to the others'."
    )


class Questions(Source):
    """One data set to answer while training. Its rows must contain the inputs of its metrics."""

    split: str = Field(default="validation", description="Of a folder or a data set of the Hub.")
    label: str | None = Field(
        default=None, description="What its scores are called, eval_LABEL_METRIC; None: the file's name."
    )
    metrics: list[Metric] = Field(default=["exact_match"], min_length=1, description="docs/evaluation.md has them.")

    @property
    def called(self) -> str:
        """The label of the set."""
        return self.label if self.label is not None else Path(self.path).stem


class Evaluation(_Section):
    """Data sets to answer by free generation at regular steps, and after the last one."""

    data: list[Questions] = Field(min_length=1)
    steps: int = Field(default=500, ge=1, description="Optimizer steps from one evaluation to the next.")
    max_rows: int | None = Field(
        default=1000, ge=1, description="The first rows of each set; they are kept in memory. None: all."
    )
    batch_size: int = Field(default=16, ge=1, description="Rows at a time, on each device.")
    max_new_tokens: int = Field(default=32, ge=1, description="Of an answer.")

    @model_validator(mode="after")
    def _labels(self) -> Evaluation:
        labels = [questions.called for questions in self.data]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"{twice} are the labels of several sets; give each a `label` of its own")
        return self


class FeatureCache(_Section):
    """Keep the frozen tower's features, so that each image runs through it once in all epochs and runs."""

    directory: str = Field(description="Folder; runs and machines may share it.")
    max_gigabytes: float = Field(
        default=50.0, gt=0, description="Images that come when it is full are computed each time."
    )

    _home = field_validator("directory")(_expanded)


class Mixture(_Section):
    """How often each data set is drawn from. Without it, and without weights, an epoch has every row once."""

    temperature: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=True,  # infinity draws all sets equally
        description="p proportional to rows ** (1 / temperature): 2 is the paper's square root.",
    )


class Training(_Section):
    """The optimizer, its schedule and the loop."""

    batch_size: int = Field(default=32, ge=1, description="Rows per optimizer step, over all devices.")
    rows_per_device: int | None = Field(
        default=None, ge=1, description="Rows per forward pass; None: all of a device's."
    )
    epochs: float | None = Field(default=None, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=1e-5, gt=0, description="The peak.")
    learning_rates: dict[str, NonNegativeFloat] = Field(default_factory=dict, description="Other peaks, by part.")
    initial_learning_rate: float = Field(default=1e-8, ge=0, description="Where the warm-up starts.")
    warmup_steps: int | Share = Field(default=1000, ge=0, description="Below 1: a share of all steps.")
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: float = Field(default=0.05, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0, description="0: no clipping.")
    max_length: int | None = Field(default=None, ge=1, description="Tokens per row, longer ones are cut at the end.")
    gradient_checkpointing: bool = False
    group_by_length: bool = Field(default=False, description="Rows of about one length come in one batch.")
    logging_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(
        default=500, ge=1, description="A run that is started again continues from its last checkpoint."
    )
    seed: int = Field(default=0, ge=0, lt=2**32)
    arguments: dict[str, Any] = Field(default_factory=dict, description="Further arguments of TrainingArguments.")

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

    stage: Literal["pretrain", "instruct", "finetune"]
    output: str = Field(description="Directory to write, complete or not at all.")
    previous: str | None = Field(
        default=None, description="Directory of the stage or the adapter before, or a Hub repository of one."
    )
    model: Host | None = Field(default=None, description="A vision-language model that sees already; or its name.")
    backbones: Backbones | None = None
    trains: list[str] = Field(
        default=["adapter"],
        description="With `model`: [adapter], or also modules to train in full, such as multi_modal_projector.",
    )
    adapter: Adapter | None = None
    images: Images = Images()
    data: list[Data] = Field(min_length=1)
    mixture: Mixture | None = None
    feature_cache: FeatureCache | None = None
    evaluation: Evaluation | None = None
    training: Training
    chat_template: str | None = Field(
        default=None, description="'vicuna', 'plain', 't5' or a Jinja template; None: the language model's own."
    )
    images_after_text: bool | None = Field(
        default=None,
        description="Images stand after the words of their turn, as in the paper, or where the row has them; None: "
        "as in the stage before, at first where the row has them.",
    )
    system: str | None = Field(default=None, description="A system message before each conversation that has none.")

    _home = field_validator("output", "previous")(_expanded)

    @field_validator("model", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _where_from(self) -> Recipe:
        parts = {part for stage in STAGES.values() for part in stage.parts}
        strange = [part for part in self.training.learning_rates if part not in parts]
        if strange and self.backbones is not None:
            raise ValueError(f"training.learning_rates.{strange[0]}: no such part; there are {sorted(parts)}")
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
        template = self.chat_template
        if template is not None and template not in CHAT_TEMPLATES and "{{" not in template and "{%" not in template:
            raise ValueError(
                f"chat_template={template!r} is neither one of {list(CHAT_TEMPLATES)} nor Jinja, which has {{{{ }}}}"
            )
        if template is not None and template not in CHAT_TEMPLATES:
            _check_jinja(template)
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
    words = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # transformers' own tags
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(words)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"chat_template is not valid Jinja: {error.message} (its line {error.lineno}). Fix it, or write one of "
            f"{list(CHAT_TEMPLATES)}"
        ) from error


def keys_at(location: tuple[Any, ...]) -> list[str]:
    """Return the keys of a section; `location` is pydantic's, with numbers for entries of a list."""
    sections = {
        "model": Host, "backbones": Backbones, "adapter": Adapter, "images": Images, "data": Data, "mixture": Mixture,
        "feature_cache": FeatureCache, "evaluation": Evaluation, "evaluation.data": Questions,
        "training": Training,
    }  # fmt: skip
    section = sections.get(".".join(part for part in location if isinstance(part, str)), Recipe)
    return list(section.model_fields)  # type: ignore[attr-defined]
