"""Take details for an adapter's model card that only its author knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from peft import PeftModel

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


@dataclass(frozen=True)
class CardDetails:
    """The arguments of `describe_adapter`."""

    task: str | None = None
    datasets: tuple[str, ...] = ()
    results: tuple[EvalResult, ...] = ()
    image: Path | None = None
    license: str | None = None
    language: str | None = None
    record: dict[str, Any] | None = None


def describe_adapter(
    model: PeftModel,
    adapter_name: str = "default",
    *,
    task: str | None = None,
    datasets: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
    image: str | Path | None = None,
    license: str | None = None,
    language: str | None = None,
    record: dict[str, Any] | None = None,
) -> None:
    """Describe the adapter for the model card that `save_pretrained` and `push_to_hub` write.

    Args:
        model: a model with the adapter.
        task: the adapter's purpose, in a sentence or more of Markdown.
        datasets: Hub names of the training data. Other words appear only in the text.
        results: measured values, which the Hub shows beside the card.
        image: an image to store with the adapter and show in the card.
        license: the Hub's name of the license, such as "apache-2.0".
        language: the Hub's name of the language, such as "en".
        record: the result of `peft_crome.training.train` or `read_record`, from which the card takes the recipe.
    Raises:
        ValueError, TypeError, FileNotFoundError: the adapter or the image is missing, or results have a wrong type.

    Example:
        >>> describe_adapter(model, task="Reads gauges.", datasets=["user/gauges"])  # doctest: +SKIP
    """
    config = model.peft_config.get(adapter_name)
    if config is None or not hasattr(type(config), "_card"):
        raise ValueError(f"No CROME adapter {adapter_name!r} on this model; there are {list(model.peft_config)}.")
    if isinstance(datasets, str):
        raise TypeError(f"datasets is a string. Write datasets=[{datasets!r}].")
    wrong = [result for result in results if not isinstance(result, EvalResult)]
    if wrong:
        raise TypeError(
            f"results: {wrong[0]!r} is not a huggingface_hub.EvalResult. Write EvalResult(task_type="
            "'visual-question-answering', dataset_type='user/data', dataset_name='Data', metric_type='accuracy', "
            "metric_value=0.9)."
        )
    path = Path(image) if image is not None else None
    if path is not None and (not path.is_file() or path.suffix.lower() not in IMAGE_SUFFIXES):
        raise FileNotFoundError(f"image={str(path)!r} is not a file with one of the endings {IMAGE_SUFFIXES}.")
    config._card = CardDetails(task, tuple(datasets), tuple(results), path, license, language, record)
