"""What a corpus is made of: documents of text or of messages, and the bad ones that are named instead of skipped."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from actlake.storage.errors import BadInputError, SourceError, nearest
from actlake.storage.rowspace import content_hash

#: What may be done about a bad document.
ON_BAD = ("raise", "quarantine")

#: Who may speak, by each name that is read.
SPEAKERS = {
    "user": "user",
    "human": "user",
    "model": "model",
    "assistant": "model",
    "system": "system",
    "developer": "system",
}


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one speaker says in a chat; ``role`` is user, model or system."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """One input text or chat with a stable id; ``source`` is the source string that named it.

    ``place`` is its file with the line or row. Either ``text`` or ``messages`` says something. ``metadata`` are the
    fields that were asked for, as text, None where the document lacks one. Raises ``BadInputError`` for what cannot be
    tokenised.
    """

    id: str
    source: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    metadata: Mapping[str, str | None] = field(default_factory=dict)
    place: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            raise BadInputError("the id is empty; give it one, or drop the id field")
        if not self.text and not self.messages:
            raise BadInputError("it is empty; remove it or give it text")
        said = ((f"message {i}", message.content) for i, message in enumerate(self.messages))
        for what, value in (("id", self.id), ("text", self.text), *self.metadata.items(), *said):
            if value is not None and not _is_unicode(value):
                raise BadInputError(f"the {what} holds half of a surrogate pair; replace it by a whole character")

    @property
    def sha256(self) -> bytes:
        """The sha256 of the text; of a chat that of the canonical JSON of its messages."""
        if self.messages:
            return bytes.fromhex(content_hash([asdict(message) for message in self.messages]))
        return hashlib.sha256(self.text.encode()).digest()

    @property
    def n_characters(self) -> int:
        """About how much there is to tokenise."""
        return len(self.text) + sum(len(message.content) for message in self.messages)


@dataclass(frozen=True, kw_only=True)
class BadDocument:
    """A document that cannot be used: its id as far as it is known, where it lies, and why."""

    document: str
    source: str
    place: str
    reason: str

    def __post_init__(self) -> None:
        # What is wrong with it may be just that it cannot be stored as it is.
        for name in ("document", "place", "reason"):
            object.__setattr__(self, name, getattr(self, name).encode("utf-8", "backslashreplace").decode())

    def __str__(self) -> str:
        known = f"document {self.document!r}, " if self.document else ""
        return f"{known}{self.place} of {self.source!r}: {self.reason}"

    def error(self) -> SourceError:
        """Return what is raised for it where bad documents are not put aside."""
        return SourceError(f"{self}; mend it, or set on_bad = 'quarantine' to put such documents aside")


def good(documents: Iterable[Document | BadDocument]) -> Iterator[Document]:
    """Yield the documents; raise ``SourceError`` at the first bad one."""
    for document in documents:
        if isinstance(document, BadDocument):
            raise document.error()
        yield document


def parse_messages(value: Any) -> tuple[Message, ...]:
    """Return a record's messages; ``assistant`` is ``model``, ``developer`` is ``system``.

    A content is text, or a list of parts ``{"type": "text", "text": ...}``, which are joined. Fields of a message other
    than ``role`` and ``content`` are not read. Raises ``BadInputError`` naming the message, counted from 0.
    """
    if not isinstance(value, list) or not value:
        raise BadInputError(f"its messages are {_shown(value)}; they must be a list of {{role, content}}")
    messages = [_message(i, item) for i, item in enumerate(value)]
    if not any(message.content.strip() for message in messages):
        raise BadInputError("all of its messages are empty; remove it or give it text")
    return tuple(messages)


def _message(i: int, item: Any) -> Message:
    if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
        raise BadInputError(f"message {i} is {_shown(item)}; it must have a role and a content")
    role = item["role"]
    if not isinstance(role, str) or role not in SPEAKERS:
        raise BadInputError(f"message {i} has the unknown role {role!r}{nearest(str(role), SPEAKERS)}")
    return Message(role=SPEAKERS[role], content=_content(i, item["content"]))


def _content(i: int, content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise BadInputError(f"message {i} has a part of type {part.get('type')!r}; only text can be read")
        return "".join(part["text"] for part in content)
    raise BadInputError(f"the content of message {i} is {_shown(content)}; it must be text, or a list of parts of text")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
