"""The shards of a run that could not be built: counted, and the first of them named."""

from actlake.jobs.engines.events import ShardAbandoned
from actlake.storage.corpus import Corpus
from actlake.storage.errors import ActlakeError
from actlake.storage.header import Header

#: How many are named.
_NAMED = 20


class Failures:
    """Abandoned shards: how many, and the first few with their errors."""

    def __init__(self) -> None:
        self._n = 0
        self._first: list[ShardAbandoned] = []

    def __len__(self) -> int:
        return self._n

    def add(self, event: ShardAbandoned) -> None:
        """Count one more."""
        self._n += 1
        if len(self._first) < _NAMED:
            self._first.append(event)

    def text(self, headers: dict[str, Header], n_shards: int, corpus: Corpus) -> str:
        """Say which shards failed, with their rows, documents and errors, and what to do."""
        lines = [f"{self._n} of {n_shards} shards could not be built; the others are committed."]
        lines += [f"  {_named(item, headers[item.task.split], corpus)}" for item in self._first]
        if self._n > len(self._first):
            lines.append(f"  and {self._n - len(self._first):,} more")
        lines.append("fix the cause and run 'actlake ingest' again: it builds just what is missing")
        return "\n".join(lines)


def _named(item: ShardAbandoned, header: Header, corpus: Corpus) -> str:
    rows = header.spec.row_space(header.n_rows).rows_of(item.task.shard)
    error = f"{type(item.error).__name__}: {item.error}"
    return f"{item.task}, rows {rows.start:,}..{rows.stop - 1:,}: {error}{_documents(header, rows, corpus)}"


def _documents(header: Header, rows: range, corpus: Corpus) -> str:
    """Name the first and the last document with rows in a shard: the order is random, so others lie between."""
    try:
        found = corpus.row_index(header.spec.split, header.spec.keep).sequences_of(rows)
        ends = [next(iter(corpus.sequences(header.spec.split, i, i + 1))).document for i in (found[0], found[-1])]
    except (ActlakeError, OSError):
        return ""  # The corpus may be what failed; the shard's own error says so.
    return f" ({len(found):,} sequences, from document {ends[0]!r} to {ends[1]!r})"
