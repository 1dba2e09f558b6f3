"""Hands shards to Ray actors: one shard a call, a bounded number of calls in flight, results as they come.

Ray Core rather than Ray Data: 1,750 shards/s against 19 (one shard a block). The work itself knows nothing of Ray.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from typing import Any

from actlake.jobs.engines.events import Event
from actlake.jobs.engines.ray_cluster import cluster, n_gpus, no_room, require_room, room, wanted_by
from actlake.jobs.engines.ray_pool import Pool, PoolOptions
from actlake.jobs.engines.ray_worker import RayWorker
from actlake.jobs.work import ModelOrder, Task, WorkOrder
from actlake.storage.errors import ActlakeError

# After the connection, which says what to install where Ray is absent.
import ray  # isort: skip
from ray.exceptions import RayTaskError  # isort: skip

#: Seconds that ``calls`` waits for a first worker on a cluster which may still grow.
_START_S = 600.0

#: Seconds between two looks around.
_POLL_S = 0.5


def run(
    order: WorkOrder,
    tasks: Iterable[Task],
    *,
    options: PoolOptions,
    address: str | None,
    note: Callable[[str], None] = lambda text: None,
    worker: type[RayWorker] | None = None,
) -> Generator[Event, None, None]:
    """Yield what happens until every task is committed or abandoned; closing it ends the workers.

    ``note`` hears of what is wrong though the run goes on. Raises ``BadInputError`` where this machine's Ray has no
    room for a worker, ``ActlakeError`` where a cluster has none for ``options.start_timeout``, and what the first
    worker that could not start had raised, as an ``ActlakeError``, where none can.
    """
    if order.device.startswith("cuda"):
        # Ray shows each actor its own GPUs alone, from the first.
        order = replace(order, device="cuda")
    with cluster(address, n_cpus=options.most * order.n_threads):
        wanted = wanted_by(order, options.resources)
        if address is None:
            require_room(wanted)
        elif room(wanted) < 1:
            note(
                f"{no_room(wanted)}: waiting up to {options.start_timeout:.0f} s for a node that has room "
                "(run.start_timeout)"
            )
        pool = Pool(worker or RayWorker, order, options, note)
        try:
            yield from pool.run(tasks)
        finally:
            pool.close()


def calls(
    actor: type[Any],
    order: ModelOrder,
    method: str,
    items: Iterable[Any],
    *,
    attempts: int,
    workers: int,
    grows: bool = False,
) -> Iterator[Any]:
    """Yield what a method of actors ``actor(order)`` returns for each item, as it comes; one call in flight for each.

    An actor that dies is started again with its item, up to ``attempts`` times in all; errors are raised as they were.
    Where there is room for no actor the cluster either ``grows`` within ten minutes, or ``BadInputError`` is raised.
    """
    wanted = wanted_by(order)
    if not grows:
        require_room(wanted)
    remote: Any = ray.remote(actor).options(
        num_cpus=order.n_threads, num_gpus=n_gpus(order), max_restarts=-1, max_task_retries=attempts - 1
    )
    actors = [remote.remote(order) for _ in range(workers)]
    # Actors that the cluster has no room for join when it has.
    coming = {one.__ray_ready__.remote(): one for one in actors}
    idle, in_flight, begun = list[Any](), dict[Any, Any](), time.monotonic()
    waiting = iter(items)
    try:
        while True:
            while idle and (item := next(waiting, None)) is not None:
                free = idle.pop()
                in_flight[getattr(free, method).remote(item)] = free
            if idle and not in_flight:
                return
            for ref in ray.wait([*in_flight, *coming], timeout=_POLL_S)[0]:
                came = ref in coming
                idle.append((coming if came else in_flight).pop(ref))
                result = _result(ref)
                if not came:
                    yield result
            if len(coming) == len(actors) and time.monotonic() - begun > _START_S:
                raise ActlakeError(f"{no_room(wanted)}, and none has come for {_START_S:.0f} s: run it again with room")
    finally:
        for one in actors:
            ray.kill(one)


def _result(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from error
