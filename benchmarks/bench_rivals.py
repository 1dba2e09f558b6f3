"""actlake beside other readers, side by side in one run: shuffled batches of the same activations.

    make .venv-rivals/.done; .venv-rivals/bin/python benchmarks/bench_rivals.py data/demo

Each reader (``benchmarks/rivals/``) stores the same rows in its own way, untimed. Then, in rounds, each in turn is a
fresh process that streams for some seconds from the page cache after a warm-up. GB are the bytes of the rows in
bfloat16, whatever a reader stores; CPU seconds include its worker processes. A batch of each is checked to be made of
rows of the source. Ratios are medians over the rounds.
"""

import argparse
import importlib
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Report, Row, leave_result, make_parser, peak_rss, run_child, tree_cpu_s
from rivals import U16, Rival, Settings
from rivals.common import BLOCK_ROWS
from tiling import pick_points, tile, write_raw
from torch import Tensor

import actlake

#: Module in ``rivals/`` by the name in the table; the last ones, with a Python object a row, only with ``--all``.
RIVALS = {
    "np.memmap gather, by hand": "memmap",
    "safetensors + shuffle, by hand": "safetensors_shuffle",
    "Activault-like .pt files": "pt_files",
    "SAELens cache, float16": "saelens_fp16",
    "SAELens cache, float32": "saelens",
    "MosaicML streaming, blocks": "mosaic",
    "LitData, blocks": "lit",
    "HF datasets": "hf_datasets",
}
BY_ROW = {"MosaicML streaming, rows": "mosaic_rows", "LitData, rows": "lit_rows"}
#: Options of ``ds.stream`` by the name in the table.
OURS = {"actlake": {}, "actlake, direct": {"buffer_bytes": 0}}
#: Rounds to half of the mantissa's bits and overflows, so its rows are not those of the source.
_INEXACT = ("saelens_fp16",)


def main() -> None:
    options = parse()
    if options.child:
        warnings.simplefilter("ignore")
        leave_result(answer(options))
        return
    with Report(options) as report, tempfile.TemporaryDirectory() as temporary:
        folder = options.workdir or Path(temporary)
        readers = [*OURS, *RIVALS, *(BY_ROW if options.all else ())]
        readers = [name for name in readers if not options.only or any(part in name for part in options.only)]
        stored = prepare_all(readers, folder, options)
        found: dict[str, list[Row]] = {name: [] for name in readers}
        for _ in range(options.rounds):
            for name in readers:
                found[name].append(_run(name, "measure", folder, options))
        rows = [_row(name, runs, found, stored[name]) for name, runs in found.items()]
        note = (
            f"{options.rows:,} rows; batches of {options.batch_size:,}; {options.mixing_rows:,} rows of mixing memory "
            f"where a reader has one; {options.seconds:g} s each, medians of {options.rounds} rounds."
        )
        report.table("Readers of the same activations", rows, note)


def prepare_all(readers: Sequence[str], folder: Path, options: argparse.Namespace) -> dict[str, int]:
    """Store the rows for every reader; return the bytes that each has stored."""
    ds = actlake.open(options.dataset)
    point = pick_points(ds, 1, options.point)[0]
    tiled = tile(ds, folder / "actlake", options.rows, [point])
    write_raw(tiled, point, folder / "rows.u16")
    stored = {}
    for name in readers:
        if name not in OURS:
            _run(name, "prepare", folder, options)
        place = folder / ("actlake" if name in OURS else _module(name))
        stored[name] = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    return stored


def _module(name: str) -> str:
    return (RIVALS | BY_ROW)[name]


def _run(name: str, what: str, folder: Path, options: argparse.Namespace) -> Row:
    arguments: list[object] = [options.dataset, "--child", what, name, "--workdir", folder]
    for option in ("rows", "seconds", "batch_size", "mixing_rows"):
        arguments += [f"--{option.replace('_', '-')}", getattr(options, option)]
    found: Row = run_child(__file__, arguments)
    return found


def _row(name: str, runs: Sequence[Row], found: dict[str, list[Row]], stored: int) -> Row:
    first, reference = next(iter(found.items()))
    speed = [a["gb_per_s"] / b["gb_per_s"] for a, b in zip(reference, runs, strict=True)]
    return {
        "reader": name,
        "GB/s": statistics.median(run["gb_per_s"] for run in runs),
        "CPU s/GB": statistics.median(run["cpu_s_per_gb"] for run in runs),
        f"{first} is faster": f"{statistics.median(speed):.1f}x",
        "stored bytes / raw": stored / runs[0]["source_nbytes"],
        "peak memory of the main process, GB": max(run["peak_rss"] for run in runs) / 1e9,
    }


# --- in the child ---


def answer(options: argparse.Namespace) -> Any:
    """Do what the child was started for."""
    what, name = options.child
    return prepare(name, options.workdir) if what == "prepare" else measure(name, options)


def source_rows(folder: Path) -> U16:
    tiled = actlake.open(folder / "actlake")
    width = tiled.spec.arrays()[tiled.hook_points[0]].width
    return np.memmap(folder / "rows.u16", dtype=np.uint16, mode="r").reshape(-1, width or 1)


def prepare(name: str, folder: Path) -> bool:
    place, done = folder / _module(name), folder / f"{_module(name)}.done"
    if not done.exists():
        place.mkdir()
        _rival(name).prepare(source_rows(folder), place)
        done.touch()
    return True


def _rival(name: str) -> Rival:
    module: Rival = importlib.import_module(f"rivals.{_module(name)}")
    return module


def measure(name: str, options: argparse.Namespace) -> Row:
    """Return rate, CPU seconds and peak memory of one reader."""
    rows = source_rows(options.workdir)
    batches = open_reader(name, options, rows.shape[1])
    first = next(batches)
    if name in OURS or _module(name) not in _INEXACT:
        check_batch(first, rows, options.batch_size)
    for _ in itertools.islice(batches, 2 * options.mixing_rows // options.batch_size):
        pass
    n_rows, cpu_s, started = 0, tree_cpu_s(), time.perf_counter()
    while (seconds := time.perf_counter() - started) < options.seconds:
        batch = next(batches)
        # As much as a trainer cannot avoid to.
        float(batch[0, 0]) + float(batch[-1, -1])
        n_rows += len(batch)
    gb = n_rows * rows.shape[1] * 2 / 1e9
    return {
        "gb_per_s": gb / seconds,
        "cpu_s_per_gb": (tree_cpu_s() - cpu_s) / gb,
        "peak_rss": peak_rss(),
        "source_nbytes": rows.nbytes,
    }


def open_reader(name: str, options: argparse.Namespace, width: int) -> Iterator[Tensor]:
    if name in OURS:
        ds = actlake.open(options.workdir / "actlake")
        point = ds.hook_points[0]
        stream = ds.stream([point], batch_size=options.batch_size, epochs=None, **OURS[name])
        return (batch[point] for batch in stream)
    settings = Settings(width=width, batch_size=options.batch_size, mixing_rows=options.mixing_rows)
    return _rival(name).batches(options.workdir / _module(name), settings)


def check_batch(batch: Tensor, rows: U16, batch_size: int) -> None:
    """Raise ``AssertionError`` unless a batch is of so many rows of the source, each a different one."""
    bits = batch.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
    if bits.shape != (batch_size, rows.shape[1]):
        raise AssertionError(f"a batch is {bits.shape}, ({batch_size}, {rows.shape[1]}) was expected")
    known = {row.tobytes() for row in rows}
    if strange := sum(row.tobytes() not in known for row in bits):
        raise AssertionError(f"{strange} of {batch_size} rows are not of the source")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("dataset", nargs="?", default="data/demo")
    parser.add_argument("--point", help="hook point (default: layers.9.resid_post)")
    parser.add_argument("--rows", type=int, default=262_144, help="rows, a multiple of 8,192")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--mixing-rows", type=int, default=65_536, help="memory for mixing, where a reader has one")
    parser.add_argument("--seconds", type=float, default=8, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", metavar="TEXT", help="readers with this in their name; repeatable")
    parser.add_argument("--all", action="store_true", help="also with a Python object a row (minutes)")
    parser.add_argument("--workdir", type=Path, help="folder for what the readers store; kept, and used again")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    if found.rows % (8 * BLOCK_ROWS):
        parser.error(f"--rows {found.rows} is no multiple of {8 * BLOCK_ROWS}, the rows of the rivals' files")
    return found


if __name__ == "__main__":
    main()
