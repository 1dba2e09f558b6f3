"""How many tokens the sources of a job hold, reckoned from the sizes of their files and from the first megabyte."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from actlake.ingest.documents import Document
from actlake.ingest.records import Fields
from actlake.ingest.replies import ENDING
from actlake.ingest.sources import describe_sources, read_documents
from actlake.ingest.tokenising import token_ids
from actlake.jobs.jobfile import Job
from actlake.jobs.plan.rates import Rates
from actlake.jobs.units import format_nbytes

#: Characters of text that are tokenised to find how many bytes a token has.
_SAMPLED = 1_000_000

#: Bytes of text in a stored byte, by a file's ending: a rule of thumb for compressed files.
_EXPANSION = {".gz": 3.0, ".zst": 3.0, ".parquet": 2.0, ".arrow": 1.0}


@dataclass(frozen=True, kw_only=True)
class SourceTokens:
    """About how many tokens of text there are, and how many a document has."""

    n_tokens: float
    document_tokens: float
    known_from: str


@dataclass(frozen=True, kw_only=True)
class TextRate:
    """Measured on the first documents: bytes of UTF-8 in a token, tokens in a document."""

    bytes_per_token: float
    document_tokens: float


def first_documents(job: Job, tokenizer: Any, n_characters: int) -> Iterator[Document]:
    """Yield the first documents of a job that can be used, until they have so many characters."""
    # The driver plans each run, so it imports this module.
    from actlake.jobs.corpus import UNKNOWN, corpus_spec

    fields = Fields.of(corpus_spec(job, tokenizer, UNKNOWN))
    if job.corpus.replies is not None:
        # Replies bring that label; the sources have none.
        fields = replace(fields, metadata=tuple(name for name in fields.metadata if name != ENDING))
    left = n_characters
    for document in read_documents(job.corpus.sources, fields, storage_options=dict(job.storage_options)):
        if not isinstance(document, Document):
            continue
        yield document
        left -= document.n_characters
        if left <= 0:
            return


def text_of(document: Document) -> str:
    """Return what a document says; a chat without the marks of its template, which are a few tokens a turn."""
    return document.text or "\n".join(message.content for message in document.messages)


def measure_text(job: Job, tokenizer: Any) -> TextRate | None:
    """Tokenise the first megabyte of text; None without a tokenizer."""
    if tokenizer is None:
        return None
    texts = [text_of(document) for document in first_documents(job, tokenizer, _SAMPLED)]
    n_tokens = sum(map(len, token_ids(texts, tokenizer)))
    nbytes = sum(len(text.encode()) for text in texts)
    return TextRate(bytes_per_token=nbytes / max(1, n_tokens), document_tokens=max(1.0, n_tokens / len(texts)))


def source_tokens(job: Job, rates: Rates, measured: TextRate | None) -> SourceTokens:
    """Reckon from the sizes of all files; raises ``SourceError`` where they cannot be listed."""
    files = describe_sources(job.corpus.sources, storage_options=dict(job.storage_options))
    nbytes = sum(file.nbytes * _expansion(file.name) for file in files)
    rate = measured or TextRate(bytes_per_token=rates.bytes_per_token, document_tokens=rates.tokens_per_document)
    how = "their first megabyte tokenised" if measured else "a rule of thumb"
    n_tokens, document_tokens = nbytes / rate.bytes_per_token, rate.document_tokens
    if (replies := job.corpus.replies) is not None:
        n_conversations = replies.n * n_tokens / document_tokens
        # At most: how long replies are, only the model knows.
        document_tokens += replies.max_new_tokens
        n_tokens = n_conversations * document_tokens
    return SourceTokens(
        n_tokens=n_tokens,
        document_tokens=document_tokens,
        known_from=(
            f"{format_nbytes(nbytes)} of sources at {rate.bytes_per_token:.2f} bytes a token ({how}): an estimate"
        ),
    )


def _expansion(name: str) -> float:
    for ending, factor in _EXPANSION.items():
        if name.endswith(ending):
            return factor
    return 1.0
