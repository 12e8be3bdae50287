"""Train the composite in the paper's three stages, with the standard `Trainer`."""

from ..utils.extras import missing

try:
    import datasets  # noqa: F401
    import ijson  # noqa: F401
    import pydantic  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:
    raise missing("train", error.name, "peft_crome.training") from error

from ..evaluation.answers import generate_answers
from ..evaluation.metrics import METRICS, exact_match, references, score
from .directory.stage import read_record, save_stage
from .errors import RecipeError, StageError
from .loop.finite import NamedRows, NotFiniteError
from .loop.trainer import CromeTrainer, training_arguments
from .loop.validation import EvaluationCallback, load_questions
from .model.build import build
from .planning.costs import model_skeleton, recipe_skeleton
from .planning.memory import NotPredictable, StepCost, StepSize, predict_step
from .planning.preflight import Preflight
from .recipe.file import load_recipe
from .recipe.schema import Recipe
from .run import train
from .stages import STAGES, Stage, count_trained, modules_to_save

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
