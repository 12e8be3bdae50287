"""Find out how a processor's chat template writes conversations, by trying it."""

from __future__ import annotations

import inspect
from typing import Any

from jinja2 import TemplateError

from ..utils.shorten import cut
from .answer_spans import ANSWER, QUESTION, AnswerSpans, Messages, PromptRewritten, Span, turn
from .processed import with_template
from .rows import RowError, row_error

REMEDY = "Write another chat_template in the recipe."


class ChatTemplate:
    """A processor's chat template, with facts from rendering a question and its answer.

    Args:
        processor: processor with a fast tokenizer.
        system: a system message for conversations without one.
        ends_answers: put the tokenizer's end token after answers if the template writes none.
    Attributes:
        processor: the processor, or a copy with its tokenizer's template.
        before: messages that the template requires before a question, or the system message.
        writes_prompts_apart: a prompt for generation is not the beginning of the conversation with its answer. Gemma 4
            closes an empty thought before the answer, and DeepSeek R1 opens one. Neither is part of a rendered
            conversation. An answer is learned after the prompt that precedes it in generation.
        keeps_earlier_turns: the beginning of a conversation does not depend on later turns; Qwen 3's does.
    Raises:
        ValueError: as `ConversationCollator`.
    """

    def __init__(self, processor: Any, system: str | None = None, ends_answers: bool = False) -> None:
        self.processor = checked(processor)
        self.system = system
        self.before = self._turns_before_probes()
        self._asked = [*self.before, turn("user", QUESTION)]
        self._exchange = [*self._asked, turn("assistant", ANSWER)]
        rendered = self.render(self._exchange)
        self.writes_prompts_apart = ANSWER in rendered and not rendered.startswith(self.render(self._asked, True))
        self.keeps_earlier_turns = self._keeps_earlier_turns()
        self._end, self._of_last_alone = self._missing_end() if ends_answers else ("", False)
        self._spans = AnswerSpans(self.render, self.processor.chat_template, self.before)

    def render(self, messages: Messages, prompt: bool = False) -> str:
        """Render messages to text.

        Args:
            prompt: whether the text ends with the beginning of an answer.
        """
        if not messages:
            return ""
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        return text

    def completed(self, messages: Messages) -> Messages:
        """Add the system message and the end tokens that the messages lack."""
        messages = list(messages)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [turn("system", self.system), *messages]
        for number, message in enumerate(messages if self._end else ()):
            if message["role"] == "assistant" and (not self._of_last_alone or number == len(messages) - 1):
                *before, last = message["content"]
                messages[number] = {**message, "content": [*before, {**last, "text": last["text"] + self._end}]}
        return messages

    def with_answers(self, messages: Messages, name: str, *, earlier: bool) -> tuple[str, list[Span]]:
        """Return the text that a decoder-only model learns from, and the spans of its answers.

        Args:
            messages: messages that end with an answer.
            name: name of the row.
            earlier: whether to find the answers before the last.
        Raises:
            RowError: the template hides where an answer begins.
            TemplateError: the template rejects the conversation.
        """
        try:
            if self.writes_prompts_apart:
                prompt = self.render(messages[:-1], True)
                text = prompt + self._answer(messages, name)
                return text, [(len(prompt), len(text))]
            text = self.render(messages)
            return text, self._spans.find(messages, text, earlier=earlier)
        except PromptRewritten as error:
            raise row_error(
                name,
                "answer",
                f"the chat template writes the prompt {error.prompt[-40:]!r} in another way once the answer follows, "
                f"so it is unknown which tokens to learn. {REMEDY}",
            ) from error

    def _turns_before_probes(self) -> Messages:
        """Return a system message if one is given, or if the template requires one, which rows may have."""
        system = [turn("system", self.system if self.system is not None else "(system)")]
        turns = [turn("user", QUESTION), turn("assistant", ANSWER)]
        errors = []
        for before in ([], system) if self.system is None else (system, []):
            try:
                self.render([*before, *turns])
                self.render([*before, turns[0]], True)
            except TemplateError as error:
                errors.append(error)
            else:
                return before
        raise ValueError(
            f"chat_template: the language model's template does not take a question and its answer ({errors[0]}). "
            "Write chat_template: vicuna, plain or t5 in the recipe, or correct processor.chat_template."
        ) from errors[0]

    def _keeps_earlier_turns(self) -> bool:
        messages = [*self.before, *(turn(role, role) for role in ("user", "assistant") * 2)]
        try:
            return self.render(messages).startswith(self.render(messages[:-2]).rstrip())
        except TemplateError:  # it takes a single question
            return False

    def _missing_end(self) -> tuple[str, bool]:
        """Return the token to put after answers (empty if the template ends them), and if only the last lacks it."""
        end = self.processor.tokenizer.eos_token or ""
        if self.render(self._exchange).rpartition(ANSWER)[2].strip():
            return "", False
        try:
            return end, end in self.render([*self._exchange, *self._exchange[-2:]])  # as in DeepSeek-VL
        except TemplateError:  # it takes a single question
            return end, True

    def _answer(self, messages: Messages, name: str) -> str:
        """Return the last answer as the template writes it, with its ending."""
        before, _, ending = self.render([*messages[:-1], turn("assistant", ANSWER)]).rpartition(ANSWER)
        rendered = self.render(messages)
        if not (rendered.startswith(before) and rendered.endswith(ending)):
            wrong = "the chat template writes the text before an answer in a way that depends on the answer. "
            raise row_error(name, "answer", wrong + REMEDY)
        return rendered[len(before) :].rstrip()


def refused(name: str, error: TemplateError) -> RowError:
    """Build the error for a rejected row: Gemma takes no system message, Mistral no two turns of one role."""
    return row_error(
        name,
        "template",
        f"the language model's chat template says: {cut(str(error), 300)}. Change the row (or system: in the "
        "recipe), or write another chat_template in the recipe.",
    )


def checked(processor: Any) -> Any:
    """Check that a processor reports where its tokens come from and how conversations are written.

    Returns:
        The processor, or a copy with its tokenizer's chat template.
    Raises:
        ValueError: the processor does not; names what to load or write instead.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"{type(processor).__name__} is a bare tokenizer or image processor, and conversations need both. Load "
            "the processor of this model: AutoProcessor.from_pretrained(...)."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not report which text its tokens come from, so answers cannot be "
            "separated from questions. Load the fast tokenizer of this model."
        )
    if "suffix" in inspect.signature(type(processor).__call__).parameters:
        # A model that reads a prompt in both directions needs to know the tokens of the answer.
        raise ValueError(
            f"{type(processor).__name__} takes the answer apart from the prompt (suffix=), and conversations have "
            "both in one. Make the batches with it: processor(images=images, text=prompts, suffix=answers, "
            "padding=True, return_tensors='pt') has the labels, and transformers' Trainer takes it."
        )
    processor = with_template(processor)
    if processor.chat_template is None:
        raise ValueError(
            "The language model has no chat template. Write chat_template: vicuna, plain or t5 in the recipe, or "
            "set processor.chat_template."
        )
    return processor
