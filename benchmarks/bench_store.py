"""What a client of an object store costs: processor seconds per GB, and the speed under errors.

    pip install 'actlake[bench]'; python benchmarks/bench_store.py

Servers on the loopback (GCS, S3), ranged reads in any order with many in flight, each client in a process of its own;
its processor time is counted apart from the server's. ``bare`` is ``http.client`` into buffers that are used again: the
least that Python can do. Then the same reads and writes through a proxy that answers one request in twenty with 429 or
503. GB are bytes on the wire. Linux.
"""

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emulators import NAMES, OPTIONS, Server, emulator, running
from harness import Report, Row, Stopwatch, leave_result, make_parser, n_cores, run_child

from actlake.storage.stores import Store

_OBJECT_NBYTES = 32 << 20
_BUCKET = "actlake-bench"
CLIENTS = ("bare", "fsspec", "obstore")
#: Half of the errors that the issue of stores speaks of are of each kind.
ERRORS = {"429": 0.025, "503": 0.025}

#: Reads bytes ``start:stop`` of the object with a number; returns how many came.
Read = Callable[[int, int, int], int]


@contextmanager
def erring(port: int) -> Iterator[int]:
    """Give a port that answers as another one does, but one request in twenty with an error."""
    faults = json.dumps({"rates": ERRORS, "seed": 1})
    command = [sys.executable, str(Path(__file__).with_name("faults.py")), str(port), faults]
    with running(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())


def bare(store: Store, protocol: str, port: int) -> Read:
    """Return a read with one kept connection and one buffer a thread."""
    local = threading.local()
    bucket = store.root
    paths: dict[int, str] = {}
    for number in range(len(store.names())):
        signed = store.fs.sign(f"{bucket}/{number}") if protocol == "s3" else ""
        plain = f"/storage/v1/b/{bucket}/o/{number}?alt=media"
        paths[number] = signed.partition(str(port))[2] if protocol == "s3" else plain

    def read(number: int, start: int, stop: int) -> int:
        if not hasattr(local, "connection"):
            local.connection, local.buffer = http.client.HTTPConnection("127.0.0.1", port), bytearray(16 << 20)
        local.connection.request("GET", paths[number], headers={"Range": f"bytes={start}-{stop - 1}"})
        answer, place = local.connection.getresponse(), 0
        view = memoryview(local.buffer)[: stop - start]
        while place < len(view) and (n_more := answer.readinto(view[place:])):
            place += n_more
        answer.read()
        return place

    return read


def ranged(store: Store) -> Read:
    """Return a read as the reader makes them."""
    return lambda number, start, stop: store.read_ranges(str(number), [(start, stop)])[0].nbytes


def child(protocol: str, port: int, client: str, nbytes: int, threads: int, pid: int) -> dict[str, float]:
    """Read everything once, after one read to connect, in a process of its own."""
    options = OPTIONS[protocol](port) | ({"client": client} if client != "bare" else {})
    store = Store(f"{protocol}://{_BUCKET}", options)
    read = bare(store, protocol, port) if client == "bare" else ranged(store)
    sizes = [store.nbytes(name) for name in sorted(store.names(), key=int)]
    ranges = [(n, at, min(at + nbytes, size)) for n, size in enumerate(sizes) for at in range(0, size, nbytes)]
    random.Random(0).shuffle(ranges)
    read(*ranges[0])
    with ThreadPoolExecutor(threads) as pool, Stopwatch() as own, Stopwatch(pids=(pid,)) as theirs:
        found = sum(pool.map(lambda item: read(*item), ranges))
    if found != sum(sizes):
        raise OSError(f"{found} of {sum(sizes)} bytes came")
    return {"seconds": own.seconds, "cpu_s": own.cpu_s, "server_cpu_s": theirs.cpu_s, "nbytes": found}


def _read(server: Server, client: str, nbytes: int, options: argparse.Namespace, port: int | None = None) -> Row:
    task = json.dumps([server.protocol, port or server.port, client, nbytes, options.threads, server.pid])
    runs = [run_child(__file__, ["--child", task]) for _ in range(options.repeats)]
    return {
        "client CPU s/GB": statistics.median(run["cpu_s"] / run["nbytes"] * 1e9 for run in runs),
        "server CPU s/GB": statistics.median(run["server_cpu_s"] / run["nbytes"] * 1e9 for run in runs),
        "GB/s": statistics.median(run["nbytes"] / run["seconds"] / 1e9 for run in runs),
    }


def _fill(store: Store, n_objects: int) -> float:
    """Store objects of random bytes, two at a time; return GB/s."""
    data = os.urandom(_OBJECT_NBYTES)
    with ThreadPoolExecutor(2) as pool, Stopwatch() as watch:
        list(pool.map(lambda number: store.write(str(number), data), range(n_objects)))
    return n_objects * len(data) / watch.seconds / 1e9


def measure(protocol: str, options: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Return the rows of both tables for one store."""
    n_objects = max(1, round(options.gb * 1e9 / _OBJECT_NBYTES))
    with emulator(protocol) as server:
        store = server.store(server.make_bucket(_BUCKET))
        clean = {"write": _fill(store, n_objects)}
        costs: list[Row] = [
            {
                "store": NAMES[protocol],
                "client": client,
                "range, MB": nbytes / 1e6,
                **_read(server, client, nbytes, options),
            }
            for nbytes in options.range_nbytes
            for client in CLIENTS
        ]
        near = _relay(server)
        with near as port, erring(server.port) as bad:
            clean["write"] = _fill(server.store(store.url, port), n_objects)
            broken = {"write": _fill(server.store(store.url, bad), n_objects)}
            for client in CLIENTS[1:]:
                clean[client] = _speed(_read(server, client, options.range_nbytes[0], options, port))
                broken[client] = _speed(_read(server, client, options.range_nbytes[0], options, bad))
    errors: list[Row] = [
        {
            "store": NAMES[protocol],
            "what": "write, fsspec" if what == "write" else f"read, {what}",
            "clean GB/s": clean[what],
            "5 % errors GB/s": broken[what],
            "share": broken[what] / clean[what],
        }
        for what in clean
    ]
    return costs, errors


@contextmanager
def _relay(server: Server) -> Iterator[int]:
    """Give the port of the same proxy without errors, so that both ways take as long."""
    command = [sys.executable, str(Path(__file__).with_name("faults.py")), str(server.port), "{}"]
    with running(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())


def _speed(row: Row) -> float:
    return float(row["GB/s"])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--gb", type=float, default=0.5, help="bytes that are stored and read")
    parser.add_argument("--store", choices=("gs", "s3"), action="append", help="only this store; repeatable")
    parser.add_argument("--range-nbytes", type=int, nargs="+", default=[900_000, 8 << 20], help="bytes of a request")
    parser.add_argument("--threads", type=int, default=8, help="requests in flight")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.child:
        arguments: list[Any] = json.loads(options.child)
        leave_result(child(*arguments))
        return
    with Report(options) as report:
        found = [measure(protocol, options) for protocol in options.store or ("gs", "s3")]
        note = (
            f"{options.gb:g} GB, {options.threads} requests in flight, medians of {options.repeats}; {n_cores()} cores."
        )
        report.table("Clients of object stores", [row for costs, _ in found for row in costs], note)
        report.table("Under errors", [row for _, errors in found for row in errors], "Through a proxy either way.")


if __name__ == "__main__":
    main()
