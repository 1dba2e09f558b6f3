"""How far a run is and how fast it goes, as numbers: what the terminal, ``actlake status`` and the metrics show."""

import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actlake.jobs.engines.events import (
    Event,
    RowsCaptured,
    ShardAbandoned,
    ShardCommitted,
    ShardRetried,
    ShardStarted,
    WorkersReady,
)
from actlake.jobs.work import device_of

if TYPE_CHECKING:
    from actlake.jobs.jobfile import Job

#: Seconds that rates are taken over: several shards of a run that is not tiny.
_WINDOW_S = 300.0

#: Seconds between two points that are kept of that time.
_STEP_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A run at one moment; shards and rows are those that it has to build, not those committed before it.

    ``busy`` is the share of the workers' time spent in forward passes, of the GPU where there is one; ``left_s`` and
    rates are None until they can be told. Bytes are those stored, after compression.
    """

    n_shards: int
    n_committed: int = 0
    n_in_flight: int = 0
    n_failed: int = 0
    n_retries: int = 0
    n_rows: int
    n_rows_done: int = 0
    rows_per_s: float | None = None
    nbytes_per_s: float | None = None
    busy: float | None = None
    n_ready: int = 0
    n_wanted: int = 0
    left_s: float | None = None
    device: str = "forward"

    def line(self, *, left: bool = True) -> str:
        """Return the numbers as a line, without the time left if so asked; ``parse`` reads it to the digits it has."""
        parts = [f"{self.n_committed}/{self.n_shards} shards, {self.n_in_flight} in flight, {self.n_failed} failed"]
        parts += [f"{self.n_retries} retried"] if self.n_retries else []
        parts += [f"{self.n_rows_done:,}/{self.n_rows:,} rows"]
        if self.rows_per_s is not None and self.nbytes_per_s is not None:
            parts += [f"{self.rows_per_s:,.0f} rows/s, {self.nbytes_per_s / 1e6:,.2f} MB/s stored"]
        if self.busy is not None:
            parts += [f"{self.device} {100 * self.busy:.0f} %"]
        if self.n_wanted:
            parts += [f"{self.n_ready}/{self.n_wanted} workers"]
        if left and self.left_s is not None:
            parts += [f"{format_duration(self.left_s)} left"]
        return ", ".join(parts)


_LINE = re.compile(
    r"(?P<n_committed>\d+)/(?P<n_shards>\d+) shards, (?P<n_in_flight>\d+) in flight, (?P<n_failed>\d+) failed"
    r"(?:, (?P<n_retries>\d+) retried)?, (?P<n_rows_done>[\d,]+)/(?P<n_rows>[\d,]+) rows"
    r"(?:, (?P<rows_per_s>[\d,]+) rows/s, (?P<nbytes_per_s>[\d,.]+) MB/s stored)?"
    r"(?:, (?P<device>forward|GPU busy) (?P<busy>\d+) %)?(?:, (?P<n_ready>\d+)/(?P<n_wanted>\d+) workers)?"
    r"(?:, (?P<left_s>(?:\d+ d )?\d+:\d\d:\d\d) left)?$",
    re.MULTILINE,
)

_SCALES = {"nbytes_per_s": 1e6, "busy": 0.01}


def parse(text: str) -> Progress | None:
    """Return the last progress that stands in what a run has printed; None where there is none."""
    found = None
    for found in _LINE.finditer(text):  # noqa: B007 - the last one
        pass
    if found is None:
        return None
    values = {name: value for name, value in found.groupdict().items() if value is not None}
    device, left = values.pop("device", "forward"), values.pop("left_s", None)
    numbers: dict[str, float] = {
        name: float(value.replace(",", "")) * _SCALES.get(name, 1)
        if name in ("rows_per_s", *_SCALES)
        else int(value.replace(",", ""))
        for name, value in values.items()
    }
    return Progress(**numbers, device=device, left_s=None if left is None else _seconds(left))  # type: ignore[arg-type]


def busy_name(job: "Job | None") -> str:
    """Return what a job's share of time in forward passes is called; asks torch for GPUs where the job does not say."""
    return "GPU busy" if job is not None and device_of(job).startswith("cuda") else "forward"


def format_duration(seconds: float) -> str:
    """Return ``1:02:03``, or ``2 d 1:02:03``."""
    days, rest = divmod(round(seconds), 86_400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock


def _seconds(text: str) -> float:
    days, _, clock = text.rpartition(" d ")
    hours, minutes, seconds = map(int, clock.split(":"))
    return float(int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds)


@dataclass(frozen=True)
class _Point:
    """The sums at one time: what a rate is the difference of."""

    time_s: float
    n_rows: int
    nbytes: int
    forward_s: float
    workers_s: float


@dataclass
class Tracker:
    """Counts the events of a run; memory does not grow with its shards."""

    n_shards: int
    n_rows: int
    device: str = "forward"
    clock: Callable[[], float] = time.monotonic
    _points: deque[_Point] = field(default_factory=deque)
    _in_flight: dict[tuple[str, int], int] = field(default_factory=dict)
    _n_committed: int = 0
    _n_failed: int = 0
    _n_retries: int = 0
    _n_captured: int = 0
    _rows_committed: int = 0
    _rows_failed: int = 0
    _nbytes: int = 0
    _forward_s: float = 0.0
    _workers_s: float = 0.0
    _n_ready: int = 0
    _n_wanted: int = 0
    _heard: float | None = None

    def event(self, event: Event) -> None:
        """Count one event."""
        now = self.clock()
        if self._heard is not None:
            self._workers_s += (now - self._heard) * self._n_ready
        self._heard = now
        if isinstance(event, WorkersReady):
            self._n_ready, self._n_wanted = event.n_ready, event.n_wanted
        elif isinstance(event, RowsCaptured):
            self._n_captured += event.n_rows
            self._forward_s += event.forward_s
        elif isinstance(event, ShardStarted):
            self._in_flight[event.task.split, event.task.shard] = event.task.n_rows
        else:
            self._end(event)
        self._keep(now)

    def _end(self, event: ShardCommitted | ShardRetried | ShardAbandoned) -> None:
        self._in_flight.pop((event.task.split, event.task.shard), None)
        if isinstance(event, ShardCommitted):
            self._n_committed += 1
            self._rows_committed += event.record.n_rows
            self._nbytes += event.record.nbytes
            return
        # What was captured of it is captured again, or never: at most the whole shard.
        self._n_captured = max(self._n_captured - event.task.n_rows, self._rows_committed)
        if isinstance(event, ShardRetried):
            self._n_retries += 1
        else:
            self._n_failed += 1
            self._rows_failed += event.task.n_rows

    @property
    def over(self) -> bool:
        """Every shard is committed or abandoned."""
        return self._n_committed + self._n_failed >= self.n_shards

    def _rows_done(self) -> int:
        # Rows are reported by workers, commits by the driver: neither may run ahead of the other.
        most = self._rows_committed + sum(self._in_flight.values())
        return max(self._rows_committed, min(self._n_captured, most))

    def _keep(self, now: float) -> None:
        point = _Point(now, self._rows_done(), self._nbytes, self._forward_s, self._workers_s)
        if len(self._points) > 1 and now - self._points[-2].time_s < _STEP_S:
            self._points[-1] = point
        else:
            self._points.append(point)
        while now - self._points[0].time_s > _WINDOW_S and len(self._points) > 2:
            self._points.popleft()

    def progress(self) -> Progress:
        """Return how far the run is."""
        n_done = self._rows_done()
        rows_per_s = nbytes_per_s = busy = left_s = None
        if self._points and (elapsed := self._points[-1].time_s - self._points[0].time_s) > 0:
            first, last = self._points[0], self._points[-1]
            rows_per_s = max(0, last.n_rows - first.n_rows) / elapsed
            nbytes_per_s = (last.nbytes - first.nbytes) / elapsed
            if (workers_s := last.workers_s - first.workers_s) > 0:
                busy = min(1.0, (last.forward_s - first.forward_s) / workers_s)
            if rows_per_s > 0:
                left_s = max(0, self.n_rows - self._rows_failed - n_done) / rows_per_s
        return Progress(
            n_shards=self.n_shards,
            n_committed=self._n_committed,
            n_in_flight=len(self._in_flight),
            n_failed=self._n_failed,
            n_retries=self._n_retries,
            n_rows=self.n_rows,
            n_rows_done=n_done,
            rows_per_s=rows_per_s,
            nbytes_per_s=nbytes_per_s,
            busy=busy,
            n_ready=self._n_ready,
            n_wanted=self._n_wanted,
            left_s=left_s,
            device=self.device,
        )
