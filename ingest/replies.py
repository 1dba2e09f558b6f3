"""Prompts and the replies that complete them: planned in batches, stored below the corpus, read back as chats.

A batch follows from the prompts alone, and so does its name: it is generated once, by whichever worker, and found by
every later build.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actlake.ingest.chat_tokens import ChatTokeniser
from actlake.ingest.documents import BadDocument, Document, Message
from actlake.ingest.tokenising import Tokenizer
from actlake.storage.arrays import crc32c
from actlake.storage.corpus_files import LABEL, open_parquet, reading, write_parquet
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.errors import BadInputError
from actlake.storage.records import ObjectRecord
from actlake.storage.redaction import redacted_name
from actlake.storage.reply_rule import ReplyRule
from actlake.storage.rowspace import content_hash
from actlake.storage.stores import Store

#: Where replies lie below the corpus.
REPLIES = "replies"
#: The label that says why a reply ended, for those who ask for it in ``metadata``.
ENDING = "ending"
#: Why a reply ended: the model was done, or ``max_new_tokens`` was reached.
ENDINGS = ("eos", "length")

#: Documents among which prompts of about one length are looked for. This and the two limits of a batch decide its
#: name: another number would have every reply generated again.
GROUP_DOCUMENTS = 4_096
#: Replies in a batch, and its tokens with all replies at full length: 4 GiB of keys and values in a model of 4B.
BATCH_REPLIES = 32
BATCH_TOKENS = 32_768

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_COLUMNS = [
    pa.field("id", pa.string()),
    pa.field("messages", _MESSAGES),
    pa.field(ENDING, pa.string()),
    pa.field("tokens", pa.list_(pa.int32())),
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A chat that a user's turn ends; ``tokens`` int32 [T], BOS and the markup that asks for an answer included."""

    document: Document
    tokens: npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """The reply number ``k`` to a prompt."""

    prompt: Prompt
    k: int

    @property
    def id(self) -> str:
        """The id of the conversation."""
        return f"{self.prompt.document.id}#{self.k}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplyBatch:
    """Replies that are generated together, of prompts of about one length; ``key`` is where they are stored."""

    rule: ReplyRule
    wanted: tuple[Wanted, ...]

    @cached_property
    def key(self) -> str:
        """The key below the corpus: a hash of the rule, and of ids, numbers and tokens."""
        wanted = [[one.prompt.document.id, one.k, one.prompt.tokens.tolist()] for one in self.wanted]
        return f"{REPLIES}/{content_hash({'rule': asdict(self.rule), 'wanted': wanted})[:32]}.parquet"


@dataclass(frozen=True, kw_only=True, eq=False)
class Reply:
    """What the model answered: its ``tokens`` int32 [T] without the one that ends it, their text, and why it ended."""

    text: str
    ending: str
    tokens: npt.NDArray[np.int32]


# --- Planning -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Documents that follow on each other, with the prompts among them, and the batches that complete those."""

    documents: tuple[Document | BadDocument | Prompt, ...]
    batches: tuple[ReplyBatch, ...]


def plan_groups(documents: Iterable[Document | BadDocument], tokenizer: Tokenizer, spec: CorpusSpec) -> Iterator[Group]:
    """Find the prompts among documents, and yield what completes them.

    A text is a prompt, and so is a chat whose last message is a user's; other chats stay as they are. Prompts that no
    template renders, or that leave no room for a reply in ``context_length``, are bad documents.
    """
    assert spec.replies is not None
    tokenise, waiting = ChatTokeniser.of(tokenizer, spec), iter(documents)
    while some := list(islice(waiting, GROUP_DOCUMENTS)):
        found = tuple(_prompts(some, tokenise, tokenizer, spec))
        prompts = [one for one in found if isinstance(one, Prompt)]
        yield Group(documents=found, batches=tuple(plan_batches(prompts, spec.replies)))


def plan_batches(prompts: Sequence[Prompt], rule: ReplyRule) -> Iterator[ReplyBatch]:
    """Cut prompts into batches by their lengths; of one length by their ids, whatever order they came in."""
    ordered = sorted(prompts, key=lambda one: (len(one.tokens), one.document.id, one.tokens.tolist()))
    batch: list[Wanted] = []
    for one in (Wanted(prompt=prompt, k=k) for prompt in ordered for k in range(rule.n)):
        width = len(one.prompt.tokens) + rule.max_new_tokens
        if batch and (len(batch) == BATCH_REPLIES or (len(batch) + 1) * width > BATCH_TOKENS):
            yield ReplyBatch(rule=rule, wanted=tuple(batch))
            batch = []
        batch.append(one)
    if batch:
        yield ReplyBatch(rule=rule, wanted=tuple(batch))


def _prompts(
    documents: Sequence[Document | BadDocument], tokenise: ChatTokeniser, tokenizer: Tokenizer, spec: CorpusSpec
) -> Iterator[Document | BadDocument | Prompt]:
    chats = [_as_chat(one) if isinstance(one, Document) else one for one in documents]
    asking = [one for one in chats if isinstance(one, Document) and one.messages[-1].role == "user"]
    found = iter(tokenise(asking, prompt=True))
    bos = [tokenizer.bos_token_id] if spec.prepend_bos else []
    for chat in chats:
        if isinstance(chat, BadDocument) or chat.messages[-1].role != "user":
            yield chat
            continue
        said = next(found)
        tokens = np.array([], np.int32) if isinstance(said, str) else np.array([*bos, *said.tokens], np.int32)
        reason = said if isinstance(said, str) else _no_room(len(tokens), spec)
        if reason is None:
            yield Prompt(document=chat, tokens=tokens)
        else:
            yield BadDocument(document=chat.id, source=chat.source, place=chat.place, reason=reason)


def _as_chat(document: Document) -> Document:
    if document.messages:
        return document
    return replace(document, text="", messages=(Message(role="user", content=document.text),))


def _no_room(n_tokens: int, spec: CorpusSpec) -> str | None:
    assert spec.replies is not None
    if n_tokens + spec.replies.max_new_tokens <= spec.context_length:
        return None
    return (
        f"its prompt has {n_tokens:,} tokens, with replies.max_new_tokens = {spec.replies.max_new_tokens:,} more than "
        f"context_length = {spec.context_length:,}; shorten it, lower max_new_tokens or raise context_length"
    )


def missing_batches(groups: Iterable[Group], stored: Collection[str]) -> Iterator[ReplyBatch]:
    """Yield the batches that are not among the stored keys."""
    return (batch for group in groups for batch in group.batches if batch.key not in stored)


# --- At rest ------------------------------------------------------------------------------------------------------


def stored_batches(store: Store) -> set[str]:
    """Return the keys of the batches that lie below a corpus."""
    return {f"{REPLIES}/{name}" for name in store.names(REPLIES)}


def reply_files(store: Store) -> dict[str, ObjectRecord]:
    """Return the record of every stored batch, for ``corpus.json``."""
    return {key: _record(store, key) for key in sorted(stored_batches(store))}


def _record(store: Store, key: str) -> ObjectRecord:
    data = store.read(key)
    return ObjectRecord(nbytes=len(data), crc32c=crc32c(data))


def replies_schema(metadata: Sequence[str]) -> pa.Schema:
    """Return the schema of a batch at rest: conversations as a source of chats has them, one a row.

    ``tokens`` are those that the model generated; ``metadata`` fields whose names are taken are left out.
    """
    taken = {field.name for field in _COLUMNS}
    return pa.schema([*_COLUMNS, *(pa.field(name, LABEL) for name in metadata if name not in taken)])


def write_replies(store: Store, batch: ReplyBatch, replies: Sequence[Reply], metadata: Sequence[str]) -> None:
    """Store the replies of a batch as one object."""
    schema = replies_schema(metadata)
    pairs = list(zip(batch.wanted, replies, strict=True))
    rows = [
        {name: one.prompt.document.metadata.get(name) for name in metadata}
        | {
            "id": one.id,
            "messages": [asdict(message) for message in _conversation(one.prompt.document, reply.text)],
            ENDING: reply.ending,
            "tokens": reply.tokens,
        }
        for one, reply in pairs
    ]
    _write(store, batch.key, schema, rows)


def _write(store: Store, key: str, schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = {
        field.name: pa.array([row[field.name] for row in rows], _plain(field.type)).cast(field.type) for field in schema
    }
    write_parquet(store, key, schema, [pa.table(columns, schema=schema)])


def _plain(kind: pa.DataType) -> pa.DataType:
    return pa.string() if kind == LABEL else kind


def _conversation(document: Document, reply: str) -> tuple[Message, ...]:
    return (*document.messages, Message(role="model", content=reply))


def replied(
    documents: Iterable[Document | BadDocument],
    tokenizer: Tokenizer,
    spec: CorpusSpec,
    store: Store,
    found: Callable[[str], None],
) -> Iterator[Document | BadDocument]:
    """Yield documents, in the place of each prompt its conversations with ids ``<id>#0``, ``<id>#1``, ...

    ``found(ENDING)`` is called where replies bring that label. Raises ``MissingObjectError`` or ``CorruptObjectError``
    for a batch that cannot be read, ``BadInputError`` for one whose document was redacted.
    """
    assert spec.replies is not None
    for group in plan_groups(documents, tokenizer, spec):
        said: dict[tuple[Prompt, int], Document] = {}
        for batch in group.batches:
            rows = _read(store, batch, spec.metadata)
            said |= {(one.prompt, one.k): _spoken(one, row, spec) for one, row in zip(batch.wanted, rows, strict=True)}
        if group.batches and ENDING in spec.metadata:
            found(ENDING)
        for one in group.documents:
            if isinstance(one, Prompt):
                yield from (said[one, k] for k in range(spec.replies.n))
            else:
                yield one


def _spoken(one: Wanted, row: Mapping[str, Any], spec: CorpusSpec) -> Document:
    document = one.prompt.document
    if row["id"] != one.id:
        raise BadInputError(
            f"document {one.id!r} was redacted, and with it the reply that a build of its prompt needs; take it out of "
            "the sources and build another corpus"
        )
    ending = {ENDING: row[ENDING]} if ENDING in spec.metadata else {}
    conversation = _conversation(document, row["messages"][-1]["content"])
    return replace(document, id=one.id, messages=conversation, metadata={**document.metadata, **ending})


def _read(store: Store, batch: ReplyBatch, metadata: Sequence[str]) -> list[dict[str, Any]]:
    with reading(f"{store.url}/{batch.key}", "delete it, if it is there, and build again: it is generated anew"):
        rows: list[dict[str, Any]] = _table(store, batch.key, replies_schema(metadata)).to_pylist()
        if len(rows) != len(batch.wanted):
            raise ValueError(f"{len(rows)} replies instead of {len(batch.wanted)}")
    return rows


def _table(store: Store, key: str, schema: pa.Schema) -> pa.Table:
    return open_parquet(pa.BufferReader(store.read(key)), schema).read()


def redact_replies(store: Store, documents: Collection[str], metadata: Sequence[str]) -> dict[str, ObjectRecord]:
    """Take conversations out of the stored batches for good; return the records of all batches."""
    schema = replies_schema(metadata)
    names = {name: redacted_name(name) for name in documents}
    for key in sorted(stored_batches(store)):
        with reading(f"{store.url}/{key}", "delete it: it is generated anew"):
            rows = _table(store, key, schema).to_pylist()
        if not any(row["id"] in names for row in rows):
            continue
        kept = [_cleared(row, names[row["id"]]) if row["id"] in names else row for row in rows]
        _write(store, key, schema, kept)
    return reply_files(store)


def _cleared(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return dict.fromkeys(row) | {"id": name, "messages": [], "tokens": []}
