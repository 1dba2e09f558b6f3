"""What a corpus is: its spec, its splits and its sequences."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from actlake.storage.errors import BadInputError
from actlake.storage.rowspace import content_hash

#: A corpus with metadata has version 2, so that a reader that knows only 1 says what it needs instead of "damaged".
FORMAT_VERSIONS = (1, 2)

#: The splits of a corpus, each with an order of its own.
SPLITS = ("train", "heldout")

#: Names that metadata fields cannot have: columns of the sequence table, and what else rows are chosen by.
RESERVED = (
    *("sequence", "tokens", "roles", "document", "window", "offset", "source"),
    *("position", "position_from_end", "role", "token_id", "token_ids", "norm", "row"),
)


@dataclass(frozen=True, kw_only=True)
class CorpusSpec:
    """The frozen description of a corpus; ``max_tokens`` says how much of it to build now.

    ``sources`` are kept sorted: the order of sequences comes from hashes, not from the order of files.
    ``context_length`` counts BOS. ``holdout`` is a share of the documents. ``max_tokens`` counts the tokens of the
    training sequences, BOS included; None keeps all. ``tokenizer`` is the tokenizer's fingerprint. ``metadata`` are
    the fields of the documents that are kept with their sequences, sorted.
    """

    sources: tuple[str, ...]
    text_field: str = "text"
    context_length: int = 1024
    prepend_bos: bool = True
    holdout: float = 0.005
    seed: int = 0
    max_tokens: int | None = None
    tokenizer: str
    metadata: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sources: Any = self.sources
        if isinstance(sources, str) or not sources or not all(isinstance(source, str) and source for source in sources):
            raise BadInputError(f"sources = {sources!r}; give a list of at least one, e.g. ['builtin:python-docs']")
        if len(set(self.sources)) < len(self.sources):
            raise BadInputError(f"sources = {list(self.sources)!r} names one twice; leave each in once")
        if self.context_length < 2:
            raise BadInputError(f"context_length = {self.context_length} is too short; use 2 or more, e.g. 1024")
        if not 0 <= self.holdout < 1:
            raise BadInputError(f"holdout = {self.holdout} is not a share; use a number from 0 to below 1, e.g. 0.005")
        if not 0 <= self.seed < 2**64:
            raise BadInputError(f"seed = {self.seed} is out of range; use a whole number from 0 to 2**64 - 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise BadInputError(f"max_tokens = {self.max_tokens} keeps nothing; use 1 or more, or leave it out")
        if not self.tokenizer:
            raise BadInputError("tokenizer is empty; give the tokenizer's fingerprint")
        check_metadata(self.metadata, self.text_field)
        object.__setattr__(self, "metadata", tuple(sorted(self.metadata)))
        object.__setattr__(self, "sources", tuple(sorted(self.sources)))
        object.__setattr__(self, "holdout", float(self.holdout))

    @property
    def format_version(self) -> int:
        """The version of the format that such a corpus has."""
        return 2 if self.metadata else 1

    @property
    def definition(self) -> dict[str, Any]:
        """Everything but ``max_tokens``, as JSON values; without metadata no word of it, as in version 1."""
        value = asdict(self) | {"sources": list(self.sources), "metadata": list(self.metadata)}
        del value["max_tokens"]
        if not self.metadata:
            del value["metadata"]
        return value

    @property
    def definition_id(self) -> str:
        """Names the definition: 16 hex digits."""
        return content_hash(self.definition)[:16]

    @property
    def rules(self) -> dict[str, Any]:
        """What is made of the texts: the definition without where they lie (``sources``, ``text_field``)."""
        return {name: value for name, value in self.definition.items() if name not in ("sources", "text_field")}

    @property
    def n_text_tokens(self) -> int:
        """Tokens of text in a full sequence: the context without BOS."""
        return self.context_length - self.prepend_bos

    def corpus_id(self, digest: str) -> str:
        """Return the identity of the sequences that this spec makes of the documents with that digest.

        Where the texts lay (``sources``, ``text_field``) is left out: the digest pins every document, and a path
        must not decide whether the rows of two datasets line up. ``max_tokens`` only cuts a prefix.
        """
        return content_hash(self.rules | {"documents": digest})

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON values."""
        return self.definition | {"max_tokens": self.max_tokens}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` returned."""
        return cls(**{**value, "sources": tuple(value["sources"]), "metadata": tuple(value.get("metadata", ()))})

    def differences(self, other: "CorpusSpec", *, places: bool = True) -> list[str]:
        """Name the fields of the definition that differ, with the value of each: ``"seed: 0 there, 1 asked"``.

        ``places`` False leaves out where the texts lie, as ``corpus_id`` does.
        """
        mine, theirs = (self.definition, other.definition) if places else (self.rules, other.rules)
        names = [*mine, *(name for name in theirs if name not in mine)]
        return [
            f"{name}: {mine.get(name)!r} there, {theirs.get(name)!r} asked"
            for name in names
            if mine.get(name) != theirs.get(name)
        ]


def check_metadata(metadata: Any, text_field: str) -> None:
    """Raise ``BadInputError`` for metadata fields that cannot be kept."""
    if isinstance(metadata, str) or not all(isinstance(name, str) and name for name in metadata):
        raise BadInputError(f"metadata = {metadata!r}; give a list of fields of the documents, e.g. ['category']")
    if len(set(metadata)) < len(metadata):
        raise BadInputError(f"metadata = {list(metadata)!r} names one twice; leave each in once")
    if taken := [name for name in metadata if name in (*RESERVED, text_field)]:
        raise BadInputError(
            f"metadata = {list(metadata)!r}: {', '.join(map(repr, taken))} is the name of something else that is known "
            "of each sequence or row; give the field of the documents another name"
        )


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source: its name below the source's fixed folder, and its size."""

    source: str
    name: str
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name} of {self.source!r}"


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The size of one split as stored; tokens include BOS, by source too."""

    n_sequences: int
    n_tokens: int
    n_documents: int
    tokens_by_source: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSequence:
    """At most ``context_length`` tokens of one document.

    ``index`` is the place in the split's order, ``window`` the number of the piece of the document, ``offset`` the
    document's token at which its text begins. ``tokens`` int32 [T] and ``roles`` uint8 [T] are read-only. ``metadata``
    are the document's fields that the corpus keeps, None where it lacks one.
    """

    index: int
    tokens: npt.NDArray[np.int32]
    roles: npt.NDArray[np.uint8]
    document: str
    window: int
    offset: int
    source: str
    metadata: Mapping[str, str | None]
