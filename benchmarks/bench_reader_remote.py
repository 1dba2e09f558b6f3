"""Streaming from object stores: local emulators of GCS and S3, without and with 20 ms before every answer.

    pip install 'actlake[bench]'; python benchmarks/bench_reader_remote.py data/demo

On one machine client, decoder and server share the cores, so the most that a reader can reach is cores / (client +
decode + server CPU seconds per GB). Each is measured alone: the client as ranged reads of all stored bytes through the
dataset's file system with many in flight, and the server by the CPU time of its process meanwhile; the decoder on bytes
in memory. The ranges are of 8 MiB at most, which cost both sides least, and then chunks in any order, which is what a
shuffled stream asks for. GB are uncompressed. The latency is injected by a proxy on the loopback (``latency.py``).
Linux.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from decoding import decode_memory, stored_chunks
from emulators import NAMES, OPTIONS, emulator, running
from harness import Report, Row, Stopwatch, leave_result, make_parser, median_rate, n_cores, run_child, warm_memory
from tiling import pick_points, tile

import actlake
from actlake.shards.prefetch import thread_count
from actlake.storage.limits import CLIENTS
from actlake.storage.stores import Store

#: Larger ranges cost fsspec's clients up to three times more CPU time a byte.
_RANGE_NBYTES = 8 << 20
_BUCKET = "actlake-bench"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where an emulator answers, as options of its fsspec client, and the processes that answer."""

    url: str
    options: Mapping[str, Any]
    pids: tuple[int, ...]


@contextmanager
def delayed(port: int, milliseconds: float) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Give a port that answers as another one does, later by so much, and the processes that this takes."""
    if not milliseconds:
        yield port, ()
        return
    command = [sys.executable, str(Path(__file__).with_name("latency.py")), str(port), str(milliseconds)]
    with running(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline()), (process.pid,)


def upload(ds: actlake.ActivationDataset, target: Store) -> None:
    """Copy every object of a local dataset."""
    root = Path(ds.url)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            target.write(path.relative_to(root).as_posix(), path.read_bytes())


# --- measurements ---


def measure(protocol: str, ds: actlake.ActivationDataset, options: argparse.Namespace) -> Iterator[Row]:
    """Measure one emulator at each latency."""
    point = ds.hook_points[0]
    chunks = stored_chunks(ds, [point])
    wire, raw = sum(chunk.length for chunk in chunks), sum(chunk.raw_nbytes for chunk in chunks)
    with emulator(protocol) as server:
        url = f"{server.make_bucket(_BUCKET)}/dataset"
        upload(ds, server.store(url))
        for milliseconds in options.latency:
            with delayed(server.port, milliseconds) as (near, pids):
                chosen = OPTIONS[protocol](near) | {"client": options.client}
                target = json.dumps({"url": url, "options": chosen, "pids": (server.pid, *pids)})
                found = run_child(
                    __file__, ["--child", target, "--repeats", options.repeats, "--epochs", options.epochs]
                )
            fetch, chunked, stream = (_medians(found[what]) for what in ("fetch", "chunked", "stream"))
            decode = median_rate([decode_memory(ds, chunks) for _ in range(options.repeats)]).cpu_s_per_gb
            bound, by_chunks = (_bound(side, decode, raw) for side in (fetch, chunked))
            streamed = options.epochs * raw
            speed = options.epochs * ds.n_rows * ds.spec.arrays()[point].nbytes_per_row / 1e9 / stream["seconds"]
            yield {
                "store": NAMES[protocol],
                "client": options.client,
                "latency, ms": f"{milliseconds:g}",
                "client, server CPU s/GB": _cpu_s_per_gb(fetch, raw),
                "by chunks": _cpu_s_per_gb(chunked, raw),
                "decode": decode,
                "client with decoder": _cpu_s_per_gb(stream, streamed),
                "bound GB/s": bound,
                "bound by chunks": by_chunks,
                "fetch alone GB/s": raw / 1e9 / fetch["seconds"],
                "chunks alone": raw / 1e9 / chunked["seconds"],
                "stream GB/s": speed,
                "stream / bound": speed / bound,
                "stream / bound by chunks": speed / by_chunks,
                "compression": raw / wire,
            }


def _bound(fetch: Mapping[str, float], decode_s_per_gb: float, nbytes: int) -> float:
    """Return the GB/s that all cores reach: ``cores / (client + decode + server CPU s per GB)``."""
    moved_s_per_gb = (fetch["client_cpu_s"] + fetch["server_cpu_s"]) / nbytes * 1e9
    return n_cores() / (moved_s_per_gb + decode_s_per_gb)


def _cpu_s_per_gb(run: Mapping[str, float], nbytes: int) -> str:
    return ", ".join(f"{run[name] / nbytes * 1e9:.2f}" for name in ("client_cpu_s", "server_cpu_s"))


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def child(endpoint: Endpoint, repeats: int, epochs: int) -> dict[str, list[dict[str, float]]]:
    """Fetch and stream everything in turns, in a process of its own."""
    found: dict[str, list[dict[str, float]]] = {"fetch": [], "chunked": [], "stream": []}
    for _ in range(repeats):
        for what, prepare in (
            ("fetch", _fetch),
            ("chunked", _fetch_chunks),
            ("stream", partial(_stream, epochs=epochs)),
        ):
            ds = actlake.open(endpoint.url, endpoint.options)
            run = prepare(ds, ds.hook_points[0])
            warm_memory()
            with Stopwatch() as own, Stopwatch(pids=endpoint.pids) as theirs:
                run()
            spent = {"seconds": own.seconds, "client_cpu_s": own.cpu_s, "server_cpu_s": theirs.cpu_s}
            found[what].append(spent)
    return found


def _fetch(ds: actlake.ActivationDataset, point: str) -> Callable[[], None]:
    ranges: deque[tuple[str, int, int]] = deque()
    for chunk in stored_chunks(ds, [point]):
        key, start, stop = ranges[-1] if ranges else ("", 0, 0)
        end = chunk.offset + chunk.length
        if key == chunk.key and stop == chunk.offset and end - start <= _RANGE_NBYTES:
            ranges[-1] = (key, start, end)
        else:
            ranges.append((chunk.key, chunk.offset, end))

    return partial(_read, ds, ranges, max(8, 4 * n_cores()))


def _fetch_chunks(ds: actlake.ActivationDataset, point: str) -> Callable[[], None]:
    chunks = stored_chunks(ds, [point])
    random.Random(0).shuffle(chunks)
    ranges = [(chunk.key, chunk.offset, chunk.offset + chunk.length) for chunk in chunks]
    return partial(_read, ds, ranges, thread_count(local=False))


def _read(ds: actlake.ActivationDataset, ranges: Iterable[tuple[str, int, int]], n_threads: int) -> None:
    with ThreadPoolExecutor(n_threads) as pool:
        for (_, start, stop), data in zip(ranges, pool.map(lambda r: ds.store.read_range(*r), ranges), strict=True):
            if len(data) != stop - start:
                raise OSError(f"{len(data)} of {stop - start} bytes came")


def _stream(ds: actlake.ActivationDataset, point: str, *, epochs: int) -> Callable[[], None]:
    stream = ds.stream(point, epochs=epochs, drop_last=False)

    def run() -> None:
        for batch in stream:
            float(batch[point][0, 0])

    return run


# --- the command ---


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("dataset", nargs="?", default="data/demo")
    parser.add_argument("--point", help="hook point (default: layers.9.resid_post)")
    parser.add_argument("--gb", type=float, default=0.5, help="size of the dataset that is made of it, uncompressed")
    parser.add_argument("--store", choices=("gs", "s3"), action="append", help="only this store; repeatable")
    parser.add_argument("--client", choices=CLIENTS, default="fsspec", help="what reads (default: fsspec)")
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 20], help="milliseconds before each answer")
    parser.add_argument("--epochs", type=int, default=3, help="passes of the stream; the first one touches its memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.client == "obstore" and "gs" in (options.store or ("gs",)) and any(options.latency):
        # It answers XML requests, which are obstore's, for the host and port that it was started with alone.
        parser.error("fake-gcs-server does not answer obstore through the proxy that delays: give --latency 0")
    return options


def main() -> None:
    # Read when gcsfs is imported: against an emulator its probe for another API stalls for a minute.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    options = parse()
    if options.child:
        leave_result(child(Endpoint(**json.loads(options.child)), options.repeats, options.epochs))
        return
    with Report(options) as report, tempfile.TemporaryDirectory() as folder:
        source = actlake.open(options.dataset)
        point = pick_points(source, 1, options.point)[0]
        nbytes_per_row = source.spec.arrays()[point].nbytes_per_row
        ds = tile(source, Path(folder) / "tiled", round(options.gb * 1e9 / nbytes_per_row), [point])
        rows = [row for protocol in options.store or ("gs", "s3") for row in measure(protocol, ds, options)]
        times = f"{options.epochs} passes; medians of {options.repeats}; {n_cores()} cores for all"
        note = f"{ds.n_rows:,} rows of {nbytes_per_row} bytes; {times}."
        report.table("Streams from object stores", rows, note)


if __name__ == "__main__":
    main()
