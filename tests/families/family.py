"""What a family of models is to the tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Family:
    """A tiny checkpoint of one family, with the real model class and the real processor class.

    Attributes:
        name: of the family, also of its chat template in `templates/`.
        build: writes the checkpoint to a directory, for `AutoProcessor` and `auto_class` to load.
        image_token: the token that stands for image features in `input_ids`, once per feature.
        auto_class: of transformers, loads the model.
        end_of_turn: what the chat template writes after an answer; None where it writes no token.
        several_images: a conversation may have more than one image.
        text_only: the processor takes a row without an image.
        system: the chat template takes a system message.
        video: the processor takes videos.
        audio: the processor takes sound.
        encoder_decoder: the answer is read by a decoder of its own.
        chat_template: the family publishes one.
        generation: the chat template marks the assistant's words with `{% generation %}`.
        alternates: the chat template refuses two turns of one role, and an answer without a question.
        images_first: images are rendered before a turn's words, wherever they stand.
        strips: the chat template strips the words of a turn.
        closes_last: `end_of_turn` is written behind the last answer, too.
        prompt_is_prefix: a conversation begins with what the template gives as a prompt for its answer.
        keeps_system: a system message is rendered when an answer follows the question, too.
        keeps_turns: a conversation's beginning is rendered alike, whatever follows.
        trains: whether one command trains it; else what it takes, or why it does not.
        needs: packages that the processor cannot do without.
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
        """Packages in `needs` that are not installed."""
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


FAMILIES: dict[str, Family] = {}

# name -> why there is no checkpoint of this family
ABSENT: dict[str, str] = {}


def family(
    name: str, image_token: str, end_of_turn: str | None, **flags: object
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Enter the decorated builder in FAMILIES."""

    def enter(build: Callable[[Path], None]) -> Callable[[Path], None]:
        assert name not in FAMILIES, name
        FAMILIES[name] = Family(name, build, image_token, end_of_turn=end_of_turn, **flags)
        return build

    return enter
