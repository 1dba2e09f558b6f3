"""The shards of a run that could not be built: each with its rows, documents and error."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from actlake.jobs.engines.events import ShardAbandoned
from actlake.jobs.work import Task
from actlake.storage.corpus import Corpus
from actlake.storage.errors import ActlakeError
from actlake.storage.header import Header

#: How many a message names: more than a reader wants, so that a log has them; ``--json`` names all.
_NAMED = 1000


@dataclass(frozen=True, kw_only=True)
class FailedShard:
    """A shard that was given up; ``documents``: the first and the last one with rows in it, its order being random."""

    split: str
    shard: int
    first_row: int
    n_rows: int
    n_sequences: int
    documents: tuple[str, ...]
    error: str

    def __str__(self) -> str:
        rows = f"rows {self.first_row:,}..{self.first_row + self.n_rows - 1:,}"
        named = f"{self.split} shard {self.shard}, {rows}: {self.error}"
        if not self.documents:
            return named
        first, last = self.documents
        return f"{named} ({self.n_sequences:,} sequences, from document {first!r} to {last!r})"


class Failures:
    """Abandoned shards, in the order in which they were given up."""

    def __init__(self) -> None:
        # Not the errors themselves: a million of them, all the same but for their tracebacks, want a gigabyte.
        self._all: list[tuple[Task, str]] = []

    def __len__(self) -> int:
        return len(self._all)

    def add(self, event: ShardAbandoned) -> None:
        """Keep one more."""
        self._all.append((event.task, sys.intern(f"{type(event.error).__name__}: {event.error}")))

    def shards(self, headers: Mapping[str, Header], corpus: Corpus) -> Iterator[FailedShard]:
        """Yield each; its documents are read from the corpus as it is asked for."""
        for task, error in self._all:
            header = headers[task.split]
            rows = header.spec.row_space(header.n_rows).rows_of(task.shard)
            n_sequences, documents = _documents(header, rows, corpus)
            yield FailedShard(
                split=task.split,
                shard=task.shard,
                first_row=rows.start,
                n_rows=len(rows),
                n_sequences=n_sequences,
                documents=documents,
                error=error,
            )

    def text(self, headers: Mapping[str, Header], n_shards: int, corpus: Corpus) -> str:
        """Say which shards failed, with their rows, documents and errors, and what to do."""
        lines = [f"{len(self)} of {n_shards} shards could not be built; the others are committed."]
        lines += [f"  {shard}" for shard in islice(self.shards(headers, corpus), _NAMED)]
        if len(self) > _NAMED:
            lines.append(f"  and {len(self) - _NAMED:,} more; with --json all are named")
        lines.append("fix the cause and run 'actlake ingest' again: it builds just what is missing")
        return "\n".join(lines)

    def described(self, headers: Mapping[str, Header], corpus: Corpus) -> list[dict[str, Any]]:
        """Return each as JSON values."""
        return [asdict(shard) for shard in self.shards(headers, corpus)]


def _documents(header: Header, rows: range, corpus: Corpus) -> tuple[int, tuple[str, ...]]:
    """Return how many sequences have rows in a shard, and the documents of the first and the last of them."""
    try:
        found = corpus.row_index(header.spec.split, header.spec.keep).sequences_of(rows)
        ends = [next(iter(corpus.sequences(header.spec.split, i, i + 1))).document for i in (found[0], found[-1])]
    except (ActlakeError, OSError):
        return 0, ()  # The corpus may be what failed; the shard's own error says so.
    return len(found), tuple(ends)
