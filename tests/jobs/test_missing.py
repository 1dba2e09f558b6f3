"""What a run has to build, as numbers."""

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
from formula_dataset import make_spec

from actlake.jobs.missing import MissingShards, SplitShards
from actlake.jobs.work import Task
from actlake.storage import whole_commits
from actlake.storage.errors import CorruptObjectError
from actlake.storage.header import Header, prepare
from actlake.storage.manifest import Manifest
from actlake.storage.manifest_files import group_key
from actlake.storage.records import GROUP_SHARDS, ObjectRecord, Provenance, ShardRecord, commit, commit_key, read_record
from actlake.storage.rowspace import RowSpace
from actlake.storage.stores import Store
from actlake.storage.summaries import compact, uncommit

Commit = Callable[[Store, Header, int, int], None]


def space_of(n_rows: int) -> RowSpace:
    return RowSpace(n_rows=n_rows, rows_per_shard=64, rows_per_block=64, seed=0, order="shuffled")


def shards_of(missing: MissingShards) -> list[tuple[str, int, int]]:
    return [(task.split, task.shard, task.n_rows) for task in missing]


def commit_shard(store: Store, header: Header, shard: int, n_rows: int, dataset_id: str | None = None) -> None:
    record = ShardRecord(
        dataset_id=dataset_id or header.spec.dataset_id,
        shard=shard,
        revision=0,
        first_row=shard * header.spec.rows_per_shard,
        n_rows=n_rows,
        n_void=0,
        objects={"rows/role": ObjectRecord(nbytes=1, crc32c=2)},
        stats=ObjectRecord(nbytes=1, crc32c=2),
        provenance=Provenance(),
    )
    commit(store, record)


def test_tasks_are_ascending_by_split_and_come_again() -> None:
    missing = MissingShards(
        splits={
            "train": SplitShards(space=space_of(64 * 9 + 10), shards=np.array([2, 5, 9])),
            "heldout": SplitShards(space=space_of(70), shards=np.array([0, 1])),
        }
    )
    expected = [("train", 2, 64), ("train", 5, 64), ("train", 9, 10), ("heldout", 0, 64), ("heldout", 1, 6)]
    assert shards_of(missing) == shards_of(missing) == expected
    assert len(missing) == 5
    assert missing.n_rows == 64 + 64 + 10 + 64 + 6
    assert all(type(task.shard) is int for task in missing)
    assert missing
    assert not MissingShards()
    assert next(iter(missing)) == Task(split="train", shard=2, n_rows=64)


def test_slices_part_the_shards() -> None:
    missing = MissingShards(splits={"train": SplitShards(space=space_of(64 * 20), shards=np.arange(3, 20))})
    assert [task.shard for task in missing.slice(1, 4)] == [5, 9, 13, 17]
    # Numbered from 1, the last slice is the one that counts from 0.
    assert shards_of(missing.slice(4, 4)) == shards_of(missing.slice(0, 4))
    parts = [missing.slice(number, 4) for number in range(4)]
    assert sorted(task.shard for part in parts for task in part) == list(range(3, 20))
    assert sum(part.n_rows for part in parts) == missing.n_rows


def test_a_group_that_counts_a_commit_which_is_gone_is_not_believed(memory: str) -> None:
    """Left by a driver that was killed between writing the group and seeing that the commit had been taken back."""
    spec = make_spec(rows_per_shard=64, rows_per_block=64)
    store = Store(memory)
    headers = {"train": prepare(store, Header(spec=spec, n_rows=64 * 2 * GROUP_SHARDS, corpus="../corpus"))}
    for shard in range(2 * GROUP_SHARDS):
        commit_shard(store, headers["train"], shard, 64)
    seen = Manifest.load(store)
    assert compact(store, seen, spec.row_space(headers["train"].n_rows)) == [0, 1]
    stale = store.read(group_key(0))
    uncommit(store, 5)
    store.write(group_key(0), stale)
    assert shards_of(MissingShards.find(store, headers)) == [("train", 5, 64)]
    assert [store.exists(group_key(group)) for group in (0, 1)] == [False, True]


def test_what_counts_is_a_commit_of_this_dataset_with_all_planned_rows(memory: str) -> None:
    spec = make_spec(rows_per_shard=64, rows_per_block=64)
    heldout = dataclasses.replace(spec, split="heldout")
    store = Store(memory)
    headers = {
        "train": prepare(store, Header(spec=spec, n_rows=64 * 5 + 10, corpus="../corpus")),
        "heldout": prepare(store.child("heldout"), Header(spec=heldout, n_rows=20, corpus="../../corpus")),
    }
    commit_shard(store, headers["train"], 0, 64)
    # The short last one of a smaller plan, one of another dataset, one beyond the plan.
    commit_shard(store, headers["train"], 2, 63)
    commit_shard(store, headers["train"], 3, 64, dataset_id="other")
    commit_shard(store, headers["train"], 9, 64)
    expected = [("train", 1, 64), ("train", 2, 64), ("train", 3, 64), ("train", 4, 64), ("train", 5, 10)]
    assert shards_of(MissingShards.find(store, headers)) == [*expected, ("heldout", 0, 20)]
    commit_shard(store, headers["train"], 5, 10)
    commit_shard(store.child("heldout"), headers["heldout"], 0, 20)
    assert shards_of(MissingShards.find(store, headers)) == expected[:-1]


def test_planning_takes_few_bytes_a_shard() -> None:
    n = 1_350_000
    missing = MissingShards(splits={"train": SplitShards(space=space_of(64 * n), shards=np.arange(n))})
    assert missing.splits["train"].shards.nbytes == 8 * n
    assert len(missing) == n
    assert missing.n_rows == 64 * n
    assert len(missing.slice(3, 1000)) == n // 1000


def test_commits_that_are_not_compacted_are_told_by_their_first_bytes(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second shard, as half of a Slurm array leaves it: parsing 675,000 records takes minutes."""
    spec = make_spec(rows_per_shard=64, rows_per_block=64)
    store = Store(memory)
    headers = {"train": prepare(store, Header(spec=spec, n_rows=64 * 2 * GROUP_SHARDS, corpus="../corpus"))}
    for shard in range(0, 2 * GROUP_SHARDS, 2):
        commit_shard(store, headers["train"], shard, 64)
    # As another writer may put it: the same record, in other words.
    said = json.loads(store.read(commit_key(1024)))
    store.write(commit_key(1024), json.dumps(said).encode())
    # Moved to another's place.
    store.write(commit_key(7), store.read(commit_key(8)))
    parsed: list[int] = []

    def read(store: Store, shard: int) -> ShardRecord:
        parsed.append(shard)
        return read_record(store, shard)

    monkeypatch.setattr(whole_commits, "read_record", read)
    with pytest.raises(CorruptObjectError, match="the record of shard 8"):
        MissingShards.find(store, headers)
    uncommit(store, 7)
    parsed.clear()
    assert [task.shard for task in MissingShards.find(store, headers)] == list(range(1, 2 * GROUP_SHARDS, 2))
    assert parsed == [1024]


def test_a_commit_that_goes_while_it_is_read_is_missing(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(rows_per_shard=64, rows_per_block=64)
    store = Store(memory)
    headers = {"train": prepare(store, Header(spec=spec, n_rows=64 * 3, corpus="../corpus"))}
    for shard in range(2):
        commit_shard(store, headers["train"], shard, 64)
    monkeypatch.setattr(whole_commits, "commits_of", lambda *_: [0, 1, 2])
    assert shards_of(MissingShards.find(store, headers)) == [("train", 2, 64)]
