"""How far a run is: counted from events, shown at a terminal and in a log, and read back from that log."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from actlake.jobs.cli.listener import TerminalListener
from actlake.jobs.cli.progress import Bars, bars
from actlake.jobs.engines.events import (
    Event,
    RowsCaptured,
    ShardAbandoned,
    ShardCommitted,
    ShardRetried,
    ShardStarted,
    WorkersReady,
)
from actlake.jobs.progress import Progress, Tracker, format_duration, parse
from actlake.jobs.work import Task
from actlake.storage.records import ObjectRecord, Provenance, ShardRecord


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def task(shard: int, n_rows: int = 100) -> Task:
    return Task(split="train", shard=shard, n_rows=n_rows)


def committed(shard: int, nbytes: int = 1_000, n_rows: int = 100) -> ShardCommitted:
    item = ObjectRecord(nbytes=nbytes, crc32c=0)
    record = ShardRecord(
        dataset_id="0" * 64,
        shard=shard,
        revision=0,
        first_row=100 * shard,
        n_rows=n_rows,
        n_void=0,
        objects={"layers.0.resid_post": item},
        stats=item,
        provenance=Provenance(),
    )
    return ShardCommitted(task=task(shard, n_rows), record=record)


def hear(tracker: Tracker, clock: Clock, events: list[tuple[float, Event]]) -> Progress:
    """Report events, each some seconds after the last one."""
    for seconds, event in events:
        clock.now += seconds
        tracker.event(event)
    return tracker.progress()


def test_the_numbers_of_a_run_are_those_of_its_events() -> None:
    clock = Clock()
    tracker = Tracker(n_shards=4, n_rows=400, clock=clock)
    now = hear(
        tracker,
        clock,
        [
            (0, WorkersReady(n_ready=2, n_wanted=4)),
            (0, ShardStarted(task=task(0))),
            (0, ShardStarted(task=task(1))),
            (10, RowsCaptured(n_rows=150, forward_s=15.0)),
            (0, committed(0, nbytes=5_000)),
        ],
    )
    assert (now.n_committed, now.n_in_flight, now.n_failed, now.n_rows_done) == (1, 1, 0, 150)
    assert (now.n_ready, now.n_wanted) == (2, 4)
    # 150 rows in 10 s of 2 workers, who were 15 of 20 s in forward passes; 250 rows are left.
    assert (now.rows_per_s, now.nbytes_per_s, now.busy) == (15.0, 500.0, 0.75)
    assert now.left_s == pytest.approx(250 / 15)


def test_rows_of_a_failed_attempt_are_not_counted_twice() -> None:
    clock = Clock()
    tracker = Tracker(n_shards=2, n_rows=200, clock=clock)
    start: list[tuple[float, Event]] = [(0, ShardStarted(task=task(0))), (1, RowsCaptured(n_rows=80))]
    failed = RuntimeError("planted")
    now = hear(tracker, clock, [*start, (0, ShardRetried(task=task(0), error=failed))])
    assert (now.n_rows_done, now.n_retries, now.n_in_flight) == (0, 1, 0)
    now = hear(tracker, clock, [*start, (0, committed(0))])
    assert (now.n_rows_done, now.n_committed) == (100, 1)
    now = hear(tracker, clock, [(1, ShardStarted(task=task(1))), (1, ShardAbandoned(task=task(1), error=failed))])
    assert (now.n_rows_done, now.n_failed, now.left_s) == (100, 1, 0.0)
    assert tracker.over


def test_a_rate_is_that_of_the_last_minutes() -> None:
    clock = Clock()
    tracker = Tracker(n_shards=10_000, n_rows=1_000_000, clock=clock)
    slow: list[tuple[float, Event]] = [(10, committed(shard)) for shard in range(100)]
    fast: list[tuple[float, Event]] = [(1, committed(shard)) for shard in range(100, 500)]
    assert hear(tracker, clock, slow).rows_per_s == pytest.approx(10)
    assert hear(tracker, clock, fast).rows_per_s == pytest.approx(100)


def test_the_tracker_of_a_large_run_stays_small() -> None:
    clock = Clock()
    tracker = Tracker(n_shards=100_000, n_rows=10_000_000, clock=clock)
    for shard in range(20_000):
        clock.now += 0.01
        tracker.event(ShardStarted(task=task(shard)))
        tracker.event(committed(shard))
    assert len(tracker._points) < 310
    assert tracker._in_flight == {}
    assert tracker.progress().rows_per_s == pytest.approx(10_000, rel=1e-3)


@st.composite
def progresses(draw: st.DrawFn) -> Progress:
    def maybe(found: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | found)

    count = st.integers(0, 10**7)
    rate = maybe(st.integers(0, 10**9))
    busy = maybe(st.integers(0, 100))
    n_wanted = draw(st.integers(0, 1000))
    return Progress(
        n_shards=draw(count),
        n_committed=draw(count),
        n_in_flight=draw(count),
        n_failed=draw(count),
        n_retries=draw(count),
        n_rows=draw(count),
        n_rows_done=draw(count),
        rows_per_s=None if rate is None else float(rate),
        nbytes_per_s=None if rate is None else rate * 10_000.0,
        busy=None if busy is None else busy * 0.01,
        n_ready=draw(st.integers(0, n_wanted)),
        n_wanted=n_wanted,
        left_s=maybe(st.integers(0, 10**7).map(float)),
        device="forward" if busy is None else draw(st.sampled_from(["forward", "GPU busy"])),
    )


@given(progresses())
def test_a_line_is_read_back(progress: Progress) -> None:
    text = (
        f"earlier: {Progress(n_shards=1, n_rows=2).line()}\ntrain shard 3: 12.3 kB stored; {progress.line()}\nlater\n"
    )
    assert parse(text) == progress


def test_other_lines_are_no_progress() -> None:
    assert parse("built 8 shards in 3 s: /data/ds has 875 rows\n3/8 shards of something else\n") is None


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (3_723.4, "1:02:03"), (90_061, "1 d 1:01:01")])
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# --- What is printed ----------------------------------------------------------------------------------------------


def listener(n_shards: int, clock: Clock) -> tuple[TerminalListener, io.StringIO]:
    """Return a listener to a run of so many shards, and what it prints where there is no terminal."""
    printed = io.StringIO()
    console = Console(file=printed, soft_wrap=True, width=200)
    found = TerminalListener(console, Bars(console=console, disable=True), clock=clock)
    plan: Any = SimpleNamespace(
        missing=range(n_shards), n_shards=n_shards, n_rows=100 * n_shards, n_missing_rows=100 * n_shards, part=None
    )
    found.planned(plan)
    return found, printed


def test_a_small_run_prints_a_line_for_each_shard() -> None:
    clock = Clock()
    found, printed = listener(3, clock)
    for shard in range(3):
        clock.now += 1
        found.event(RowsCaptured(n_rows=100))
        found.event(committed(shard))
    lines = printed.getvalue().splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "300 rows in 3 shards",
        *(f"train shard {shard}: 100 rows, 1.0 kB stored" for shard in range(3)),
    ]
    assert [parse(line) is not None for line in lines] == [False, True, True, True]


def test_a_large_run_prints_a_line_every_few_seconds_and_the_last() -> None:
    clock = Clock()
    found, printed = listener(50_000, clock)
    for shard in range(50_000):
        clock.now += 0.01
        found.event(committed(shard))
    lines = printed.getvalue().splitlines()
    # 500 s at a line every 10 s, the first and the last.
    assert 50 <= len(lines) <= 53
    assert lines[-1].startswith("50000/50000 shards, 0 in flight, 0 failed, 5,000,000/5,000,000 rows")


def test_a_slow_shard_does_not_leave_the_log_silent() -> None:
    clock = Clock()
    found, printed = listener(2, clock)
    for _ in range(100):
        clock.now += 1
        found.event(RowsCaptured(n_rows=1, forward_s=0.5))
    assert len(printed.getvalue().splitlines()) == 11


def test_an_error_is_named_once() -> None:
    found, printed = listener(500, Clock())
    for shard in range(200):
        found.event(ShardRetried(task=task(shard), error=RuntimeError("planted")))
        found.event(ShardAbandoned(task=task(shard), error=RuntimeError("planted")))
    for shard in range(200, 400):
        found.event(ShardAbandoned(task=task(shard), error=RuntimeError(f"another, {shard}")))
    lines = printed.getvalue().splitlines()
    assert lines[1:3] == [
        "train shard 0 failed, and is tried again: RuntimeError: planted",
        "train shard 0 failed: RuntimeError: planted",
    ]
    assert sum("failed: " in line for line in lines) == 19


def test_a_terminal_shows_bars_and_one_line_of_numbers() -> None:
    printed, clock = io.StringIO(), Clock()
    console = Console(file=printed, force_terminal=True, width=200, color_system=None)
    with bars(console) as shown:
        found = TerminalListener(console, shown, clock=clock)
        plan: Any = SimpleNamespace(missing=range(2), n_shards=2, n_rows=200, n_missing_rows=200, part=None)
        found.planned(plan)
        found.event(WorkersReady(n_ready=1, n_wanted=1))
        clock.now += 4
        found.event(RowsCaptured(n_rows=100, forward_s=3.0))
        found.event(committed(0, nbytes=8_000_000))
    last = printed.getvalue()
    assert (
        "1/2 shards, 0 in flight, 0 failed, 100/200 rows, 25 rows/s, 2.00 MB/s stored, forward 75 %, 1/1 workers"
        in last
    )
    assert "train shard 0:" not in last
