"""The first half of a build: the documents of a part to runs of windows, sorted into buckets of their order keys."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actlake.ingest.corpus_parts import Part
from actlake.ingest.corpus_spill import (
    DOCUMENTS,
    Block,
    PartRecord,
    Place,
    Slice,
    record_key,
    write_documents,
    write_tables,
)
from actlake.ingest.corpus_windows import digest_entry, split_id, split_of, window_table
from actlake.ingest.documents import BadDocument, Document
from actlake.ingest.records import Fields
from actlake.ingest.replies import replied
from actlake.ingest.sources import read_file
from actlake.ingest.tokenising import Progress, Tokenizer, batches, tokenise_batch
from actlake.storage.corpus_spec import SPLITS, CorpusSpec
from actlake.storage.stores import Store

T = TypeVar("T")
R = TypeVar("R")

#: Bytes of windows in a run; with the sorted copy and its encoding, what a worker needs is about three times this.
RUN_NBYTES = 96 * 2**20
#: Bytes of sources whose windows make one bucket: a bucket is sorted in memory.
BUCKET_NBYTES = 64 * 2**20
#: Origins: the number of a part in the upper bits, that of a document in its part below.
_PART_BITS = 40


@dataclass(frozen=True, kw_only=True)
class PartOrder:
    """What a worker must know to do parts.

    ``n_buckets`` of each split is a power of two. ``replies`` is the corpus, below which the replies to prompts lie.
    """

    spec: CorpusSpec
    place: Place
    folder: str
    n_buckets: Mapping[str, int]
    on_bad: str = "raise"
    replies: Store | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)


def plan_buckets(nbytes: int, holdout: float) -> dict[str, int]:
    """Return the number of buckets of each split for sources of so many bytes: powers of two, at least one."""
    shares = {"train": 1 - holdout, "heldout": holdout}
    return {split: 1 << max(0, int(nbytes * share / BUCKET_NBYTES).bit_length()) for split, share in shares.items()}


def tokenise_part(part: Part, order: PartOrder, tokenizer: Tokenizer, progress: Progress | None = None) -> PartRecord:
    """Tokenise the documents of a part and store them as runs; its record is stored last, and returned.

    ``progress`` hears of the documents and tokens of each batch. Raises what reading the sources raises, and
    ``SourceError`` for a bad document where ``on_bad`` is ``"raise"``.
    """
    fields, bad = Fields.of(order.spec), list[BadDocument]()
    runs = _Runs(part, order)
    with ThreadPoolExecutor(1) as pool:
        work = partial(tokenise_batch, tokenizer=tokenizer, spec=order.spec)
        for documents, (table, worse) in _ahead(batches(_good(part, fields, bad, order, tokenizer)), work, pool):
            for one in worse:
                _set_aside(one, bad, order)
            unusable = {(one.document, one.place) for one in worse}
            places = [one.place for one in documents if (one.id, one.place) not in unusable]
            runs.add(table, places)
            if progress is not None:
                progress(len(table), len(table["tokens"].combine_chunks().values))
    runs.flush()
    record = PartRecord(
        name=part.name,
        slices=tuple(runs.slices),
        blocks=tuple(runs.blocks),
        tokens_by_source=runs.n_tokens,
        documents_by_source=runs.n_documents,
        bad=tuple(bad),
        seen=tuple(sorted(fields.seen.fields)),
        found=tuple(sorted(fields.seen.metadata)),
    )
    order.place.write(record_key(order.folder, part), record.to_bytes())
    return record


def read_part(part: Part, fields: Fields, order: PartOrder) -> Iterator[Document | BadDocument]:
    """Yield the documents of a part as they lie in the sources."""
    for piece in part.pieces:
        groups = None if piece.groups is None else range(*piece.groups)
        yield from read_file(piece.file, fields, row_groups=groups, storage_options=order.storage_options)


def _good(
    part: Part, fields: Fields, bad: list[BadDocument], order: PartOrder, tokenizer: Tokenizer
) -> Iterator[Document]:
    documents = read_part(part, fields, order)
    if order.replies is not None:
        documents = replied(documents, tokenizer, order.spec, order.replies, fields.seen.metadata.add)
    for document in documents:
        if isinstance(document, BadDocument):
            _set_aside(document, bad, order)
        else:
            yield document


def _set_aside(document: BadDocument, bad: list[BadDocument], order: PartOrder) -> None:
    if order.on_bad == "raise":
        raise document.error()
    bad.append(document)


def _ahead(items: Iterator[T], work: Callable[[T], R], pool: ThreadPoolExecutor) -> Iterator[tuple[T, R]]:
    """Yield items with their results, while a thread is at the next one: the tokenizer lets go of the interpreter."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > 1:
            first, result = waiting.popleft()
            yield first, result.result()
    for first, result in waiting:
        yield first, result.result()


class _Runs:
    """Windows and documents in the making; they are stored whenever there are enough for a run."""

    def __init__(self, part: Part, order: PartOrder) -> None:
        self._part, self._order = part, order
        self._windows: list[pa.Table] = []
        self._documents: list[pa.Table] = []
        self._nbytes = self._n_runs = self._n_read = 0
        self.slices: list[Slice] = []
        self.blocks: list[Block] = []
        self.n_tokens: dict[int, int] = {}
        self.n_documents: dict[int, int] = {}

    def add(self, table: pa.Table, places: list[str]) -> None:
        """Take tokenised documents, and where each lies."""
        spec, numbers = self._order.spec, np.arange(self._n_read, self._n_read + len(table), dtype=np.int64)
        self._n_read += len(table)
        if len(table) == 0:
            return
        origin = (self._part.number << _PART_BITS) + numbers
        self._windows.append(window_table(table, spec, origin))
        self._documents.append(self._described(table, origin, places))
        self._nbytes += self._windows[-1].nbytes
        if self._nbytes >= RUN_NBYTES:
            self.flush()

    def _described(self, table: pa.Table, origin: Any, places: list[str]) -> pa.Table:
        spec = self._order.spec
        names, metadata = table["document"].to_pylist(), table["metadata"].to_pylist()
        n_tokens = pc.list_value_length(table["tokens"]).to_pylist()
        sources = [spec.sources.index(source) for source in table["source"].to_pylist()]
        for source, n in zip(sources, n_tokens, strict=True):
            self.n_tokens[source] = self.n_tokens.get(source, 0) + n
            self.n_documents[source] = self.n_documents.get(source, 0) + 1
        entries = [
            digest_entry(name, text, dict(labels) if spec.metadata else None)
            for name, text, labels in zip(names, table["text_sha256"].to_pylist(), metadata, strict=True)
        ]
        columns = {
            "document": names,
            "origin": origin,
            "entry": entries,
            "source": sources,
            "n_tokens": n_tokens,
            "place": places,
        }
        return pa.table(columns, schema=DOCUMENTS)

    def flush(self) -> None:
        """Store what was taken as a run."""
        if not self._windows:
            return
        key = f"{self._order.folder}/runs/{self._part.number:06d}-{self._part.name}-{self._n_runs:05d}"
        self.slices += _write_windows(self._order, f"{key}-windows", pa.concat_tables(self._windows))
        self._windows = []
        self.blocks += write_documents(self._order.place, f"{key}-documents", pa.concat_tables(self._documents))
        self._documents, self._nbytes, self._n_runs = [], 0, self._n_runs + 1


def _write_windows(order: PartOrder, key: str, windows: pa.Table) -> list[Slice]:
    bucket = bucket_of(windows, order)
    ordered = windows.combine_chunks().take(pa.array(np.argsort(bucket, kind="stable")))
    buckets, sizes = np.unique(bucket, return_counts=True)
    ends = np.cumsum(sizes)
    tables = [ordered.slice(end - size, size) for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)]
    extents = write_tables(order.place, key, tables)
    return [
        Slice(bucket=int(number), extent=extent, counts=_counts(table))
        for number, extent, table in zip(buckets, extents, tables, strict=True)
    ]


def bucket_of(windows: pa.Table, order: PartOrder) -> Any:
    """Return the bucket of each window, int64 [n]: by the upper bits of its key; those of the held-out split follow."""
    spec = order.spec
    names = windows["document"].combine_chunks().dictionary_encode()
    ids = [split_id(spec, name) for name in names.dictionary.to_pylist()]
    held_out = np.array([split_of(spec.seed, spec.holdout, name) != SPLITS[0] for name in ids])
    of_window = held_out[names.indices.to_numpy()]
    key = windows["key"].to_numpy()
    train, held = (_upper(key, order.n_buckets[split]) for split in SPLITS)
    return np.where(of_window, order.n_buckets[SPLITS[0]] + held, train)


def _upper(key: Any, n_buckets: int) -> Any:
    bits = n_buckets.bit_length() - 1
    return np.zeros(len(key), np.int64) if bits == 0 else (key >> np.uint64(64 - bits)).astype(np.int64)


def _counts(table: pa.Table) -> dict[int, tuple[int, int]]:
    grouped = table.group_by("source").aggregate([("n_text", "count"), ("n_text", "sum")])
    columns = (grouped[name].to_pylist() for name in ("source", "n_text_count", "n_text_sum"))
    return {source: (n, tokens) for source, n, tokens in zip(*columns, strict=True)}
