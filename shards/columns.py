"""Row columns of the rows in flight, read when they are first asked for: most trainers never look at them.

They are 17 bytes a row, stored in chunks of a few kB: reading them beside the activations of one hook point would cost
half of what those cost.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.shards.order import I64
from actlake.storage.spec import ROW_COLUMNS

#: The columns of a batch; ``row`` is the index of a row in ``ds[point]``.
COLUMNS = ("row", *ROW_COLUMNS)


class WindowColumns:
    """Row columns of a window's kept rows, unit by unit.

    ``read`` returns a column of the kept rows of the unit with that number in the window. Thread-safe, and safe after a
    fork: it has no locks, and two threads that ask for a column at once both read it.
    """

    def __init__(
        self, n_units: int, taken: Callable[[], I64], read: Callable[[str, int], npt.NDArray[Any]], wanted: set[str]
    ) -> None:
        self._n_units, self._taken, self._read, self._wanted = n_units, taken, read, wanted
        self._known: dict[str, npt.NDArray[Any]] = {}

    @cached_property
    def taken(self) -> I64:
        """Where each row that is put out comes among the kept rows, int64 [n]."""
        return self._taken()

    def load(self, name: str) -> npt.NDArray[Any]:
        """Return a column of all units."""
        if name not in self._known:
            self._known[name] = np.concatenate([self._read(name, place) for place in range(self._n_units)])
        return self._known[name]

    def gather(self, name: str, low: int, high: int) -> npt.NDArray[Any]:
        """Return a column of the rows put out from ``low`` to ``high``; later windows then read it ahead."""
        self._wanted.add(name)
        return self.load(name)[self.taken[low:high]]


class BatchColumns:
    """Row columns of one batch: ``read`` gives one by its name, once. Pickles as values."""

    def __init__(self, read: Callable[[str], npt.NDArray[Any]]) -> None:
        self._read = read
        self._known: dict[str, npt.NDArray[Any]] = {}

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def __reduce__(self) -> tuple[Any, ...]:
        values = {name: self[name] for name in COLUMNS}
        return BatchColumns, (values.__getitem__,)
