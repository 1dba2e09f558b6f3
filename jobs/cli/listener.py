"""Shows how an ingestion goes: bars at a terminal, a line a shard where output goes to a file or a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID

from actlake.jobs.cli.progress import bars, format_nbytes
from actlake.jobs.engines.events import Event, RowsCaptured, ShardAbandoned, ShardCommitted
from actlake.jobs.ingestion import Listener, Plan


class TerminalListener(Listener):
    """Shows notes, the corpus bar and the shard bar with rows/s, failures and the time left."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._corpus: TaskID | None = None
        self._sorted: TaskID | None = None
        self._replies: TaskID | None = None
        self._shards: TaskID | None = None
        self._plan: Plan | None = None
        self._planned_at = 0.0
        self._first: tuple[float, int] | None = None
        self._n_rows = self._n_committed = self._n_failed = self._nbytes = 0
        self._rows_of_committed = 0

    def note(self, text: str) -> None:
        self._console.print(text)

    def documents(self, n_documents: int, n_tokens: int) -> None:
        if self._corpus is None:
            self._corpus = self._progress.add_task("corpus", total=None, detail="")
        detail = f"{n_documents:,} documents, {n_tokens:,} tokens"
        self._progress.update(self._corpus, completed=n_documents, detail=detail)

    def replies(self, n_done: int, n_missing: int) -> None:
        if self._replies is None:
            self._replies = self._progress.add_task("replies", total=n_missing, detail="loading the model")
            self._console.print(f"{n_missing:,} replies to generate")
        if n_done:
            self._progress.update(self._replies, completed=n_done, detail=f"{n_done:,} replies")

    def sequences(self, n_written: int, n_sequences: int) -> None:
        if self._sorted is None:
            self._sorted = self._progress.add_task("sort", total=n_sequences, detail="")
        self._progress.update(self._sorted, completed=n_written, detail=f"{n_written:,} sequences")

    def planned(self, plan: Plan) -> None:
        if self._corpus is not None:
            self._progress.update(self._corpus, total=1, completed=1)
        self._plan, self._planned_at = plan, time.monotonic()
        n_done = plan.n_shards - len(plan.missing)
        already = f", {n_done} of them committed before" if n_done else ""
        self._console.print(f"{plan.n_rows:,} rows in {plan.n_shards} shards{already}")
        if plan.missing:
            self._shards = self._progress.add_task("shards", total=plan.n_missing_rows, detail="loading the model")

    def event(self, event: Event) -> None:
        if isinstance(event, RowsCaptured):
            self._n_rows += event.n_rows
        elif isinstance(event, ShardCommitted):
            self._n_committed += 1
            self._rows_of_committed += event.record.n_rows
            self._nbytes += event.record.nbytes
            if not self._console.is_terminal:
                self._console.print(self._line(event))
        elif isinstance(event, ShardAbandoned):
            self._n_failed += 1
            self._console.print(f"{event.task} failed: {type(event.error).__name__}: {event.error}")
        if self._first is None:
            self._first = time.monotonic(), max(self._n_rows, self._rows_of_committed)
        if self._shards is not None:
            done = max(self._n_rows, self._rows_of_committed)
            self._progress.update(self._shards, completed=done, detail=self._detail())

    def _rate(self) -> float:
        # From the first report on: loading the model says nothing of the rows to come.
        n_rows = max(self._n_rows, self._rows_of_committed)
        started, n_before = self._first or (self._planned_at, 0)
        if n_rows == n_before:
            started, n_before = self._planned_at, 0
        return (n_rows - n_before) / max(1e-9, time.monotonic() - started)

    def _detail(self) -> str:
        assert self._plan is not None
        failed = f", {self._n_failed} failed" if self._n_failed else ""
        total = len(self._plan.missing)
        return (
            f"{self._n_committed}/{total} committed{failed}, {self._rate():,.0f} rows/s, {format_nbytes(self._nbytes)}"
        )

    def _line(self, event: ShardCommitted) -> str:
        assert self._plan is not None
        left = (self._plan.n_missing_rows - self._rows_of_committed) / max(1e-9, self._rate())
        shard = f"{event.task}: {event.record.n_rows:,} rows, {format_nbytes(event.record.nbytes)} stored"
        return f"{shard}; {self._detail()}, {left:.0f} s left"


@contextmanager
def listening(console: Console) -> Iterator[TerminalListener]:
    """Show progress for as long as the block lasts."""
    with bars(console) as progress:
        yield TerminalListener(console, progress)
