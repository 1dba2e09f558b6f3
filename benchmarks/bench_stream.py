"""How fast a dataset streams, beside the rate at which its chunks can be read, checked and decoded at all.

    python benchmarks/bench_stream.py DATASET [--point layers.9.resid_post] [--epochs 20] [--repeats 3]

Both use all cores and alternate in one process, from the page cache. A small dataset is streamed for several epochs.
"""

import argparse
import json
import resource
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from harness import conditions

import actlake
from actlake.shards.objects import bits_dtype
from actlake.shards.prefetch import thread_count


@dataclass
class Rate:
    """Gigabytes (1e9, uncompressed) per second, and CPU seconds for each."""

    gb_per_s: float
    cpu_s_per_gb: float


def decode_all(ds: actlake.ActivationDataset, points: list[str], epochs: int) -> Rate:
    """Read, check and decode every chunk of the points into a scratch of each thread."""
    arrays = [ds.spec.arrays()[point] for point in points]
    n_rows = ds.reader.manifest.n_rows_by_shard()
    tasks = [
        (array, shard, chunk)
        for _ in range(epochs)
        for array in arrays
        for shard, rows in n_rows.items()
        for chunk in range(-(-rows // array.rows_per_chunk))
    ]
    threads = thread_count(ds.store.local)

    def work(first: int) -> None:
        scratch = {a.name: np.empty(a.shape(a.rows_per_chunk), dtype=bits_dtype(a)) for a in arrays}
        for array, shard, chunk in tasks[first::threads]:
            ds.reader.read_chunk(array, shard, chunk, scratch[array.name])

    with ThreadPoolExecutor(threads) as pool, Stopwatch(_nbytes(ds, points) * epochs) as watch:
        list(pool.map(work, range(threads)))
    return watch.rate


def stream_all(ds: actlake.ActivationDataset, points: list[str], epochs: int, batch_size: int) -> Rate:
    """Stream the points, touching every batch as a trainer would not avoid to."""
    nbytes_per_row = _nbytes(ds, points) / ds.n_rows
    stream = ds.stream(points, batch_size=batch_size, epochs=epochs, drop_last=False)
    n_rows = 0
    with Stopwatch(_nbytes(ds, points) * epochs) as watch:
        for batch in stream:
            n_rows += len(batch)
            float(batch[points[0]][0, 0])
    assert n_rows * nbytes_per_row == _nbytes(ds, points) * epochs
    return watch.rate


class Stopwatch:
    """Times a block that handles so many bytes."""

    def __init__(self, nbytes: float) -> None:
        self._gb = nbytes / 1e9

    def __enter__(self) -> "Stopwatch":
        self._wall, self._cpu = time.perf_counter(), _cpu_s()
        return self

    def __exit__(self, *_: object) -> None:
        self.rate = Rate(self._gb / (time.perf_counter() - self._wall), (_cpu_s() - self._cpu) / self._gb)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _nbytes(ds: actlake.ActivationDataset, points: list[str]) -> int:
    return ds.n_rows * sum(ds.spec.arrays()[point].nbytes_per_row for point in points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", default="data/demo")
    parser.add_argument("--point", action="append", help="hook point; may be given several times")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    ds = actlake.open(arguments.dataset)
    points = arguments.point or ["layers.9.resid_post"]
    print(json.dumps(conditions(), indent=1))
    decode_all(ds, points, 1)
    pairs = [
        (decode_all(ds, points, arguments.epochs), stream_all(ds, points, arguments.epochs, arguments.batch_size))
        for _ in range(arguments.repeats)
    ]
    for name, rates in (("decode", [a for a, _ in pairs]), ("stream", [b for _, b in pairs])):
        gb, cpu = (statistics.median(getattr(r, field) for r in rates) for field in ("gb_per_s", "cpu_s_per_gb"))
        print(f"{name}: {gb:.2f} GB/s, {cpu:.2f} CPU s per GB")
    print(f"stream / decode: {statistics.median(b.gb_per_s / a.gb_per_s for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
