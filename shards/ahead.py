"""How many windows are begun before they are waited for."""

import time
from collections import deque
from collections.abc import Iterator

from actlake.shards.counters import Counters
from actlake.shards.flights import Flight
from actlake.shards.follow import POLL_S

#: Tasks for each thread that should be waiting while a window of a batch or less is finished.
_TASKS_AHEAD = 8
_MAX_WINDOWS_AHEAD = 16


def begun_ahead(flights: Iterator[Flight | None], n_threads: int, counters: Counters) -> Iterator[Flight]:
    """Yield windows in turn, each begun before the ones that it follows are done.

    One is ahead while there is memory for two, more are where they are tiny. Those are begun several in a row, and
    waited for together: what the first has used is in the caches, and threads change places less often.
    """
    waiting: deque[Flight] = deque()
    n_ahead, n_awaited, ended = 1, 1, False
    while waiting or not ended:
        begins = len(waiting) <= (n_ahead + 1) // 2
        while begins and not ended and len(waiting) <= n_ahead:
            try:
                flight = next(flights)
            except StopIteration:
                ended = True
                break
            if flight is None:
                break
            waiting.append(flight)
            if len(flight.deliveries) <= 1:
                n_ahead = min(_MAX_WINDOWS_AHEAD, -(-_TASKS_AHEAD * n_threads // max(1, flight.n_tasks)))
        if waiting:
            if not n_awaited:
                n_awaited = max(1, len(waiting) - (n_ahead + 1) // 2)
                _await(waiting[n_awaited - 1], counters)
            n_awaited -= 1
            yield waiting.popleft()
        elif not ended:
            time.sleep(POLL_S / 4)


def _await(flight: Flight, counters: Counters) -> None:
    with counters.waiting():
        for task in flight.tasks:
            # Its error is raised in turn, after the batches before it.
            task.exception()
