"""Documents to token ids, a batch at a time; texts are dropped as soon as they are tokenised."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actlake.ingest.sources import Document
from actlake.storage.errors import SourceError
from actlake.storage.rowspace import content_hash

#: A batch of documents ends at either: enough work for the tokenizer's threads, little text in memory.
_BATCH_DOCUMENTS = 1_000
_BATCH_CHARACTERS = 1_000_000

TOKENISED = pa.schema(
    [
        ("document", pa.string()),
        ("source", pa.string()),
        ("text_sha256", pa.binary(32)),
        ("tokens", pa.list_(pa.int32())),
        ("metadata", pa.map_(pa.string(), pa.string())),
    ]
)
Progress = Callable[[int, int], None]


class Tokenizer(Protocol):
    """What the corpus needs of a transformers tokenizer."""

    @property
    def bos_token_id(self) -> Any:
        """The id of BOS, or None."""

    def __call__(self, text: list[str], /, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Return ``{"input_ids": [[id, ...], ...]}``."""

    def __len__(self) -> int:
        """Return the size of the vocabulary."""

    def convert_ids_to_tokens(self, ids: list[int], /) -> Any:
        """Return the piece of each id."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenisedDocuments:
    """All documents by ascending id (as UTF-8), their tokens end to end in ``tokens`` int32.

    Document i holds ``tokens[first[i] : first[i] + n_tokens[i]]``; both int64 [n_documents]. ``metadata`` has for each
    field the documents' values.
    """

    ids: list[str]
    sources: list[str]
    text_sha256: list[bytes]
    metadata: Mapping[str, list[str | None]]
    first: npt.NDArray[np.int64]
    n_tokens: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]

    @property
    def digest(self) -> str:
        """sha256 over, for each document by id: sha256 of its id, sha256 of its text.

        Where metadata are kept, then that of their canonical JSON too.
        """
        digest = hashlib.sha256()
        for i, (name, text) in enumerate(zip(self.ids, self.text_sha256, strict=True)):
            digest.update(hashlib.sha256(name.encode()).digest() + text)
            if self.metadata:
                digest.update(bytes.fromhex(content_hash({name: of[i] for name, of in self.metadata.items()})))
        return digest.hexdigest()


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into batches of about 1,000 documents or a million characters, whichever comes first."""
    batch: list[Document] = []
    n_characters = 0
    for document in documents:
        batch.append(document)
        n_characters += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or n_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def tokenise_batch(documents: Sequence[Document], tokenizer: Tokenizer) -> pa.Table:
    """Return a table of the schema ``TOKENISED``, one row a document, without BOS and EOS.

    Raises ``SourceError`` for a document that gives no tokens.
    """
    token_ids = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
    for document, ids in zip(documents, token_ids, strict=True):
        if len(ids) == 0:
            raise SourceError(f"document {document.id!r} of {document.source!r} gives no tokens; remove it")
    columns = {
        "document": [document.id for document in documents],
        "source": [document.source for document in documents],
        "text_sha256": [hashlib.sha256(document.text.encode()).digest() for document in documents],
        "tokens": token_ids,
        "metadata": [list(document.metadata.items()) for document in documents],
    }
    return pa.table(columns, schema=TOKENISED)


def tokenise(documents: Iterable[Document], tokenizer: Tokenizer, progress: Progress | None) -> TokenisedDocuments:
    """Tokenise all documents; ``progress`` is told documents and tokens done after each batch.

    Raises ``SourceError`` for two documents of one id.
    """
    tables = []
    n_documents = n_tokens = 0
    for batch in batches(_unique(documents)):
        tables.append(tokenise_batch(batch, tokenizer))
        n_documents += len(batch)
        n_tokens += len(tables[-1]["tokens"].combine_chunks().values)
        if progress is not None:
            progress(n_documents, n_tokens)
    return _collect(tables)


def _unique(documents: Iterable[Document]) -> Iterator[Document]:
    seen: dict[str, str] = {}
    for document in documents:
        if document.id in seen:
            raise SourceError(
                f"two documents have the id {document.id!r} (in {seen[document.id]!r} and {document.source!r}); "
                "give each its own id field, or name files of different folders by one pattern such as 'data/**/*.txt'"
            )
        seen[document.id] = document.source
        yield document


def _collect(tables: Sequence[pa.Table]) -> TokenisedDocuments:
    ids = [name for table in tables for name in table["document"].to_pylist()]
    sources = [sys.intern(source) for table in tables for source in table["source"].to_pylist()]
    hashes = [digest for table in tables for digest in table["text_sha256"].to_pylist()]
    metadata = [dict(pairs) for table in tables for pairs in table["metadata"].to_pylist()]
    lists = [chunk for table in tables for chunk in table["tokens"].chunks]
    n_tokens = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in lists]).astype(np.int64)
    first = np.cumsum(n_tokens) - n_tokens
    by_id = sorted(range(len(ids)), key=lambda i: ids[i].encode())
    return TokenisedDocuments(
        ids=[ids[i] for i in by_id],
        sources=[sources[i] for i in by_id],
        text_sha256=[hashes[i] for i in by_id],
        metadata={name: [_interned(metadata[i][name]) for i in by_id] for name in metadata[0]},
        first=first[by_id],
        n_tokens=n_tokens[by_id],
        tokens=np.concatenate([chunk.flatten().to_numpy() for chunk in lists]),
    )


def _interned(label: str | None) -> str | None:
    # Few labels on many documents.
    return None if label is None else sys.intern(label)
