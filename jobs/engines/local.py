"""Builds shards on this machine without Ray: one worker in this process, several in one process each.

A shard that fails is tried again by another worker where there is one. A process that dies (out of memory, killed) is
replaced; what it was building is tried again later, and alone, so that a shard which kills its workers takes no other
with it.
"""

import queue
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field

from actlake.jobs.engines.events import (
    Event,
    RowsCaptured,
    ShardAbandoned,
    ShardCommitted,
    ShardRetried,
    ShardStarted,
    WorkersReady,
    after_first,
    raise_unable,
)
from actlake.jobs.engines.local_processes import Handle, Here, Process, gpu_groups
from actlake.jobs.engines.local_worker import Failed, Gone, Message, Ready
from actlake.jobs.work import Task, WorkOrder
from actlake.storage.errors import ActlakeError

#: So many processes may die while they build a shard, or one after another before they have their model.
DEATHS = 3


@dataclass(eq=False)
class _Try:
    """A task, and how it has gone so far."""

    task: Task
    n_failures: int = 0
    n_deaths: int = 0
    #: What it raised first, with which it is given up.
    error: Exception | None = None
    #: The worker that failed last.
    by: "_Member | None" = None


@dataclass(eq=False)
class _Member:
    """A worker, what it is building, and how many shards it takes at once: 0 until it has its model."""

    environment: dict[str, str]
    handle: Handle | None = None
    n_concurrent: int = 0
    building: dict[Task, _Try] = field(default_factory=dict)


def n_workers_here(order: WorkOrder, wanted: int) -> int:
    """Return how many of the wanted workers this machine has room for: one for each visible GPU, or group of them.

    Raises ``JobFileError`` where one worker wants more GPUs than there are.
    """
    if not order.device.startswith("cuda"):
        return wanted
    return max(1, min(wanted, len(gpu_groups(order.device, order.n_gpus))))


def run(order: WorkOrder, tasks: Iterable[Task], *, attempts: int, workers: int = 1) -> Generator[Event, None, None]:
    """Yield what happens until every task is committed or abandoned; at most ``n_workers_here`` workers.

    Raises what the first worker that cannot have its model raised, as an ``ActlakeError``, and one where their
    processes die before they have it.
    """
    pool = _Pool(order, n_workers_here(order, workers), attempts)
    try:
        yield from pool.run(tasks)
    finally:
        pool.close()


class _Pool:
    def __init__(self, order: WorkOrder, n_workers: int, attempts: int) -> None:
        self._order, self._attempts, self._n_stillborn = order, attempts, 0
        self._said: queue.SimpleQueue[tuple[Handle, Message]] = queue.SimpleQueue()
        groups = gpu_groups(order.device, order.n_gpus) if n_workers > 1 else []
        environments = [{"CUDA_VISIBLE_DEVICES": gpus} for gpus in groups] or [{} for _ in range(n_workers)]
        self._members = [_Member(environment) for environment in environments[:n_workers]]
        self._failed, self._suspects = deque[_Try](), deque[_Try]()

    def run(self, tasks: Iterable[Task]) -> Iterator[Event]:
        for member in self._members:
            self._start(member)
        waiting = iter(tasks)
        while True:
            # One for each in turn, so that the last shards are spread over the workers.
            while chosen := [(one, task) for one in self._members if (task := self._next(one, waiting)) is not None]:
                for member, following in chosen:
                    yield self._give(member, following)
            if all(member.n_concurrent and not member.building for member in self._members):
                return
            yield from self._hear(*self._said.get())

    def close(self) -> None:
        handles = [member.handle for member in self._members if member.handle is not None]
        for handle in handles:
            handle.stop()
        for handle in handles:
            handle.close()

    def _start(self, member: _Member) -> None:
        member.n_concurrent = 0
        if len(self._members) == 1:
            member.handle = Here(self._order, self._report)
        else:
            member.handle = Process(self._order, self._report, member.environment)

    def _report(self, handle: Handle, message: Message) -> None:
        self._said.put((handle, message))

    def _next(self, member: _Member, waiting: Iterator[Task]) -> _Try | None:
        """Return what a worker builds next, None where it has enough."""
        alone = any(one.n_deaths for one in member.building.values())
        if alone or len(member.building) >= member.n_concurrent:
            return None
        if (again := self._failed_elsewhere(member)) is not None:
            return again
        if (task := next(waiting, None)) is not None:
            return _Try(task)
        return self._suspects.popleft() if self._suspects and not member.building else None

    def _failed_elsewhere(self, member: _Member) -> _Try | None:
        for one in self._failed:
            if one.by is not member or len(self._members) == 1:
                self._failed.remove(one)
                return one
        return None

    def _give(self, member: _Member, one: _Try) -> Event:
        assert member.handle is not None
        member.building[one.task] = one
        member.handle.give(one.task)
        return ShardStarted(task=one.task)

    def _hear(self, handle: Handle, message: Message) -> Iterator[Event]:
        member = next((member for member in self._members if member.handle is handle), None)
        if member is None:
            return  # A process that was replaced.
        match message:
            case Ready():
                member.n_concurrent, self._n_stillborn = message.n_concurrent, 0
                yield self._ready()
            case RowsCaptured():
                yield message
            case ShardCommitted():
                del member.building[message.task]
                yield message
            case Failed(task=None, error=error):
                raise_unable(error)
            case Failed(task=Task() as task):
                one = member.building.pop(task)
                one.by, one.n_failures = member, one.n_failures + 1
                one.error = one.error or message.error
                may = one.n_failures < self._attempts
                yield self._again(one, message.error if may else one.error, self._failed, may)
            case Gone():
                yield from self._bury(member, message.status)

    def _bury(self, member: _Member, status: int) -> Iterator[Event]:
        """Replace a process that died, and put back what it was building."""
        assert member.handle is not None
        member.handle.close()
        error = ActlakeError(
            f"the worker's process ended with {_ending(status)}; where that was for want of memory, lower run.workers "
            "or layout.rows_per_shard"
        )
        if not member.n_concurrent:
            self._n_stillborn += 1
            if self._n_stillborn == DEATHS:
                raise error
        lost, member.building = list(member.building.values()), {}
        for one in lost:
            one.n_deaths += 1
            yield self._again(one, after_first(one.error, error), self._suspects, one.n_deaths < DEATHS)
        self._start(member)
        yield self._ready()

    def _again(self, one: _Try, error: Exception, waiting: "deque[_Try]", may: bool) -> Event:
        if not may:
            return ShardAbandoned(task=one.task, error=error)
        waiting.append(one)
        return ShardRetried(task=one.task, error=error)

    def _ready(self) -> WorkersReady:
        n_ready = sum(member.n_concurrent > 0 for member in self._members)
        return WorkersReady(n_ready=n_ready, n_wanted=len(self._members))


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"
