"""A worker of the local engine: a model, threads that build shards with it, and the process that it may have.

A process is a fresh interpreter at the other end of a pipe: it gets its order and tasks by it, sends back what happens,
and ends when the pipe closes, however the engine ended.
"""

import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NoReturn

from actlake.jobs.engines.events import RowsCaptured, ShardCommitted
from actlake.jobs.work import Task, Worker, WorkOrder
from actlake.storage.errors import ActlakeError
from actlake.storage.unfinished import remove_unfinished


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The worker has its model, and builds so many shards at once."""

    n_concurrent: int


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A shard failed; ``task`` None: the worker could not start."""

    task: Task | None
    error: Exception


@dataclass(frozen=True, kw_only=True)
class Gone:
    """The worker's process ended with this exit status, negative: by that signal."""

    status: int


Message = Ready | RowsCaptured | ShardCommitted | Failed | Gone


class StoppedError(Exception):
    """Ends a build that nobody waits for any more."""


class Crew:
    """Loads the model once, then builds the tasks that it is given in ``Worker.n_concurrent`` threads.

    ``send`` hears what happens, in any of the threads.
    """

    def __init__(self, order: WorkOrder, send: Callable[[Message], None]) -> None:
        self._order, self._send, self._stopped = order, send, threading.Event()
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        #: What its threads are about; None: the model, while it is loading.
        self._busy: set[Task | None] = {None}
        self._threads = list[threading.Thread]()
        self._thread(self._start, "actlake-start")

    def give(self, task: Task) -> None:
        """Have a task built as soon as a thread is free."""
        self._busy.add(task)
        self._tasks.put(task)

    def stop(self) -> None:
        """End the threads; what they build is given up with its next batch."""
        self._stopped.set()
        self._tasks.put(None)

    def join(self) -> None:
        """Wait for threads that were stopped, but for those in the middle of something: that may be long.

        An interpreter that ends meanwhile can abort: torch tears down what it keeps for each thread.
        """
        while self._threads and not self._busy:
            self._threads.pop().join()

    def _thread(self, target: Callable[..., None], name: str, *arguments: object) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, name=name, daemon=True))
        self._threads[-1].start()

    def _start(self) -> None:
        try:
            worker = Worker(self._order)
        except BaseException as error:  # noqa: BLE001 - handed to the engine, which raises it
            self._busy.discard(None)
            self._send(Failed(task=None, error=_plain(error)))
            return
        for _ in range(worker.n_concurrent):
            self._thread(self._work, "actlake-worker", worker)
        self._busy.discard(None)
        self._send(Ready(n_concurrent=worker.n_concurrent))

    def _work(self, worker: Worker) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                message: Message = ShardCommitted(task=task, record=worker.build(task, self._captured))
            except BaseException as error:  # noqa: BLE001 - counted, named and raised at the end of the run
                message = Failed(task=task, error=_plain(error))
            self._busy.discard(task)
            self._send(message)
        self._tasks.put(None)  # For the next thread.

    def _captured(self, n_rows: int, forward_s: float) -> None:
        if self._stopped.is_set():
            raise StoppedError
        self._send(RowsCaptured(n_rows=n_rows, forward_s=forward_s))


def _plain(error: BaseException) -> Exception:
    """Return an error as it is where it survives pickling, else one with its text."""
    if isinstance(error, Exception):
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # noqa: BLE001 - of an error of any package
            return ActlakeError(f"{type(error).__name__}: {error}")
        return error
    return ActlakeError(f"{type(error).__name__}: {error}")


def serve(handle: int) -> NoReturn:
    """Be a worker's process: ``handle`` is this end of the pipe, whose first message is the order."""
    # Ctrl-C reaches every process of a terminal; the engine's end closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _leave(128 + signal.SIGTERM))
    pipe, sending = Connection(handle), threading.Lock()

    def send(message: Message) -> None:
        with sending:
            try:
                pipe.send(message)
            except OSError:
                _leave(0)  # Nobody listens.

    try:
        crew = Crew(pipe.recv(), send)
        while True:
            crew.give(pipe.recv())
    except (EOFError, OSError):
        _leave(0)


def _leave(status: int) -> NoReturn:
    remove_unfinished()
    sys.stderr.flush()
    os._exit(status)
