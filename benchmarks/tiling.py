"""Datasets of any size for benchmarks: the rows of a real one over and over, or rows of noise, written once.

A dataset that is streamed for many short epochs measures first touches; one of several gigabytes measures the steady
state, and its bytes compress as the real ones do.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import n_cores

import actlake
from actlake.shards.objects import bits_dtype
from actlake.storage.arrays import ArraySpec, ShardObject, crc32c, encode_shard
from actlake.storage.codecs import Codec
from actlake.storage.header import Header, prepare
from actlake.storage.moments import of_shard, to_parquet
from actlake.storage.records import ObjectRecord, Provenance, ShardRecord, commit, stats_key
from actlake.storage.rowspace import KeepRule
from actlake.storage.spec import ROW_COLUMNS, DatasetSpec, PointSpec
from actlake.storage.stores import Store

Rows = npt.NDArray[Any]
I64 = npt.NDArray[np.int64]

#: Returns what is stored of an array for some rows.
Values = Callable[[ArraySpec, I64], Rows]


def tile(
    source: actlake.ActivationDataset,
    folder: Path,
    n_rows: int,
    points: Sequence[str],
    *,
    codec: Codec | None = None,
    rows_per_shard: int = 65_536,
    by_row: bool = False,
) -> actlake.ActivationDataset:
    """Write the first committed rows of some hook points again and again until there are ``n_rows``; open it.

    Sequences of another round have other numbers. ``by_row`` puts the rows into the order of sequence and position
    first and permutes them in the new, smaller shuffle blocks, as ingestion would have.
    """
    names = [*points, *(f"rows/{column}" for column in ROW_COLUMNS)]
    held = {name: source[name][: source.n_rows] for name in names}
    if by_row:
        order = np.lexsort((held["rows/position"], held["rows/sequence"]))
        held = {name: rows[order] for name, rows in held.items()}
    step = int(held["rows/sequence"].max()) + 1
    spec = replace(
        source.spec,
        model=f"{source.spec.model}-tiled",
        hook_points=tuple(point for point in source.spec.hook_points if point.name in points),
        codec=source.spec.codec if codec is None else codec,
        rows_per_shard=rows_per_shard,
        rows_per_block=rows_per_shard,
    )

    def values(array: ArraySpec, rows: I64) -> Rows:
        found = held[array.name][rows % source.n_rows]
        return found + rows // source.n_rows * step if array.name == "rows/sequence" else found

    return write_dataset(folder, spec, n_rows, values, in_corpus_order=by_row)


def write_dataset(
    folder: Path, spec: DatasetSpec, n_rows: int, values: Values, *, in_corpus_order: bool = True
) -> actlake.ActivationDataset:
    """Write a dataset whose rows ``values`` gives, shard by shard, and open it; one that is there already is opened.

    ``values`` is asked for rows in corpus order, which are permuted inside the shuffle blocks then; without
    ``in_corpus_order`` they are stored as they come.
    """
    store = Store(folder)
    prepare(store, Header(spec=spec, n_rows=n_rows, corpus="../corpus"))
    missing = actlake.open(folder).missing_shards
    with ThreadPoolExecutor(n_cores()) as pool:
        for shard in missing:
            space = spec.row_space(n_rows)
            rows = np.arange(space.rows_of(shard).start, space.rows_of(shard).stop)
            order = np.argsort(space.places(shard)) if in_corpus_order else slice(None)
            held = {name: values(array, rows[order]) for name, array in spec.arrays().items()}
            encoded = {name: encode_shard(spec.arrays()[name], part, pool.map) for name, part in held.items()}
            moments = {name: of_shard(held[name], pool.map, rows) for name in spec.point_names}
            store_shard(store, spec, shard, rows, encoded, to_parquet(moments))
    return actlake.open(folder)


def store_shard(
    store: Store, spec: DatasetSpec, shard: int, rows: I64, encoded: Mapping[str, ShardObject], statistics: bytes
) -> None:
    """Store the objects and the statistics of one shard, and commit it."""
    for name, found in encoded.items():
        store.write(spec.arrays()[name].object_key(shard), *found.parts)
    store.write(stats_key(shard), statistics)
    record = ShardRecord(
        dataset_id=spec.dataset_id,
        shard=shard,
        revision=0,
        first_row=int(rows[0]),
        n_rows=len(rows),
        n_void=0,
        objects={
            name: ObjectRecord(nbytes=found.nbytes, crc32c=found.crc32c, index_crc32c=found.index_crc32c)
            for name, found in encoded.items()
        },
        stats=ObjectRecord(nbytes=len(statistics), crc32c=crc32c(statistics)),
        provenance=Provenance(attempt="benchmark"),
    )
    commit(store, record)


def make_spec(points: Sequence[str], *, width: int, rows_per_shard: int, rows_per_chunk: int = 1024) -> DatasetSpec:
    """Return the spec of a dataset that no model made."""
    return DatasetSpec(
        model="benchmark",
        model_revision=None,
        model_fingerprint="0" * 64,
        architecture="None",
        corpus_id="0" * 64,
        split="train",
        keep=KeepRule(),
        hook_points=tuple(PointSpec(name=name, width=width, rows_per_chunk=rows_per_chunk) for name in points),
        dtype="bfloat16",
        seed=0,
        order="shuffled",
        rows_per_shard=rows_per_shard,
        rows_per_block=rows_per_shard,
        batch_tokens=4096,
        codec=Codec(),
    )


def write_repeated(
    folder: Path, spec: DatasetSpec, n_shards: int, *, zeros: bool = False, rows_per_sequence: int = 1023
) -> actlake.ActivationDataset:
    """Write shards that all hold the same normally distributed rows at every hook point, encoded once; open it.

    Their bytes compress a little less than a model's, or to nothing with ``zeros``. The row columns are those of
    sequences of ``rows_per_sequence`` rows, permuted in the shuffle blocks.
    """
    store = Store(folder)
    n_rows = n_shards * spec.rows_per_shard
    prepare(store, Header(spec=spec, n_rows=n_rows, corpus="../corpus"))
    space, arrays = spec.row_space(n_rows), spec.arrays()
    point = arrays[spec.point_names[0]]
    noise = np.random.default_rng(0).standard_normal(point.shape(spec.rows_per_shard), dtype=np.float32)
    held = (noise * (not zeros)).astype(point.numpy_dtype)
    with ThreadPoolExecutor(n_cores()) as pool:
        activations = dict.fromkeys(spec.point_names, encode_shard(point, held, pool.map))
        # Nobody scales by these: moments of a few rows do.
        statistics = to_parquet(dict.fromkeys(spec.point_names, of_shard(held[:1024], pool.map)))
    for shard in range(n_shards):
        rows = np.arange(space.rows_of(shard).start, space.rows_of(shard).stop)
        sequence, position = np.divmod(rows[np.argsort(space.places(shard))], rows_per_sequence)
        columns = {"sequence": sequence, "position": position}
        encoded = {
            f"rows/{name}": encode_shard(arrays[f"rows/{name}"], columns.get(name, rows * 0).astype(dtype))
            for name, dtype in ROW_COLUMNS.items()
        }
        store_shard(store, spec, shard, rows, activations | encoded, statistics)
    return actlake.open(folder)


def pick_points(ds: actlake.ActivationDataset, n_points: int, first: str | None = None) -> list[str]:
    """Return hook points of one width, beginning with ``first`` (else ``layers.9.resid_post`` where there is one)."""
    wanted = first or next((name for name in ds.hook_points if name == "layers.9.resid_post"), ds.hook_points[0])
    arrays = ds.spec.arrays()
    same = [name for name in ds.hook_points if name != wanted and arrays[name].width == arrays[wanted].width]
    return list(itertools.islice([wanted, *same], n_points))


def write_raw(ds: actlake.ActivationDataset, point: str, file: Path) -> npt.NDArray[np.uint16]:
    """Write a hook point's bits as one plain file, uint16 [rows, width]; return it as a ``np.memmap``."""
    array = ds.spec.arrays()[point]
    shape = array.shape(ds.n_rows)
    target = np.memmap(file, dtype=bits_dtype(array), mode="w+", shape=shape)
    for start in range(0, ds.n_rows, 65_536):
        stop = min(start + 65_536, ds.n_rows)
        target[start:stop] = ds[point][start:stop].view(bits_dtype(array))
    target.flush()
    return np.memmap(file, dtype=bits_dtype(array), mode="r", shape=shape)
