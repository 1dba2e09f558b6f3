"""From a record of a source, a line or a row, to a document: which fields are read, and which records are taken."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from actlake.ingest.documents import BadDocument, Document, parse_messages
from actlake.ingest.filters import Filter
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.errors import BadInputError, UnknownNameError, nearest


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line or row as it was read; ``default_id`` is its id where it brings none, ``place`` where it lies."""

    fields: Mapping[str, Any]
    default_id: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Notes of a reading: all fields that records have, and those of the metadata that a document has."""

    fields: set[str] = field(default_factory=set)
    metadata: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What is read of a record: its text or its chat, its id, its metadata, and the conditions it must fulfil.

    ``seen`` grows as records are read.
    """

    text: str = "text"
    id: str = "id"
    messages: str | None = None
    metadata: tuple[str, ...] = ()
    filters: tuple[Filter, ...] = ()
    seen: Seen = field(default_factory=Seen, compare=False)

    @classmethod
    def of(cls, spec: CorpusSpec) -> Self:
        """Return what a corpus reads; raises ``BadInputError`` for a filter that cannot be understood."""
        return cls(
            text=spec.text_field,
            id=spec.id_field,
            messages=spec.messages_field,
            metadata=spec.metadata,
            filters=tuple(Filter.parse(text) for text in spec.filters),
        )

    @property
    def contents(self) -> tuple[str, ...]:
        """The fields of which a record must have one."""
        return (self.text,) if self.messages is None else (self.messages, self.text)

    @property
    def names(self) -> set[str]:
        """Every field that is read."""
        return {*self.contents, self.id, *self.metadata, *(condition.field for condition in self.filters)}

    def require_content(self, names: Iterable[str]) -> None:
        """Raise ``BadInputError`` where neither text nor messages are among the fields that are there."""
        present = list(names)
        if not any(name in present for name in self.contents):
            key = "text_field" if self.messages is None else "messages_field"
            raise BadInputError(
                f"no field {' or '.join(map(repr, self.contents))}; set {key} to one of those present: "
                f"{', '.join(map(repr, present)) or 'none'}"
            )

    def require_seen(self) -> None:
        """Raise ``UnknownNameError`` for metadata that no document has, or a filter's field that no record has."""
        others = self.seen.fields - {self.text}
        for name in self.metadata:
            if name not in self.seen.metadata:
                raise UnknownNameError(f"no document has the metadata field {name!r}{nearest(name, others - {name})}")
        for condition in self.filters:
            if condition.field not in self.seen.fields:
                raise UnknownNameError(
                    f"filters: no record has the field {condition.field!r}{nearest(condition.field, others)}"
                )

    def document(self, record: Record, source: str) -> Document | BadDocument | None:
        """Return the document of a record, None where a filter leaves it out."""
        self.seen.fields.update(record.fields)
        name = ""
        try:
            name = _id(record.fields.get(self.id, record.default_id))
            if not all(condition.holds(record.fields) for condition in self.filters):
                return None
            metadata = {name: _label(record.fields.get(name), name) for name in self.metadata}
            document = Document(
                id=name, source=source, metadata=metadata, place=record.place, **self._content(record.fields)
            )
        except BadInputError as error:
            return BadDocument(document=name, source=source, place=record.place, reason=str(error))
        self.seen.metadata.update(name for name, value in metadata.items() if value is not None)
        return document

    def _content(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        self.require_content(fields)
        if self.messages is not None and fields.get(self.messages) is not None:
            return {"messages": parse_messages(fields[self.messages])}
        text = fields.get(self.text)
        if not isinstance(text, str):
            raise BadInputError(f"field {self.text!r} holds {type(text).__name__}, not text; set another text_field")
        return {"text": text}


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadInputError(f"the id is {value!r}; it must be text or an integer, or absent in the whole file")
    return str(value)


def _label(value: Any, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadInputError(
            f"the metadata field {name!r} holds {value!r}, which has no JSON text ({error}); make it text"
        ) from error
