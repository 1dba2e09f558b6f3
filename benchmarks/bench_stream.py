"""How fast a dataset streams, beside the rate at which its chunks can be read, checked and decoded at all.

    python benchmarks/bench_stream.py DATASET [--make 4] [--point layers.9.resid_post] [--epochs 2] [--repeats 3]

Everything runs on all cores from the page cache, and what is compared alternates in one process. Sections:

- modes: default settings, a buffer of 65,536 rows, ``direct`` (buffer_bytes=0), and with the row columns looked at,
  each over the pure decoder of ``decoding.py``, for one hook point and for four at once;
- first: the time to the first batch over the time to read and decode one buffer;
- none: the codec ``none`` beside a hand-written gather from an ``np.memmap`` of the same rows;
- ranks: 1 to 4 ranks, each a process, on 1 core and on all.

``--make`` writes the dataset's rows over and over into so many gigabytes first (per hook point set, in a temporary
folder or in ``--workdir``, where they stay): a small dataset streamed again and again measures first touches instead.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from decoding import decode_files, stored_chunks
from harness import Rate, Report, Row, Stopwatch, make_parser, median_rate, n_cores, warm_memory
from tiling import pick_points, tile, write_raw

import actlake
from actlake.storage.codecs import Codec
from actlake.storage.sizes import parse_nbytes

SECTIONS = ("modes", "first", "none", "ranks")
BUFFER_ROWS = 65_536
DEFAULT_BUFFER = "1GiB"


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way of streaming: options of ``ds.stream``, and whether the row columns are looked at."""

    name: str
    options: Mapping[str, Any]
    columns: bool = False


def modes(row_nbytes: int) -> list[Mode]:
    return [
        Mode(name="default", options={}),
        Mode(name=f"buffer of {BUFFER_ROWS:,} rows", options={"buffer_bytes": BUFFER_ROWS * row_nbytes}),
        Mode(name="direct", options={"buffer_bytes": 0}),
        Mode(name="default, row columns", options={}, columns=True),
    ]


def row_nbytes(ds: actlake.ActivationDataset, points: Sequence[str]) -> int:
    return sum(ds.spec.arrays()[point].nbytes_per_row for point in points)


def stream_all(ds: actlake.ActivationDataset, points: Sequence[str], epochs: int, batch_size: int, mode: Mode) -> Rate:
    """Stream every row, touching each batch as a trainer cannot avoid to."""
    stream = ds.stream(list(points), batch_size=batch_size, epochs=epochs, drop_last=False, **mode.options)
    n_rows = 0
    with Stopwatch(row_nbytes(ds, points) * ds.n_rows * epochs) as watch:
        for batch in stream:
            n_rows += len(batch)
            for point in points:
                float(batch[point][0, 0])
            if mode.columns:
                int(batch.row[0] + batch.token_id[0] + batch.position[0] + batch.sequence[0] + batch.role[0])
    if n_rows != ds.n_rows * epochs:
        raise AssertionError(f"{n_rows} rows came, {ds.n_rows * epochs} were expected")
    return watch.rate


def in_turns(repeats: int, *runs: Callable[[], Rate]) -> list[list[Rate]]:
    """Run each so many times, side by side and every other time in the opposite order; return the rates of each."""
    found: list[list[Rate]] = [[] for _ in runs]
    for repeat in range(repeats):
        for place in range(len(runs)) if repeat % 2 == 0 else reversed(range(len(runs))):
            warm_memory()
            found[place].append(runs[place]())
    return found


def ratio(over: Sequence[Rate], under: Sequence[Rate]) -> float:
    """Return the median of the ratios of neighbours in time."""
    return statistics.median(a.gb_per_s / b.gb_per_s for a, b in zip(over, under, strict=True))


# --- sections ---


def bench_modes(
    ds: actlake.ActivationDataset, point_sets: Sequence[Sequence[str]], options: argparse.Namespace
) -> list[Row]:
    rows: list[Row] = []
    for points in point_sets:
        chunks = stored_chunks(ds, points)
        decode_files(ds, chunks)
        for mode in modes(row_nbytes(ds, points)):
            decoded, streamed = in_turns(
                options.repeats,
                partial(decode_files, ds, chunks, epochs=options.epochs),
                partial(stream_all, ds, points, options.epochs, options.batch_size, mode),
            )
            rows.append(_mode_row(f"{len(points)}", mode.name, decoded, streamed))
    return rows


def _mode_row(points: str, mode: str, decoded: Sequence[Rate], streamed: Sequence[Rate]) -> Row:
    over = [a.gb_per_s / b.gb_per_s for a, b in zip(streamed, decoded, strict=True)]
    return {
        "points": points,
        "mode": mode,
        "decode GB/s": median_rate(decoded).gb_per_s,
        "decode CPU s/GB": median_rate(decoded).cpu_s_per_gb,
        "stream GB/s": median_rate(streamed).gb_per_s,
        "stream CPU s/GB": median_rate(streamed).cpu_s_per_gb,
        "stream / decode": statistics.median(over),
        "from - to": f"{min(over):.2f} - {max(over):.2f}",
    }


def bench_first(ds: actlake.ActivationDataset, points: Sequence[str], options: argparse.Namespace) -> list[Row]:
    n_rows = min(ds.n_rows, parse_nbytes(DEFAULT_BUFFER) // row_nbytes(ds, points))
    nbytes = n_rows * row_nbytes(ds, points)
    chunks = stored_chunks(ds, points)
    some = chunks[: max(1, round(len(chunks) * n_rows / ds.n_rows))]

    def first() -> Rate:
        with Stopwatch(nbytes) as watch:
            next(iter(ds.stream(list(points), batch_size=options.batch_size, seed=1)))
        return watch.rate

    decoded, began = in_turns(options.repeats, partial(decode_files, ds, some), first)
    buffer_s, first_s = median_rate(decoded).seconds, median_rate(began).seconds
    return [
        {
            "points": str(len(points)),
            "buffer": f"{nbytes / 1e9:.2f} GB",
            "read and decode a buffer, s": buffer_s,
            "first batch, s": first_s,
            "ratio": first_s / buffer_s,
        }
    ]


def bench_none(ds: actlake.ActivationDataset, point: str, folder: Path, options: argparse.Namespace) -> list[Row]:
    plain = tile(ds, folder / "none", ds.n_rows, [point], codec=Codec(name="none"))
    rows = write_raw(plain, point, folder / "rows.u16")
    gathered, *streamed = in_turns(
        options.repeats,
        partial(gather_all, rows, options.epochs, options.batch_size),
        *(
            partial(stream_all, plain, [point], options.epochs, options.batch_size, mode)
            for mode in modes(row_nbytes(plain, [point]))
        ),
    )
    baseline = {"reader": "np.memmap gather, by hand", "over the gather": 1.0}
    found: list[Row] = [baseline | _rate_columns(gathered)]
    for mode, rates in zip(modes(1), streamed, strict=True):
        found.append({"reader": mode.name, "over the gather": ratio(rates, gathered)} | _rate_columns(rates))
    return found


def _rate_columns(rates: Sequence[Rate]) -> dict[str, float]:
    middle = median_rate(rates)
    return {"GB/s": middle.gb_per_s, "CPU s/GB": middle.cpu_s_per_gb}


def gather_all(rows: npt.NDArray[np.uint16], epochs: int, batch_size: int) -> Rate:
    """Deliver a true global shuffle of a file in the page cache, as one writes it by hand."""
    with Stopwatch(rows.nbytes * epochs) as watch:
        for epoch in range(epochs):
            order = np.random.default_rng(epoch).permutation(len(rows))
            for start in range(0, len(rows), batch_size):
                batch = torch.from_numpy(rows[order[start : start + batch_size]].view(np.int16)).view(torch.bfloat16)
                float(batch[0, 0])
    return watch.rate


# --- ranks ---


@dataclass(frozen=True, kw_only=True)
class RankTask:
    """What one rank does, in its process."""

    url: str
    point: str
    batch_size: int
    epochs: int
    rank: int
    world_size: int
    cores: tuple[int, ...]
    buffer_bytes: int


def bench_ranks(ds: actlake.ActivationDataset, point: str, options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for n_used in sorted({1, n_cores()}):
        cores = tuple(sorted(os.sched_getaffinity(0)))[:n_used]
        for world_size in options.ranks:
            runs = [_run_ranks(ds, point, world_size, cores, options) for _ in range(options.repeats)]
            middle = median_rate([rate for rate, _ in runs])
            rows.append(
                {
                    "cores": n_used,
                    "ranks": world_size,
                    "GB/s, all ranks": middle.gb_per_s,
                    "CPU s/GB": middle.cpu_s_per_gb,
                    "cores busy": middle.gb_per_s * middle.cpu_s_per_gb / n_used,
                    "copy of memory, GB/s": statistics.median(copy for _, copy in runs),
                }
            )
    return rows


def _run_ranks(
    ds: actlake.ActivationDataset, point: str, world_size: int, cores: tuple[int, ...], options: argparse.Namespace
) -> tuple[Rate, float]:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(world_size), context.Queue()
    tasks = [
        RankTask(
            url=ds.url,
            point=point,
            batch_size=options.batch_size,
            epochs=options.epochs,
            rank=rank,
            world_size=world_size,
            cores=cores,
            # Small windows: of two that many ranks share, each would be decoded by several.
            buffer_bytes=BUFFER_ROWS * row_nbytes(ds, [point]),
        )
        for rank in range(world_size)
    ]
    processes = [context.Process(target=run_rank, args=(task, barrier, results), daemon=True) for task in tasks]
    warm_memory()
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join(timeout=30)
    gb, seconds, cpu_s = sum(f[0] for f in found) / 1e9, max(f[1] for f in found), sum(f[2] for f in found)
    copied = sum(f[3] for f in found)
    return Rate(gb_per_s=gb / seconds, cpu_s_per_gb=cpu_s / gb, seconds=seconds), copied


def run_rank(task: RankTask, barrier: Any, results: Any) -> None:
    """Stream one rank's rows; leave its bytes, seconds, CPU seconds, and the GB/s of a copy of memory beside them."""
    os.sched_setaffinity(0, task.cores)
    ds = actlake.open(task.url)
    stream = ds.stream(
        [task.point],
        batch_size=task.batch_size,
        epochs=task.epochs,
        rank=task.rank,
        world_size=task.world_size,
        buffer_bytes=task.buffer_bytes,
    )
    source, target = np.ones(64 << 20, dtype=np.uint8), np.ones(64 << 20, dtype=np.uint8)
    barrier.wait(timeout=120)
    started = time.perf_counter()
    for _ in range(8):
        np.copyto(target, source)
    copy_gb_per_s = 8 * source.nbytes / 1e9 / (time.perf_counter() - started)
    barrier.wait(timeout=120)
    nbytes = 0
    with Stopwatch() as watch:
        for batch in stream:
            nbytes += batch[task.point].nbytes
    results.put((nbytes, watch.seconds, watch.cpu_s, copy_gb_per_s))


# --- the command ---


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[tuple[actlake.ActivationDataset, list[list[str]], Path]]:
    """Open the dataset to measure, make it first where that is asked for; with its hook points and a work folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.workdir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        ds = actlake.open(options.dataset)
        sets = [options.point] if options.point else [pick_points(ds, n_points) for n_points in (1, 4)]
        if options.make:
            every = list(dict.fromkeys(point for points in sets for point in points))
            n_rows = round(options.make * 1e9 / row_nbytes(ds, every))
            ds = tile(ds, folder / "tiled", n_rows, every)
        yield ds, sets, folder


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("dataset", nargs="?", default="data/demo")
    parser.add_argument(
        "--point", action="append", help="hook point; several are streamed at once (default: 1, then 4)"
    )
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=2, help="times that each run streams the dataset")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turns")
    parser.add_argument("--make", type=float, metavar="GB", help="tile the dataset to so many gigabytes first")
    parser.add_argument("--workdir", type=Path, help="folder for what is made; kept, and used again")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="run this section; may be repeated")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    wanted = options.only or SECTIONS
    with Report(options) as report, opened(options) as (ds, sets, folder):
        size = f"{ds.n_rows:,} rows, {row_nbytes(ds, sets[0]) * ds.n_rows / 1e9:.2f} GB for {len(sets[0])} hook points"
        if "modes" in wanted:
            note = f"{size}; batches of {options.batch_size:,}; medians of {options.repeats} pairs."
            report.table("Streaming over pure decoding", bench_modes(ds, sets, options), note)
        if "first" in wanted:
            report.table("The first batch", [row for points in sets for row in bench_first(ds, points, options)])
        if "none" in wanted:
            report.table("Codec none, from the page cache", bench_none(ds, sets[0][0], folder, options))
        if "ranks" in wanted:
            note = "Cores busy near 1: the processors limit. Well below 1: memory, or waiting."
            report.table("Ranks", bench_ranks(ds, sets[0][0], options), note)


if __name__ == "__main__":
    main()
