"""Memory of batches in flight: slots of one batch each, handed out again once a trainer has dropped the batch."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.shards.objects import bits_dtype
from actlake.storage.arrays import ArraySpec

#: Slots are made by the slab, so that one copy reaches many of them. A trainer that keeps a batch keeps its slab.
_SLAB_NBYTES = 64 * 1024 * 1024


class Slab:
    """Consecutive slots: for each name an array ``[slots, rows, width]`` of bits."""

    def __init__(self, arrays: Mapping[str, ArraySpec], n_rows: int, n_slots: int) -> None:
        self.arrays: dict[str, npt.NDArray[Any]] = {
            name: np.empty((n_slots, *array.shape(n_rows)), dtype=bits_dtype(array)) for name, array in arrays.items()
        }
        #: Where each array begins, and bytes of a slot in it: asked of numpy once, as it costs more than a copied row.
        self.places = {name: (rows.ctypes.data, rows.strides[0]) for name, rows in self.arrays.items()}


@dataclass(frozen=True, eq=False)
class Slot:
    """One batch's memory: a place in a slab."""

    slab: Slab
    place: int

    def rows(self, name: str) -> npt.NDArray[Any]:
        """Return the rows of a name, ``[rows, width]`` of bits."""
        rows: npt.NDArray[Any] = self.slab.arrays[name][self.place]
        return rows

    def address(self, name: str) -> int:
        """Return where the rows of a name begin in memory, for as long as the slab lives."""
        first, stride = self.slab.places[name]
        return first + self.place * stride


class Memory:
    """Slots for batches of ``n_rows`` rows of some arrays.

    Fresh memory costs up to 1 CPU second per GB, since the kernel hands it out page by page, zeroed; a slot that comes
    back costs nothing. Thread-safe: garbage may be collected in any thread.
    """

    def __init__(self, arrays: Mapping[str, ArraySpec], n_rows: int) -> None:
        self._arrays, self._n_rows = dict(arrays), n_rows
        nbytes = n_rows * sum(array.nbytes_per_row for array in arrays.values())
        self._per_slab = max(1, _SLAB_NBYTES // max(1, nbytes))
        self._order: dict[int, int] = {}
        self._free: list[Slot] = []
        self._returned: deque[Slot] = deque()
        self._closed = False

    def take(self, n_slots: int) -> list[Slot]:
        """Return slots of any content, neighbours next to each other as far as may be."""
        while self._returned:
            self._free.append(self._returned.popleft())
        while len(self._free) < n_slots:
            wanted = min(self._per_slab, n_slots - len(self._free))
            slab = Slab(self._arrays, self._n_rows, wanted)
            self._order[id(slab)] = len(self._order)
            self._free += [Slot(slab, place) for place in range(wanted)]
        self._free.sort(key=self._address, reverse=True)
        return [self._free.pop() for _ in range(n_slots)]

    def _address(self, slot: Slot) -> tuple[int, int]:
        return self._order[id(slot.slab)], slot.place

    def lend(self, slot: Slot) -> dict[str, npt.NDArray[Any]]:
        """Return a slot's rows by name; the slot comes back when the last of these arrays is dropped."""
        lease = _Lease(self, slot)
        return {name: _lent(slot.rows(name), lease) for name in self._arrays}

    def give_back(self, slot: Slot) -> None:
        """Take a slot back that was not lent."""
        self._come_back(slot)

    def close(self) -> None:
        """Let go of all memory, and keep none that comes back."""
        self._closed = True
        self._free.clear()
        self._returned.clear()

    def _come_back(self, slot: Slot) -> None:
        if not self._closed:
            self._returned.append(slot)


class _Lease:
    """Lives as long as an array that holds it."""

    __slots__ = ("_memory", "_slot")

    def __init__(self, memory: Memory, slot: Slot) -> None:
        self._memory, self._slot = memory, slot

    def __del__(self) -> None:
        self._memory.give_back(self._slot)


class _Lent(np.ndarray[Any, Any]):
    """Rows with their lease. What is made of them holds either them or the slab alone, so a trainer gets tensors."""

    lease: _Lease


def _lent(rows: npt.NDArray[Any], lease: _Lease) -> npt.NDArray[Any]:
    found = rows.view(_Lent)
    found.lease = lease
    return found
