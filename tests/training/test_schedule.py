"""Test the learning rate at each step, with the paper's numbers."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_crome.training import CromeTrainer, RecipeError, load_recipe, training_arguments
from peft_crome.training.loop.schedule import warmup_then_cosine


def by_hand(step: int, total: int, warmup: int = 1000, start: float = 1e-8, peak: float = 1e-5) -> float:
    """Return the rate of a warm-up over 1000 steps from 1e-8 to 1e-5 and a cosine to 0."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@pytest.mark.parametrize(("warmup", "start"), [(1000, 1e-8), (1000, 0.0), (1000, 1e-5), (0, 1e-8)])
def test_optimizer_is_given_that_rate_at_every_step(warmup: int, start: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 1e-5}])
    scheduler = warmup_then_cosine(optimizer, warmup_steps=warmup, total_steps=3000, initial_factor=start / 1e-5)
    for step in range(3001):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            by_hand(step, 3000, warmup, start), rel=1e-9, abs=1e-15
        )
        optimizer.step()
        scheduler.step()


class Composite(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image_projection = torch.nn.Linear(2, 2)
        self.crome_up = torch.nn.Linear(2, 2, bias=False)
        self.language_model = torch.nn.Linear(2, 2).requires_grad_(False)


def trainer(tmp_path: Any, **training: Any) -> CromeTrainer:
    recipe = load_recipe(
        {"preset": "pretrain", "output": "o", "data": [{"path": "a"}], "training": {"epochs": None, **training}}
    )
    arguments = training_arguments(recipe, str(tmp_path))
    return CromeTrainer(model=Composite(), args=arguments, settings=recipe.training)


def test_groups_have_their_own_rates_and_share_the_schedule(tmp_path: Any) -> None:
    own = trainer(tmp_path, max_steps=2000, learning_rates={"adapter": 1e-3})
    optimizer = own.create_optimizer()
    own.create_scheduler(2000, optimizer)
    groups = {(g["part"], g["weight_decay"]): g for g in optimizer.param_groups}
    assert set(groups) == {("image_projection", 0.05), ("image_projection", 0.0), ("adapter", 0.05)}
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert groups[("adapter", 0.05)]["lr"] == pytest.approx(1e-6)
    assert groups[("image_projection", 0.05)]["lr"] == pytest.approx(1e-8)
    trained = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert trained == {id(p) for p in own.model.parameters() if p.requires_grad}


def test_rows_are_divided_or_refused(tmp_path: Any) -> None:
    values = {"preset": "pretrain", "output": "o", "data": [{"path": "a"}], "training": {"rows_per_device": 4}}
    arguments = training_arguments(load_recipe(values), str(tmp_path), world_size=2)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (4, 4)
    with pytest.raises(RecipeError, match="32 rows cannot be divided between 3 processes"):
        training_arguments(load_recipe(values), str(tmp_path), world_size=3)
    values["training"] = {"arguments": {"report": "none"}}
    with pytest.raises(RecipeError, match=r"\['report'\] are not arguments"):
        training_arguments(load_recipe(values), str(tmp_path))


def test_warmup_longer_than_the_run_is_refused(tmp_path: Any) -> None:
    own = trainer(tmp_path, max_steps=2000)
    own.optimizer = SimpleNamespace()  # not touched
    with pytest.raises(RecipeError, match=r"1000 leaves nothing of 300 steps. Write warmup_steps: 15"):
        own.create_scheduler(300)
