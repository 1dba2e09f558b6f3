"""What an engine reports while it runs, whichever it is."""

from dataclasses import dataclass

from actlake.jobs.work import Task
from actlake.storage.records import ShardRecord


@dataclass(frozen=True, kw_only=True)
class RowsCaptured:
    """So many more rows went through the model."""

    n_rows: int


@dataclass(frozen=True, kw_only=True)
class ShardCommitted:
    """A shard is visible to readers."""

    task: Task
    record: ShardRecord


@dataclass(frozen=True, kw_only=True)
class ShardAbandoned:
    """A shard failed as often as it may; the others go on."""

    task: Task
    error: Exception


Event = RowsCaptured | ShardCommitted | ShardAbandoned
