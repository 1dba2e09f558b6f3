"""Workers of a Ray cluster as they come and go, and the shards that each of them has in hand.

All actors that a run may have are asked for at once: those without room stay pending, where Ray's autoscaler sees them,
and join when they get it. One that is lost is replaced by another pending one. Nothing here waits for a single answer:
calls are polled, and a node that the cluster gives up takes its calls with it, however silent it is.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import actlake
from actlake.jobs.engines.events import Event, RowsCaptured, ShardCommitted, ShardStarted, WorkersReady, raise_unable
from actlake.jobs.engines.ray_cluster import n_gpus, no_room, nodes, wanted_by
from actlake.jobs.engines.ray_faults import cause_of, loss_of, one_line
from actlake.jobs.engines.ray_worker import Place
from actlake.jobs.engines.shard_queue import Loss, ShardQueue, Try
from actlake.jobs.work import SHARDS_IN_FLIGHT, Task, WorkOrder
from actlake.storage.errors import ActlakeError, BadInputError

# After the connection, which says what to install where Ray is absent.
import ray  # isort: skip
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError, RayTaskError  # isort: skip

if TYPE_CHECKING:
    from actlake.jobs.jobfile import RunOptions

#: Seconds between two looks at the rows captured so far; longer where workers are many.
_POLL_S = 0.5

#: Status calls a second, over all workers.
_STATUS_PER_S = 200

#: Seconds between two looks at which nodes are alive.
_NODES_S = 5.0

#: Seconds to fetch an answer that is there: it may lie on a node that has just gone.
_GET_S = 30.0

#: Workers that may die, one after another in one place of the pool, before they have their model.
_MOST_STARTS = 3

#: Seconds that a pending worker gets after all others could not start; in a run that has begun ``start_timeout``.
_GRACE_S = 20.0

#: Seconds without a worker after which it is said what is waited for.
_QUIET_S = 15.0

#: Seconds after which workers are asked for again that could not even be made where Ray had put them.
_AGAIN_S = 60.0


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """How many workers: ``least`` to begin with, ``most`` in all; and what ``[run]`` says of them."""

    least: int = 1
    most: int = 1
    attempts: int = 2
    resources: Mapping[str, float] = field(default_factory=dict)
    placement: str = "pack"
    start_timeout: float = 600.0

    @classmethod
    def of(cls, run: "RunOptions", most: int) -> Self:
        """Return what a job file says, for at most so many workers."""
        return cls(
            least=min(run.least_workers, most),
            most=most,
            attempts=run.attempts,
            resources=run.resources,
            placement=run.placement,
            start_timeout=run.start_timeout,
        )


@dataclass(eq=False)
class _Member:
    """One actor. ``capacity``: how many shards it builds at once, 0 until it has its model; ``building``: those."""

    actor: Any
    #: How many before it, in its place, died before they had their model.
    n_stillborn: int
    place: Place | None = None
    capacity: int = 0
    building: dict[Any, Try] = field(default_factory=dict)
    #: The call that is under way apart from builds: 'place', 'start', 'status' or 'probe'.
    call: str = ""
    n_rows: int = 0
    forward_s: float = 0.0
    error: Exception | None = None

    @property
    def host(self) -> str:
        return self.place.host if self.place is not None else "a node of the cluster"

    @property
    def is_ready(self) -> bool:
        return self.capacity > 0 and self.error is None

    @property
    def is_starting(self) -> bool:
        return self.place is not None and not self.capacity and self.error is None

    @property
    def is_unmade(self) -> bool:
        return self.place is None and self.error is not None


class Pool:
    """The workers of a run; ``run`` may be called once, ``close`` ends them all."""

    def __init__(self, worker: type[Any], order: WorkOrder, options: PoolOptions, note: Callable[[str], None]) -> None:
        self._order, self._options, self._note = order, options, note
        self._remote: Any = ray.remote(worker).options(
            num_cpus=order.n_threads,
            num_gpus=n_gpus(order),
            resources=dict(options.resources) or None,
            # Ray's default fills a node before it takes another.
            scheduling_strategy="SPREAD" if options.placement == "spread" else "DEFAULT",
            # The builds, and one call that asks how far they are.
            max_concurrency=SHARDS_IN_FLIGHT + 1,
        )
        self._members: list[_Member] = []
        # Builds and other calls under way, by Ray's reference.
        self._calls: dict[Any, _Member] = {}
        self._begun = False
        now = time.monotonic()
        self._enough_at = self._status_at = self._nodes_at = self._unable_at = now
        self._told: set[str] = set()
        self._told_to_wait = False
        self._untold: list[str] = []
        for _ in range(options.most):
            self._add()

    def run(self, tasks: Iterable[Task]) -> Iterator[Event]:
        """Yield what happens until every task is committed or abandoned."""
        queue = ShardQueue(tasks, self._options.attempts)
        yield self._ready()
        while True:
            yield from self._hand_out(queue)
            if queue.is_empty and not any(member.building for member in self._members):
                return
            for ref in self._wait():
                yield from self._answer(ref, queue)
            yield from self._look_around(queue)

    def close(self) -> None:
        """End all workers, those that the cluster has no room for as well."""
        for member in self._members:
            self._kill(member)

    # --- workers ---

    def _add(self, n_stillborn: int = 0) -> None:
        member = _Member(self._remote.remote(self._order), n_stillborn)
        self._members.append(member)
        self._call(member, "place")

    def _call(self, member: _Member, name: str) -> None:
        member.call = name
        method = "place" if name == "probe" else name
        self._calls[getattr(member.actor, method).remote()] = member

    def _kill(self, member: _Member) -> None:
        with suppress(RayError, ValueError):  # It is gone already.
            ray.kill(member.actor)

    def _ready(self) -> WorkersReady:
        return WorkersReady(n_ready=sum(member.is_ready for member in self._members), n_wanted=self._options.most)

    def _joined(self, member: _Member, place: Place) -> None:
        """A worker has got room: see whether it fits, and have it load its model."""
        member.place = place
        if place.version != actlake.__version__:
            raise BadInputError(
                f"{place.host} has actlake {place.version}, the driver {actlake.__version__}; install the same on "
                "every node, or let 'actlake submit' ship it"
            )
        self._call(member, "start")

    def _unable(self, member: _Member, error: Exception) -> None:
        """Keep a worker that cannot start as it is: it holds the room that another one would fail in."""
        member.error, self._unable_at = error, time.monotonic()
        text = f"a worker on {member.host} cannot start, the run goes on without it: {one_line(error)}"
        if text not in self._told:
            self._told.add(text)
            self._untold.append(text)
        self._tell()

    def _tell(self) -> None:
        if self._begun or any(member.is_ready for member in self._members):
            for text in self._untold:
                self._note(text)
            self._untold.clear()

    @property
    def _least(self) -> int:
        """How many are to be ready: to begin with as many as the job says, or may still start, then one."""
        able = sum(member.error is None for member in self._members)
        return 1 if self._begun else max(1, min(self._options.least, able))

    # --- shards ---

    def _hand_out(self, queue: ShardQueue) -> Iterator[Event]:
        ready = [member for member in self._members if member.is_ready]
        self._begun = self._begun or len(ready) >= self._least
        if not self._begun:
            return
        free = [member for member in ready if len(member.building) < member.capacity and member.call != "probe"]
        # One for each in turn, so that the last shards are spread over the workers.
        while free:
            served = []
            for member in free:
                given = queue.take(member, list(member.building.values()), ready)
                if given is None:
                    continue
                ref = member.actor.build.remote(given.task)
                member.building[ref] = given
                self._calls[ref] = member
                served.append(member)
                yield ShardStarted(task=given.task)
            free = [member for member in served if len(member.building) < member.capacity]

    def _wait(self) -> list[Any]:
        if not self._calls:  # Of which Ray would answer at once.
            time.sleep(_POLL_S)
            return []
        done, rest = ray.wait(list(self._calls), timeout=_POLL_S)
        if done and rest:
            # All else that is there: one by one the waiting would cost the square of the workers.
            done += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return list(done)

    def _answer(self, ref: Any, queue: ShardQueue) -> Iterator[Event]:
        member = self._calls.pop(ref, None)
        if member is None:
            return  # Of a worker that was given up meanwhile.
        try:
            value = ray.get(ref, timeout=_GET_S)
        except RayTaskError as error:
            yield from self._failed(member, ref, cause_of(error, member.host), queue)
        except ActorUnavailableError:
            self._probe(member)
        except (RayError, GetTimeoutError) as error:
            yield from self._lose(member, error, queue)
        else:
            yield from self._heard(member, ref, value, queue)

    def _heard(self, member: _Member, ref: Any, value: Any, queue: ShardQueue) -> Iterator[Event]:
        if (built := member.building.pop(ref, None)) is not None:
            yield ShardCommitted(task=built.task, record=value)
            return
        call, member.call = member.call, ""
        if call == "place":
            try:
                self._joined(member, value)
            except BadInputError as error:
                self._unable(member, error)
        elif call == "start":
            member.capacity = value
            yield self._ready()
            self._tell()
        elif call == "status":
            n_rows, forward_s = value
            if n_rows > member.n_rows:
                yield RowsCaptured(n_rows=n_rows - member.n_rows, forward_s=forward_s - member.forward_s)
                member.n_rows, member.forward_s = n_rows, forward_s
        elif call == "probe":
            # It lives, but what became of the calls that were cut off is not known.
            yield from self._lose(member, ActlakeError("the connection to it broke off"), queue, Loss.NODE)

    def _failed(self, member: _Member, ref: Any, error: Exception, queue: ShardQueue) -> Iterator[Event]:
        """A method raised: a shard's own error, or a worker that cannot start."""
        if (built := member.building.pop(ref, None)) is not None:
            yield queue.failed(built, member, error)
            return
        self._unable(member, error)

    def _probe(self, member: _Member) -> None:
        """The connection to a worker broke: ask it again, which tells in the end whether it, or its node, is gone.

        What it builds stays in its hands until then, though no call answers for it any more.
        """
        self._forget_calls(member)
        self._call(member, "probe")

    def _forget_calls(self, member: _Member) -> None:
        self._calls = {ref: owner for ref, owner in self._calls.items() if owner is not member}

    def _lose(self, member: _Member, error: Exception, queue: ShardQueue, loss: Loss | None = None) -> Iterator[Event]:
        """Replace a worker that is gone; what it was building is handed out again."""
        loss = loss or loss_of(error, member.place.node if member.place is not None else "", nodes())
        self._members.remove(member)
        self._forget_calls(member)
        self._kill(member)
        for built in member.building.values():
            yield queue.lost(built, member, loss, member.host)
        n_stillborn = 0
        if not member.capacity and loss is Loss.PROCESS:
            n_stillborn = member.n_stillborn + 1
        if loss is Loss.CREATION or n_stillborn == _MOST_STARTS:
            self._members.append(member)
            self._unable(member, cause_of(error, member.host))
        else:
            self._add(n_stillborn)
        if member.capacity:
            yield self._ready()

    # --- from time to time ---

    def _look_around(self, queue: ShardQueue) -> Iterator[Event]:
        now = time.monotonic()
        if now - self._nodes_at > _NODES_S:
            self._nodes_at = now
            alive = {node["NodeID"] for node in nodes()}
            for member in [m for m in self._members if m.place is not None and m.place.node not in alive]:
                yield from self._lose(member, ActlakeError("its node is gone"), queue, Loss.NODE)
        if now - self._unable_at > _AGAIN_S:
            self._make_again()
        if now - self._status_at > max(_POLL_S, len(self._members) / _STATUS_PER_S):
            self._status_at = now
            for member in self._members:
                if member.is_ready and not member.call:
                    self._call(member, "status")
        self._check_hope(now)

    def _make_again(self) -> None:
        """Ask again for workers that could not be made: they hold no room, so one bad node may have had them all."""
        for member in [member for member in self._members if member.is_unmade]:
            self._members.remove(member)
            self._kill(member)
            self._add()

    def _check_hope(self, now: float) -> None:
        """Raise where no worker can start, or none comes."""
        n_ready = sum(member.is_ready for member in self._members)
        if any(member.is_starting for member in self._members) or n_ready >= self._least:
            self._enough_at = now
            return
        unable = [member for member in self._members if member.error is not None]
        # A run that has begun is worth waiting: for room, or for another node than the one that makes no worker.
        may_come = any(member.error is None or (self._begun and member.is_unmade) for member in self._members)
        if unable and not n_ready and (not may_come or (not self._begun and now - self._unable_at > _GRACE_S)):
            assert unable[0].error is not None
            raise_unable(unable[0].error)
        waited, wanted = now - self._enough_at, wanted_by(self._order, self._options.resources)
        if waited > _QUIET_S and not self._told_to_wait:
            self._told_to_wait = True
            self._note(
                f"{n_ready} of {self._least} workers are there: {no_room(wanted)}; waiting for room, up to "
                f"{self._options.start_timeout:.0f} s (run.start_timeout)"
            )
        if waited > self._options.start_timeout:
            least = "" if n_ready == 0 else f" ({n_ready} of run.workers.min = {self._options.least} are ready)"
            raise ActlakeError(
                f"no worker came for {self._options.start_timeout:.0f} s{least}: {no_room(wanted)}; give the cluster "
                "more room, or the run more time with run.start_timeout, and run it again: finished shards are kept"
            )
