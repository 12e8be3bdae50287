"""Extend the standard Trainer by parameter groups per part and the paper's schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length, rotate_checkpoints

from ...backbone.labeled import logits_at_labels
from ...backbone.model import unwrapped
from ...backbone.packed_rows import pack_rows
from ...data.draws import DrawOrder, Draws, DrawStream
from ...data.lengths import row_lengths
from ..directory.run_folder import complete_checkpoint
from ..errors import RecipeError
from ..recipe.schema import Recipe, Training
from ..stages import trained_parameters
from .finite import ROW_IDS, FiniteCheck
from .progress import LastLoss, ProgressLine
from .schedule import warmup_then_cosine


def training_arguments(recipe: Recipe, directory: str, world_size: int = 1) -> TrainingArguments:
    """Make the `TrainingArguments` of a recipe. Its `training.arguments` override the rest.

    Args:
        directory: directory of the checkpoints.
        world_size: number of processes that share the rows of a step.
    Raises:
        RecipeError: an entry of `training.arguments` is unknown or has a wrong type, or the rows cannot be divided or
            packed.
    """
    settings = recipe.training
    each, rest = divmod(settings.batch_size, world_size)
    rows = settings.rows_per_device or each
    if rest or each % rows:
        raise RecipeError(
            f"training.batch_size: {settings.batch_size} rows cannot be divided between {world_size} processes with "
            f"{rows} rows at a time. Change batch_size or rows_per_device."
        )
    if settings.packing and rows == 1:
        raise RecipeError(
            "training.packing: one row at a time leaves none to pack. Raise batch_size or rows_per_device, or take "
            "packing out."
        )
    arguments: dict[str, Any] = {
        "output_dir": directory,
        "max_steps": settings.max_steps if settings.max_steps is not None else -1,
        "num_train_epochs": settings.epochs if settings.epochs is not None else 1.0,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": each // rows,
        "learning_rate": settings.learning_rate,
        "adam_beta1": settings.betas[0],
        "adam_beta2": settings.betas[1],
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "activation_checkpointing": settings.gradient_checkpointing,
        "logging_steps": settings.logging_steps,
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "seed": settings.seed,
        "remove_unused_columns": False,  # the collator reads the columns, not the model
        "label_names": ["labels"],  # the Trainer does not find them through a PeftModel
        "accelerator_config": {"dispatch_batches": False},  # a batch may have several images per row
        "ddp_find_unused_parameters": False,  # all parameters get a gradient: see guard.py
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),  # the Trainer refuses bf16 otherwise
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    known = TrainingArguments.__dataclass_fields__
    unknown = [key for key in settings.arguments if key not in known]
    if unknown:
        raise RecipeError(f"training.arguments: {unknown} are not arguments of transformers' TrainingArguments.")
    try:
        made = TrainingArguments(**(arguments | settings.arguments))
    except (TypeError, ValueError, AttributeError) as error:
        wrong = {key: value for key, value in settings.arguments.items() if not _is_taken(arguments | {key: value})}
        raise RecipeError(
            f"training.arguments: TrainingArguments does not take {wrong or settings.arguments}: {error}"
        ) from error
    if made.n_gpu > 1:
        raise RecipeError(
            f"One process sees {made.n_gpu} GPUs, between which the Trainer would split rows and images apart. "
            "Write accelerate launch -m peft_crome train ..., or show it one GPU: CUDA_VISIBLE_DEVICES=0."
        )
    return made


def _is_taken(arguments: dict[str, Any]) -> bool:
    try:
        TrainingArguments(**arguments)
    except (TypeError, ValueError, AttributeError):
        return False
    return True


class CromeTrainer(Trainer):
    """`Trainer` with a learning rate for each part, a warm-up that starts above zero, and exact restarts.

    The crop of an image depends only on the seed and the number of its draw (see `draws`). A continued run, with any
    number of processes or workers, therefore has the rows, crops and mirror images of an uninterrupted one.

    The trainer stops at a loss or a gradient that is NaN or infinite, before the weights change. If the collator is a
    `NamedRows`, the error names the rows.

    Args:
        settings: the recipe's section `training`.
        image_tokens: number of tokens of an ordinary image, to group rows by length.
        *args: as in `Trainer`.
        **kwargs: as in `Trainer`.
    """

    def __init__(self, *args: Any, settings: Training, image_tokens: int = 0, **kwargs: Any) -> None:
        self.settings = settings
        self.image_tokens = image_tokens
        self.optimizer: torch.optim.Optimizer | None
        self.lr_scheduler: Any
        self.finite = FiniteCheck()
        self.progress = ProgressLine()
        self.train_dataset: Any
        self._order: DrawOrder | None = None
        super().__init__(*args, **kwargs)
        host = unwrapped(self.model)
        self._dtype = getattr(host, "dtype", None)
        # With these, every process must call the same modules, including the tower.
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if hasattr(host, "blank_image"):
            host.blank_image = sharded
        if sharded and settings.packing:
            raise RecipeError("training.packing: FSDP and DeepSpeed train padded rows. Take it out.")
        if has_length(self.train_dataset):
            self.train_dataset = Draws(self.train_dataset)
        elif self.train_dataset is not None:
            self.train_dataset = DrawStream(self.train_dataset, block=self._rows_at_a_time())
        if self.pop_callback(ProgressCallback) is not None:  # absent with `disable_tqdm` or in a notebook
            self.add_callback(self.progress)
        self.add_callback(LastLoss())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as in `Trainer`.

        Raises:
            NotFiniteError: a loss or a gradient is NaN or infinite. All processes raise it.
        """
        try:
            return super().train(*args, **kwargs)
        finally:
            self.progress.close()

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute a batch's loss and gradient, and note the batch for the check of the step."""
        model_inputs = {name: value for name, value in inputs.items() if name != ROW_IDS}
        loss = super().training_step(model, model_inputs, *args, **kwargs)
        self.finite.see(loss, inputs.get(ROW_IDS))
        self.progress.count(loss, inputs["attention_mask"].sum())
        return loss

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Compute the loss as `Trainer` does, from logits at labels; from all logits if the outputs are requested.

        With `packing`, the rows of the batch are packed.
        """
        if not (return_outputs or self.label_smoother or self.compute_loss_func):
            if self.settings.packing:
                inputs = pack_rows(model, inputs, self.settings.max_length)
            inputs = logits_at_labels(model, inputs)
        return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        """Cast pixels to the model's dtype: processors give float32, and several towers take only their own dtype."""
        prepared = super()._prepare_input(data)
        if isinstance(prepared, torch.Tensor) and prepared.is_floating_point() and self._dtype is not None:
            return prepared.to(self._dtype)
        return prepared

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Check the step here, right before the optimizer runs: no callback gets the norm at this point."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.finite.check(norm, self.accelerator, self.state.global_step + 1, self.args.output_dir)
        return norm

    # ---- rows ----

    def _rows_at_a_time(self) -> int:
        return self.args.per_device_train_batch_size * self.accelerator.num_processes

    def _get_train_sampler(self, train_dataset: Any = None) -> DrawOrder:
        rows = self.train_dataset.rows
        lengths = row_lengths(rows, self.image_tokens) if self.settings.group_by_length else None
        self._order = DrawOrder(
            len(rows),
            seed=self.args.seed,
            multiple=self._rows_at_a_time(),
            batch_size=self.settings.batch_size,
            lengths=lengths,
        )
        return self._order

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*args)
        if isinstance(self.train_dataset, DrawStream):
            self.train_dataset.done = batches * self._rows_at_a_time()
        return epochs, batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # With several processes and skipped batches, accelerate's samplers do not pass the epoch on.
        if self._order is not None:
            self._order.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, mark it complete when all processes have written, and remove older ones last."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            complete_checkpoint(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
            best = self.state.best_model_checkpoint
            rotate_checkpoints(self.args.output_dir, save_total_limit=limit, best_model_checkpoint=best)

    # ---- optimizer ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create AdamW over groups: each part, weights with decay and without (biases, norms)."""
        model = self.model if model is None else model
        if self.optimizer is None:
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            decays = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
            for part, name, parameter in trained_parameters(model):
                groups.setdefault((part, name in decays), []).append(parameter)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.settings.learning_rates.get(part, self.settings.learning_rate),  # type: ignore[call-overload]
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                        "part": part,
                    }
                    for (part, decay), parameters in groups.items()
                ],
                **arguments,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Create the paper's schedule: linear from `initial_learning_rate`, then a cosine to 0.

        Raises:
            RecipeError: the warm-up is as long as the run.
        """
        if self.lr_scheduler is None:
            warmup = self.settings.warmup_steps
            warmup = warmup if isinstance(warmup, int) else int(warmup * num_training_steps)
            if warmup >= num_training_steps:
                raise RecipeError(
                    f"training.warmup_steps: {warmup} leaves nothing of {num_training_steps} steps. Write "
                    f"warmup_steps: {num_training_steps // 20}."
                )
            optimizer = optimizer if optimizer is not None else self.optimizer
            self.lr_scheduler = warmup_then_cosine(
                optimizer,
                warmup_steps=warmup,
                total_steps=num_training_steps,
                initial_factor=self.settings.initial_learning_rate / self.settings.learning_rate,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler
