"""Voids the rows of redacted documents in datasets: whole shards rewritten from what is stored, revision + 1.

A shard's commit record is kept aside before it goes, so that a run that was interrupted is taken up by the next one.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.ingest.corpus_redact import redact_corpus
from actlake.jobs.work import split_store
from actlake.storage.arrays import ArraySpec, ShardIndex, crc32c, decode_chunk, encode_shard
from actlake.storage.corpus import Corpus
from actlake.storage.errors import BadInputError, NotFoundError
from actlake.storage.finish import finish
from actlake.storage.header import Header
from actlake.storage.listing import delete_empty_parents
from actlake.storage.manifest import uncommit
from actlake.storage.moments import Moments, from_parquet, of_shard, to_parquet
from actlake.storage.records import ObjectRecord, ShardRecord, commit, read_record, stats_key
from actlake.storage.rowspace import ROLE_VOID
from actlake.storage.spec import SPLITS
from actlake.storage.stores import Store

I64 = npt.NDArray[np.int64]

#: What a void row keeps: where it is from, which says nothing of the text.
_KEPT = ("rows/position", "rows/sequence")


@dataclass(frozen=True, kw_only=True)
class RedactReport:
    """What a redaction did: sequences of the corpus, and by dataset the rows voided and the shards rewritten."""

    corpus: str
    documents: tuple[str, ...]
    n_sequences: int
    rows: Mapping[str, int]
    shards: Mapping[str, int]


def redact(
    corpus: Store,
    documents: Sequence[str],
    datasets: Sequence[Store],
    on_shard: Callable[[str, int], None] = lambda url, shard: None,
) -> RedactReport:
    """Take documents out of a corpus and void their rows in these datasets; ``on_shard`` hears of rewritten shards.

    Raises ``UnknownNameError`` for an unknown document and ``BadInputError`` for a dataset of another corpus, both
    before anything is changed.
    """
    parts = [part for dataset in datasets for part in _parts(dataset, Corpus.open(corpus))]
    kept_ids = sorted({token for _, header in parts for token in header.spec.keep.exclude})
    done = redact_corpus(corpus, documents, kept_ids)
    rows, shards = dict.fromkeys((d.url for d in datasets), 0), dict.fromkeys((d.url for d in datasets), 0)
    for store, header in parts:
        url = store.url if header.spec.split == "train" else store.url.removesuffix("/heldout")
        for shard, n_void in _void(store, header, done.corpus, done.sequences[header.spec.split]):
            rows[url], shards[url] = rows[url] + n_void, shards[url] + 1
            on_shard(store.url, shard)
    return RedactReport(
        corpus=corpus.url,
        documents=tuple(documents),
        n_sequences=sum(map(len, done.sequences.values())),
        rows=rows,
        shards=shards,
    )


def _parts(dataset: Store, corpus: Corpus) -> Iterator[tuple[Store, Header]]:
    """Yield the splits of a dataset that are there."""
    for split in SPLITS:
        store = split_store(dataset, split)
        try:
            header = Header.read(store)
        except NotFoundError:
            if split == "train":
                raise
            continue
        if header.spec.corpus_id != corpus.corpus_id:
            raise BadInputError(
                f"{dataset.url} is made from corpus {header.spec.corpus_id[:12]}..., {corpus.store.url} is "
                f"{corpus.corpus_id[:12]}...; name datasets of this corpus only"
            )
        yield store, header


def _void(store: Store, header: Header, corpus: Corpus, sequences: I64) -> Iterator[tuple[int, int]]:
    """Rewrite the shards that hold rows of these sequences; yield their numbers, and how many such rows each holds."""
    space = header.spec.row_space(header.n_rows)
    first_row = corpus.row_index(header.spec.split, header.spec.keep).first_row
    spans = [np.arange(first_row[i], min(first_row[i + 1], space.n_rows)) for i in sequences.tolist()]
    rows = np.concatenate([np.zeros(0, np.int64), *spans])
    for shard in np.unique(rows // space.rows_per_shard).tolist():
        mine = rows[rows // space.rows_per_shard == shard] - shard * space.rows_per_shard
        if n_void := _Shard(store, header, shard).void(mine):
            yield shard, n_void
    finish(store, header)


class _Shard:
    """One committed shard that is rewritten with some of its rows void."""

    def __init__(self, store: Store, header: Header, shard: int) -> None:
        self._store, self._header, self._shard = store, header, shard
        self._aside = f"redacting/{shard:010d}.json"

    def void(self, rows: I64) -> int:
        """Void rows, counted from the shard's first in corpus order; return how many, 0 where they were void before."""
        record = self._set_aside()
        interrupted = record is not None
        if record is None:
            try:
                record = read_record(self._store, self._shard)
            except NotFoundError:
                # It is not committed: whoever builds it does so from the redacted corpus.
                return 0
        # Of a short last shard that is to grow, only what is there: its rows lie as they did when it was committed.
        places = self._header.spec.row_space(record.first_row + record.n_rows).places(self._shard)
        places = places[rows[rows < record.n_rows]]
        if not interrupted:
            if self._is_void(record, places):
                return 0
            self._store.write(self._aside, record.to_bytes())
        uncommit(self._store, self._shard)
        commit(self._store, self._rewritten(record, places))
        self._store.delete(self._aside)
        delete_empty_parents(self._store, self._aside)
        return len(places)

    def _set_aside(self) -> ShardRecord | None:
        try:
            return ShardRecord.from_bytes(self._store.read(self._aside), f"{self._store.url}/{self._aside}")
        except NotFoundError:
            return None

    def _is_void(self, record: ShardRecord, places: I64) -> bool:
        roles = self._read(self._header.spec.arrays()["rows/role"], record.n_rows)
        return bool((roles[places] == ROLE_VOID).all())

    def _rewritten(self, record: ShardRecord, places: I64) -> ShardRecord:
        """Write every object anew, one after another; return the record to commit."""
        stored = from_parquet(self._store.read(stats_key(self._shard)), self._widths())
        moments, objects, kept = dict[str, Moments](), dict[str, ObjectRecord](), np.zeros(0, np.int64)
        arrays = self._header.spec.arrays()
        # The roles first: they say which rows count.
        for name in sorted(arrays, key=lambda name: name != "rows/role"):
            rows = self._read(arrays[name], record.n_rows)
            if name not in _KEPT:
                rows[places] = ROLE_VOID if name == "rows/role" else 0
            if name == "rows/role":
                kept = np.flatnonzero(rows != ROLE_VOID)
            if name in stored:
                found = of_shard(rows[kept], map, record.first_row + kept)
                moments[name] = replace(found, n_nonfinite=stored[name].n_nonfinite)
            objects[name] = self._write(arrays[name], rows)
        data = to_parquet({name: moments[name] for name in self._header.spec.point_names})
        self._store.write(stats_key(self._shard), data)
        return replace(
            record,
            revision=record.revision + 1,
            n_void=record.n_rows - len(kept),
            objects={name: objects[name] for name in arrays},
            stats=ObjectRecord(nbytes=len(data), crc32c=crc32c(data)),
            provenance=replace(record.provenance, attempt=uuid.uuid4().hex, finished=_now()),
        )

    def _widths(self) -> dict[str, int]:
        return {point.name: point.width for point in self._header.spec.hook_points}

    def _read(self, array: ArraySpec, n_rows: int) -> npt.NDArray[Any]:
        key = array.object_key(self._shard)
        data, where = memoryview(self._store.read(key)), f"{self._store.url}/{key}"
        index = ShardIndex.parse(array, bytes(data[-array.index_nbytes :]), n_rows, len(data), where)
        n_chunks = -(-n_rows // array.rows_per_chunk)
        rows = np.empty(array.shape(n_chunks * array.rows_per_chunk), array.numpy_dtype)
        for chunk in range(n_chunks):
            start, out = int(index.offsets[chunk]), rows[chunk * array.rows_per_chunk :][: array.rows_per_chunk]
            decode_chunk(array, data[start : start + int(index.lengths[chunk])], out, f"{where}, chunk {chunk}")
        return rows[:n_rows]

    def _write(self, array: ArraySpec, rows: npt.NDArray[Any]) -> ObjectRecord:
        encoded = encode_shard(array, rows)
        self._store.write(array.object_key(self._shard), *encoded.parts)
        return ObjectRecord(nbytes=encoded.nbytes, crc32c=encoded.crc32c, index_crc32c=encoded.index_crc32c)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
