"""Shows how an ingestion goes: bars and numbers at a terminal, lines where output goes to a file or a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import TaskID

from actlake.jobs.cli.progress import Bars, bars
from actlake.jobs.engines.events import Event, ShardAbandoned, ShardCommitted, ShardRetried
from actlake.jobs.jobfile import Job
from actlake.jobs.progress import Progress, Tracker, busy_name
from actlake.jobs.readiness import Listener, Plan
from actlake.jobs.units import count_of, format_nbytes

#: Runs of at most so many shards print a line for each, where the output is no terminal.
_FEW_SHARDS = 100

#: Seconds between two lines otherwise: 9,000 lines a day, however many shards.
_EVERY_S = 10.0

#: Different errors that are shown as they come; all others are counted, and named at the end of the run.
_MOST_ERRORS = 20


class TerminalListener(Listener):
    """Shows notes, the bars of the corpus and of the shards, and under them the numbers of ``jobs.progress``."""

    def __init__(
        self, console: Console, progress: Bars, job: Job | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._progress, self._job, self._clock = console, progress, job, clock
        self._corpus: TaskID | None = None
        self._sorted: TaskID | None = None
        self._replies: TaskID | None = None
        self._shards: TaskID | None = None
        self._tracker: Tracker | None = None
        self._errors: set[str] = set()
        self._line_at = clock()

    def note(self, text: str) -> None:
        self._console.print(text)

    def documents(self, n_documents: int, n_tokens: int) -> None:
        if self._corpus is None:
            self._corpus = self._progress.add_task("corpus", total=None, detail="")
        detail = f"{n_documents:,} documents, {n_tokens:,} tokens of text"
        self._progress.update(self._corpus, completed=n_documents, detail=detail)
        self._line(f"corpus: {detail}")

    def replies(self, n_done: int, n_missing: int) -> None:
        if self._replies is None:
            self._replies = self._progress.add_task("replies", total=n_missing, detail="loading the model")
            self._console.print(f"{n_missing:,} replies to generate")
        if n_done:
            self._progress.update(self._replies, completed=n_done, detail=f"{n_done:,} replies")
            self._line(f"replies: {n_done:,}/{n_missing:,}")

    def sequences(self, n_written: int, n_sequences: int) -> None:
        if self._sorted is None:
            self._sorted = self._progress.add_task("sort", total=n_sequences, detail="")
        self._progress.update(self._sorted, completed=n_written, detail=f"{n_written:,} sequences")
        self._line(f"sort: {n_written:,}/{n_sequences:,} sequences")

    def planned(self, plan: Plan) -> None:
        if self._corpus is not None:
            self._progress.update(self._corpus, total=1, completed=1)
        n_missing = len(plan.missing)
        n_done = plan.n_shards - n_missing
        already = f", {n_done} of them committed before" if n_done else ""
        if plan.part is not None:
            already = f"; {n_missing} of slice {plan.part} are to be built"
        self._console.print(f"{plan.n_rows:,} rows in {count_of(plan.n_shards, 'shard')}{already}")
        self._tracker = Tracker(n_missing, plan.n_missing_rows, busy_name(self._job), self._clock)
        if n_missing:
            self._shards = self._progress.add_task("shards", total=plan.n_missing_rows, detail="loading the model")

    def event(self, event: Event) -> None:
        assert self._tracker is not None
        self._tracker.event(event)
        if isinstance(event, ShardRetried | ShardAbandoned):
            self._name(event)
        if self._console.is_terminal:
            self._show(self._tracker.progress())
        elif isinstance(event, ShardCommitted) and self._tracker.n_shards <= _FEW_SHARDS:
            shard = f"{event.task}: {event.record.n_rows:,} rows, {format_nbytes(event.record.nbytes)} stored"
            self._line(f"{shard}; {self._tracker.progress().line()}", at_once=True)
        elif self._tracker.over or self._is_due():
            self._line(self._tracker.progress().line(), at_once=True)

    def _show(self, now: Progress) -> None:
        if self._shards is not None:
            self._progress.update(self._shards, completed=now.n_rows_done, detail=f"{now.n_rows_done:,} rows")
            self._progress.footer = now.line(left=False)

    def _name(self, event: ShardRetried | ShardAbandoned) -> None:
        what = "failed, and is tried again" if isinstance(event, ShardRetried) else "failed"
        cause = f"{type(event.error).__name__}: {event.error}"
        if f"{what}{cause}" not in self._errors and len(self._errors) < _MOST_ERRORS:
            self._errors.add(f"{what}{cause}")
            self._console.print(f"{event.task} {what}: {cause}")

    def _is_due(self) -> bool:
        return self._clock() - self._line_at >= _EVERY_S

    def _line(self, text: str, *, at_once: bool = False) -> None:
        """Print a line of progress, unless bars show it or the last one was a moment ago."""
        if not self._console.is_terminal and (at_once or self._is_due()):
            self._line_at = self._clock()
            self._console.print(text)


@contextmanager
def listening(console: Console, job: Job | None = None) -> Iterator[TerminalListener]:
    """Show progress for as long as the block lasts."""
    with bars(console) as progress:
        yield TerminalListener(console, progress, job)
