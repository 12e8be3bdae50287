"""Train one stage with the standard `Trainer`; it continues from its last checkpoint."""

from __future__ import annotations

import copy
import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from . import data
from .model import attach, save_stage
from .records import write_json

SAVE_STEPS = 50


@dataclass(frozen=True)
class Stage:
    """The data and the length of one stage.

    Args:
        name: "align" (projection + adapter, on captions) or "finetune" (adapter alone, on questions).
        steps: number of optimizer steps.
        images_per_step: number of rows in a batch, one image each.
        questions_per_image: number of question turns in a row; captions have one.
        learning_rate: peak of AdamW, after a warm-up over 5% of the steps, followed by a cosine to 0.
        draws: which questions, in order: pairs of a draw (see `data.question_rows`) and its steps; "any" if empty.
        isolated: whether questions about one image are hidden from one another.
        word_weight: weight of a term that draws image tokens toward the words of their caption (see `WordLoss`).
    """

    name: str
    steps: int
    images_per_step: int
    questions_per_image: int
    learning_rate: float
    draws: tuple[tuple[str, int], ...] = ()
    isolated: bool = False
    word_weight: float = 0.0


def train_stage(
    stage: Stage,
    method: str,
    seed: int,
    processor: Any,
    features: torch.Tensor,
    directory: Path,
    previous: Path | None = None,
    rows: list[dict[str, Any]] | None = None,
    use_cpu: bool = False,
) -> dict[str, Any]:
    """Train a stage, save it to `directory` and return its record. A finished stage is not trained again.

    Args:
        previous: directory of the previous stage.
        rows, use_cpu: as in `fit`.
    Returns:
        settings, seconds, peak_memory_bytes, trained_parameters, file_bytes and the loss curve [[step, loss], ...].
    """
    record_file = directory / "record.json"
    if record_file.is_file():
        return json.loads(record_file.read_text())
    torch.manual_seed(seed)
    model = attach(method, stage.name, previous)
    fitted = fit(model, stage, seed, processor, features, directory / "checkpoints", rows, use_cpu)
    record = {
        "settings": {**asdict(stage), "method": method, "seed": seed},
        **fitted,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "file_bytes": save_stage(model, directory),
    }
    write_json(record_file, record)
    return record


def fit(
    model: torch.nn.Module,
    stage: Stage,
    seed: int,
    processor: Any,
    features: torch.Tensor,
    checkpoints: Path | None,
    rows: list[dict[str, Any]] | None = None,
    use_cpu: bool = False,
) -> dict[str, Any]:
    """Train all parameters that require a gradient.

    Args:
        checkpoints: directory to continue from and to save to; None: neither.
        rows: training rows, one per image of each step; None: easy-VQA's, as `stage` draws them.
        use_cpu: whether to leave a GPU unused.
    Returns:
        seconds, whether it was resumed (seconds then cover the last part only), losses [[step, loss], ...].
    """
    rows = easy_vqa_rows(stage, seed) if rows is None else rows
    if stage.word_weight:
        start_at_words(model, features)
    arguments = TrainingArguments(
        output_dir=str(checkpoints) if checkpoints is not None else None,
        max_steps=stage.steps,
        per_device_train_batch_size=stage.images_per_step,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, stage.steps // 20),
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=10,
        save_strategy="steps" if checkpoints is not None else "no",
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        use_cpu=use_cpu,
        dataloader_pin_memory=torch.cuda.is_available() and not use_cpu,
        train_sampling_strategy="sequential" if stage.draws else "random",
        seed=seed,
    )
    dataset = data.tokenized(rows, processor, stage.isolated)
    collate = data.Collator(features, processor.tokenizer.pad_token_id)
    trainer = CacheTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        compute_loss_func=WordLoss(model, processor, stage.word_weight) if stage.word_weight else answer_loss,
    )
    before = data.tokens_before_the_image(dataset, processor.image_token_id)
    trainer.cache = cache_of(before, model)  # on the device where `Trainer` has put the model
    collate.cached = 0 if trainer.cache is None else len(before)
    start = time.perf_counter()
    last = get_last_checkpoint(str(checkpoints)) if checkpoints is not None and checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    losses = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": round(time.perf_counter() - start, 1), "resumed": last is not None, "losses": losses}


def cache_of(tokens: torch.Tensor, model: torch.nn.Module) -> DynamicCache | None:
    """Compute the keys and values of tokens that every row begins with, once for the whole training.

    Args:
        tokens: (tokens,), which have no image.
    Returns:
        A cache of one row; None without tokens, and if training would change it, as with LoRA.
    """
    if not len(tokens):
        return None
    cache = model.train()(input_ids=tokens[None].to(model.device), use_cache=True, logits_to_keep=1).past_key_values
    changes = any(layer.keys.requires_grad or layer.values.requires_grad for layer in cache.layers)
    return None if changes else cache


class CacheTrainer(Trainer):
    """`Trainer` whose rows continue a cache.

    Attributes:
        cache: keys and values of what every row begins with; None: nothing.
    """

    cache: DynamicCache | None = None

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as `Trainer` does. The cache is copied, since the model appends to it."""
        if self.cache is not None:
            copied = copy.deepcopy(self.cache)
            copied.batch_repeat_interleave(len(inputs["input_ids"]))
            inputs = {**inputs, "past_key_values": copied}
        return super().compute_loss(model, inputs, *args, **kwargs)


def easy_vqa_rows(stage: Stage, seed: int, questions: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Draw the captions or questions of a stage, one row per image of each step.

    Args:
        questions: questions to draw from; None: easy-VQA's training questions.
    """
    questions = data.load_questions("train") if questions is None else questions
    if stage.name == "align":
        return data.caption_rows(questions, stage.steps * stage.images_per_step, seed)
    rows = []
    for number, (draw, steps) in enumerate(stage.draws or (("any", stage.steps),)):
        count = steps * stage.images_per_step
        rows += data.question_rows(questions, count, seed + 100 * number, stage.questions_per_image, draw)
    return rows


def answer_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Compute mean cross-entropy over the answers' tokens; `data.Collator` aligns logits and labels."""
    logits = outputs.logits.flatten(0, 1).float()
    count = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum") / count


class WordLoss:
    """Compute the answers' loss plus the distance of an image's tokens from the words of its caption.

    The distance is that of the image tokens' mean from the mean of the words' embeddings, squared, relative to the
    square of the latter. The language model can compare image tokens among words with words, as it learned on text.
    Captions alone do not move the tokens there.

    Args:
        model: the composite, adapted or not.
        processor: the composite's processor.
        weight: weight of the distance.
    """

    def __init__(self, model: torch.nn.Module, processor: Any, weight: float) -> None:
        self.model = model
        self.tokenizer = processor.tokenizer
        self.weight = weight

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the loss. `labels` has one caption per row."""
        captions = [self.tokenizer.decode(row[row != -100], skip_special_tokens=True) for row in labels]
        # With a space in front, as words in a sentence.
        ids = [self.tokenizer.encode(f" {caption}", add_special_tokens=False) for caption in captions]
        words = torch.stack([word_embeddings(self.model, torch.tensor(row)).float().mean(dim=0) for row in ids])
        tokens = outputs.image_hidden_states.float().mean(dim=1)
        distance = (tokens - words).square().sum(dim=-1).mean() / words.square().sum(dim=-1).mean()
        return answer_loss(outputs, labels, num_items_in_batch) + self.weight * distance


def word_embeddings(model: torch.nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return the frozen language model's embeddings as its layers read them, which Gemma scales: (ids, hidden).

    Args:
        ids: token ids; None: every 48th of the vocabulary.
    """
    table = model.get_input_embeddings()  # type: ignore[operator]
    table = getattr(table, "base_layer", table)
    ids = torch.arange(0, table.num_embeddings, 48) if ids is None else ids
    return table(ids.to(table.weight.device)).detach()


@torch.no_grad()
def start_at_words(model: torch.nn.Module, features: torch.Tensor) -> None:
    """Scale the new projection so that image tokens are as large as words, instead of eight times as large."""
    weight = next(p for name, p in model.named_parameters() if "image_projection" in name and p.requires_grad)
    size = word_embeddings(model).float().square().mean(dim=-1).sqrt().median()
    given = (features[:200].to(weight) @ weight.T).square().mean().sqrt()
    weight.mul_(size / given)
