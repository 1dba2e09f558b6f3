"""What an engine reports while it runs, whichever it is."""

from dataclasses import dataclass

from actlake.jobs.work import Task
from actlake.storage.records import ShardRecord


@dataclass(frozen=True, kw_only=True)
class WorkersReady:
    """So many workers have their model, of as many as the run may use."""

    n_ready: int
    n_wanted: int


@dataclass(frozen=True, kw_only=True)
class ShardStarted:
    """A worker has been handed a shard, for the first time or again."""

    task: Task


@dataclass(frozen=True, kw_only=True)
class RowsCaptured:
    """So many more rows went through the model, in ``forward_s`` seconds of forward passes, summed over workers."""

    n_rows: int
    forward_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ShardCommitted:
    """A shard is visible to readers."""

    task: Task
    record: ShardRecord


@dataclass(frozen=True, kw_only=True)
class ShardRetried:
    """A shard failed and is tried again, on another worker where there is one."""

    task: Task
    error: Exception


@dataclass(frozen=True, kw_only=True)
class ShardAbandoned:
    """A shard failed as often as it may; the others go on."""

    task: Task
    error: Exception


Event = WorkersReady | ShardStarted | RowsCaptured | ShardCommitted | ShardRetried | ShardAbandoned
