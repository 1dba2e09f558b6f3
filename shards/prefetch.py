"""The one thread pool of the reader: threads that end with their owner.

Threads, not processes: reading, crc32c and decoding release the GIL.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from threading import BoundedSemaphore
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: Beyond this, more threads only fight for memory bandwidth.
_MAX_THREADS = 32

#: A remote read waits ~20 ms for its first byte, twenty times as long as a chunk is decoded.
_REMOTE_THREADS_PER_CORE = 16


def core_count() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count(local: bool) -> int:
    """Return how many threads read from a local disk, or from an object store where ``local`` is False."""
    return min(_MAX_THREADS, core_count() * (1 if local else _REMOTE_THREADS_PER_CORE))


class Workers:
    """Threads that run functions and raise in the caller what those raised.

    A context manager: at its end tasks that have not begun are dropped, and the threads end after the task they are
    in. It does not wait for them, since a garbage collection inside one of them may be what ends it.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        #: Held while bytes that have come are decoded: for that, 32 threads on 2 cores take three times the time of 2.
        self.turns = BoundedSemaphore(core_count())
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="actlake-read")
        self._pid = os.getpid()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        # After a fork the threads are the parent's, and so are the locks that they may have held.
        if self._pid == os.getpid():
            self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, function: Callable[[T], R], item: T) -> "Future[R]":
        """Start ``function(item)`` in a thread."""
        return self._pool.submit(function, item)

    def share(self, function: Callable[[T], None], items: Sequence[T]) -> "list[Future[None]]":
        """Start ``function`` for all items, taken by the threads one by one; return what is done when all are.

        One wait a thread, not an item: a task of the pool costs 50 us. After an error the items that are left are not
        begun.
        """
        turns = count()

        def run() -> None:
            while not self._closed and (turn := next(turns)) < len(items):
                try:
                    function(items[turn])
                except BaseException:
                    # Moves the others' turns past the end.
                    deque(islice(turns, len(items)), maxlen=0)
                    raise

        return [self._pool.submit(run) for _ in range(min(self.n_threads, len(items)))]

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield ``function(item)`` in the order of the items, with at most two tasks a thread begun or waiting."""
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(self.submit(function, item))
            if len(waiting) >= 2 * self.n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
