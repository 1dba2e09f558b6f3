"""Tokenised documents to sequences in a fixed order, in Parquet: plain functions.

The order of a corpus is a sort by hash, so that it is the same however files are cut, listed or spread over workers.
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actlake.ingest.tokenising import TokenisedDocuments, Tokenizer
from actlake.storage.corpus_files import VOCABULARY, VOCABULARY_STEM, sequence_stem, sequences_schema, write_by_content
from actlake.storage.corpus_spec import CorpusSpec, SplitInfo
from actlake.storage.errors import BadInputError, SourceError
from actlake.storage.records import ObjectRecord
from actlake.storage.rowspace import ROLE_TEXT
from actlake.storage.stores import Store

#: Sequences in one file and in one row group: fixed, so that the bytes follow from the sequences alone.
SEQUENCES_PER_FILE = 65_536
SEQUENCES_PER_ROW_GROUP = 1_024


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Sequences to be, one a window: arrays [n] of equal length; ``n_text`` is the tokens of text, without BOS."""

    document: npt.NDArray[np.int64]
    window: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int32]
    n_text: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document)

    def take(self, index: npt.NDArray[np.int64] | slice) -> "Windows":
        """Return the chosen windows."""
        return Windows(
            document=self.document[index],
            window=self.window[index],
            offset=self.offset[index],
            n_text=self.n_text[index],
        )


# --- Splits, windows, order ---------------------------------------------------------------------------------------


def _hash64(message: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "big")


def split_of(seed: int, holdout: float, document: str) -> str:
    """Return ``"heldout"`` for a share ``holdout`` of the document ids, else ``"train"``.

    Held out: blake2b-8 of ``"holdout" + seed (uint64) + id (UTF-8)`` is below ``holdout * 2**64``; big-endian.
    """
    held_out = _hash64(b"holdout" + seed.to_bytes(8, "big") + document.encode()) < holdout * 2.0**64
    return "heldout" if held_out else "train"


def order_key(seed: int, document: str, window: int) -> int:
    """Return what sequences are sorted by, uint64; equal keys go by document id (as UTF-8), then window.

    blake2b-8 of ``"order" + seed (uint64) + id (UTF-8) + window (uint32)``; all numbers big-endian.
    """
    return _hash64(b"order" + seed.to_bytes(8, "big") + document.encode() + window.to_bytes(4, "big"))


def cut_windows(documents: TokenisedDocuments, chosen: npt.NDArray[np.int64], n_text: int) -> Windows:
    """Cut the chosen documents into consecutive windows of ``n_text`` tokens; only a document's last may be shorter."""
    n_windows = -(-documents.n_tokens[chosen] // n_text)
    document = np.repeat(chosen, n_windows)
    window = np.arange(len(document)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
    offset = window * n_text
    return Windows(
        document=document,
        window=window.astype(np.int32),
        offset=offset.astype(np.int32),
        n_text=np.minimum(n_text, documents.n_tokens[document] - offset),
    )


def ordered_split(documents: TokenisedDocuments, spec: CorpusSpec, split: str) -> Windows:
    """Return all windows of one split in the corpus's order."""
    chosen = [i for i, name in enumerate(documents.ids) if split_of(spec.seed, spec.holdout, name) == split]
    windows = cut_windows(documents, np.array(chosen, dtype=np.int64), spec.n_text_tokens)
    pairs = zip(windows.document.tolist(), windows.window.tolist(), strict=True)
    keys = (order_key(spec.seed, documents.ids[document], window) for document, window in pairs)
    # Documents are numbered by ascending id.
    return windows.take(np.lexsort((windows.window, windows.document, np.fromiter(keys, np.uint64, len(windows)))))


def first_tokens(windows: Windows, spec: CorpusSpec) -> Windows:
    """Return the shortest prefix with at least ``max_tokens`` tokens, BOS included."""
    if spec.max_tokens is None:
        return windows
    running = np.cumsum(windows.n_text + spec.prepend_bos)
    return windows.take(slice(int(np.searchsorted(running, spec.max_tokens)) + 1))


# --- Writing ------------------------------------------------------------------------------------------------------


def write_split(
    store: Store, split: str, documents: TokenisedDocuments, windows: Windows, bos: int | None
) -> dict[str, ObjectRecord]:
    """Write one split's sequences in the order of ``windows``; return its files by key. ``bos`` None adds none."""
    files: dict[str, ObjectRecord] = {}
    for first in range(0, len(windows), SEQUENCES_PER_FILE):
        part = windows.take(slice(first, first + SEQUENCES_PER_FILE))
        tables = (
            _table(documents, part.take(slice(start, start + SEQUENCES_PER_ROW_GROUP)), first + start, bos)
            for start in range(0, len(part), SEQUENCES_PER_ROW_GROUP)
        )
        schema = sequences_schema(list(documents.metadata))
        files |= write_by_content(store, sequence_stem(split, first), schema, tables)
    return files


def write_vocabulary(store: Store, tokenizer: Tokenizer) -> dict[str, ObjectRecord]:
    """Write the pieces by token id; SentencePiece's mark of a space becomes a space."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    text = ["" if piece is None else piece.replace("\u2581", " ") for piece in pieces]
    table = pa.table({"token_id": range(len(text)), "piece": text}, schema=VOCABULARY)
    return write_by_content(store, VOCABULARY_STEM, VOCABULARY, [table])


def _table(documents: TokenisedDocuments, windows: Windows, first: int, bos: int | None) -> pa.Table:
    n_bos = 0 if bos is None else 1
    n_tokens = windows.n_text + n_bos
    ends = np.cumsum(n_tokens)
    starts = ends - n_tokens
    # Token i of a sequence is token i - n_bos of its window; the place of BOS is overwritten after the gather.
    source = np.arange(ends[-1]) + np.repeat(
        documents.first[windows.document] + windows.offset - n_bos - starts, n_tokens
    )
    tokens = documents.tokens[np.maximum(source, 0)]
    if bos is not None:
        tokens[starts] = bos
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    roles = np.full(len(tokens), ROLE_TEXT, dtype=np.uint8)
    names = windows.document.tolist()
    columns = {
        "sequence": np.arange(first, first + len(windows)),
        "tokens": pa.ListArray.from_arrays(offsets, tokens),
        "roles": pa.ListArray.from_arrays(offsets, roles),
        "document": [documents.ids[i] for i in names],
        "window": windows.window,
        "offset": windows.offset,
        "source": pa.array([documents.sources[i] for i in names]).dictionary_encode(),
    }
    for field, values in documents.metadata.items():
        columns[field] = pa.array([values[i] for i in names], pa.string()).dictionary_encode()
    return pa.table(columns, schema=sequences_schema(list(documents.metadata)))


def split_info(documents: TokenisedDocuments, windows: Windows, bos: int | None) -> SplitInfo:
    """Return the size of one split, with BOS counted."""
    n_tokens = windows.n_text + (bos is not None)
    by_source: dict[str, int] = {}
    for document, n in zip(windows.document.tolist(), n_tokens.tolist(), strict=True):
        source = documents.sources[document]
        by_source[source] = by_source.get(source, 0) + n
    return SplitInfo(
        n_sequences=len(windows),
        n_tokens=int(n_tokens.sum()),
        n_documents=len(np.unique(windows.document)),
        tokens_by_source=by_source,
    )


def bos_of(spec: CorpusSpec, tokenizer: Tokenizer) -> int | None:
    """Return the id to prepend, None for none; raise ``BadInputError`` for a tokenizer that lacks the BOS asked for."""
    if not spec.prepend_bos:
        return None
    if tokenizer.bos_token_id is None:
        raise BadInputError("prepend_bos = true, but this tokenizer has no BOS token; set prepend_bos = false")
    return int(tokenizer.bos_token_id)


def write_objects(
    store: Store, spec: CorpusSpec, documents: TokenisedDocuments, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Write everything but ``corpus.json``; return what that says of it: completeness, layout, splits and files.

    Raises ``SourceError`` where no document is left to train on, ``BadInputError`` for a tokenizer without BOS.
    """
    bos = bos_of(spec, tokenizer)
    every = ordered_split(documents, spec, "train")
    if len(every) == 0:
        raise SourceError(
            f"all {len(documents.ids)} documents are held out by holdout = {spec.holdout}; lower it or add documents"
        )
    train = first_tokens(every, spec)
    windows = {"train": train, "heldout": ordered_split(documents, spec, "heldout")}
    files = write_vocabulary(store, tokenizer)
    for split, chosen in windows.items():
        files |= write_split(store, split, documents, chosen, bos)
    return {
        "complete": len(train) == len(every),
        "sequences_per_file": SEQUENCES_PER_FILE,
        "sequences_per_row_group": SEQUENCES_PER_ROW_GROUP,
        "splits": {split: asdict(split_info(documents, chosen, bos)) for split, chosen in windows.items()},
        "files": {key: {"nbytes": file.nbytes, "crc32c": file.crc32c} for key, file in files.items()},
    }
