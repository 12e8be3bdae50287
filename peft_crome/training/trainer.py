"""The ordinary Trainer with parameter groups by part and the paper's schedule."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from .recipe import Recipe, RecipeError, Training
from .schedule import warmup_then_cosine
from .stages import trained_parameters


def training_arguments(recipe: Recipe, directory: str, world_size: int = 1) -> TrainingArguments:
    """What `Trainer` is told; `training.arguments` of the recipe comes last.

    Args:
        directory: of the checkpoints.
        world_size: processes, between which a step's rows are divided.
    Raises:
        RecipeError: an entry of `training.arguments` is unknown, or the rows cannot be divided.
    """
    settings = recipe.training
    each, rest = divmod(settings.batch_size, world_size)
    rows = settings.rows_per_device or each
    if rest or each % rows:
        raise RecipeError(
            f"training.batch_size: {settings.batch_size} rows cannot be divided between {world_size} processes with "
            f"{rows} rows at a time. Change batch_size or rows_per_device."
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
        "remove_unused_columns": False,  # the rows are the collator's, not the model's
        "label_names": ["labels"],  # the Trainer does not look for them through a PeftModel
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    known = TrainingArguments.__dataclass_fields__
    unknown = [key for key in settings.arguments if key not in known]
    if unknown:
        raise RecipeError(f"training.arguments: {unknown} are no arguments of transformers' TrainingArguments.")
    made = TrainingArguments(**(arguments | settings.arguments))
    if made.n_gpu > 1:
        raise RecipeError(
            f"One process sees {made.n_gpu} GPUs, between which the Trainer would split rows and pictures apart. "
            "Write accelerate launch -m peft_crome train ..., or show it one GPU: CUDA_VISIBLE_DEVICES=0."
        )
    return made


class CromeTrainer(Trainer):
    """`Trainer` with a learning rate per part and a warm-up that starts above zero.

    Args:
        settings: the recipe's section `training`.
        args, kwargs: of `Trainer`.
    """

    def __init__(self, *args: Any, settings: Training, **kwargs: Any) -> None:
        self.settings = settings
        self.optimizer: torch.optim.Optimizer | None
        self.lr_scheduler: Any
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss, which depends on all that trains, if only by zero.

        Behind a Q-Former only image tokens are adapted: a batch without pictures has no gradient otherwise, and
        processes that have pictures would wait for it.
        """
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss, *rest = result if isinstance(result, tuple) else (result,)
        if torch.is_grad_enabled() and inputs.get("pixel_values") is None:
            loss = loss + 0.0 * sum(parameter.sum() for _, _, parameter in trained_parameters(model))
        return (loss, *rest) if isinstance(result, tuple) else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over groups: each part, weights with decay and without (biases, norms)."""
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
        """The paper's: a line from `initial_learning_rate`, then a cosine to 0.

        Raises:
            RecipeError: the warm-up is as long as the run.
        """
        if self.lr_scheduler is None:
            warmup = self.settings.warmup_steps
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
