"""The second half of a build: buckets to sequences, in Parquet files whose bytes follow from the sequences alone."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actlake.ingest.corpus_layout import Bucket, SelectOrder, SplitLayout, select_windows, sequences_of
from actlake.ingest.corpus_spill import label_column
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_files import LABEL, flat, sequence_stem, sequences_schema, write_by_content
from actlake.storage.corpus_spec import CorpusSpec, SplitInfo
from actlake.storage.records import ObjectRecord
from actlake.storage.redaction import Redactions, redact
from actlake.storage.rowspace import ROLE_TEXT, ROLES
from actlake.storage.stores import Store

#: Labels of a field that are listed, those with most tokens; more are counted than listed.
LABELS_LISTED, LABELS_COUNTED = 1_000, 100_000


@dataclass(frozen=True, kw_only=True)
class FileTask:
    """One file to write: the sequences ``first:stop`` of a split, from these buckets.

    The sequences before ``n_present`` are already in the corpus, which is extended.
    """

    split: str
    first: int
    stop: int
    n_present: int
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class WriteOrder:
    """What writing files needs to know. ``present`` is the corpus that is extended.

    Documents in ``redactions`` stay out though the sources still have them.
    """

    store: Store
    select: SelectOrder
    bos: int | None
    per_group: int
    present: Corpus | None = None
    redactions: Redactions = field(default_factory=dict)

    @property
    def spec(self) -> CorpusSpec:
        """The spec of the corpus."""
        return self.select.spec


@dataclass(kw_only=True)
class Tally:
    """Sizes of some sequences, which add up; tokens include BOS. ``labels`` are tokens by field and label."""

    n_sequences: int = 0
    n_tokens: int = 0
    n_documents: int = 0
    by_source: Counter[str] = field(default_factory=Counter)
    labels: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def empty(cls, spec: CorpusSpec) -> Self:
        """Return the sizes of no sequences."""
        return cls(labels={name: Counter() for name in spec.metadata})

    @classmethod
    def of(cls, info: SplitInfo) -> Self:
        """Return sizes as they were stored."""
        return cls(
            n_sequences=info.n_sequences,
            n_tokens=info.n_tokens,
            n_documents=info.n_documents,
            by_source=Counter(info.tokens_by_source),
            labels={name: Counter(counts) for name, counts in info.tokens_by_label.items()},
        )

    def add(self, other: "Tally") -> None:
        """Take in sequences that come after these: of a field with too many labels, new ones are not counted."""
        self.n_sequences += other.n_sequences
        self.n_tokens += other.n_tokens
        self.n_documents += other.n_documents
        self.by_source.update(other.by_source)
        for name, counts in other.labels.items():
            mine = self.labels.setdefault(name, Counter())
            late = set([label for label in counts if label not in mine][max(0, LABELS_COUNTED - len(mine)) :])
            mine.update({label: n for label, n in counts.items() if label not in late})

    def info(self) -> SplitInfo:
        """Return the sizes as ``corpus.json`` has them."""
        labels = {
            name: dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:LABELS_LISTED])
            for name, counts in self.labels.items()
        }
        return SplitInfo(
            n_sequences=self.n_sequences,
            n_tokens=self.n_tokens,
            n_documents=self.n_documents,
            tokens_by_source=dict(self.by_source),
            tokens_by_label=labels,
        )


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file that was stored: its key and record, and what its new sequences amount to."""

    split: str
    first: int
    key: str
    record: ObjectRecord
    tally: Tally


def plan_files(split: str, layout: SplitLayout, n_present: int, per_file: int) -> list[FileTask]:
    """Cut a split's new sequences into files; the first takes in those of the last file that was not full."""
    stop = n_present + layout.n_sequences
    return [
        FileTask(
            split=split,
            first=first,
            stop=min(first + per_file, stop),
            n_present=n_present,
            buckets=tuple(sequences_of(layout, first, first + per_file)),
        )
        for first in range(n_present // per_file * per_file, stop, per_file)
        if layout.n_sequences
    ]


def write_file(task: FileTask, order: WriteOrder) -> Written:
    """Write one file of sequences, a row group at a time."""
    spec, tally = order.spec, Tally.empty(order.spec)
    schema = sequences_schema(spec.metadata, chats=spec.chats)
    groups = _regroup(_sequences(task, order, tally, schema), order.per_group)
    tables = (encoded(table, task.first + number * order.per_group, schema) for number, table in enumerate(groups))
    ((key, record),) = write_by_content(order.store, sequence_stem(task.split, task.first), schema, tables).items()
    return Written(split=task.split, first=task.first, key=key, record=record, tally=tally)


def _sequences(task: FileTask, order: WriteOrder, tally: Tally, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the sequences of a file, labels as plain strings; count the new ones."""
    if order.present is not None and task.first < task.n_present:
        for group in range(task.first // order.per_group, -(-task.n_present // order.per_group)):
            stored = order.present.columns(task.split, group, schema.names)
            yield stored.slice(0, task.n_present - group * order.per_group).cast(plain_schema(schema))
    for bucket in task.buckets:
        windows = select_windows(bucket, order.select)
        start, stop = max(0, task.first - bucket.start), task.stop - bucket.start
        chosen = windows.slice(start, stop - start).combine_chunks()
        _count(tally, chosen, order)
        yield redact(_to_sequences(chosen, order, schema), order.redactions, order.select.n_bos)


def _regroup(tables: Iterable[pa.Table], n_rows: int) -> Iterator[pa.Table]:
    """Yield the rows of tables in tables of ``n_rows``; only the last may have fewer."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= n_rows:
            together = pa.concat_tables(waiting)
            whole = len(together) // n_rows * n_rows
            yield from (together.slice(at, n_rows).combine_chunks() for at in range(0, whole, n_rows))
            waiting = [together.slice(whole)]
    rest = pa.concat_tables(waiting).combine_chunks()
    if len(rest):
        yield rest


def encoded(table: pa.Table, first: int, schema: pa.Schema) -> pa.Table:
    """Return sequences as they are stored: numbered, labels by a dictionary of their own row group."""
    columns = {}
    for field_ in schema:
        column = table[field_.name].combine_chunks()
        columns[field_.name] = column.dictionary_encode() if field_.type == LABEL else column
    columns["sequence"] = pa.array(np.arange(first, first + len(table)))
    return pa.table(columns, schema=schema)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema with labels as plain strings."""
    return pa.schema([(item.name, pa.string() if item.type == LABEL else item.type) for item in schema])


def _to_sequences(windows: pa.Table, order: WriteOrder, schema: pa.Schema) -> pa.Table:
    """Return windows as sequences: with BOS, a role for every token, and the names of their sources."""
    tokens, offsets = flat(windows["tokens"])
    ends = pa.array(offsets + np.arange(len(offsets)) * order.select.n_bos, pa.int32())
    columns: dict[str, Any] = {name: windows[name] for name in ("document", "window", "offset")}
    columns |= {name: windows[label_column(name)] for name in order.spec.metadata}
    columns["sequence"] = pa.nulls(len(windows), pa.int64())
    columns["tokens"] = pa.ListArray.from_arrays(ends, _with_bos(tokens, offsets, order.bos, order))
    columns["source"] = pa.array(order.spec.sources).take(windows["source"])
    chat = windows["roles"].is_valid().to_numpy()
    of_token = np.repeat(chat, np.diff(offsets))
    roles = _filled(windows["roles"], of_token, ROLE_TEXT, np.uint8)
    before = np.where(chat, ROLES["template"], ROLE_TEXT)
    columns["roles"] = pa.ListArray.from_arrays(ends, _with_bos(roles, offsets, before, order))
    if order.spec.chats:
        turns = _filled(windows["turns"], of_token, 0, np.int16)
        # BOS is of the turn that it stands before.
        columns["turns"] = pa.ListArray.from_arrays(ends, _with_bos(turns, offsets, turns[offsets[:-1]], order))
    return pa.table({name: columns[name] for name in schema.names}, schema=plain_schema(schema))


def _filled(lists: pa.ChunkedArray, of_token: Any, filler: int, dtype: Any) -> npt.NDArray[Any]:
    """Return the values of lists end to end; ``filler`` where a list is absent."""
    values = np.full(len(of_token), filler, dtype=dtype)
    if of_token.any():
        values[of_token] = lists.combine_chunks().flatten().to_numpy()
    return values


def _with_bos(values: npt.NDArray[Any], offsets: npt.NDArray[Any], bos: Any, order: WriteOrder) -> npt.NDArray[Any]:
    return np.insert(values, offsets[:-1], bos) if order.select.n_bos else values


def _count(tally: Tally, windows: pa.Table, order: WriteOrder) -> None:
    n_tokens = windows["n_text"].to_numpy() + order.select.n_bos
    number, at, inverse = np.unique(windows["source"].to_numpy(), return_index=True, return_inverse=True)
    sums = np.bincount(inverse, weights=n_tokens, minlength=len(number)).astype(np.int64)
    labels = dict[str, Counter[str]]()
    for name in order.spec.metadata:
        label = windows[label_column(name)]
        table = pa.table({"label": label, "n": n_tokens}).filter(label.is_valid())
        grouped = table.group_by("label", use_threads=False).aggregate([("n", "sum")])
        labels[name] = Counter(dict(zip(grouped["label"].to_pylist(), grouped["n_sum"].to_pylist(), strict=True)))
    tally.add(
        Tally(
            n_sequences=len(windows),
            n_tokens=int(n_tokens.sum()),
            n_documents=int(pc.sum(windows["first"]).as_py() or 0),
            by_source=Counter({order.spec.sources[number[i]]: int(sums[i]) for i in np.argsort(at)}),
            labels=labels,
        )
    )
