"""What a corpus is: its spec, its splits and its sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from actlake.storage.errors import BadInputError, nearest
from actlake.storage.reply_rule import ReplyRule
from actlake.storage.rowspace import content_hash
from actlake.storage.stored_json import require_fields

#: A corpus that uses a newer field of the spec has version 3, one of several segments version 4, so that a reader that
#: knows only less says what it needs instead of "damaged". Version 2 had metadata without ``tokens_by_label``.
FORMAT_VERSIONS = (1, 2, 3, 4, 5)
SEGMENTS_VERSION = 4
REDACTIONS_VERSION = 5

#: Stands in a sequence for a token that was taken out; no id of a token is negative.
REDACTED = -1

#: Fields of the spec that came later: at these values they are left out of its JSON, and of every identity.
_NEWER: Mapping[str, Any] = {
    "metadata": (),
    "id_field": "id",
    "messages_field": None,
    "filters": (),
    "max_document_tokens": None,
    "stride": None,
    "chat_format": None,
    "reasoning": None,
    "weights": {},
    "quotas": {},
    "replies": None,
    "split_by": "document",
}

#: What is held out as one: a document, or all replies to a prompt, whose ids differ in a ``#`` and digits at the end.
SPLIT_BY = ("document", "prompt")

#: Where the documents lie and which of them are taken: their digest pins all that these decide.
_PLACES = (
    "sources",
    "text_field",
    "id_field",
    "messages_field",
    "filters",
    "max_document_tokens",
    "weights",
    "replies",
)

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

    ``messages_field`` is where records hold a chat, None for none; ``chat_format`` names how chats are rendered, and
    ``reasoning`` is the regular expression of the reasoning in a model's turn. ``filters`` are conditions on records,
    all of which must hold. Documents of more than ``max_document_tokens`` are bad ones. ``stride`` is the text tokens
    from one window's start to the next one's; None: no overlap.

    ``weights`` mix the sources: each has a share of the tokens of every prefix in proportion to its weight. ``quotas``
    are the most training tokens of a source, BOS included.

    ``replies`` says how prompts are completed by a model before they are tokenised. ``split_by`` is what is held out as
    one, of ``SPLIT_BY``.
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
    id_field: str = "id"
    messages_field: str | None = None
    filters: tuple[str, ...] = ()
    max_document_tokens: int | None = None
    stride: int | None = None
    chat_format: str | None = None
    reasoning: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    quotas: Mapping[str, int] = field(default_factory=dict)
    replies: ReplyRule | None = None
    split_by: str = "document"

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
        self._check_newer()
        check_mixture(self.sources, self.weights, self.quotas)
        object.__setattr__(self, "weights", {source: float(self.weights[source]) for source in sorted(self.weights)})
        object.__setattr__(self, "quotas", {source: self.quotas[source] for source in sorted(self.quotas)})
        object.__setattr__(self, "metadata", tuple(sorted(self.metadata)))
        object.__setattr__(self, "sources", tuple(sorted(self.sources)))
        object.__setattr__(self, "holdout", float(self.holdout))

    def _check_newer(self) -> None:
        if self.max_document_tokens is not None and self.max_document_tokens < 1:
            raise BadInputError(f"max_document_tokens = {self.max_document_tokens} lets nothing through; leave it out")
        if self.stride is not None and not 1 <= self.stride <= self.n_text_tokens:
            raise BadInputError(
                f"stride = {self.stride} leaves out text or stands still; use 1 to {self.n_text_tokens}, the tokens of "
                "text in a window, or leave it out for windows without overlap"
            )
        if self.split_by not in SPLIT_BY:
            raise BadInputError(f"split_by = {self.split_by!r} is not one of {', '.join(SPLIT_BY)}")
        if self.chats != (self.chat_format is not None):
            raise BadInputError("chat_format goes together with messages_field or replies: give both or none")
        if self.replies is not None and self.replies.max_new_tokens + self.prepend_bos >= self.context_length:
            raise BadInputError(
                f"replies.max_new_tokens = {self.replies.max_new_tokens} leaves no room for a prompt in context_length "
                f"= {self.context_length}; lower the one or raise the other"
            )
        if self.chats and "turns" in self.metadata:
            raise BadInputError("metadata has 'turns', which a corpus of chats keeps by itself; rename that field")

    @property
    def format_version(self) -> int:
        """The version of the format that such a corpus has."""
        newer = {name for name, default in _NEWER.items() if getattr(self, name) != default}
        return 3 if newer else 1

    @property
    def definition(self) -> dict[str, Any]:
        """Everything but ``max_tokens``, as JSON values; newer fields only where they say something."""
        value = asdict(self)
        del value["max_tokens"]
        for name, default in _NEWER.items():
            if value[name] == default:
                del value[name]
        return {name: list(item) if isinstance(item, tuple) else item for name, item in value.items()}

    @property
    def definition_id(self) -> str:
        """Names the definition: 16 hex digits."""
        return content_hash(self.definition)[:16]

    @property
    def rules(self) -> dict[str, Any]:
        """What is made of the documents: the definition without what says where they lie and which are taken."""
        return {name: value for name, value in self.definition.items() if name not in _PLACES}

    @property
    def chats(self) -> bool:
        """Whether documents may be chats, so that sequences have turns."""
        return self.messages_field is not None or self.replies is not None

    @property
    def n_text_tokens(self) -> int:
        """Tokens of text in a full sequence: the context without BOS."""
        return self.context_length - self.prepend_bos

    def corpus_id(self, digest: str) -> str:
        """Return the identity of the sequences that this spec makes of the documents with that digest.

        Where they lay and how they were chosen is left out: the digest pins every document, and a path must not decide
        whether the rows of two datasets line up. ``max_tokens`` only cuts a prefix.
        """
        return content_hash(self.rules | {"documents": digest})

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON values."""
        return self.definition | {"max_tokens": self.max_tokens}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` returned."""
        require_fields(cls, value, skip=("replies",))
        fields: dict[str, Any] = {n: tuple(item) if isinstance(item, list) else item for n, item in value.items()}
        if fields.get("replies") is not None:
            fields["replies"] = ReplyRule.from_json(fields["replies"])
        return cls(**fields)

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


def check_mixture(sources: Sequence[str], weights: Mapping[str, float], quotas: Mapping[str, int]) -> None:
    """Raise ``BadInputError`` for weights and quotas that are not of these sources, or no numbers above 0."""
    for name, given in (("weights", weights), ("quotas", quotas)):
        if strange := sorted(set(given) - set(sources)):
            raise BadInputError(f"{name} names {strange[0]!r}, which is no source{nearest(strange[0], sources)}")
        if wrong := [source for source, value in given.items() if not _is_positive(value)]:
            raise BadInputError(
                f"{name}[{wrong[0]!r}] = {given[wrong[0]]} must be above 0; leave out what is not wanted"
            )
    if weights and (absent := sorted(set(sources) - set(weights))):
        raise BadInputError(f"weights has none for {absent[0]!r}; give every source one, or leave weights out")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


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
    """The size of one split as stored; tokens include BOS, by source too.

    ``tokens_by_label`` has the tokens of each label by metadata field; of many labels the 1,000 with most.
    """

    n_sequences: int
    n_tokens: int
    n_documents: int
    tokens_by_source: Mapping[str, int]
    tokens_by_label: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the sizes as JSON values; without metadata no word of labels."""
        value = asdict(self)
        if not self.tokens_by_label:
            del value["tokens_by_label"]
        return value


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSequence:
    """At most ``context_length`` tokens of one document.

    ``index`` is the place in the split's order, ``window`` the number of the piece of the document, ``offset`` the
    document's token at which its text begins. ``tokens`` int32 [T] and ``roles`` uint8 [T] are read-only. ``turns``
    int16 [T] is the number of each token's turn, in a corpus of chats. ``metadata`` are the document's fields that the
    corpus keeps, None where it lacks one.
    """

    index: int
    tokens: npt.NDArray[np.int32]
    roles: npt.NDArray[np.uint8]
    turns: npt.NDArray[np.int16] | None = None
    document: str
    window: int
    offset: int
    source: str
    metadata: Mapping[str, str | None]

    @property
    def redacted(self) -> bool:
        """Whether the document was taken out of the corpus, so that all rows of the sequence are void."""
        return bool((self.tokens == REDACTED).any())
