"""Datasets of each format version that are read for ever.

``data/format-v1`` was written once by ``write_dataset``, ``data/format-v1-manifest`` by ``write_manifest``, and
``data/format-v2``, which has the fields of version 2, by ``write_dataset``. They are never written again: a change that
cannot read them needs a new format version, with a folder of its own.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from actlake.storage.arrays import ArraySpec, ShardIndex, chunk_rows, crc32c, decode_chunk, encode_shard
from actlake.storage.header import Header, prepare
from actlake.storage.manifest import SCHEMA, Manifest, group_key, write_root
from actlake.storage.manifest_files import group_bytes
from actlake.storage.moments import Moments, fold, from_parquet, to_parquet
from actlake.storage.records import ObjectRecord, Provenance, ShardRecord, commit, stats_key
from actlake.storage.rowspace import ROLE_TEXT, ROLE_VOID, KeepRule
from actlake.storage.spec import DatasetSpec
from actlake.storage.stores import Store

DATA = Path(__file__).parent / "data"
N_ROWS = {"": 150, "heldout": 20}
VOID_ROW = 77  # in corpus order, of the training split
COLUMNS: dict[str, Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]]] = {
    "rows/token_id": lambda row: 1000 + row,
    "rows/position": lambda row: 1 + row % 10,
    "rows/sequence": lambda row: 5_000_000_000 + row // 10,
    "rows/role": lambda row: np.full(len(row), ROLE_TEXT),
}


def rows_in_corpus_order(array: ArraySpec, first: int, n: int, void: int | None) -> npt.NDArray[Any]:
    """Return what rows ``first : first + n`` hold: formulas of the row number and the channel, exact in bfloat16."""
    row = np.arange(first, first + n)
    if array.width is None:
        values: npt.NDArray[Any] = COLUMNS[array.name](row).astype(array.numpy_dtype)
        if array.name == "rows/role":
            values[row == void] = ROLE_VOID
        return values
    layer = int(array.name.split(".")[1])
    numbers = (7 * row[:, None] + 3 * np.arange(array.width) + 11 * layer) % 64 - 32
    numbers[row == void] = 0
    return np.asarray(numbers / 8, dtype=array.numpy_dtype)


def write_dataset(store: Store, spec: DatasetSpec, n_rows: int, void: int | None) -> None:
    """Write a complete dataset of one split."""
    header = prepare(store, Header(spec=spec, n_rows=n_rows, corpus="../corpus"))
    space = spec.row_space(n_rows)
    for shard in range(space.n_shards):
        rows, places = space.rows_of(shard), space.places(shard)
        objects: dict[str, ObjectRecord] = {}
        moments: dict[str, Moments] = {}
        for name, array in spec.arrays().items():
            stored = np.zeros(array.shape(len(rows)), dtype=array.numpy_dtype)
            stored[places] = rows_in_corpus_order(array, rows.start, len(rows), void)
            encoded = encode_shard(array, stored)
            store.write(array.object_key(shard), *encoded.parts)
            objects[name] = ObjectRecord(
                nbytes=encoded.nbytes, crc32c=encoded.crc32c, index_crc32c=encoded.index_crc32c
            )
            if array.width is not None:
                keep = np.ones(len(rows), dtype=bool)
                if void is not None and void in rows:
                    keep[places[void - rows.start]] = False
                moments[name] = Moments.of(stored[keep])
        stats = to_parquet(moments)
        store.write(stats_key(shard), stats)
        record = ShardRecord(
            dataset_id=spec.dataset_id,
            shard=shard,
            revision=0,
            first_row=rows.start,
            n_rows=len(rows),
            n_void=int(void is not None and void in rows),
            objects=objects,
            stats=ObjectRecord(nbytes=len(stats), crc32c=crc32c(stats)),
            provenance=Provenance(attempt=f"golden-{shard}", software={"actlake": "0.1.0"}),
        )
        commit(store, record)
    manifest = Manifest.load(store)
    write_root(store, dataset_id=spec.dataset_id, n_rows=header.n_rows, manifest=manifest, groups=[])


def write_manifest(store: Store, make_record: Callable[..., ShardRecord]) -> None:
    """Write a compacted group without its commits."""
    manifest = Manifest.of(make_record(shard) for shard in range(1024))
    store.write(group_key(0), group_bytes(next(manifest.tables())))


def read_array(store: Store, array: ArraySpec, manifest: Manifest) -> npt.NDArray[Any]:
    """Read all committed rows with nothing but the arithmetic of the format page."""
    parts = []
    for record in manifest.records():
        data = store.read(array.object_key(record.shard))
        index = ShardIndex.parse(array, data[-array.index_nbytes :], record.n_rows, len(data), array.name)
        promised = record.objects[array.name]
        assert (promised.nbytes, promised.crc32c, promised.index_crc32c) == (len(data), crc32c(data), index.crc32c)
        chunks = np.empty(array.shape(array.rows_per_shard), dtype=array.numpy_dtype)
        for chunk in chunk_rows(array, 0, record.n_rows):
            start, stop = int(index.offsets[chunk]), int(index.offsets[chunk] + index.lengths[chunk])
            out = chunks[chunk * array.rows_per_chunk : (chunk + 1) * array.rows_per_chunk]
            decode_chunk(array, data[start:stop], out, f"{array.name}, chunk {chunk}")
        parts.append(chunks[: record.n_rows])
    return np.concatenate(parts)


def store_of(split: str) -> Store:
    return Store(DATA / "format-v1" / split)


def void_of(split: str) -> int | None:
    return VOID_ROW if split == "" else None


def places_of(header: Header) -> npt.NDArray[np.int64]:
    space = header.spec.row_space(header.n_rows)
    return np.concatenate([space.rows_of(shard).start + space.places(shard) for shard in range(space.n_shards)])


@pytest.mark.parametrize("split", N_ROWS)
def test_the_golden_dataset_holds_the_formulas_values(split: str) -> None:
    store = store_of(split)
    header, manifest = Header.read(store), Manifest.load(store)
    assert header.n_rows == manifest.n_rows == N_ROWS[split]
    assert header.spec.split == (split or "train")
    places = places_of(header)
    assert not np.array_equal(places, np.arange(len(places)))
    for array in header.spec.arrays().values():
        expected = rows_in_corpus_order(array, 0, header.n_rows, void_of(split))
        assert read_array(store, array, manifest)[places].tobytes() == expected.tobytes(), array.name


def test_some_golden_values_by_hand() -> None:
    store = store_of("")
    header, manifest = Header.read(store), Manifest.load(store)
    arrays = header.spec.arrays()
    token = read_array(store, arrays["rows/token_id"], manifest)
    acts = read_array(store, arrays["layers.0.resid_post"], manifest)
    assert acts.dtype == ml_dtypes.bfloat16
    # Row 5: (7 * 5 + 3 * c) % 64 - 32, in eighths.
    assert (acts[token.tolist().index(1005)] * 8).tolist() == [3, 6, 9, 12, 15, 18, 21, 24]
    void = token.tolist().index(1000 + VOID_ROW)
    assert read_array(store, arrays["rows/role"], manifest)[void] == 255
    assert acts[void].tolist() == [0.0] * 8
    assert read_array(store, arrays["rows/sequence"], manifest)[void] == 5_000_000_007


def test_the_golden_identities_stand() -> None:
    spec = Header.read(store_of("")).spec
    assert spec.dataset_id == "028fc38d7a8891dcec5aabf540950681a87d16545acefaf50552a78d85a31364"
    assert spec.row_space_id == "f84542252efc7bdcce2599b726bebcdf3d5e579954d60857d7096d61a07bb12e"
    assert spec.keep.keep_id == "10426516d3e166b7"


def test_the_golden_dataset_of_version_2_reads() -> None:
    store = Store(DATA / "format-v2")
    header, manifest = Header.read(store), Manifest.load(store)
    assert json.loads(store.read("spec.json"))["format_version"] == header.spec.format_version == 2
    assert header.spec.keep == KeepRule(exclude=(0, 1, 2), roles=("text", "reasoning"))
    assert header.spec.batching == "packed"
    assert header.spec.dataset_id == "b1c713fa934fd2f36c5cd595f639294628b3e88137b8351a1ae449ac9c86f992"
    assert header.spec.row_space_id == "e9cc710da64beb05e26cb9001fa1c67a0884e71ac3d7892037513d7c5f35817a"
    assert header.spec.keep.keep_id == "6d117f1b96d72705"
    for array in header.spec.arrays().values():
        expected = rows_in_corpus_order(array, 0, 70, 7)
        assert read_array(store, array, manifest)[places_of(header)].tobytes() == expected.tobytes(), array.name


def test_the_golden_statistics_are_those_of_the_rows() -> None:
    store = store_of("")
    header, manifest = Header.read(store), Manifest.load(store)
    files = {shard: from_parquet(store.read(stats_key(shard))) for shard in manifest.shards}
    for name, array in header.spec.arrays().items():
        if array.width is None:
            continue
        rows = rows_in_corpus_order(array, 0, header.n_rows, VOID_ROW).astype(np.float64)
        rows = np.delete(rows, VOID_ROW, axis=0)
        folded = fold({shard: file[name] for shard, file in files.items()}, array.width)
        assert folded.count == 149
        np.testing.assert_allclose(folded.mean, rows.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(folded.variance, rows.var(axis=0), rtol=1e-12)


@pytest.mark.parametrize("split", N_ROWS)
def test_writing_it_again_gives_equal_arrays_and_metadata(
    split: str, tmp_path: Path, make_spec: Callable[..., DatasetSpec]
) -> None:
    golden, again = store_of(split), Store(tmp_path)
    write_dataset(again, make_spec(split=split or "train"), N_ROWS[split], void_of(split))
    header, old, new = Header.read(golden), Manifest.load(golden), Manifest.load(again)
    assert Header.read(again) == header
    for name, array in header.spec.arrays().items():
        assert read_array(again, array, new).tobytes() == read_array(golden, array, old).tobytes()
        key = f"arrays/{name}/zarr.json"
        assert json.loads(again.read(key)) == json.loads(golden.read(key))
    for was, found in zip(old.records(), new.records(), strict=True):
        assert (was.first_row, was.n_rows, was.n_void, was.objects.keys()) == (
            found.first_row,
            found.n_rows,
            found.n_void,
            found.objects.keys(),
        )


def test_the_golden_manifest_group_reads(make_record: Callable[..., ShardRecord]) -> None:
    manifest = Manifest.load(Store(DATA / "format-v1-manifest"))
    assert manifest.table.schema == SCHEMA
    assert list(manifest.records()) == [make_record(shard) for shard in range(1024)]


def test_the_golden_data_stay_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 150 * 1024
