"""Chats as text: rendered by a template, with every character's speaker and turn known.

A template says nothing of who wrote which characters. So a chat is rendered twice: as it is, and with a mark that
occurs in no text in the place of each content. What lies between the marks is markup; the contents, as they are or
with white space trimmed, must fill the places of the marks exactly.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from actlake.ingest.documents import Message
from actlake.storage.errors import BadInputError, nearest
from actlake.storage.rowspace import ROLES

#: The turn format of Gemma, for tokenizers without a template of their own.
GEMMA = "gemma"

#: What ``[corpus] chat_template`` may say: the tokenizer's own template, if it has one, or Gemma's.
CHAT_TEMPLATES = ("auto", GEMMA)

#: How reasoning is marked by templates that know of it: ``<think>...</think>``.
_THINKING = r"<think>(.*?)</think>"

#: Llama's own default, for templates that ask for today's date: the same chat always gives the same text.
_TODAY = datetime(2024, 7, 26)
_CODES = ("%d", "%m", "%b", "%B", "%y", "%Y", "%a", "%A", "%H", "%M", "%S")
_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{_TODAY.strftime(code)}')" for code in _CODES)
    + " }}{% endmacro %}"
)

#: Private characters of Unicode; the number between them says which content it is.
_MARK = re.compile("\ue000(\\d+)\ue001")

Render = Callable[[Sequence[Message], bool], str]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Characters from ``start`` to the next span's start; ``turn`` is the number of the message they belong to."""

    start: int
    role: int
    turn: int


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """A chat as text without BOS, covered by ``spans`` from its first character on."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How chats become text. ``name`` is its identity: ``gemma``, or a hash of the template.

    ``reasoning`` is the regular expression of the reasoning in a model's turn: of its first group where it has one,
    and then what it matches around that is markup. None: there is none. ``closes(markup)`` says how many characters of
    a markup still belong to the turn before it.
    """

    name: str
    render: Render
    closes: Callable[[str], int]
    reasoning: str | None

    def layout(self, messages: Sequence[Message], *, prompt: bool = False) -> Rendering:
        """Render a chat; ``prompt`` adds the markup that asks the model to go on.

        Raises ``BadInputError`` for a chat that the template refuses, or whose contents it changes or leaves out.
        """
        pieces = [piece for turn, message in enumerate(messages) for piece in self._pieces(turn, message)]
        text = self.render(messages, prompt)
        found = _MARK.split(self.render(_marked(messages, pieces), prompt))
        markups, order = found[::2], [int(number) for number in found[1::2]]
        there = set(order)
        lost = [piece for i, piece in enumerate(pieces) if i not in there]
        kept = [piece for i, piece in enumerate(pieces) if i in there]
        missing = [piece.turn for piece in lost if piece.role != "reasoning" and piece.text.strip()]
        if missing or order != sorted(there) or len(order) != len(kept):
            where = f"message {missing[0]}" if missing else "the order of the messages"
            raise BadInputError(f"the chat template does not keep {where}")
        turns = [0, *(piece.turn for piece in kept), len(messages) if prompt else len(messages) - 1]
        spans, at = list[Span](), 0
        for i, markup in enumerate(markups):
            if not text.startswith(markup, at):
                raise BadInputError(_changed(turns[i]))
            spans += self._markup(markup, at, turns[i], turns[i + 1])
            at += len(markup)
            if i < len(kept):
                n = _filled(text, at, kept[i], markups[i + 1], is_last=i + 1 == len(kept))
                spans.append(Span(start=at, role=ROLES[kept[i].role], turn=kept[i].turn))
                at += n
        return Rendering(text=text, spans=tuple(spans))

    def _markup(self, markup: str, start: int, before: int, after: int) -> list[Span]:
        n = len(markup) if before == after else self.closes(markup)
        closing = Span(start=start, role=ROLES["template"], turn=before)
        opening = Span(start=start + n, role=ROLES["template"], turn=after)
        return [closing] * (n > 0) + [opening] * (n < len(markup))

    def _pieces(self, turn: int, message: Message) -> list["_Piece"]:
        cuts, at = list[tuple[str, int, int]](), 0
        if self.reasoning is not None and message.role == "model":
            for found in re.finditer(self.reasoning, message.content, re.DOTALL):
                cuts += [("model", at, found.start()), ("reasoning", *found.span(1 if found.re.groups else 0))]
                at = found.end()
        cuts.append((message.role, at, len(message.content)))
        return [
            _Piece(turn=turn, role=role, start=start, text=message.content[start:stop])
            for role, start, stop in cuts
            if start < stop
        ]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    # What one speaker says, from ``start`` of the content of message ``turn`` on.
    turn: int
    role: str
    start: int
    text: str


def _marked(messages: Sequence[Message], pieces: Sequence[_Piece]) -> list[Message]:
    """Return the messages with a mark in the place of each piece."""
    contents = [message.content for message in messages]
    for number, piece in reversed(list(enumerate(pieces))):
        content = contents[piece.turn]
        mark = f"\ue000{number}\ue001"
        contents[piece.turn] = content[: piece.start] + mark + content[piece.start + len(piece.text) :]
    return [Message(role=message.role, content=content) for message, content in zip(messages, contents, strict=True)]


def _filled(text: str, at: int, piece: _Piece, markup: str, *, is_last: bool) -> int:
    """Return how many characters of a piece stand before the next markup: all, or all but white space at its ends."""
    whole = piece.text
    trimmed = (whole.rstrip(), whole.lstrip(), whole.strip(), whole.rstrip("\n"), whole.lstrip("\n"), whole.strip("\n"))
    for content in sorted({whole, *trimmed}, key=len, reverse=True):
        stop = at + len(content) + len(markup)
        if text.startswith(content + markup, at) and (not is_last or stop == len(text)):
            return len(content)
    raise BadInputError(_changed(piece.turn))


def _changed(turn: int) -> str:
    return (
        f"the chat template changes the content of message {turn}, so that its roles cannot be told; mend the message, "
        f"or set chat_template = '{GEMMA}'"
    )


# --- Formats ------------------------------------------------------------------------------------------------------


def render_gemma(messages: Sequence[Message], prompt: bool) -> str:
    """Render a chat as Gemma 3's template does: system text before the first user's, contents trimmed."""
    system = messages[0].content + "\n\n" if messages[0].role == "system" else ""
    turns = messages[1:] if messages[0].role == "system" else messages
    if not turns:
        raise BadInputError("a system message alone is no chat; add a user's message")
    said = []
    for i, message in enumerate(turns):
        if message.role != ("user", "model")[i % 2]:
            raise BadInputError(
                f"message {len(messages) - len(turns) + i} is a {message.role}'s; user and model must take turns, the "
                "user first, with one system message at most before them"
            )
        before = system if i == 0 else ""
        said.append(f"<start_of_turn>{message.role}\n{before}{message.content.strip()}<end_of_turn>\n")
    return "".join(said) + ("<start_of_turn>model\n" if prompt else "")


def chat_format(tokenizer: Any, template: str = "auto", reasoning: str | None = None) -> ChatFormat:
    """Return how a tokenizer's chats are rendered: by its own template, or as Gemma does where it has none.

    A template that renders as Gemma's does has that name, so that base and chat models share their corpora.
    ``reasoning`` None looks for ``<think>...</think>`` where the template knows of it.

    Raises ``BadInputError`` for a template without roles, and for an expression that cannot be understood.
    """
    if template not in CHAT_TEMPLATES:
        raise BadInputError(f"chat_template = {template!r} is unknown{nearest(template, CHAT_TEMPLATES)}")
    check_reasoning(reasoning)
    own = getattr(tokenizer, "chat_template", None) if template == "auto" else None
    name: str = GEMMA
    render: Render = render_gemma
    if own is not None:
        own = tokenizer.get_chat_template()
        if not _renders_as_gemma(of_tokenizer := _template(tokenizer, own)):
            name, render = f"template-{hashlib.sha256(own.encode()).hexdigest()[:16]}", of_tokenizer
        if reasoning is None and "<think>" in own:
            reasoning = _THINKING
    found = ChatFormat(name=name, render=render, closes=_closing(tokenizer), reasoning=reasoning)
    try:
        found.layout(_PROBES[0])
    except BadInputError as error:
        raise BadInputError(
            f"the tokenizer has a chat template without roles: {error}; set chat_template = '{GEMMA}', or mend it"
        ) from error
    return found


def check_reasoning(expression: str | None) -> None:
    """Raise ``BadInputError`` for a regular expression that cannot be understood."""
    try:
        re.compile(expression or "")
    except re.error as error:
        raise BadInputError(f"reasoning = {expression!r} is no regular expression: {error}") from error


_PROBES = tuple(
    tuple(Message(role=role, content=content) for role, content in chat)
    for chat in (
        (("user", "Hello"), ("model", "Good day")),
        (("user", "one"),),
        (("user", " one\n"), ("model", "\ntwo "), ("user", "three")),
        (("system", " Be brief. \n"), ("user", " one "), ("model", "<think>\nhm\n</think>\n\ntwo"), ("user", "")),
    )
)


def _renders_as_gemma(render: Render) -> bool:
    try:
        return all(render(chat, prompt) == render_gemma(chat, prompt) for chat in _PROBES for prompt in (False, True))
    except BadInputError:
        return False


def _template(tokenizer: Any, template: str) -> Render:
    """Return a renderer by a Jinja template; BOS, which the corpus decides on, is taken off."""
    from jinja2 import TemplateError

    names: Mapping[str, str] = {"model": "assistant"}
    bos = tokenizer.bos_token or ""
    fixed = _CLOCK + template if "strftime_now" in template else template

    def render(messages: Sequence[Message], prompt: bool) -> str:
        chat = [{"role": names.get(message.role, message.role), "content": message.content} for message in messages]
        try:
            text: str = tokenizer.apply_chat_template(
                chat, chat_template=fixed, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            # A template is a program: all that can go wrong in its arithmetic of text, it may raise.
            raise BadInputError(f"the chat template refuses it: {error}") from error
        return text.removeprefix(bos)

    return render


def _closing(tokenizer: Any) -> Callable[[str], int]:
    """Return a rule of which characters of a markup close the turn before it.

    Up to its first control token, that one and the white space after it: ``<end_of_turn>`` and a line break. A markup
    without a control token, such as two line breaks, closes nothing.
    """
    backend, known = tokenizer.backend_tokenizer, dict[str, int]()
    control = control_ids(tokenizer)

    def closes(markup: str) -> int:
        if markup not in known:
            encoding = backend.encode(markup, add_special_tokens=False)
            stops = (stop for token, (_, stop) in zip(encoding.ids, encoding.offsets, strict=True) if token in control)
            first = next(stops, 0)
            rest = markup[first:]
            known[markup] = first + len(rest) - len(rest.lstrip()) if first else 0
        return known[markup]

    return closes


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokens that no text should hold: marks of turns, BOS, EOS and the like."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)
