"""What a machine does alone and what bounds an ingestion: copies from the GPU, the processor's work, writes to disk."""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actlake.ingest.capture import Capture
from actlake.storage.arrays import ArraySpec, encode_shard
from actlake.storage.moments import of_shard
from actlake.storage.spec import DatasetSpec
from actlake.storage.stores import Store

_COPY_NBYTES = 256 << 20
_N_COPIES = 8
#: Rows of one piece of work: a chunk of the narrowest hook points.
_PIECE_ROWS = 1024
#: Written to the disk alone at most, in objects of this size.
_DISK_NBYTES, _OBJECT_NBYTES = 4 << 30, 64 << 20

Piece = tuple[ArraySpec, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class ProcessorLimit:
    """GB/s, uncompressed, that all threads together get through: statistics, encoding with checksums, and both."""

    statistics: float
    encode: float

    @property
    def both(self) -> float:
        """The rate of the one after the other, as every value goes through both."""
        return 1 / (1 / self.statistics + 1 / self.encode)


def copy_gb_per_s(device: str) -> float | None:
    """Return the GB/s of copies to pinned host memory, 256 MiB each; None where there is no GPU."""
    if not device.startswith("cuda"):
        return None
    there = torch.empty(_COPY_NBYTES, dtype=torch.uint8, device=device).random_()
    here = torch.empty(_COPY_NBYTES, dtype=torch.uint8, pin_memory=True)
    here.copy_(there)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    for _ in range(_N_COPIES):
        here.copy_(there, non_blocking=True)
    last.record()
    last.synchronize()
    return _N_COPIES * _COPY_NBYTES / float(first.elapsed_time(last)) / 1e6


def disk_gb_per_s(folder: Store, seconds: float) -> float:
    """Return the best GB/s of one and of four threads that write objects, each on the disk before the next."""
    data = np.random.default_rng(0).bytes(_OBJECT_NBYTES)
    return max(_written(folder, data, n_threads, seconds / 2) for n_threads in (1, 4))


def _written(folder: Store, data: bytes, n_threads: int, seconds: float) -> float:
    key, start = uuid.uuid4().hex, time.perf_counter()

    def write(number: int) -> int:
        # Each thread replaces its own few objects, so that the disk does not fill up.
        if number and time.perf_counter() - start > seconds:
            return 0
        folder.write(f"disk/{key}/{number % (2 * n_threads)}", data)
        return len(data)

    with ThreadPoolExecutor(n_threads) as pool:
        n_done = sum(pool.map(write, range(_DISK_NBYTES // _OBJECT_NBYTES)))
    rate = n_done / (time.perf_counter() - start) / 1e9
    for number in range(2 * n_threads):
        folder.delete(f"disk/{key}/{number}")
    return rate


def sample(forward: Capture, spec: DatasetSpec, batch_tokens: int, context: int, n_points: int = 16) -> list[Piece]:
    """Return activations of one batch in pieces of a chunk or so, of at most so many hook points of the spec."""
    ids_BT = torch.randint(10, forward.model.shape.vocab_size, (max(1, batch_tokens // context), context))
    acts, arrays = forward(ids_BT), spec.arrays()
    step = -(-len(spec.point_names) // n_points)
    found: list[Piece] = []
    for name in spec.point_names[::step]:
        # The bits go through an integer type: numpy has no bfloat16 of its own.
        rows = acts[name].flatten(0, 1).cpu().view(torch.int16).numpy().view(arrays[name].numpy_dtype)
        found += [(arrays[name], rows[at : at + _PIECE_ROWS]) for at in range(0, len(rows), _PIECE_ROWS)]
    return found


def processor_limit(pieces: Sequence[Piece], n_threads: int, seconds: float) -> ProcessorLimit:
    """Measure what the threads do with pieces of activations when nothing else runs."""
    return ProcessorLimit(
        statistics=_worked(pieces, lambda piece: of_shard(piece[1]), n_threads, seconds / 2),
        encode=_worked(pieces, lambda piece: encode_shard(*piece), n_threads, seconds / 2),
    )


def _worked(pieces: Sequence[Piece], work: Callable[[Piece], object], n_threads: int, seconds: float) -> float:
    def take_turns() -> int:
        n_done = 0
        for place in places:
            piece = pieces[place % len(pieces)]
            work(piece)
            n_done += piece[1].nbytes
            if time.perf_counter() >= end:
                break
        return n_done

    # Shared by the threads: next() of itertools.count is one step of the interpreter.
    places: Iterator[int] = count()
    start = time.perf_counter()
    end = start + seconds
    with ThreadPoolExecutor(n_threads) as pool:
        done = [pool.submit(take_turns) for _ in range(n_threads)]
        n_done = sum(one.result() for one in done)
    return n_done / (time.perf_counter() - start) / 1e9


def slowest(limits: Mapping[str, float | None]) -> tuple[str, float]:
    """Return the name and the rate of the slowest of the limits that there are."""
    known = {name: rate for name, rate in limits.items() if rate is not None}
    name = min(known, key=known.__getitem__)
    return name, known[name]
