"""Builds shards in this process, one after another: no Ray, no other process."""

import queue
import threading
from collections.abc import Iterable, Iterator

from actlake.jobs.engines.events import Event, RowsCaptured, ShardAbandoned, ShardCommitted
from actlake.jobs.work import Task, Worker, WorkOrder


def run(order: WorkOrder, tasks: Iterable[Task], *, attempts: int) -> Iterator[Event]:
    """Yield what happens until every task is committed or abandoned."""
    events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            worker = Worker(order)
            for task in tasks:
                if stop.is_set():
                    return
                events.put(_build(worker, task, attempts, events))
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            events.put(error)
        finally:
            events.put(None)

    # A thread of its own, so that the consumer can draw progress while a shard is being built.
    thread = threading.Thread(target=work, name="actlake-worker", daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        stop.set()
    thread.join()


def _build(
    worker: Worker, task: Task, attempts: int, events: "queue.SimpleQueue[Event | BaseException | None]"
) -> Event:
    for attempt in range(attempts):
        try:
            record = worker.build(task, lambda n_rows: events.put(RowsCaptured(n_rows=n_rows)))
            return ShardCommitted(task=task, record=record)
        except Exception as error:  # noqa: BLE001 - counted, named and raised at the end of the run
            last = error
            if attempt == attempts - 1:
                break
    return ShardAbandoned(task=task, error=last)
