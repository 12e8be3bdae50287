"""Train the composite in the paper's three stages, on the ordinary `Trainer`."""

from ..extras import missing

try:
    import datasets  # noqa: F401
    import ijson  # noqa: F401
    import pydantic  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:
    raise missing("train", error.name, "peft_crome.training") from error

from .build import build
from .checkpoint import StageError, read_record, save_stage
from .evaluation import generate_answers
from .finite import NamedRows, NotFiniteError
from .memory import NotPredictable, StepCost, StepSize, predict_step
from .metrics import METRICS, exact_match, references, score
from .planning import model_skeleton, recipe_skeleton
from .preflight import Preflight
from .recipe import Recipe, RecipeError
from .recipe_file import load_recipe
from .run import train
from .stages import STAGES, Stage, count_trained, modules_to_save
from .trainer import CromeTrainer, training_arguments
from .validation import EvaluationCallback, load_questions

__all__ = [
    "METRICS",
    "STAGES",
    "CromeTrainer",
    "EvaluationCallback",
    "NamedRows",
    "NotFiniteError",
    "NotPredictable",
    "Preflight",
    "Recipe",
    "RecipeError",
    "Stage",
    "StageError",
    "StepCost",
    "StepSize",
    "build",
    "count_trained",
    "exact_match",
    "generate_answers",
    "load_questions",
    "load_recipe",
    "model_skeleton",
    "modules_to_save",
    "predict_step",
    "read_record",
    "recipe_skeleton",
    "references",
    "save_stage",
    "score",
    "train",
    "training_arguments",
]
