"""Try other settings of the long demo on validation images: a tenth of the training images, unused in all trials."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from . import data
from .demo import ALIGN, ALIGN_RATES, FINETUNE
from .evaluation import answer, score, score_yes_no
from .model import load_stage, processor, vision_features
from .records import write_json
from .training import Stage, easy_vqa_rows, train_stage

VALIDATION = 10  # every tenth image of the training split
QUESTIONS = {"what": 200, "yes/no": 400}


def split(questions: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split the training questions by image into questions to train on and questions to validate on."""
    train = [row for row in questions if row["image_id"] % VALIDATION != 0]
    return train, [row for row in questions if row["image_id"] % VALIDATION == 0]


def run(
    output: Path, results: Path, method: str, seed: int = 0, align: Stage = ALIGN, tune: Stage = FINETUNE
) -> dict[str, Any]:
    """Train both stages and write the scores on validation.

    Args:
        output: folder of checkpoints; a finished stage is not trained again.
        results: a JSON file.
        method: one of `model.METHODS`, or "crome-wide".
        align: the captions' stage; LoRA takes the long version's rate for it.
        tune: the questions' stage.
    """
    shared = processor()
    features = vision_features("train", shared.image_processor)
    train, validation = split(data.load_questions("train"))
    align = replace(align, learning_rate=ALIGN_RATES.get(method, align.learning_rate))
    folders = {"align": output / f"{method}-{align.steps}-seed{seed}", "finetune": output / results.stem}
    rows = [easy_vqa_rows(stage, seed, train) for stage in (align, tune)]
    aligned = train_stage(align, method, seed, shared, features, folders["align"], rows=rows[0])
    tuned = train_stage(tune, method, seed, shared, features, folders["finetune"], folders["align"], rows[1])
    asked = data.sample(validation, QUESTIONS)
    answers = answer(load_stage(folders["finetune"]), shared, features, asked, description=results.stem)
    record = {"method": method, "seed": seed, "align": aligned, "finetune": tuned}
    record |= {"score": score(asked, answers), "yes_no": score_yes_no(asked, answers)}
    write_json(results, record)
    return record
