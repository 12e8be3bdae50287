"""Find the answers in a conversation that a chat template has rendered, in time linear in its length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # marks around an answer; noncharacters, so no text contains them
QUESTION, ANSWER = "(question)", "(answer)"
FEW = 8  # up to this number, each answer is found by its own prompt
OF_OTHER_TURNS = {"nextitem", "previtem", "length", "revindex", "revindex0", "changed", "cycle"}  # attributes of loop
Messages = list[dict[str, Any]]
Span = tuple[int, int]


def turn(role: str, *parts: str | dict[str, Any]) -> dict[str, Any]:
    """Build a message from texts and other parts."""
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


class PromptRewritten(ValueError):
    """A prompt is not the beginning of the conversation that continues it.

    Args:
        prompt: the prompt as generation would get it.
    """

    def __init__(self, prompt: str) -> None:
        super().__init__(prompt)
        self.prompt = prompt


class AnswerSpans:
    """Find answers in a rendered conversation.

    An answer begins where the prompt for generation ends, and ends with the end of its turn. Most templates write the
    same text before and after every answer. If that text occurs once per answer, the answers are between. Else the
    last answer is found by its prompt, and the same rendering has marks around the earlier answers. If the text around
    them may differ, an earlier answer is found by rendering it after the first exchange and the one before it. Some of
    these are checked by rendering the whole conversation up to them. If a check fails, all answers are found that way,
    in time quadratic in their number.
    Args:
        render: function of messages, and whether a prompt for an answer ends them -> text.
        template: Jinja, or another kind of template that a processor has.
        before: messages that the template requires before a question.
    """

    def __init__(self, render: Callable[[Messages, bool], str], template: Any, before: Messages) -> None:
        self._render = render
        self._beside: tuple[str, str, str] | None = None
        if isinstance(template, str) and writes_turns_alone(template):
            self._beside = self._what_stands_beside_answers(before)

    def find(self, messages: Messages, text: str, *, earlier: bool) -> list[Span]:
        """Find the first character of each answer, and the one after its last.

        Args:
            messages: messages that end with an answer.
            text: the rendered messages.
            earlier: whether to find the answers before the last.
        Raises:
            PromptRewritten: a prompt is written differently once an answer follows.
        """
        if self._beside is not None:
            answers = [_text_of(message) for message in messages if message["role"] == "assistant"]
            spans = _beside_alike(text, answers, self._beside)
            if spans is not None:
                return spans if earlier else spans[-1:]
        ends = [end for end, message in enumerate(messages[:-1]) if message["role"] == "assistant" and earlier]
        if ends and self._beside is not None and OPEN not in text and CLOSE not in text:
            prompt = self._render(_marked(messages[:-1]), True)
            spans = _between_marks(prompt, text, [_text_of(messages[end]) for end in ends], self._beside)
            if spans is not None:
                return [*spans, (len(prompt) - 2 * len(ends), len(text.rstrip()))]
        spans = self._in_exchanges(messages, ends, text) if len(ends) > FEW else None
        if spans is None:
            spans = [self.by_prefix(messages, end, text) for end in ends]
        return [*spans, self.by_prefix(messages, len(messages) - 1, text)]

    def _in_exchanges(self, messages: Messages, ends: list[int], text: str) -> list[Span] | None:
        """Find the answers at these messages; None: the whole conversation writes an exchange differently.

        Dependence on words before the last exchange is detected if it affects the whole text, or one of the
        first, second, fourth, eighth, ... prompts.
        """
        exchanges = [messages[first:end] for first, end in pairwise([0, *(end + 1 for end in ends)])]
        written: list[str] = []
        spans: list[Span] = []
        place = 0
        for number, exchange in enumerate(exchanges):
            known = sorted({0, number - 1} & set(range(number)))
            before = "".join(written[n] for n in known)
            window = [message for n in known for message in exchanges[n]] + exchange
            try:
                prompt, rendered = self._render(window[:-1], True), self._render(window, False)
            except TemplateError:
                return None
            for made in (prompt, rendered):
                if not (made.startswith(before) and text.startswith(made[len(before) :], place)):
                    return None
            written.append(rendered[len(before) :])
            if not written[-1].strip():
                return None
            spans.append((place + len(prompt) - len(before), place + len(written[-1].rstrip())))
            place += len(written[-1])
            if number & (number + 1) == 0 and spans[-1] != self.by_prefix(messages, ends[number], text):
                return None
        return spans

    def by_prefix(self, messages: Messages, end: int, text: str) -> Span:
        """Find one answer by rendering the messages before it and those up to its end."""
        prompt = self._render(messages[:end], True)
        is_last = end == len(messages) - 1
        rendered = (text if is_last else self._render(messages[: end + 1], False)).rstrip()
        if not (text.startswith(prompt) and text.startswith(rendered)):
            raise PromptRewritten(prompt)
        return len(prompt), len(rendered)

    def _what_stands_beside_answers(self, before: Messages) -> tuple[str, str, str] | None:
        """Return the end of a prompt, the text between it and an answer, and the end of an answer; None: it varies."""
        asked = [*before, turn("user", QUESTION)]
        try:
            prompt, rendered = self._render(asked, True), self._render([*asked, turn("assistant", ANSWER)], False)
            if not rendered.startswith(prompt) or rendered.count(ANSWER) != 1 or prompt.count(QUESTION) != 1:
                return None
            gap, _, ending = rendered[len(prompt) :].partition(ANSWER)
            beside = prompt.partition(QUESTION)[2], gap, ending.rstrip()
            systems = [before] if before else [[], [turn("system", "s")]]
            return beside if all(self._holds_for(beside, system) for system in systems) else None
        except (TemplateError, PromptRewritten):
            return None

    def _holds_for(self, beside: tuple[str, str, str], before: Messages) -> bool:
        messages = [*before, *(turn(role, f"{role} {n}") for n in range(3) for role in ("user", "assistant"))]
        try:
            text = self._render(messages, False)
        except TemplateError:
            return bool(before)  # a template without system messages never gets such a row
        ends = [number for number, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
        prompt = self._render(_marked(messages[:-1]), True)
        spans = _between_marks(prompt, text, [_text_of(messages[end]) for end in ends], beside)
        return spans == [self.by_prefix(messages, end, text) for end in ends]


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _marked(messages: Messages) -> Messages:
    """Put marks around each answer, inside its white space, which a template may strip."""
    marked = []
    for message in messages:
        if message["role"] == "assistant":
            text = _text_of(message)
            core = text.strip()
            message = turn("assistant", text.replace(core, f"{OPEN}{core}{CLOSE}", 1) if core else text)
        marked.append(message)
    return marked


def _beside_alike(text: str, answers: Sequence[str], beside: tuple[str, str, str]) -> list[Span] | None:
    """Find the answers in a text, the last at its end; None: the text around them does not determine it."""
    before_answer, gap, ending = beside
    if not before_answer.strip() or text.count(before_answer) != len(answers):
        return None
    spans, end = [], 0
    for answer in answers:
        first = text.index(before_answer, end) + len(before_answer)
        core = answer.strip()
        # Without an ending, white space after an answer is ambiguous.
        written = [kept for kept in (answer, core) if core and (ending or kept == core)]
        fits = next((kept for kept in written if text.startswith(gap + kept + ending, first)), None)
        if fits is None:
            return None
        end = first + len(gap + fits + ending)
        spans.append((first, end))
    return spans if not text[end:].strip() else None


def _between_marks(prompt: str, text: str, answers: Sequence[str], beside: tuple[str, str, str]) -> list[Span] | None:
    """Find the answers before the end of a marked prompt in the text; None: the marks do not determine them."""
    pieces = prompt.replace(CLOSE, OPEN).split(OPEN)
    if len(pieces) != 2 * len(answers) + 1 or not text.startswith("".join(pieces)):
        return None
    before_answer, gap, ending = beside
    spans, place = [], 0
    for number, answer in enumerate(answers):
        first = place + len(pieces[2 * number])
        last = first + len(pieces[2 * number + 1])
        place = last
        core = answer.strip()
        if not core or text[first:last] != core:
            return None
        left, right = answer[: answer.index(core)], answer[answer.index(core) + len(core) :]
        if left and not before_answer.strip():
            return None  # the white space is ambiguous
        starts = [
            first - len(gap + kept) for kept in (left, "") if text.endswith(before_answer + gap + kept, 0, first)
        ]
        stops = [last + len(kept + ending) for kept in (right, "") if text.startswith(kept + ending, last)]
        if not starts or not stops:
            return None
        spans.append((starts[0], stops[0] if ending else last))
    return spans


class Generation(Extension):
    """Support transformers' `{% generation %}` around the assistant's text; the tag writes nothing."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def writes_turns_alone(template: str) -> bool:
    """Whether each turn and each prompt depends on the words of no other turn but the first.

    Effects of roles and numbers are found by trying the template; effects of words are not. False if unclear.
    """
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols", Generation]).parse(template)
        inputs = find_undeclared_variables(tree) - {"messages"}
    except TemplateError:
        return False
    inner = list(tree.find_all(nodes.Node))
    parents = {id(child): node for node in (tree, *inner) for child in node.iter_child_nodes()}
    if tree.find(nodes.CallBlock) is not None or OF_OTHER_TURNS.intersection(map(_attribute, inner)):
        return False
    loops: list[nodes.For] = []
    if not _reads_in_order("messages", tree, parents, loops) or len(loops) != 1:
        return False
    if _reads_behind(loops[0], tree, parents):
        return False
    return all(
        _writes_by_roles(node, parents, inputs, loops[0])
        for node in inner
        if (isinstance(node, nodes.Name) and node.name == "add_generation_prompt") or _attribute(node) == "last"
    )


def _around(node: nodes.Node, parents: dict[int, nodes.Node]) -> Iterator[nodes.Node]:
    """Yield the nodes that contain a node, from the inside to the template."""
    while id(node) in parents:
        node = parents[id(node)]
        yield node


def _attribute(node: nodes.Node | None) -> Any:
    """Return the name of the attribute that an expression reads; None: the expression is of another kind."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value
    return None


def _reads_in_order(
    name: str,
    tree: nodes.Template,
    parents: dict[int, nodes.Node],
    loops: list[nodes.For],
    known: frozenset[str] = frozenset(),
) -> bool:
    """Whether the messages are used in one loop, and elsewhere only for the first message and for roles."""
    for used in tree.find_all(nodes.Name):
        if used.name != name or used.ctx != "load":
            continue
        node: nodes.Node = used
        parent = parents[id(node)]
        while _gives_messages(parent, node):
            node, parent = parent, parents[id(parent)]
        if isinstance(parent, nodes.For) and parent.iter is node:
            loops += [parent] if all(parent is not loop for loop in loops) else []
        elif isinstance(parent, nodes.Assign) and isinstance(parent.target, nodes.Name):
            alias = parent.target.name
            if alias not in {name, *known} and not _reads_in_order(alias, tree, parents, loops, known | {name}):
                return False
        elif isinstance(parent, nodes.Filter) and parent.name == "length":
            if not _compares_with_few(parents[id(parent)]):
                return False
        elif isinstance(parent, nodes.Getitem) and parent.node is node:
            if _attribute(parent) != 0 and _attribute(parents[id(parent)]) != "role":
                return False
        elif not isinstance(parent, nodes.Test | nodes.If | nodes.CondExpr | nodes.Not):
            return False
    return True


def _reads_behind(loop: nodes.For, tree: nodes.Template, parents: dict[int, nodes.Node]) -> bool:
    """Whether a macro or a namespace, which may keep what a turn has left, is read after the loop."""
    order = {id(node): number for number, node in enumerate(tree.find_all(nodes.Node))}
    end = max(order[id(node)] for node in loop.find_all(nodes.Node))
    names = {node.name for node in tree.find_all(nodes.Node) if isinstance(node, nodes.NSRef | nodes.Macro)}
    return any(
        used.name in names
        and order[id(used)] > end
        and not any(isinstance(node, nodes.Macro) for node in _around(used, parents))
        for used in tree.find_all(nodes.Name)
    )


def _gives_messages(parent: nodes.Node, node: nodes.Node) -> bool:
    """Whether the value of an expression is its part: the messages, or those after the first."""
    if isinstance(parent, nodes.Getitem) and isinstance(parent.arg, nodes.Slice):
        start, stop, step = parent.arg.start, parent.arg.stop, parent.arg.step
        first = start is None or (isinstance(start, nodes.Const) and start.value in (0, 1))
        return parent.node is node and first and stop is None and step is None
    return isinstance(parent, nodes.And | nodes.Or) or (isinstance(parent, nodes.CondExpr) and parent.test is not node)


def _compares_with_few(node: nodes.Node) -> bool:
    """Whether the number of messages is compared with a number above those that are tried."""
    return isinstance(node, nodes.Compare) and all(
        isinstance(operand.expr, nodes.Const) and operand.expr.value in range(4) for operand in node.ops
    )


def _writes_by_roles(used: nodes.Node, parents: dict[int, nodes.Node], inputs: set[str], loop: nodes.For) -> bool:
    """Whether text that is written only at the end, and its condition, depend on roles and the template's inputs."""
    turns = {target.name for target in [loop.target] if isinstance(target, nodes.Name)}
    around = list(_around(used, parents))
    conditions = [node for node in around if isinstance(node, nodes.If | nodes.CondExpr)]
    for part in (*(node.test for node in conditions), conditions[0] if conditions else around[-1]):
        if part.find(nodes.NSRef) is not None:
            return False
        for name in part.find_all(nodes.Name):
            of_turn = name.name in turns and _attribute(parents[id(name)]) == "role"
            if not (of_turn or name.name in inputs or name.name == "loop"):
                return False
    return True
