"""Which shard a worker gets next: those that went wrong elsewhere, then the next one; and when one is given up.

A shard's own errors are counted against ``run.attempts``. What its workers die of is counted apart: a process that dies
may have been killed by the shard, for want of memory, so it is tried again alone on a worker, three times in all; a
node that goes says nothing about the shard, which is given up when it has lost ten of them.
"""

import enum
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from actlake.jobs.engines.events import ShardAbandoned, ShardRetried, after_first
from actlake.jobs.work import Task
from actlake.storage.errors import ActlakeError, WorkerLostError

#: Processes that may die while they build a shard.
MOST_DEATHS = 3

#: Nodes that may go while a worker on them builds a shard.
MOST_NODES = 10


class Loss(enum.Enum):
    """How a worker was lost: its process alone died, its node went, or it could not even be made there."""

    PROCESS = "process"
    NODE = "node"
    CREATION = "creation"


@dataclass(eq=False)
class Try:
    """A shard that is built, or is to be built again, and how it went so far."""

    task: Task
    n_failures: int = 0
    n_deaths: int = 0
    n_nodes: int = 0
    #: What it raised first, with which it is given up.
    error: Exception | None = None
    #: Workers that it failed on.
    failed_on: list[object] = field(default_factory=list)
    #: The worker that takes no other shard until it has this one, which is to be alone.
    claimed: object = None

    @property
    def is_alone(self) -> bool:
        return self.n_deaths > 0


class ShardQueue:
    """Hands out shards, ascending; holds those to be tried again, never the others."""

    def __init__(self, tasks: Iterable[Task], attempts: int) -> None:
        self._tasks: Iterator[Task] = iter(tasks)
        self._next: Task | None = next(self._tasks, None)
        self._again: deque[Try] = deque()
        self._attempts = attempts

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be handed out."""
        return self._next is None and not self._again

    def take(self, worker: object, building: Sequence[Try], ready: Sequence[object]) -> Try | None:
        """Return what a worker that builds ``building`` gets next, None where it is to wait.

        ``ready`` are all workers: a shard goes to one that it has not failed on, if there is such a one.
        """
        if any(one.is_alone for one in building):
            return None
        for one in self._again:
            if worker in one.failed_on and any(other not in one.failed_on for other in ready):
                continue
            if one.is_alone and building:
                if one.claimed is worker or not any(one.claimed is other for other in ready):
                    one.claimed = worker
                    return None
                continue
            self._again.remove(one)
            return one
        task, self._next = self._next, next(self._tasks, None) if self._next is not None else None
        return None if task is None else Try(task)

    def failed(self, one: Try, worker: object, error: Exception) -> ShardRetried | ShardAbandoned:
        """A shard raised an error: have it tried again, on another worker; given up, it is with its first error."""
        one.n_failures += 1
        one.failed_on.append(worker)
        one.error = one.error or error
        may = one.n_failures < self._attempts
        return self._put(one, error if may else one.error, may=may)

    def lost(self, one: Try, worker: object, loss: Loss, host: str) -> ShardRetried | ShardAbandoned:
        """The worker of a shard is gone: have it tried again."""
        if loss is Loss.NODE:
            one.n_nodes += 1
            why = f"the node of its worker, {host}, was lost"
            return self._put(one, _gave_up(one, why, one.n_nodes), may=one.n_nodes < MOST_NODES)
        one.n_deaths += 1
        why = (
            f"its worker's process on {host} died; where that was for want of memory, lower layout.rows_per_shard or "
            "layout.shard_memory, or give each worker more"
        )
        return self._put(one, _gave_up(one, why, one.n_deaths), may=one.n_deaths < MOST_DEATHS)

    def _put(self, one: Try, error: Exception, *, may: bool) -> ShardRetried | ShardAbandoned:
        one.claimed = None
        if not may:
            return ShardAbandoned(task=one.task, error=error)
        self._again.append(one)
        return ShardRetried(task=one.task, error=error)


def _gave_up(one: Try, why: str, times: int) -> ActlakeError:
    return after_first(one.error, WorkerLostError(why if times < 2 else f"{why} ({times} times in all)"))
