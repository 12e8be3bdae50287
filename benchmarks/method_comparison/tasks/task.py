"""What a task is: numbered images, training rows, questions of three splits, and captions of its images."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch

from examples.easy_vqa.data import blind_baselines
from examples.easy_vqa.model import Images, cached_features

T = TypeVar("T")
Split = Literal["validation", "test", "shifted"]
Row = dict[str, Any]  # image_id, turns [[question, answer], ...]
Question = dict[str, Any]  # image_id, question, answer, kind


class Task(Protocol):
    """A task with images. An `image_id` counts through all of its `images`.

    Attributes:
        name: name in records.
        title: name in tables.
        shift: what differs in the split "shifted".
        per_step: training images of a step. Rows with several questions have fewer, so that steps cost alike.
    """

    name: str
    title: str
    shift: str
    per_step: int

    def images(self) -> tuple[Images, ...]:
        """Return the images, some of which may have to be downloaded."""

    def rows(self, count: int, seed: int) -> list[Row]:
        """Draw `count` training rows of one image each. Every image comes once before any is repeated."""

    def questions(self, split: Split, count: int, seed: int) -> list[Question]:
        """Draw about `count` questions of a split, or all that there are. The same arguments give the same ones."""

    def captions(self, split: Literal["train", "test"], count: int, seed: int) -> list[tuple[int, str]]:
        """Draw `count` images with captions, by which a host is aligned ("train") and asked ("test")."""


def features(task: Task, image_processor: Any, dtype: torch.dtype) -> torch.Tensor:
    """Compute the frozen tower's pooled features of all images, (images, 16, 384) fp16, by image_id."""
    return torch.cat([cached_features(part, image_processor, dtype) for part in task.images()])


def words_alone(task: Task, split: Split, count: int, seed: int, train: int) -> float:
    """Return the accuracy of the best answer to each question's words, as `train` training rows have them."""
    known = [{"question": q, "answer": a} for row in task.rows(train, seed) for q, a in row["turns"]]
    asked = task.questions(split, count, seed)
    said = blind_baselines(known, asked)["best answer to each question text"]
    return sum(text == row["answer"] for text, row in zip(said, asked, strict=True)) / len(asked)


def taken(items: Sequence[T], count: int, seed: int) -> Iterator[T]:
    """Yield `count` items in random order. Every item comes once before any is repeated."""
    generator = random.Random(seed)
    while count > 0:
        order = generator.sample(items, min(count, len(items)))
        yield from order
        count -= len(order)
