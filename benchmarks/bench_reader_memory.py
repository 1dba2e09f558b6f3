"""Whether a stream keeps to its buffer: peak resident memory for 1 and for 36 hook points, asserted.

    python benchmarks/bench_reader_memory.py [--buffer 512MiB]

For each number of hook points a dataset several times larger than the buffer is written (rows of noise), and a fresh
process streams all of it, holding one batch at a time as a trainer does. What its resident memory grows by at its
peak (VmHWM over the resident memory before the first batch) must not pass the buffer, 15 % of it, and one batch. The
exit code is 1 where it does. Linux.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness import Report, Row, leave_result, make_parser, peak_rss, reset_peak_rss, run_child
from tiling import make_spec, write_repeated

import actlake
from actlake.storage.sizes import parse_nbytes
from actlake.storage.spec import ROW_COLUMNS

ALLOWANCE = 0.15
#: Bytes of a row's columns in a batch: row number, token id, position, sequence, role.
_COLUMNS_NBYTES = 8 + 4 + 4 + 8 + 1


def main() -> None:
    options = parse()
    if options.child:
        leave_result(stream_once(options.child, options))
        return
    with Report(options) as report, tempfile.TemporaryDirectory() as temporary:
        rows = [measure(n_points, Path(options.workdir or temporary), options) for n_points in options.points]
        note = f"Allowed: the buffer, {ALLOWANCE:.0%} of it, and one batch of {options.batch_size:,} rows."
        report.table("Peak memory of a stream", rows, note)
    over = [row for row in rows if row["peak, MiB"] > row["allowed, MiB"]]
    sys.exit("\n".join(f"{row['hook points']} hook points: over what is allowed" for row in over) or 0)


def measure(n_points: int, folder: Path, options: argparse.Namespace) -> Row:
    """Write a dataset, stream it in a fresh process, and compare."""
    row_nbytes = 2 * options.width * n_points
    buffer = parse_nbytes(options.buffer)
    spec = make_spec(
        [f"layers.{layer}.resid_post" for layer in range(n_points)],
        width=options.width,
        rows_per_shard=options.rows_per_shard,
    )
    n_shards = max(2, -(-round(options.times * buffer) // (row_nbytes * options.rows_per_shard)))
    ds = write_repeated(folder / f"{n_points}", spec, n_shards)
    arguments = ["--child", ds.url, "--buffer", options.buffer, "--batch-size", options.batch_size]
    found = run_child(__file__, arguments)
    batch = options.batch_size * (row_nbytes + _COLUMNS_NBYTES)
    return {
        "hook points": n_points,
        "buffer": options.buffer,
        "dataset, GB": ds.n_rows * row_nbytes / 1e9,
        "batch, MiB": batch / 2**20,
        "peak, MiB": (found["peak"] - found["before"]) / 2**20,
        "allowed, MiB": (buffer * (1 + ALLOWANCE) + batch) / 2**20,
        "imports and open, MiB": found["before"] / 2**20,
    }


def stream_once(url: str, options: argparse.Namespace) -> dict[str, int]:
    """Stream a dataset once; return the resident bytes before the first batch, and at the peak."""
    ds = actlake.open(url)
    stream = ds.stream(list(ds.hook_points), batch_size=options.batch_size, buffer_bytes=options.buffer)
    before = reset_peak_rss()
    for batch in stream:
        for name in ROW_COLUMNS:
            getattr(batch, name)
    return {"before": before, "peak": peak_rss()}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--points", type=int, nargs="+", default=[1, 36], help="numbers of hook points")
    parser.add_argument("--buffer", default="512MiB", help="buffer_bytes of the stream")
    parser.add_argument("--times", type=float, default=5, help="size of each dataset over that of the buffer")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--rows-per-shard", type=int, default=16_384)
    parser.add_argument("--workdir", type=Path, help="folder for the datasets; kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
