"""Tokenised documents to windows: the held-out split, the cut, and the key that windows are sorted by; pure functions.

The order of a corpus is a sort by hash, so that it is the same however files are cut, listed or spread over workers.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actlake.ingest.corpus_spill import label_column, windows_schema
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.rowspace import ROLE_TEXT, content_hash

I64 = npt.NDArray[np.int64]

#: The number of a reply, at the end of a conversation's id (``ingest/replies.py``).
_REPLY = re.compile(r"#[0-9]+\Z")


def _hash64(message: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "big")


def split_of(seed: int, holdout: float, document: str) -> str:
    """Return ``"heldout"`` for a share ``holdout`` of the document ids, else ``"train"``.

    Held out: blake2b-8 of ``"holdout" + seed (uint64) + id (UTF-8)`` is below ``holdout * 2**64``; big-endian.
    """
    held_out = _hash64(b"holdout" + seed.to_bytes(8, "big") + document.encode()) < holdout * 2.0**64
    return "heldout" if held_out else "train"


def split_id(spec: CorpusSpec, document: str) -> str:
    """Return the id whose hash decides a document's split: its own, or that of the prompt that it replies to."""
    return _REPLY.sub("", document) if spec.split_by == "prompt" else document


def order_key(seed: int, document: str, window: int) -> int:
    """Return what sequences are sorted by, uint64; equal keys go by document id (as UTF-8), then window.

    blake2b-8 of ``"order" + seed (uint64) + id (UTF-8) + window (uint32)``; all numbers big-endian.
    """
    return _hash64(b"order" + seed.to_bytes(8, "big") + document.encode() + window.to_bytes(4, "big"))


def mixed_in(seed: int, share: float, document: str) -> bool:
    """Say whether a document is among the ``share`` that is kept of its source's.

    Kept: blake2b-8 of ``"mixture" + seed (uint64) + id (UTF-8)`` is below ``share * 2**64``; big-endian.
    """
    return _hash64(b"mixture" + seed.to_bytes(8, "big") + document.encode()) < share * 2.0**64


def digest_entry(document: str, text_sha256: bytes, metadata: dict[str, str | None] | None) -> bytes:
    """Return what the digest of the documents is over, for one of them.

    The sha256 of its id, that of its text, and where metadata are kept that of their canonical JSON.
    """
    entry = hashlib.sha256(document.encode()).digest() + text_sha256
    return entry if metadata is None else entry + bytes.fromhex(content_hash(metadata))


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Windows of documents: arrays [n] of equal length; ``n_text`` is the tokens of text, without BOS."""

    document: I64
    window: I64
    offset: I64
    n_text: I64


def cut_windows(n_tokens: I64, n_text: int, stride: int | None) -> Windows:
    """Cut documents of so many tokens into windows of ``n_text``, one beginning ``stride`` tokens after the other.

    Without a stride they follow on each other. Only a document's last may be shorter.
    """
    step = stride or n_text
    n_windows = 1 + np.maximum(0, -(-(n_tokens - n_text) // step))
    document = np.repeat(np.arange(len(n_tokens)), n_windows)
    window = np.arange(len(document)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
    offset = window * step
    return Windows(
        document=document, window=window, offset=offset, n_text=np.minimum(n_text, n_tokens[document] - offset)
    )


def window_table(documents: pa.Table, spec: CorpusSpec, origin: I64) -> pa.Table:
    """Return the windows of tokenised documents (``TOKENISED``), whose places in the sources are ``origin``, int64 [n].

    Whether a window is of the training split, its document's id says.
    """
    lists = documents["tokens"].combine_chunks()
    ends = lists.offsets.to_numpy().astype(np.int64)
    windows = cut_windows(np.diff(ends), spec.n_text_tokens, spec.stride)
    names: list[str] = documents["document"].to_pylist()
    pairs = zip(windows.document.tolist(), windows.window.tolist(), strict=True)
    key = np.fromiter((order_key(spec.seed, names[i], window) for i, window in pairs), np.uint64, len(windows.document))
    numbers = {source: number for number, source in enumerate(spec.sources)}
    source = np.array([numbers[name] for name in documents["source"].to_pylist()], dtype=np.int32)
    columns: dict[str, Any] = {
        "key": key,
        "document": documents["document"].combine_chunks().take(pa.array(windows.document)),
        "window": windows.window.astype(np.int32),
        "offset": windows.offset.astype(np.int32),
        "origin": origin[windows.document],
        "source": source[windows.document],
        "first": _first_of_document(windows.document, key, windows.window),
        "n_text": windows.n_text,
    }
    starts = ends[windows.document] + windows.offset
    columns["tokens"] = _cut(lists.values.to_numpy(), starts, windows.n_text)
    columns |= _cut_roles(documents, np.diff(ends), starts - ends[0], windows.n_text)
    values = [dict(pairs) for pairs in documents["metadata"].to_pylist()]
    for name in spec.metadata:
        labels = pa.array([of.get(name) for of in values], pa.string())
        columns[label_column(name)] = labels.take(pa.array(windows.document))
    return pa.table(columns, schema=windows_schema(spec.metadata))


def _first_of_document(document: I64, key: npt.NDArray[np.uint64], window: I64) -> npt.NDArray[np.bool_]:
    order = np.lexsort((window, key, document))
    first = np.zeros(len(document), dtype=bool)
    first[order[np.concatenate([[True], np.diff(document[order]) > 0])]] = True
    return first


def _cut(values: npt.NDArray[Any], starts: I64, lengths: I64) -> pa.ListArray:
    """Return the lists ``values[start : start + length]``; lists that follow on each other are not copied."""
    ends = np.cumsum(lengths)
    if np.array_equal(starts[1:], starts[:-1] + lengths[:-1]):
        offsets = np.append(starts, starts[-1:] + lengths[-1:])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
    index = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
    return pa.ListArray.from_arrays(pa.array(np.append(0, ends), pa.int32()), pa.array(values[index]))


def _cut_roles(documents: pa.Table, n_tokens: I64, starts: I64, lengths: I64) -> dict[str, Any]:
    """Return roles and turns of windows; both null where all documents are plain text."""
    roles = documents["roles"].combine_chunks()
    if roles.null_count == len(roles):
        kinds = {"roles": pa.uint8(), "turns": pa.int16()}
        return {name: pa.nulls(len(starts), pa.list_(kind)) for name, kind in kinds.items()}
    found = {}
    chat = np.repeat(roles.is_valid().to_numpy(zero_copy_only=False), n_tokens)
    for name, filler, dtype in (("roles", ROLE_TEXT, np.uint8), ("turns", 0, np.int16)):
        values = np.full(len(chat), filler, dtype=dtype)
        values[chat] = documents[name].combine_chunks().flatten().to_numpy()
        found[name] = _cut(values, starts, lengths)
    return found
