"""What the manifest alone says for the report: coverage, sizes, the run in time, who made it. Reads no activations."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actlake.shards.dataset import ActivationDataset

#: Columns of the coverage map and of the time line at most: about one for each pixel or two.
_MAX_BINS = 400


@dataclass(frozen=True, kw_only=True)
class Run:
    """Neighbouring shards ``start:stop`` of which the same ``share`` of rows is committed."""

    start: int
    stop: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Split:
    """How much of a split is there. ``shards_per_bin`` shards are averaged in ``runs``."""

    split: str
    n_rows: int
    n_rows_planned: int
    n_void: int
    n_shards: int
    n_shards_planned: int
    n_missing: int
    first_missing: Sequence[int]
    nbytes: int
    raw_nbytes: int
    shards_per_bin: int
    runs: Sequence[Run]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Some time of the run: one shard, or many in a bin. Times in ms since 1970; work in seconds of all workers."""

    start: float
    stop: float
    label: str
    split: str
    host: str
    n_shards: int
    n_rows: int
    n_tokens: int
    n_rebuilt: int
    n_void: int
    rows_per_s: float
    forward_s: float
    encode_s: float
    write_s: float


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Who made the dataset, with what, in which time."""

    hosts: Sequence[str]
    devices: Sequence[str]
    software: Sequence[str]
    first: str
    last: str
    n_tokens: int
    forward_s: float
    encode_s: float
    write_s: float
    n_undated: int


def split_facts(ds: ActivationDataset) -> Split:
    """Return what is committed of one split."""
    space = ds.spec.row_space(ds.n_rows_planned)
    per_bin = -(-space.n_shards // _MAX_BINS) or 1
    return Split(
        split=ds.spec.split,
        n_rows=ds.n_rows,
        n_rows_planned=ds.n_rows_planned,
        n_void=int(_sum(ds.reader.manifest.columns("n_void")["n_void"])),
        n_shards=len(ds.reader.manifest),
        n_shards_planned=space.n_shards,
        n_missing=len(ds.missing_shards),
        first_missing=ds.missing_shards[:20],
        nbytes=ds.reader.manifest.nbytes,
        raw_nbytes=ds.n_rows * ds.spec.nbytes_per_row,
        shards_per_bin=per_bin,
        runs=_runs(_shares(ds), per_bin),
    )


def _shares(ds: ActivationDataset) -> npt.NDArray[np.float64]:
    space = ds.spec.row_space(ds.n_rows_planned)
    planned = np.full(space.n_shards, space.rows_per_shard, dtype=np.float64)
    if space.n_shards:
        planned[-1] = len(space.rows_of(space.n_shards - 1))
    table = ds.reader.manifest.columns("shard", "n_rows")
    shards, rows = table["shard"].to_numpy(), table["n_rows"].to_numpy()
    within = shards < space.n_shards
    committed = np.zeros(space.n_shards)
    committed[shards[within]] = rows[within]
    return np.minimum(committed / planned, 1.0)


def _runs(shares: npt.NDArray[np.float64], per_bin: int) -> list[Run]:
    starts = np.arange(0, len(shares), per_bin)
    if not len(starts):
        return []
    sizes = np.minimum(per_bin, len(shares) - starts)
    binned = np.round(np.add.reduceat(shares, starts) / sizes, 3)
    # A bin that lacks one shard of thousands is not whole, however it rounds.
    binned[(binned == 1.0) & (np.minimum.reduceat(shares, starts) < 1.0)] = 0.999
    edges = np.flatnonzero(np.diff(binned, prepend=-1.0))
    stops = np.append(starts[edges[1:]], len(shares))
    return [
        Run(start=int(starts[edge]), stop=int(stop), share=float(binned[edge]))
        for edge, stop in zip(edges, stops, strict=True)
    ]


def provenance(splits: Sequence[ActivationDataset]) -> Provenance:
    """Return who made all splits, from their commit records."""
    names = ("host", "device", "software", "started", "finished", "n_tokens", "forward_s", "encode_s", "write_s")
    table = pa.concat_tables([ds.reader.manifest.columns(*names) for ds in splits])
    dated = _dated(table)
    return Provenance(
        hosts=_distinct(table["host"]),
        devices=_distinct(table["device"]),
        software=[_software(text) for text in _distinct(table["software"])],
        first=pc.min(dated["started"]).as_py() or "",
        last=pc.max(dated["finished"]).as_py() or "",
        n_tokens=int(_sum(table["n_tokens"])),
        forward_s=_sum(table["forward_s"]),
        encode_s=_sum(table["encode_s"]),
        write_s=_sum(table["write_s"]),
        n_undated=table.num_rows - dated.num_rows,
    )


def _sum(column: pa.ChunkedArray) -> float:
    return float(pc.sum(column).as_py() or 0)


def _distinct(column: pa.ChunkedArray) -> list[str]:
    return sorted(set(pc.unique(column).to_pylist()) - {""})


def _dated(table: pa.Table) -> pa.Table:
    return table.filter((pc.field("started") != "") & (pc.field("finished") != ""))


def _software(text: str) -> str:
    return ", ".join(f"{name} {version}" for name, version in json.loads(text).items())


def spans(splits: Sequence[ActivationDataset]) -> list[Span]:
    """Return the run in time: a span for each shard, or 400 of equal length where there are more shards.

    Shards without times in their record are left out; ``Provenance.n_undated`` counts them.
    """
    table = pa.concat_tables([_times(ds) for ds in splits])
    if table.num_rows <= _MAX_BINS:
        return [_span(row) for row in table.sort_by([("stop", "ascending"), ("start", "ascending")]).to_pylist()]
    first, last = pc.min(table["start"]).as_py(), pc.max(table["stop"]).as_py()
    width = max((last - first) / _MAX_BINS, 1e-3)
    places = np.minimum((table["stop"].to_numpy() - first) / width, _MAX_BINS - 1).astype(np.int64)
    totals = [(name, "sum") for name in _TOTALS]
    binned = table.append_column("place", pa.array(places)).group_by("place", use_threads=False)
    rows = binned.aggregate([("host", "count_distinct"), ("host", "first"), ("shard", "count"), *totals])
    return [_bin(first + row["place"] * width, width, row) for row in rows.sort_by("place").to_pylist()]


_TOTALS = ("n_rows", "n_tokens", "n_rebuilt", "n_void", "forward_s", "encode_s", "write_s")


def _times(ds: ActivationDataset) -> pa.Table:
    """Return the dated shards, with ``start`` and ``stop`` in ms since 1970."""
    names = ("shard", "revision", "n_rows", "n_void", "host", "started", "finished", "n_tokens")
    table = _dated(ds.reader.manifest.columns(*names, "forward_s", "encode_s", "write_s"))
    for name, text in (("start", "started"), ("stop", "finished")):
        moments = table[text].cast(pa.timestamp("ms", tz="UTC"))
        table = table.append_column(name, moments.cast(pa.int64()))
    table = table.append_column("n_rebuilt", pc.greater(table["revision"], 0).cast(pa.int64()))
    return table.append_column("split", pa.array([ds.spec.split] * table.num_rows, pa.string()))


def _span(row: dict[str, Any]) -> Span:
    return Span(
        start=row["start"],
        stop=row["stop"],
        label=f"shard {row['shard']}",
        split=row["split"],
        host=row["host"],
        n_shards=1,
        rows_per_s=row["n_rows"] / max((row["stop"] - row["start"]) / 1000, 1e-3),
        **{name: row[name] for name in _TOTALS},
    )


def _bin(start: float, width: float, row: dict[str, Any]) -> Span:
    n_hosts = row["host_count_distinct"]
    return Span(
        start=start,
        stop=start + width,
        label=f"{row['shard_count']:,} shards",
        split="",
        host=row["host_first"] if n_hosts == 1 else f"{n_hosts} hosts",
        n_shards=row["shard_count"],
        rows_per_s=row["n_rows_sum"] / (width / 1000),
        **{name: row[f"{name}_sum"] for name in _TOTALS},
    )
