"""A run's progress as Ray metrics, which Prometheus scrapes from Ray's endpoints; docs/cluster.md lists them.

The driver has all of them: workers report rows and seconds to it, so that a sum over workers needs no query.
"""

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from actlake.jobs.engines.events import Event, RowsCaptured, ShardCommitted, ShardRetried
from actlake.jobs.progress import Progress, Tracker, busy_name
from actlake.jobs.readiness import Listener

if TYPE_CHECKING:
    from actlake.jobs.jobfile import Job
    from actlake.jobs.readiness import Plan

#: Seconds between two settings of the gauges: Ray drops those that were not set since its last export.
_EVERY_S = 0.5

#: What Prometheus calls ``ray_<name>``; gauges.
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "actlake_shards": ("Shards of the run by state: committed, in_flight, failed, left.", ("state",)),
    "actlake_rows": ("Rows of the run by state: done, left.", ("state",)),
    "actlake_workers": ("Workers by state: ready (the model is loaded), wanted.", ("state",)),
    "actlake_rows_per_second": ("Rows captured a second, over the last five minutes.", ()),
    "actlake_stored_bytes_per_second": ("Bytes committed a second, after compression, over five minutes.", ()),
    "actlake_busy_ratio": ("Share of the ready workers' time spent in forward passes, 0 to 1.", ()),
    "actlake_seconds_left": ("Seconds until the run is done at its present speed.", ()),
}

#: What Prometheus calls ``ray_<name>_total``; counters.
COUNTERS: Mapping[str, str] = {
    "actlake_captured_rows": "Rows that went through the model, those of failed attempts included.",
    "actlake_forward_seconds": "Seconds of forward passes, summed over workers.",
    "actlake_committed_shards": "Shards committed.",
    "actlake_stored_bytes": "Bytes of the committed shards, after compression.",
    "actlake_retries": "Failures of shards that were tried again.",
}


class Metered(Listener):
    """Passes on what it hears, and sets the metrics until it is closed; for a run on Ray."""

    def __init__(self, hear: Listener, job: "Job") -> None:
        self._hear, self._job = hear, job
        self._tracker: Tracker | None = None
        self._meters: _Meters | None = None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, text: str) -> None:
        self._hear.note(text)

    def documents(self, n_documents: int, n_tokens: int) -> None:
        self._hear.documents(n_documents, n_tokens)

    def replies(self, n_done: int, n_missing: int) -> None:
        self._hear.replies(n_done, n_missing)

    def sequences(self, n_written: int, n_sequences: int) -> None:
        self._hear.sequences(n_written, n_sequences)

    def planned(self, plan: "Plan") -> None:
        self._tracker = Tracker(len(plan.missing), plan.n_missing_rows, busy_name(self._job))
        self._hear.planned(plan)

    def event(self, event: Event) -> None:
        assert self._tracker is not None
        with self._lock:
            self._tracker.event(event)
            # Not before: an engine on this machine starts its Ray with the first shard.
            self._meters = self._meters or _Meters(self._job.dataset)
            self._meters.count(event)
        if self._thread is None:
            self._thread = threading.Thread(target=self._show, name="actlake-metrics", daemon=True)
            self._thread.start()
        self._hear.event(event)

    def close(self) -> None:
        """Stop setting the metrics."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _show(self) -> None:
        assert self._tracker is not None
        assert self._meters is not None
        while True:
            with self._lock:
                over = self._tracker.over
                self._meters.show(self._tracker.progress())
            if over or self._closed.wait(_EVERY_S):
                return


class _Meters:
    """Ray's own objects."""

    def __init__(self, dataset: str) -> None:
        from ray.util.metrics import Counter, Gauge

        tags = {"dataset": dataset}
        self._gauges = {
            name: Gauge(name, description=text, tag_keys=("dataset", *keys)) for name, (text, keys) in GAUGES.items()
        }
        self._counters = {
            name: Counter(name, description=text, tag_keys=("dataset",)) for name, text in COUNTERS.items()
        }
        for meter in (*self._gauges.values(), *self._counters.values()):
            meter.set_default_tags(tags)

    def count(self, event: Event) -> None:
        if isinstance(event, RowsCaptured):
            self._count("actlake_captured_rows", event.n_rows)
            self._count("actlake_forward_seconds", event.forward_s)
        elif isinstance(event, ShardCommitted):
            self._count("actlake_committed_shards", 1)
            self._count("actlake_stored_bytes", event.record.nbytes)
        elif isinstance(event, ShardRetried):
            self._count("actlake_retries", 1)

    def _count(self, name: str, value: float) -> None:
        if value > 0:  # Ray's counters refuse 0.
            self._counters[name].inc(value)

    def show(self, now: Progress) -> None:
        left = now.n_shards - now.n_committed - now.n_failed - now.n_in_flight
        shards = {"committed": now.n_committed, "in_flight": now.n_in_flight, "failed": now.n_failed, "left": left}
        self._states("actlake_shards", shards)
        self._states("actlake_rows", {"done": now.n_rows_done, "left": now.n_rows - now.n_rows_done})
        self._states("actlake_workers", {"ready": now.n_ready, "wanted": now.n_wanted})
        rates = {
            "actlake_rows_per_second": now.rows_per_s,
            "actlake_stored_bytes_per_second": now.nbytes_per_s,
            "actlake_busy_ratio": now.busy,
            "actlake_seconds_left": now.left_s,
        }
        for name, value in rates.items():
            if value is not None:
                self._gauges[name].set(value)

    def _states(self, name: str, values: Mapping[str, int]) -> None:
        for state, value in values.items():
            self._gauges[name].set(value, tags={"state": state})
