"""Copies a corpus between stores: the files that its header lists, each checked, ``corpus.json`` last."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from actlake.jobs.transfer_objects import Budget, fetch
from actlake.shards.prefetch import Workers
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_files import reading
from actlake.storage.corpus_segments import require_one_corpus
from actlake.storage.errors import BadInputError, NotFoundError, SpecMismatchError
from actlake.storage.listing import list_objects
from actlake.storage.places import corpus_kind
from actlake.storage.records import ObjectRecord
from actlake.storage.stored_json import MAX_NBYTES, parse_object
from actlake.storage.stores import Store, resolve_url


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """What became of a corpus: files copied, files that were there, bytes copied."""

    source: str
    target: str
    corpus_id: str
    n_copied: int
    n_present: int
    nbytes: int


def corpus_beside(dataset: Store, corpus: str) -> Store:
    """Return where the copy of a corpus lies that comes along with a dataset: in ``corpora/`` beside it."""
    return resolve_url(f"../corpora/{corpus.rstrip('/').rpartition('/')[2]}", dataset)


def holds_corpus(store: Store, corpus_id: str) -> bool:
    """Say whether that corpus lies there."""
    present = _opened(store)
    return present is not None and present.corpus_id == corpus_id


class CorpusCopy:
    """One corpus on its way. Raises at once for a source that is none and for a target that holds something else."""

    def __init__(self, source: Store, target: Store) -> None:
        self.source, self.target = source, target
        Corpus.open(source)  # Raises for what is none.
        # What is read here is what is copied, and put there in the end, whatever replaces it meanwhile.
        self.header = source.read("corpus.json", MAX_NBYTES)
        self.corpus, self.present = Corpus(source, parse_object(self.header)), _opened(target)
        if self.present is not None and self.present.corpus_id != self.corpus.corpus_id:
            raise SpecMismatchError(
                f"{target.url} holds corpus {self.present.corpus_id[:12]}..., {source.url} is "
                f"{self.corpus.corpus_id[:12]}...; copy to a folder of its own"
            )
        if self.present is not None:
            require_one_corpus(_chain(self.present), _chain(self.corpus), target.url, source.url)
            if strange := set(self.present.redactions) - set(self.corpus.redactions):
                raise SpecMismatchError(
                    f"{len(strange)} documents are redacted in {target.url} and not in {source.url}; redact them too"
                )
        if target.exists("spec.json"):
            raise BadInputError(f"{target.url} is a dataset; copy the corpus to a folder of its own")

    @property
    def nbytes(self) -> int:
        """Bytes of the listed files."""
        return sum(record.nbytes for record in self.corpus.files.values())

    def run(self, budget: Budget, n_threads: int, advance: Callable[[int], None]) -> CorpusReport:
        """Copy what the target lacks; a larger cut of the same corpus there stays as it is.

        Raises ``DataError`` for a damaged file: a corpus is copied whole or not at all.
        """
        larger = self.present is not None and _n_sequences(self.present) > _n_sequences(self.corpus)
        there = {} if self.present is None else self.present.files
        missing = {} if larger else {key: item for key, item in self.corpus.files.items() if there.get(key) != item}

        def copy(item: tuple[str, ObjectRecord]) -> int:
            key, record = item
            with budget.holding(2 * record.nbytes):
                self.target.write(key, fetch(self.source, key, record, f"{self.source.url}/{key}"))
            return record.nbytes

        copied = 0
        with Workers(n_threads) as workers:
            for nbytes in workers.map(copy, missing.items()):
                copied += nbytes
                advance(nbytes)
        if not larger:
            self._copy_row_indexes()
            if self.present is None or self.target.read("corpus.json") != self.header:
                self.target.write("corpus.json", self.header)
                self._drop_replaced(there)
        return CorpusReport(
            source=self.source.url,
            target=self.target.url,
            corpus_id=self.corpus.corpus_id,
            n_copied=len(missing),
            n_present=len(self.corpus.files) - len(missing),
            nbytes=copied,
        )

    def _drop_replaced(self, there: Iterable[str]) -> None:
        """Delete what the target's former header listed and this one does not: of redacted documents the texts too."""
        for key in set(there).difference(self.corpus.files):
            self.target.delete(key)

    def _copy_row_indexes(self) -> None:
        """Copy what would else be made again from all tokens; no header lists it, so its own checksums are asked."""
        for found in list(list_objects(self.source, "rows")):
            if corpus_kind(found.key) != "row index":
                continue
            data = self.source.read(found.key)
            with reading(f"{self.source.url}/{found.key}", "delete it: it is made again"):
                pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
            self.target.write(found.key, data)


def _opened(store: Store) -> Corpus | None:
    try:
        return Corpus.open(store)
    except NotFoundError:
        return None


def _chain(corpus: Corpus) -> list[str]:
    return [segment.segment_id for segment in corpus.segments]


def _n_sequences(corpus: Corpus) -> int:
    return sum(split.n_sequences for split in corpus.splits.values())
