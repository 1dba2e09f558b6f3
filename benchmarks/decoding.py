"""The yardstick of the reader: how fast the chunks of hook points can be read, checked and decoded at all.

As strong as we can make it: open files, one ``preadv`` a chunk into a buffer that each thread keeps, crc32c, and
numcodecs' decoder into a scratch that stays in the cache. The threads take chunks from one queue, so that none idles.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import Rate, Stopwatch, n_cores

import actlake
from actlake.shards.objects import bits_dtype
from actlake.storage.arrays import ArraySpec, ShardIndex, decode_chunk


@dataclass(frozen=True, kw_only=True)
class StoredChunk:
    """Where the bytes of one chunk lie."""

    array: ArraySpec
    key: str
    offset: int
    length: int

    @property
    def raw_nbytes(self) -> int:
        return self.array.rows_per_chunk * self.array.nbytes_per_row


def stored_chunks(ds: actlake.ActivationDataset, points: Sequence[str]) -> list[StoredChunk]:
    """Return every chunk of some hook points in stored order, the points of a shard one after another."""
    found = []
    for shard, n_rows in ds.reader.manifest.n_rows_by_shard().items():
        for array in (ds.spec.arrays()[point] for point in points):
            key = array.object_key(shard)
            tail = ds.store.read_range(key, -array.index_nbytes, 0)
            index = ShardIndex.parse(array, tail, n_rows, ds.store.nbytes(key), key)
            for chunk in range(-(-n_rows // array.rows_per_chunk)):
                offset, length = int(index.offsets[chunk]), int(index.lengths[chunk])
                found.append(StoredChunk(array=array, key=key, offset=offset, length=length))
    return found


def decode_files(ds: actlake.ActivationDataset, chunks: Sequence[StoredChunk], *, epochs: int = 1) -> Rate:
    """Read, check and decode chunks of a local dataset on all cores, so many times."""
    with _open_files(ds, chunks) as handles:

        def load(chunk: StoredChunk, buffer: memoryview) -> memoryview:
            piece = buffer[: chunk.length]
            if os.preadv(handles[chunk.key], [piece], chunk.offset) != chunk.length:
                raise OSError(f"{chunk.key} is shorter than its index says")
            return piece

        return _decode(chunks, load, epochs)


def decode_memory(ds: actlake.ActivationDataset, chunks: Sequence[StoredChunk], *, epochs: int = 1) -> Rate:
    """Check and decode chunks whose bytes are in memory on all cores: decoding alone."""
    held = {(c.key, c.offset): memoryview(ds.store.read_range(c.key, c.offset, c.offset + c.length)) for c in chunks}
    return _decode(chunks, lambda chunk, _: held[chunk.key, chunk.offset], epochs)


def _decode(chunks: Sequence[StoredChunk], load: Callable[[StoredChunk, memoryview], memoryview], epochs: int) -> Rate:
    queue = deque(chunk for _ in range(epochs) for chunk in chunks)
    nbytes = sum(chunk.raw_nbytes for chunk in queue)
    longest = max(chunk.length for chunk in chunks)

    def work(_: int) -> None:
        buffer = memoryview(bytearray(longest))
        scratch: dict[str, npt.NDArray[Any]] = {}
        for chunk in _drain(queue):
            array = chunk.array
            if array.name not in scratch:
                scratch[array.name] = np.zeros(array.shape(array.rows_per_chunk), dtype=bits_dtype(array))
            decode_chunk(array, load(chunk, buffer), scratch[array.name], chunk.key)

    with ThreadPoolExecutor(n_cores()) as pool, Stopwatch(nbytes) as watch:
        list(pool.map(work, range(n_cores())))
    return watch.rate


def _drain(queue: "deque[StoredChunk]") -> Iterator[StoredChunk]:
    while True:
        try:
            yield queue.popleft()
        except IndexError:
            return


@contextmanager
def _open_files(ds: actlake.ActivationDataset, chunks: Sequence[StoredChunk]) -> Iterator[dict[str, int]]:
    handles = {key: os.open(ds.store.path(key), os.O_RDONLY) for key in dict.fromkeys(chunk.key for chunk in chunks)}
    try:
        yield handles
    finally:
        for handle in handles.values():
            os.close(handle)
