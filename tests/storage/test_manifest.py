import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actlake.storage.errors import CorruptObjectError, UncommittedShardError
from actlake.storage.manifest import SCHEMA, Manifest, compact, group_key, read_root, uncommit, write_root
from actlake.storage.records import ShardRecord, commit, commit_key
from actlake.storage.stores import Store

MakeRecord = Callable[..., ShardRecord]
N_SHARDS = 1030
# The stored records, serialised once for all tests.
RECORDS: dict[int, bytes] = {}


@pytest.fixture
def full(memory_url: str, make_record: MakeRecord) -> str:
    """Return the URL of a dataset of 1,030 committed shards, the last one short."""
    store = Store(memory_url)
    if not RECORDS:
        RECORDS.update({shard: make_record(shard, n_rows=n_rows).to_bytes() for shard, n_rows in sizes().items()})
    for shard, data in RECORDS.items():
        store.write(commit_key(shard), data)
    return memory_url


def sizes() -> dict[int, int]:
    return {shard: 10 if shard == N_SHARDS - 1 else 64 for shard in range(N_SHARDS)}


def finish(store: Store) -> Manifest:
    manifest = Manifest.load(store)
    groups = compact(store, manifest, N_SHARDS, sizes())
    write_root(store, dataset_id="d", n_rows=manifest.n_rows, manifest=manifest, groups=groups)
    return manifest


def test_records_come_back_from_arrow(make_record: MakeRecord) -> None:
    records = [make_record(shard, revision=shard) for shard in range(5)]
    shuffled = random.Random(0).sample(records, 5)
    manifest = Manifest.of(shuffled)
    assert manifest.table.schema == SCHEMA
    assert list(manifest.records()) == records
    assert [manifest.record(shard) for shard in range(5)] == records
    assert manifest.shards == [0, 1, 2, 3, 4]


def test_the_columns_do_not_depend_on_the_order_of_objects(make_record: MakeRecord) -> None:
    record = make_record(1)
    turned = replace(record, objects=dict(reversed(list(record.objects.items()))))
    assert Manifest.of([turned]).table.equals(Manifest.of([record]).table)


def test_totals(make_record: MakeRecord) -> None:
    records = [make_record(shard) for shard in (0, 2, 7)]
    manifest = Manifest.of(records)
    assert len(manifest) == 3
    assert manifest.n_rows == 192
    assert manifest.nbytes == sum(record.nbytes for record in records)
    assert manifest.n_rows_by_shard() == {0: 64, 2: 64, 7: 64}
    assert manifest.nbytes_by_array() == {
        name: sum(record.objects[name].nbytes for record in records) for name in records[0].objects
    }


def test_no_commits_are_a_manifest_too(tmp_path: Path) -> None:
    manifest = Manifest.load(Store(tmp_path))
    assert (len(manifest), manifest.n_rows, manifest.nbytes, manifest.shards) == (0, 0, 0, [])
    assert manifest.nbytes_by_array() == {}
    assert list(manifest.records()) == []


def test_an_uncommitted_shard_is_an_error(make_record: MakeRecord) -> None:
    with pytest.raises(UncommittedShardError, match="shard 1 is not committed; 'actlake ingest'"):
        Manifest.of([make_record(0), make_record(2)]).record(1)


def test_compaction_changes_nothing_that_is_read(full: str, watched: type[Any]) -> None:
    before = Manifest.load(Store(full))
    assert before.shards == list(range(N_SHARDS))
    finish(Store(full))
    store = watched(full)
    after = Manifest.load(store)
    assert after.table.equals(before.table)
    assert list(after.records()) == list(before.records())
    # Opening a finished dataset lists nothing, and reads a group instead of its 1,024 records.
    assert store.listings == []
    assert sorted(store.reads) == sorted(
        ["root.json", group_key(0), *(commit_key(shard) for shard in range(1024, N_SHARDS))]
    )


def test_without_a_root_the_groups_are_listed(full: str, watched: type[Any]) -> None:
    before = finish(Store(full))
    store = watched(full)
    store.delete("root.json")
    assert Manifest.load(store).table.equals(before.table)
    assert store.listings == ["manifest", "commits", "commits/00000001"]
    assert len(store.reads) == 1 + 1 + 6


def test_the_bytes_of_a_group_are_determined(full: str, watched: type[Any]) -> None:
    store = watched(full)
    finish(store)
    data = store.read(group_key(0))
    store.changes.clear()
    # Another driver finds it there and leaves it.
    assert compact(store, Manifest.load(store), N_SHARDS, sizes()) == [0]
    assert store.changes == []
    # A third one wrote it from a manifest that was itself read from the group.
    loaded = Manifest.load(store)
    store.delete(group_key(0))
    assert compact(store, loaded, N_SHARDS, sizes()) == [0]
    assert store.read(group_key(0)) == data


def test_a_group_is_plain_parquet(full: str) -> None:
    store = Store(full)
    finish(store)
    table = pq.read_table(pa.BufferReader(store.read(group_key(0))))
    assert table.schema.names == SCHEMA.names
    assert table["shard"].to_pylist() == list(range(1024))


def test_only_full_groups_of_full_shards_are_compacted(full: str, make_record: MakeRecord) -> None:
    store = Store(full)
    # A missing shard.
    uncommit(store, 500)
    assert compact(store, Manifest.load(store), N_SHARDS, sizes()) == []
    # One that is shorter than planned, as the last one before the dataset grew.
    commit(store, make_record(500, n_rows=10))
    assert compact(store, Manifest.load(store), N_SHARDS, sizes()) == []
    # The last one of the plan, if it is short: it may grow.
    commit(store, make_record(500))
    commit(store, make_record(1023, n_rows=10))
    assert compact(store, Manifest.load(store), 1024, sizes() | {1023: 10}) == []
    commit(store, make_record(1023))
    assert compact(store, Manifest.load(store), 1024, sizes()) == [0]


def test_uncommit_takes_the_summaries_away_first(full: str, watched: type[Any]) -> None:
    finish(Store(full))
    store = watched(full)
    uncommit(store, 5)
    assert store.changes == ["delete root.json", f"delete {group_key(0)}", f"delete {commit_key(5)}"]
    assert Manifest.load(store).shards == [shard for shard in range(N_SHARDS) if shard != 5]


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_an_interrupted_uncommit_leaves_the_shard_whole(fail_at: int, full: str, watched: type[Any]) -> None:
    before, store = finish(Store(full)), watched(full)
    store.fail_at = fail_at
    with pytest.raises(OSError, match="on purpose"):
        uncommit(store, 5)
    assert Manifest.load(Store(full)).table.equals(before.table)
    uncommit(Store(full), 5)
    assert 5 not in Manifest.load(Store(full)).shards


def test_what_no_one_of_us_wrote_is_passed_over(tmp_path: Path, make_record: MakeRecord) -> None:
    store = Store(tmp_path)
    commit(store, make_record(3))
    for key in (".DS_Store", "00000000.tmp", "00000000"):
        store.write(f"commits/00000000/{key}", b"x")
        store.write(f"manifest/{key}", b"x")
    store.write("commits/notes.txt", b"x")
    assert Manifest.load(store).shards == [3]


def test_root_has_the_totals(full: str) -> None:
    store = Store(full)
    assert read_root(store) is None
    manifest = finish(store)
    assert read_root(store) == {
        "dataset_id": "d",
        "complete": True,
        "n_rows": 64 * (N_SHARDS - 1) + 10,
        "n_shards": N_SHARDS,
        "nbytes": manifest.nbytes,
        "groups": [0],
    }


def test_the_totals_of_a_smaller_plan_are_ignored(full: str, watched: type[Any]) -> None:
    before = finish(Store(full))
    for n_rows, listings in ((before.n_rows, 0), (before.n_rows + 1, 3)):
        store = watched(full)
        assert Manifest.load(store, n_rows).table.equals(before.table)
        assert len(store.listings) == listings


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"n_shards": 3}'])
def test_a_damaged_root_is_named(data: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("root.json", data)
    with pytest.raises(CorruptObjectError, match=r"root\.json is damaged.*actlake ingest"):
        Manifest.load(store)


@pytest.mark.parametrize("damage", ["cut", "empty", "other columns"])
def test_a_damaged_group_is_named(damage: str, full: str) -> None:
    store = Store(full)
    finish(store)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1]}), sink)
    whole = store.read(group_key(0))
    store.write(group_key(0), {"cut": whole[:-20], "empty": b"", "other columns": sink.getvalue()}[damage])
    with pytest.raises(CorruptObjectError, match=r"00000000\.parquet is damaged"):
        Manifest.load(store)


def test_a_promised_record_that_is_not_there_is_a_missing_shard(full: str) -> None:
    store = Store(full)
    finish(store)
    before = Manifest.load(store).shards
    store.delete(commit_key(1027))
    assert Manifest.load(store).shards == [shard for shard in before if shard != 1027]
