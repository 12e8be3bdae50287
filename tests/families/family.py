"""The properties of a model family that the tests use, and the table of all families."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Family:
    """A tiny checkpoint of one family, with the real model class and the real processor class.

    Attributes:
        name: name of the family, and of its chat template in `templates/`.
        build: writes the checkpoint to a directory, from which `AutoProcessor` and `auto_class` load it.
        image_token: the token that stands for image features in `input_ids`, once per feature.
        auto_class: class of transformers that loads the model.
        end_of_turn: token that the chat template writes after an answer, or None if it writes no token.
        several_images: whether a conversation may have more than one image.
        text_only: whether the processor accepts a row without an image.
        system: whether the chat template accepts a system message.
        video: whether the processor accepts videos.
        audio: whether the processor accepts sound.
        encoder_decoder: whether a separate decoder writes the answer.
        chat_template: whether the family publishes a chat template.
        generation: whether the chat template marks the assistant's words with `{% generation %}`.
        alternates: whether the chat template refuses two turns of one role, and an answer without a question.
        images_first: whether images are rendered before a turn's words, regardless of their order.
        strips: whether the chat template strips the words of a turn.
        closes_last: whether `end_of_turn` is also written after the last answer.
        prompt_is_prefix: whether a conversation begins with the template's prompt for its answer.
        keeps_system: whether a system message is still rendered when an answer follows the question.
        keeps_turns: whether the beginning of a conversation is rendered the same whatever follows.
        trains: "yes" if one command trains it, with the extra setting if it needs one. Otherwise "no" and the reason.
        needs: packages that the processor requires.
    """

    name: str
    build: Callable[[Path], None]
    image_token: str
    auto_class: str = "AutoModelForImageTextToText"
    end_of_turn: str | None = None
    several_images: bool = True
    text_only: bool = True
    system: bool = True
    video: bool = False
    audio: bool = False
    encoder_decoder: bool = False
    chat_template: bool = True
    generation: bool = False
    alternates: bool = False
    images_first: bool = False
    strips: bool = False
    closes_last: bool = True
    prompt_is_prefix: bool = True
    keeps_system: bool = True
    keeps_turns: bool = True
    trains: str = "yes"
    needs: tuple[str, ...] = field(default=())

    def missing(self) -> list[str]:
        """Return the packages in `needs` that are not installed."""
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


FAMILIES: dict[str, Family] = {}

# name -> why there is no checkpoint of this family
ABSENT: dict[str, str] = {}


def family(
    name: str, image_token: str, end_of_turn: str | None, **flags: object
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register the decorated builder in `FAMILIES`."""

    def enter(build: Callable[[Path], None]) -> Callable[[Path], None]:
        assert name not in FAMILIES, name
        FAMILIES[name] = Family(name, build, image_token, end_of_turn=end_of_turn, **flags)
        return build

    return enter
