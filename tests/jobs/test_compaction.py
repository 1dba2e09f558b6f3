"""Groups are compacted while a run goes on: with the bytes that its end would write, and never against a commit."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from formula_dataset import make_spec

from actlake.jobs import compaction
from actlake.jobs.compaction import Compactor
from actlake.jobs.engines.events import ShardCommitted, ShardRetried
from actlake.jobs.missing import MissingShards
from actlake.jobs.work import Task
from actlake.storage import groups, manifest, manifest_files, manifest_parts, records, summaries
from actlake.storage.errors import StoreError
from actlake.storage.finish import finish
from actlake.storage.header import Header, prepare
from actlake.storage.manifest import Manifest, group_key, uncommit
from actlake.storage.records import ObjectRecord, Provenance, ShardRecord, commit, commit_key
from actlake.storage.stores import Store

N_SHARDS, GROUP = 11, 4


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (compaction, groups, manifest, manifest_files, manifest_parts, records, summaries):
        monkeypatch.setattr(module, "GROUP_SHARDS", GROUP, raising=False)


class Reads(Store):
    """A store that notes which records are read, and of which the first bytes."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.records: list[str] = []
        self.heads: list[str] = []

    def read(self, key: str, most: int | None = None) -> bytes:
        if key.startswith("commits/"):
            self.records.append(key)
        return super().read(key, most)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        if key.startswith("commits/"):
            self.heads.append(key)
        return super().read_range(key, start, stop)


class Run:
    """A dataset of 11 shards, the last of them short, as workers commit it and the driver hears of it."""

    def __init__(self, url: str) -> None:
        self.store, self.notes = Reads(url), list[str]()
        spec = make_spec(rows_per_shard=64, rows_per_block=64)
        self.header = prepare(self.store, Header(spec=spec, n_rows=64 * (N_SHARDS - 1) + 10, corpus="../corpus"))
        self.space = spec.row_space(self.header.n_rows)

    def record(self, shard: int, attempt: str = "first") -> ShardRecord:
        return ShardRecord(
            dataset_id=self.header.spec.dataset_id,
            shard=shard,
            revision=0,
            first_row=64 * shard,
            n_rows=len(self.space.rows_of(shard)),
            n_void=0,
            objects={"rows/role": ObjectRecord(nbytes=9 + shard, crc32c=2)},
            stats=ObjectRecord(nbytes=1, crc32c=2),
            provenance=Provenance(attempt=attempt, forward_s=0.1 + shard, software={"torch": "2"}),
        )

    def task(self, shard: int) -> Task:
        return Task(split="train", shard=shard, n_rows=len(self.space.rows_of(shard)))

    def commit(self, shard: int, attempt: str = "first") -> ShardCommitted:
        record = self.record(shard, attempt)
        commit(self.store, record)
        return ShardCommitted(task=self.task(shard), record=record)

    def compactor(self) -> Compactor:
        headers = {"train": self.header}
        return Compactor(self.store, headers, MissingShards.find(self.store, headers), self.notes.append)

    def compacted(self) -> list[str]:
        return [name for name in self.store.names("manifest") if not name.startswith("index")]


@pytest.fixture
def run(memory: str) -> Iterator[Run]:
    return Run(memory)  # type: ignore[return-value]


def test_each_full_group_is_written_once_it_is_whole_with_the_bytes_of_the_end(run: Run) -> None:
    with run.compactor() as compactor:
        for shard in (3, 0, 8, 10, 2, 9, 1, 5, 4, 7, 6):
            compactor.event(run.commit(shard))
    # The records came from the workers; the last group, with the short shard, may grow.
    assert run.store.records == []
    assert run.compacted() == ["00000000.parquet", "00000001.parquet"]
    during = {name: run.store.read(f"manifest/{name}") for name in run.compacted()}
    for name in during:
        run.store.delete(f"manifest/{name}")
    finish(run.store, run.header)
    assert {name: run.store.read(f"manifest/{name}") for name in run.compacted()} == during


def test_a_killed_run_leaves_groups_for_the_next_one(run: Run) -> None:
    with run.compactor() as compactor:
        for shard in (0, 1, 2, 3, 4, 5):
            compactor.event(run.commit(shard))
    run.store.records.clear()
    missing = MissingShards.find(run.store, {"train": run.header})
    assert [task.shard for task in missing] == [6, 7, 8, 9, 10]
    assert sorted(run.store.heads) == [commit_key(4), commit_key(5)]
    assert run.store.records == []


def test_a_resumed_run_reads_the_records_of_the_run_before(run: Run) -> None:
    for shard in (0, 2, 4):
        run.commit(shard)
    compactor = run.compactor()
    run.store.records.clear()
    with compactor:
        for shard in (1, 3, 5, 6, 7):
            compactor.event(run.commit(shard))
    assert run.compacted() == ["00000000.parquet", "00000001.parquet"]
    assert sorted(run.store.records) == [commit_key(0), commit_key(2), commit_key(4)]
    assert Manifest.load_listed(run.store).columns("attempt", "nbytes").to_pylist()[7]["nbytes"] == 16


def test_the_record_of_a_shard_that_was_handed_out_twice_is_read(run: Run) -> None:
    """The first worker, which had been given up, may have committed last."""
    with run.compactor() as compactor:
        compactor.event(ShardRetried(task=run.task(1), error=OSError("lost")))
        for shard in (0, 1, 2):
            compactor.event(run.commit(shard))
        run.commit(1, attempt="late")
        compactor.event(run.commit(3))
    assert run.store.records == [commit_key(1)]
    assert Manifest.load_listed(run.store).columns("attempt")["attempt"].to_pylist()[1] == "late"


def test_a_shard_un_committed_meanwhile_is_in_no_group(run: Run) -> None:
    with run.compactor() as compactor:
        for shard in (0, 1, 2):
            compactor.event(run.commit(shard))
        uncommit(run.store, 1)
        compactor.event(run.commit(3))
    assert run.compacted() == []
    assert Manifest.load_listed(run.store).shards == [0, 2, 3]


def test_a_shard_that_was_the_last_before_the_dataset_grew_is_in_no_group(run: Run) -> None:
    """As in a slice, which finds the short record of a shard that another one has yet to build again."""
    run.commit(1)
    with run.compactor() as compactor:
        commit(run.store, replace(run.record(1, attempt="before it grew"), n_rows=10))
        for shard in (0, 2, 3):
            compactor.event(run.commit(shard))
    assert run.compacted() == run.notes == []


def test_a_group_that_others_still_build_is_left_to_them(run: Run) -> None:
    """As in a slice: all of its own shards of the group are there, others are not."""
    headers = {"train": run.header}
    part = MissingShards.find(run.store, headers).slice(1, 2)
    with Compactor(run.store, headers, part, run.notes.append) as compactor:
        for task in part:
            compactor.event(run.commit(task.shard))
    assert run.compacted() == run.notes == []


def test_records_that_are_too_many_to_hold_are_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_MOST_OPEN", 1)
    with run.compactor() as compactor:
        for shard in (0, 4, 5, 6, 7, 1, 2, 3):
            compactor.event(run.commit(shard))
    assert run.compacted() == ["00000000.parquet", "00000001.parquet"]
    assert sorted(run.store.records) == [commit_key(shard) for shard in (4, 5, 6, 7)]


def test_a_store_that_fails_is_noted_and_the_end_of_the_run_compacts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Store.write

    def failing(self: Store, key: str, *parts: Any) -> None:
        if key == group_key(0):
            raise StoreError("no answer")
        write(self, key, *parts)

    monkeypatch.setattr(Store, "write", failing)
    with run.compactor() as compactor:
        for shard in range(N_SHARDS):
            compactor.event(run.commit(shard))
    assert run.notes == ["commits are not compacted before the end of the run: StoreError: no answer"]
    monkeypatch.setattr(Store, "write", write)
    finish(run.store, run.header)
    assert run.compacted() == ["00000000.parquet", "00000001.parquet"]


def test_what_is_raised_in_a_run_does_not_wait_for_groups(run: Run) -> None:
    compactor = run.compactor()
    for shard in range(3):
        compactor.event(run.commit(shard))
    compactor.__exit__(KeyboardInterrupt)
    with pytest.raises(RuntimeError, match="after shutdown"):
        compactor.event(run.commit(3))


def test_records_of_another_dataset_are_in_no_group(run: Run) -> None:
    compactor = run.compactor()
    with compactor:
        for shard in range(4):
            event = run.commit(shard)
            compactor.event(replace(event, record=replace(event.record, dataset_id="other")))
    assert run.compacted() == []
