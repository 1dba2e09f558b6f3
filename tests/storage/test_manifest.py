import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actlake.storage import groups, manifest_files, manifest_parts, records, summaries
from actlake.storage import manifest as manifest_module
from actlake.storage.errors import CorruptObjectError, DataError, UncommittedShardError
from actlake.storage.manifest import SCHEMA, Manifest, compact, group_key, read_root, uncommit, write_root
from actlake.storage.manifest_files import group_bytes, index_key
from actlake.storage.records import ShardRecord, commit, commit_key
from actlake.storage.rowspace import RowSpace
from actlake.storage.stores import Store

MakeRecord = Callable[..., ShardRecord]
N_SHARDS = 1030
INDEX = index_key(0, N_SHARDS)
# The stored records, serialised once for all tests.
RECORDS: dict[int, bytes] = {}


@pytest.fixture
def full(memory_url: str, make_record: MakeRecord) -> str:
    """Return the URL of a dataset of 1,030 committed shards, the last one short."""
    store = Store(memory_url)
    if not RECORDS:
        sizes = enumerate(SPACE.n_rows_by_shard().tolist())
        RECORDS.update({shard: make_record(shard, n_rows=n_rows).to_bytes() for shard, n_rows in sizes})
    for shard, data in RECORDS.items():
        store.write(commit_key(shard), data)
    return memory_url


def space_of(n_rows: int) -> RowSpace:
    return RowSpace(n_rows=n_rows, rows_per_shard=64, rows_per_block=64, seed=0, order="shuffled")


SPACE = space_of(64 * (N_SHARDS - 1) + 10)


def finish(store: Store) -> Manifest:
    manifest = Manifest.load(store)
    groups = compact(store, manifest, SPACE)
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
    assert after.nbytes_by_array() == before.nbytes_by_array()
    sizes_of = before.sizes("rows/role", "none", "layers.0.resid_post")
    assert after.sizes("rows/role", "none", "layers.0.resid_post").combine_chunks().equals(sizes_of.combine_chunks())
    assert sizes_of.column_names == ["shard", "rows/role", "none", "layers.0.resid_post"]
    assert sizes_of["layers.0.resid_post"].to_pylist()[:3] == [1000, 1001, 1002]
    assert sizes_of["none"].null_count == N_SHARDS
    assert after.record(1029) == before.record(1029)


def test_opening_a_finished_dataset_lists_its_last_group_and_reads_its_index(full: str, watched: type[Any]) -> None:
    before = finish(Store(full))
    store = watched(full)
    after = Manifest.load(store)
    scalars = [name for name in SCHEMA.names if name != "objects"]
    assert after.columns(*scalars).equals(before.columns(*scalars))
    assert after.sizes("rows/role")["rows/role"].to_pylist() == before.sizes("rows/role")["rows/role"].to_pylist()
    assert after.nbytes_by_array() == before.nbytes_by_array()
    assert (store.listings, store.reads) == (["commits/00000001"], ["root.json"])
    assert store.ranges == {INDEX}
    # A record is its commit: the group would be a thousand of them.
    assert after.record(7) == before.record(7)
    assert store.reads == ["root.json", commit_key(7)]


def test_a_commit_that_vanished_from_the_last_group_is_missed_at_once(full: str) -> None:
    before = finish(Store(full))
    Store(full).delete(commit_key(1027))
    assert Manifest.load(Store(full)).shards == [shard for shard in before.shards if shard != 1027]


def test_an_early_root_without_an_index_opens_too(full: str, watched: type[Any]) -> None:
    before = finish(Store(full))
    store = watched(full)
    root = read_root(store) or {}
    store.write(
        "root.json", json.dumps({k: v for k, v in root.items() if not k.startswith(("index", "nbytes_"))}).encode()
    )
    store.reads.clear()
    after = Manifest.load(store)
    assert after.table.equals(before.table)
    assert after.nbytes_by_array() == before.nbytes_by_array()
    assert (store.listings, store.ranges) == (["commits/00000001"], {group_key(0)})
    assert sorted(store.reads) == [*(commit_key(shard) for shard in range(1024, N_SHARDS)), "root.json"]
    store.delete(commit_key(1027))
    assert Manifest.load(store).shards == [shard for shard in before.shards if shard != 1027]


def test_without_a_root_the_groups_are_listed(full: str, watched: type[Any]) -> None:
    before = finish(Store(full))
    store = watched(full)
    store.delete("root.json")
    assert Manifest.load(store).table.equals(before.table)
    assert store.listings == ["manifest", "commits", "commits/00000001"]
    assert len(store.reads) == 1 + 6
    assert store.ranges == {group_key(0)}


def test_records_that_are_too_many_to_keep_are_read_again(
    full: str, watched: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Manifest.load_listed(Store(full))
    monkeypatch.setattr(manifest_module, "_KEPT_GROUPS", 1)
    store = watched(full)
    manifest = Manifest.load_listed(store, also=["dataset_id"])
    assert len(store.reads) == N_SHARDS
    # What opening reads stays; the rest comes again, and a record as one object.
    assert manifest.missing_numbers(SPACE, manifest.columns("dataset_id")["dataset_id"][0].as_py()).tolist() == []
    assert manifest.record(7) == kept.record(7)
    assert len(store.reads) == N_SHARDS + 1
    assert manifest.columns("attempt").equals(kept.columns("attempt"))
    assert len(store.reads) == 2 * N_SHARDS + 1
    assert manifest.nbytes_by_array() == kept.nbytes_by_array()
    store.delete(commit_key(1027))
    with pytest.raises(DataError, match="was changed since it was opened"):
        manifest.columns("host")


def test_commits_that_vanish_while_they_are_read_are_not_there(full: str, watched: type[Any]) -> None:
    class Vanishing(watched):  # type: ignore[misc]
        def read(self, key: str, most: int | None = None) -> bytes:
            if key == commit_key(1027):
                self.delete(key)
            return bytes(super().read(key, most))

    assert Manifest.load_listed(Vanishing(full)).shards == [k for k in range(N_SHARDS) if k != 1027]


def test_what_of_another_dataset_is_missing(make_record: MakeRecord) -> None:
    manifest = Manifest.of([make_record(0), make_record(1, dataset_id="other"), make_record(2)])
    own = make_record(0).dataset_id
    assert manifest.missing(space_of(64 * 3)) == []
    assert manifest.missing(space_of(64 * 3), own) == [1]
    assert manifest.missing(space_of(64 * 3), "other") == [0, 2]
    assert manifest.is_exactly(space_of(64 * 3))
    assert not manifest.is_exactly(space_of(64 * 2 + 1))
    assert not manifest.is_exactly(space_of(64 * 4))


def test_the_bytes_of_a_group_are_determined(full: str, watched: type[Any]) -> None:
    store = watched(full)
    finish(store)
    data = store.read(group_key(0))
    store.changes.clear()
    # Another driver finds it there and leaves it.
    assert compact(store, Manifest.load(store), SPACE) == [0]
    assert store.changes == []
    # From the columns of the group itself come the same bytes, without the Parquet ids of its fields.
    assert group_bytes(next(Manifest.load(store).tables())) == data


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
    assert compact(store, Manifest.load(store), SPACE) == []
    # One that is shorter than planned, as the last one before the dataset grew.
    commit(store, make_record(500, n_rows=10))
    assert compact(store, Manifest.load(store), SPACE) == []
    # The last one of the plan, if it is short: it may grow.
    commit(store, make_record(500))
    commit(store, make_record(1023, n_rows=10))
    assert compact(store, Manifest.load(store), space_of(64 * 1023 + 10)) == []
    commit(store, make_record(1023))
    assert compact(store, Manifest.load(store), space_of(64 * 1024)) == [0]


def test_uncommit_takes_the_summaries_away_first(full: str, watched: type[Any]) -> None:
    finish(Store(full))
    store = watched(full)
    uncommit(store, 5)
    summaries = ["delete root.json", f"delete {index_key(0, 65536)}", f"delete {group_key(0)}"]
    assert store.changes == [*summaries, f"delete {commit_key(5)}", *summaries]
    assert Manifest.load(store).shards == [shard for shard in range(N_SHARDS) if shard != 5]


@pytest.mark.parametrize("fail_at", [0, 1, 2, 3])
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
        "index": [INDEX],
        "nbytes_by_array": manifest.nbytes_by_array(),
    }


def test_the_totals_of_a_smaller_plan_are_ignored(full: str, watched: type[Any]) -> None:
    before = finish(Store(full))
    for n_rows, listings in ((before.n_rows, 1), (before.n_rows + 1, 3)):
        store = watched(full)
        assert Manifest.load(store, n_rows).table.equals(before.table)
        assert len(store.listings) == listings


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"n_shards": 3}'])
def test_a_damaged_root_is_named(data: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("root.json", data)
    with pytest.raises(CorruptObjectError, match=r"root\.json is damaged.*actlake ingest"):
        Manifest.load(store)


@pytest.mark.parametrize("key", [group_key(0), INDEX])
@pytest.mark.parametrize("damage", ["cut", "empty", "other columns"])
def test_a_damaged_file_is_named(damage: str, key: str, full: str) -> None:
    store = Store(full)
    finish(store)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1]}), sink)
    whole = store.read(key)
    store.write(key, {"cut": whole[:-20], "empty": b"", "other columns": sink.getvalue().to_pybytes()}[damage])
    if key == group_key(0):
        store.delete("root.json")
    with pytest.raises(CorruptObjectError, match=rf"{re.escape(key)} is damaged.*actlake ingest"):
        Manifest.load(store)


def test_a_flipped_bit_in_the_index_is_never_read(full: str) -> None:
    before = finish(Store(full)).columns("shard", "n_rows", "nbytes", "attempt")
    store = Store(full)
    whole, n_found = store.read(INDEX), 0
    for place in range(50, 6000, 149):
        data = bytearray(whole)
        data[place] ^= 4
        store.write(INDEX, bytes(data))
        try:
            assert Manifest.load(store).columns(*before.column_names).equals(before), place
        except CorruptObjectError:
            n_found += 1
    assert n_found > 10


def test_without_its_index_a_dataset_is_listed(full: str, watched: type[Any]) -> None:
    before = finish(Store(full))
    store = watched(full)
    store.delete(INDEX)
    assert Manifest.load(store).table.equals(before.table)
    assert store.listings == ["commits/00000001", "manifest", "commits", "commits/00000001"]
    finish(store)
    assert store.exists(INDEX)


def test_finishing_again_writes_nothing(full: str, watched: type[Any]) -> None:
    finish(Store(full))
    store = watched(full)
    finish(store)
    assert store.changes == []


def test_a_rebuilt_shard_comes_into_the_index(full: str, make_record: MakeRecord) -> None:
    store = Store(full)
    finish(store)
    uncommit(store, 1026)
    commit(store, make_record(1026, n_void=60))
    finish(store)
    assert Manifest.load(store).columns("n_void")["n_void"].to_pylist()[1026] == 60


def test_the_index_of_a_smaller_plan_is_cleared_away(full: str, make_record: MakeRecord) -> None:
    store = Store(full)
    finish(store)
    # What preparing for more rows does, and the builds after it.
    store.delete("root.json")
    commit(store, make_record(N_SHARDS))
    manifest = finish(store)
    assert store.names("manifest") == ["00000000.parquet", "index-00000000-01031.parquet"]
    assert Manifest.load(store).shards == manifest.shards == list(range(N_SHARDS + 1))


def test_what_was_replaced_since_is_named(full: str) -> None:
    store = Store(full)
    finish(store)
    manifest = Manifest.load(store)
    uncommit(store, 5)
    store.delete(INDEX)
    assert len(manifest.columns("shard")) == N_SHARDS
    with pytest.raises(DataError, match=r"was changed since it was opened.*open it again"):
        manifest.columns("attempt")
    with pytest.raises(DataError, match="was changed since it was opened"):
        next(manifest.tables())
    with pytest.raises(UncommittedShardError, match="shard 5 has lost its commit record since"):
        manifest.record(5)


def test_a_record_with_other_rows_than_the_manifest_says_is_refused(full: str) -> None:
    store = Store(full)
    finish(store)
    manifest = Manifest.load(store)
    record = manifest.record(5)
    commit(store, replace(record, n_rows=record.n_rows - 1))
    with pytest.raises(DataError, match=r"shard 5 has \d+ rows by its commit record and \d+ by the manifest: open the"):
        manifest.record(5)
    assert manifest.record(6).shard == 6


class Racing(Store):
    """A store beside which another driver un-commits shard 1: ``n_before`` of its steps before ``key`` is written."""

    key, n_before, late = "", 0, False

    def __init__(self, url: str, steps: list[str]) -> None:
        super().__init__(url)
        self.steps = steps

    def write(self, key: str, *parts: bytes | memoryview) -> None:
        if key == self.key:
            self.step(self.n_before)
        super().write(key, *parts)
        if key == self.key and not self.late:
            self.step(len(self.steps))

    def step(self, n: int) -> None:
        for _ in range(min(n, len(self.steps))):
            self.delete(self.steps.pop(0))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("n_before", range(8))
@pytest.mark.parametrize("key", [group_key(0), index_key(0, 8), index_key(1, 1), "root.json"])
def test_a_shard_un_committed_beside_a_compaction_stays_so(
    key: str,
    n_before: int,
    late: bool,
    memory_url: str,
    watched: type[Any],
    make_record: MakeRecord,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("GROUP_SHARDS", 4), ("INDEX_GROUPS", 2)):
        for module in (records, manifest_module, manifest_files, manifest_parts, groups, summaries):
            monkeypatch.setattr(module, name, value, raising=False)
    other = watched(f"{memory_url}/none")
    uncommit(other, 1)
    store = Racing(memory_url, [change.removeprefix("delete ") for change in other.changes])
    for shard in range(9):
        commit(store, make_record(shard))
    store.key, store.n_before, store.late = key, n_before, late
    manifest = Manifest.load(store)
    full = compact(store, manifest, space_of(64 * 9))
    write_root(store, dataset_id="d", n_rows=manifest.n_rows, manifest=manifest, groups=full)
    store.step(7)
    assert Manifest.load(store).shards == Manifest.load_listed(store).shards == [0, *range(2, 9)]


def test_missing_shards(make_record: MakeRecord) -> None:
    space = RowSpace(n_rows=64 * 5 + 10, rows_per_shard=64, rows_per_block=64, seed=0, order="shuffled")
    manifest = Manifest.of([make_record(0), make_record(2), make_record(3, n_rows=63), make_record(9)])
    assert manifest.missing(space) == [1, 3, 4, 5]
    assert Manifest.of(make_record(k, n_rows=10 if k == 5 else 64) for k in range(6)).missing(space) == []
