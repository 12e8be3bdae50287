"""What only the author of an adapter knows, for its model card."""

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
    """Say what `save_pretrained` and `push_to_hub` are to write into the adapter's model card.

    Args:
        model: has the adapter.
        task: a sentence or more of Markdown: what the adapter is for.
        datasets: Hub names of the data it was trained on; other words are put into the text alone.
        results: measured values; the Hub shows them beside the card.
        image: stored with the adapter and shown in the card.
        license: the Hub's name of it, such as "apache-2.0".
        language: the Hub's name of it, such as "en".
        record: what `peft_crome.training.train` or `read_record` returns, for the recipe.
    Raises:
        ValueError, TypeError, FileNotFoundError: no such adapter or image, or results of another type.

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
