"""Train the composite in the paper's three stages, on the ordinary `Trainer`."""

from .build import build
from .checkpoint import StageError, read_record, save_stage
from .evaluation import exact_match, generate_answers, references
from .recipe import Recipe, RecipeError, load_recipe
from .run import train
from .stages import STAGES, Stage, count_trained, modules_to_save
from .trainer import CromeTrainer, training_arguments

__all__ = [
    "STAGES",
    "CromeTrainer",
    "Recipe",
    "RecipeError",
    "Stage",
    "StageError",
    "build",
    "count_trained",
    "exact_match",
    "generate_answers",
    "load_recipe",
    "modules_to_save",
    "read_record",
    "references",
    "save_stage",
    "train",
    "training_arguments",
]
