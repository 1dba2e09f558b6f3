"""Documents to token ids, a batch at a time; texts are dropped as soon as they are tokenised."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actlake.ingest.chat_tokens import ChatTokeniser, TokenisedChat
from actlake.ingest.documents import BadDocument, Document
from actlake.storage.corpus_spec import CorpusSpec

#: A batch of documents ends at either: enough work for the tokenizer's threads, little text in memory.
_BATCH_DOCUMENTS = 1_000
_BATCH_CHARACTERS = 1_000_000

#: ``roles`` and ``turns``, one a token, are null for plain text: all of it is text, and in no turn.
TOKENISED = pa.schema(
    [
        ("document", pa.string()),
        ("source", pa.string()),
        ("text_sha256", pa.binary(32)),
        ("tokens", pa.list_(pa.int32())),
        ("roles", pa.list_(pa.uint8())),
        ("turns", pa.list_(pa.int16())),
        ("metadata", pa.map_(pa.string(), pa.string())),
    ]
)

#: Hears how many documents and tokens are done.
Progress = Callable[[int, int], None]


class Tokenizer(Protocol):
    """What the corpus needs of a transformers tokenizer; chats need a ``backend_tokenizer`` of ``tokenizers`` too."""

    @property
    def bos_token_id(self) -> Any:
        """The id of BOS, or None."""

    def __call__(self, text: list[str], /, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Return ``{"input_ids": [[id, ...], ...]}``."""

    def __len__(self) -> int:
        """Return the size of the vocabulary."""

    def convert_ids_to_tokens(self, ids: list[int], /) -> Any:
        """Return the piece of each id."""


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into batches of about 1,000 documents or a million characters, whichever comes first."""
    batch: list[Document] = []
    n_characters = 0
    for document in documents:
        batch.append(document)
        n_characters += document.n_characters
        if len(batch) >= _BATCH_DOCUMENTS or n_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def tokenise_batch(
    documents: Sequence[Document], tokenizer: Tokenizer, spec: CorpusSpec
) -> tuple[pa.Table, list[BadDocument]]:
    """Return a table of the schema ``TOKENISED``, one row a document, without BOS and EOS; and the bad documents.

    Those give no tokens or more than ``max_document_tokens``, or are chats whose roles cannot be told. Raises
    ``SpecMismatchError`` for a tokenizer whose chats look otherwise than the spec says.
    """
    talking = [document for document in documents if document.messages]
    talks = iter(ChatTokeniser.of(tokenizer, spec)(talking) if talking else ())
    texts = iter(token_ids([document.text for document in documents if not document.messages], tokenizer))
    taken: list[tuple[Document, TokenisedChat | Sequence[int]]] = []
    bad: list[BadDocument] = []
    for document in documents:
        found = next(talks) if document.messages else next(texts)
        reason = found if isinstance(found, str) else _size(len(found), spec.max_document_tokens)
        if reason is None and not isinstance(found, str):
            taken.append((document, found))
        else:
            bad.append(
                BadDocument(document=document.id, source=document.source, place=document.place, reason=str(reason))
            )
    return _table(taken), bad


def token_ids(texts: list[str], tokenizer: Tokenizer) -> list[Sequence[int]]:
    """Return the token ids of each text, without BOS and EOS; by the tokenizer's own threads where it has some."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found: list[Sequence[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return found
    # A saved tokenizer, or a call of another user of this one, may have set them.
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _size(n_tokens: int, max_tokens: int | None) -> str | None:
    if n_tokens == 0:
        return "it gives no tokens; remove it"
    if max_tokens is not None and n_tokens > max_tokens:
        return f"it has {n_tokens:,} tokens, max_document_tokens = {max_tokens:,}; cut it, or raise the limit"
    return None


def _table(taken: Sequence[tuple[Document, TokenisedChat | Sequence[int]]]) -> pa.Table:
    documents = [document for document, _ in taken]
    found = [tokens for _, tokens in taken]
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum([len(one) for one in found], dtype=np.int32)])
    ids = itertools.chain.from_iterable(one.tokens if isinstance(one, TokenisedChat) else one for one in found)
    columns = {
        "document": [document.id for document in documents],
        "source": [document.source for document in documents],
        "text_sha256": [document.sha256 for document in documents],
        "tokens": pa.ListArray.from_arrays(offsets, np.fromiter(ids, np.int32, offsets[-1])),
        "roles": _of_chats([one.roles if isinstance(one, TokenisedChat) else None for one in found], np.uint8),
        "turns": _of_chats([one.turns if isinstance(one, TokenisedChat) else None for one in found], np.int16),
        "metadata": [list(document.metadata.items()) for document in documents],
    }
    return pa.table(columns, schema=TOKENISED)


def _of_chats(values: Sequence[npt.NDArray[Any] | None], dtype: Any) -> pa.ListArray:
    lengths = [0 if value is None else len(value) for value in values]
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    flat = np.concatenate([np.zeros(0, dtype), *(value for value in values if value is not None)])
    absent = pa.array([value is None for value in values], pa.bool_())
    return pa.ListArray.from_arrays(offsets, flat, mask=absent)
