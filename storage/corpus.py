"""Reading corpora: tokenised sequences in a fixed order, by index.

``corpus.json`` is written last and makes the corpus visible. A larger ``max_tokens`` extends the same prefix: its last
file is a longer one of another name that begins with the same sequences. The smaller corpus stays whole until the
larger is, and a handle of the smaller then reads on in the files of the larger.
"""

import io
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actlake.storage.arrays import crc32c
from actlake.storage.corpus_files import (
    QUARANTINE,
    QUARANTINE_STEM,
    REBUILD,
    ROW_INDEX,
    VOCABULARY,
    VOCABULARY_STEM,
    ObjectReader,
    flat,
    open_parquet,
    reading,
    sequence_stem,
    sequences_schema,
    to_sequences,
    write_parquet,
)
from actlake.storage.corpus_segments import Segment
from actlake.storage.corpus_spec import FORMAT_VERSIONS, CorpusSpec, SourceFile, SplitInfo, TokenSequence
from actlake.storage.errors import (
    BadInputError,
    CorruptObjectError,
    FormatVersionError,
    MissingObjectError,
    NotFoundError,
)
from actlake.storage.parquet_bounds import check_footer, require_whole
from actlake.storage.records import ObjectRecord
from actlake.storage.row_index import RowIndex, count_rows
from actlake.storage.rowspace import ROLES, KeepRule
from actlake.storage.spec import SPLITS
from actlake.storage.stored_json import MAX_NBYTES, parse_object, require_fields
from actlake.storage.stores import Store

FORMAT = "actlake corpus"
_CACHED_GROUPS = 4
_Read = TypeVar("_Read")
#: Applies a function to each of some row groups, in their order.
Run = Callable[[Callable[[int], npt.NDArray[np.int64]], Sequence[int]], Iterable[npt.NDArray[np.int64]]]


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The types of ``corpus.json``."""

    corpus_id: str
    complete: bool
    splits: Mapping[str, dict]  # type: ignore[type-arg]  # looked at one by one
    files: Mapping[str, dict]  # type: ignore[type-arg]
    source_files: tuple[dict, ...]  # type: ignore[type-arg]
    sequences_per_file: int
    sequences_per_row_group: int
    redactions: Mapping[str, list] = field(default_factory=dict)  # type: ignore[type-arg]


class Corpus:
    """Read handle of a stored corpus. Pickles as its store and header; not for several threads at a time."""

    def __init__(self, store: Store, header: Mapping[str, Any]) -> None:
        self.store = store
        self.spec = CorpusSpec.from_json(header["spec"])
        self.corpus_id: str = header["corpus_id"]
        self.complete: bool = header["complete"]
        require_fields(_Header, header)
        # Each of them is there, if only with no sequence.
        self.splits = {name: SplitInfo(**require_fields(SplitInfo, header["splits"][name])) for name in SPLITS}
        self.files: dict[str, ObjectRecord] = {
            key: ObjectRecord(**require_fields(ObjectRecord, value)) for key, value in header["files"].items()
        }
        self.source_files = [SourceFile(**require_fields(SourceFile, value)) for value in header["source_files"]]
        self.segments = [Segment.from_json(value) for value in header.get("segments", ())] or [
            Segment(
                segment_id=self.corpus_id,
                sources=self.spec.sources,
                source_files=tuple(self.source_files),
                splits=self.splits,
            )
        ]
        self.mixture: Mapping[str, Mapping[str, Any]] = header.get("mixture", {})
        #: By sha256 of the id of each document that was taken out: the token ids of it that stayed.
        self.redactions: Mapping[str, Sequence[int]] = header.get("redactions", {})
        self._per_file: int = header["sequences_per_file"]
        self.sequences_per_group: int = header["sequences_per_row_group"]
        if not 1 <= self.sequences_per_group <= self._per_file <= 2**24:
            raise ValueError(f"{self.sequences_per_group} sequences in a row group, {self._per_file} in a file")
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open_files", "_groups")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._open_files: dict[str, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[str, int], list[TokenSequence]] = OrderedDict()

    @classmethod
    def open(cls, store: Store) -> "Corpus":
        """Open a corpus.

        Raises ``NotFoundError`` where there is none (or an unfinished one), ``FormatVersionError`` for another format
        version, ``CorruptObjectError`` for a damaged ``corpus.json``.
        """
        try:
            data = store.read("corpus.json", MAX_NBYTES)
        except NotFoundError as error:
            raise NotFoundError(f"no corpus at {store.url}; 'actlake ingest' builds one") from error
        where = f"{store.url}/corpus.json"
        try:
            header = parse_object(data)
            if header["format"] != FORMAT:
                raise CorruptObjectError(f"{where} describes a {header['format']!r}, not a corpus")
            if header["format_version"] not in FORMAT_VERSIONS:
                raise FormatVersionError(
                    f"{where} has format version {header['format_version']}; this actlake reads "
                    f"{', '.join(map(str, FORMAT_VERSIONS))}: pip install -U actlake"
                )
            return cls(store, header)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptObjectError(f"{where} is damaged ({type(error).__name__}: {error}); {REBUILD}") from error

    def sequences(self, split: str, start: int, stop: int) -> list[TokenSequence]:
        """Return the sequences ``start:stop`` of a split's order; only the row groups that hold them are read.

        Raises ``BadInputError`` for a range that is not there, ``DataError`` for files that are absent or damaged.
        """
        n_sequences = self._split(split).n_sequences
        if not 0 <= start <= stop <= n_sequences:
            raise BadInputError(f"sequences {start}:{stop} are not in {split!r}; it holds 0:{n_sequences}")
        found: list[TokenSequence] = []
        for group in range(start // self.sequences_per_group, self.n_groups(split)):
            first = group * self.sequences_per_group
            if first >= stop:
                break
            found += self._group(split, group)[max(0, start - first) : stop - first]
        return found

    def n_groups(self, split: str) -> int:
        """Return how many row groups hold a split; group g begins with sequence ``g * sequences_per_group``."""
        return -(-self._split(split).n_sequences // self.sequences_per_group)

    def columns(self, split: str, group: int, names: Sequence[str]) -> pa.Table:
        """Return columns of the sequences of one row group, without reading the others; raises as ``sequences``."""
        table = self._read_group(split, group, ["sequence", *names], lambda table: table)
        return table.select(list(names)).slice(0, self._split(split).n_sequences - group * self.sequences_per_group)

    def row_index(self, split: str, keep: KeepRule, run: Run = map) -> RowIndex:
        """Return the first row of every sequence under a keep rule; made and stored at first use.

        ``run(function, row groups)`` yields the function's value for each, in their order: ``map``, or a cluster's.
        The stored bytes follow from the corpus and the rule, so that it does not matter who stores them.
        """
        n_sequences = self._split(split).n_sequences
        key = f"rows/{keep.keep_id}/{split}.parquet"
        stored = self._stored_index(key)
        if stored is not None and stored.n_sequences >= n_sequences:
            return RowIndex(stored.first_row[: n_sequences + 1])
        # What a smaller corpus counted stays: only what came after it is read.
        first = 0 if stored is None else stored.n_sequences // self.sequences_per_group
        known = [] if stored is None else [np.diff(stored.first_row[: first * self.sequences_per_group + 1])]
        counts = run(partial(self.count_rows, split, keep), range(first, self.n_groups(split)))
        index = RowIndex.from_counts(np.concatenate([np.zeros(0, np.int64), *known, *counts])[:n_sequences])
        schema = ROW_INDEX.with_metadata({"corpus_id": self.corpus_id})
        write_parquet(self.store, key, schema, [pa.table({"first_row": index.first_row}, schema=schema)])
        return index

    def tokens_by_role(self, split: str) -> dict[str, int]:
        """Return how many tokens of a split have each role, by name, those that there are; reads the roles of all."""
        counts = np.zeros(256, dtype=np.int64)
        for group in range(self.n_groups(split)):
            counts += np.bincount(flat(self.columns(split, group, ["roles"])["roles"])[0], minlength=256)
        return {name: int(counts[code]) for name, code in ROLES.items() if counts[code]}

    def pieces(self) -> list[str]:
        """Return the vocabulary by token id as readable text."""
        table = self._read_listed(VOCABULARY_STEM, lambda key: self._file(key, VOCABULARY).read(["piece"]))
        pieces: list[str] = table["piece"].to_pylist()
        return pieces

    def quarantine(self) -> pa.Table:
        """Return the documents that could not be used: a table of ``QUARANTINE``."""
        if not any(key.startswith(QUARANTINE_STEM) for key in self.files):
            return QUARANTINE.empty_table()
        table: pa.Table = self._read_listed(QUARANTINE_STEM, lambda key: self._file(key, QUARANTINE).read())
        return table

    @property
    def chain(self) -> tuple[str, ...]:
        """The ids of the segments, in their order."""
        return tuple(segment.segment_id for segment in self.segments)

    def verify(self) -> int:
        """Compare every file that ``corpus.json`` lists with its size and crc32c there; return how many there are.

        Raises ``MissingObjectError`` or ``CorruptObjectError`` for the first that differs, with its name and the
        remedy. Row indexes are not listed: they are checked when they are read, and made again at need.
        """
        for key, record in self.files.items():
            with reading(f"{self.store.url}/{key}"):
                data = self.store.read(key)
            if (len(data), crc32c(data)) != (record.nbytes, record.crc32c):
                raise CorruptObjectError(
                    f"{self.store.url}/{key}: {record.nbytes} bytes with crc32c {record.crc32c:#010x} expected, "
                    f"{len(data)} with {crc32c(data):#010x} found; {REBUILD}"
                )
        return len(self.files)

    def holds(self, max_tokens: int | None) -> bool:
        """Say whether a corpus cut at ``max_tokens`` is a prefix of this one."""
        return self.complete or (max_tokens is not None and self.splits["train"].n_tokens >= max_tokens)

    def _split(self, split: str) -> SplitInfo:
        if split not in self.splits:
            raise BadInputError(f"no split {split!r}; the splits are {', '.join(self.splits)}")
        return self.splits[split]

    def _group(self, split: str, group: int) -> list[TokenSequence]:
        if (split, group) not in self._groups:
            self._groups[split, group] = self._read_group(split, group, None, to_sequences)
            if len(self._groups) > _CACHED_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end((split, group))
        return self._groups[split, group]

    def count_rows(self, split: str, keep: KeepRule, group: int) -> npt.NDArray[np.int64]:
        """Return int64 [n]: how many rows each sequence of a row group has under a keep rule."""
        names = ["sequence", "tokens", "roles"]
        table = self._read_group(split, group, names, lambda table: table)
        tokens, offsets = flat(table["tokens"])
        return count_rows(tokens, flat(table["roles"])[0], offsets.astype(np.int64), keep)

    def _read_group(
        self, split: str, group: int, columns: Sequence[str] | None, decode: Callable[[pa.Table], _Read]
    ) -> _Read:
        first = group * self.sequences_per_group
        stem = sequence_stem(split, first // self._per_file * self._per_file)
        return self._read_listed(stem, lambda key: decode(self._table(key, split, first, columns)))

    def _read_listed(self, stem: str, read: Callable[[str], _Read]) -> _Read:
        """Read from the listed file of that name; one that is gone is looked for in the present ``corpus.json``."""
        key = self._listed(stem)
        try:
            with reading(f"{self.store.url}/{key}"):
                return read(key)
        except MissingObjectError:
            if not self._follow():
                raise
        return self._read_listed(stem, read)

    def _follow(self) -> bool:
        """Take over the files of a larger cut that has replaced this one; say whether they are others."""
        present = Corpus.open(self.store)
        if present.corpus_id != self.corpus_id or present.files == self.files:
            return False
        self.files = present.files
        self._open_files.clear()
        return True

    def _listed(self, stem: str) -> str:
        for key in self.files:
            if key.startswith(stem):
                return key
        raise CorruptObjectError(f"{self.store.url}/corpus.json lists no {stem}*.parquet; {REBUILD}")

    def _table(self, key: str, split: str, first: int, columns: Sequence[str] | None) -> pa.Table:
        table = self._file(key, sequences_schema(self.spec.metadata, self.spec.chats)).read_row_group(
            first % self._per_file // self.sequences_per_group, columns=columns
        )
        n_least = min(self.sequences_per_group, self.splits[split].n_sequences - first)
        require_whole(table, len(table), nullable=self.spec.metadata)
        numbers = table["sequence"].to_numpy()
        if len(numbers) < n_least or not np.array_equal(numbers, np.arange(first, first + len(numbers))):
            raise ValueError(f"sequences {first}:{first + n_least} are not where they should be")
        return table

    def _stored_index(self, key: str) -> RowIndex | None:
        if not self.store.exists(key):
            return None
        with reading(f"{self.store.url}/{key}", "delete it: it is made again"):
            data = self.store.read(key, MAX_NBYTES)
            # Prefix sums, even packed, take more than a bit each.
            file = open_parquet(io.BytesIO(data), ROW_INDEX)
            check_footer(file.metadata, n_rows=8 * len(data))
            if (file.schema_arrow.metadata or {}).get(b"corpus_id") != self.corpus_id.encode():
                return None
            table = file.read()
            require_whole(table, len(table))
            return RowIndex(table["first_row"].to_numpy())

    def _file(self, key: str, schema: pa.Schema) -> pq.ParquetFile:
        if key not in self._open_files:
            file = open_parquet(ObjectReader(self.store, key), schema)
            # Of a file of sequences, of which the tokens are most; of the vocabulary and all else 2**24 rows.
            most = self._per_file if key.startswith("sequences/") else 2**24
            n_values = self.sequences_per_group * self.spec.context_length
            check_footer(file.metadata, n_rows=most, n_values=max(most, n_values))
            self._open_files[key] = file
        return self._open_files[key]
