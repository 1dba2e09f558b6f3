"""What an engine reports while it runs, whichever it is; and what it raises where no worker can start."""

from dataclasses import dataclass
from typing import NoReturn

from actlake.jobs.work import Task
from actlake.storage.errors import ActlakeError
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


def after_first(first: Exception | None, error: ActlakeError) -> ActlakeError:
    """Return the error that ended an attempt, naming the one that the shard had raised before, if any."""
    return error if first is None else type(error)(f"{error}; at first it raised {type(first).__name__}: {first}")


def raise_unable(error: Exception) -> NoReturn:
    """Raise what kept a worker from starting, as one of our errors: torch has its own for want of GPU memory."""
    if isinstance(error, ActlakeError):
        raise error
    raise ActlakeError(f"a worker cannot start: {type(error).__name__}: {error}") from error
