"""The host memory of the shards that a worker has in the making: of so many, used again and again."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.storage.arrays import ArraySpec

#: Objects of which the encoded bytes are held at most; at least two, so that one is encoded while one is uploaded.
_MOST_UPLOADS, _FEWEST_UPLOADS = 8, 2

#: Of a cache line: rows of one array never share one with those of another.
_ALIGNMENT = 64


def uploads_of(n_threads: int) -> int:
    """Return how many objects a worker with ``n_threads`` encodes and uploads at once."""
    return max(_FEWEST_UPLOADS, min(_MOST_UPLOADS, n_threads))


class ShardMemory:
    """Memory of at most ``n_shards`` shards, allocated when it is first needed and used again; thread-safe.

    Fresh memory costs the kernel up to a CPU second per GB.
    """

    def __init__(self, n_shards: int) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []
        self._slots, self._lock = threading.BoundedSemaphore(n_shards), threading.Lock()

    @contextmanager
    def lease(self, nbytes: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Hand out at least ``nbytes`` bytes, of any content, for as long as the block lasts; waits for them."""
        with self._slots:
            found = self._take(nbytes)
            try:
                yield found
            finally:
                with self._lock:
                    self._free.append(found)

    def _take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        with self._lock:
            self._free.sort(key=len)
            for place, arena in enumerate(self._free):
                if len(arena) >= nbytes:
                    return self._free.pop(place)
            # It makes room for a larger one: there are never more of them than slots.
            if self._free:
                self._free.pop()
        return np.empty(nbytes, dtype=np.uint8)


def nbytes_of(arrays: Iterable[ArraySpec], n_rows: int) -> int:
    """Return the bytes from which ``carve`` cuts ``n_rows`` rows of these arrays."""
    return sum(_aligned(n_rows * array.nbytes_per_row) for array in arrays)


def carve(arena: npt.NDArray[np.uint8], arrays: Iterable[ArraySpec], n_rows: int) -> dict[str, npt.NDArray[Any]]:
    """Cut ``n_rows`` rows of each array out of an arena, by name; of bfloat16 their bits, as uint16."""
    found, start = {}, 0
    for array in arrays:
        nbytes = n_rows * array.nbytes_per_row
        # numpy moves uint16 faster than an extension type.
        dtype = np.dtype("<u2") if array.dtype == "bfloat16" else array.numpy_dtype
        found[array.name] = arena[start : start + nbytes].view(dtype).reshape(array.shape(n_rows))
        start += _aligned(nbytes)
    return found


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
