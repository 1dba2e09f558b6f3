"""Compacts a dataset's groups of 1,024 commits while a run goes on, each as soon as it is whole.

So a run that is killed leaves some files for the next one to read, not a million small records. The records are those
that workers returned, which have the bytes of the stored ones; those of an earlier run are read. A shard that was
handed out more than once may have been committed more than once, so its record is read as well.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from actlake.jobs.engines.events import Event, ShardCommitted, ShardRetried
from actlake.jobs.missing import MissingShards
from actlake.jobs.work import Task, split_store
from actlake.storage.errors import NotFoundError
from actlake.storage.groups import shards_of
from actlake.storage.header import Header
from actlake.storage.manifest_files import to_table
from actlake.storage.records import GROUP_SHARDS, ShardRecord, read_records
from actlake.storage.stores import Store
from actlake.storage.summaries import full_groups, write_group

#: Groups whose records are held at a time: 1,024 records of 136 objects have 40 MB. Those of others are read again.
_MOST_OPEN = 6


class Compactor:
    """Hears the events of a run; writes groups in one thread of its own. A context: at its end the thread is through.

    What fails here is left to the last step of a run, which does it again and raises; ``note`` hears of it.
    """

    def __init__(
        self, store: Store, headers: Mapping[str, Header], missing: MissingShards, note: Callable[[str], None]
    ) -> None:
        self._splits = {
            split: _Split(split_store(store, split), header, missing.splits[split].shards)
            for split, header in headers.items()
        }
        self._note = note
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="actlake-compact")
        self._stopped = threading.Event()
        # Written or waiting to be with their records: where the store is slower than the workers, others are read.
        self._held = threading.Semaphore(2)

    def __enter__(self) -> "Compactor":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._stopped.set()
        self._pool.shutdown(cancel_futures=kind is not None)

    def event(self, event: Event) -> None:
        """Take note of a commit; have its group written if it was the last one."""
        if isinstance(event, ShardRetried):
            self._splits[event.task.split].retried(event.task)
        elif isinstance(event, ShardCommitted):
            split = self._splits[event.task.split]
            if (group := split.committed(event.record)) is not None:
                records, held = split.take(group), self._held.acquire(blocking=False)
                self._pool.submit(self._write, split, group, records if held else {}, held)

    def _write(self, split: "_Split", group: int, records: dict[int, ShardRecord], held: bool) -> None:
        try:
            if not self._stopped.is_set():
                split.write(group, records)
        except Exception as error:  # noqa: BLE001 - the end of the run does it again, and raises
            self._stopped.set()
            self._note(f"commits are not compacted before the end of the run: {type(error).__name__}: {error}")
        finally:
            if held:
                self._held.release()


class _Split:
    """The groups of one split: how many of their commits are still missing, and the records of those that came."""

    def __init__(self, store: Store, header: Header, missing: npt.NDArray[np.int64]) -> None:
        self.store, self._spec = store, header.spec
        space = header.spec.row_space(header.n_rows)
        self._n_groups = full_groups(space)
        # Of groups, 8 bytes each.
        self._n_missing = np.bincount(missing // GROUP_SHARDS, minlength=self._n_groups)
        self._records: dict[int, dict[int, ShardRecord]] = {}
        self._retried: dict[int, set[int]] = {}

    def retried(self, task: Task) -> None:
        self._retried.setdefault(task.shard // GROUP_SHARDS, set()).add(task.shard)

    def committed(self, record: ShardRecord) -> int | None:
        """Keep a record; return its group where that has all commits now."""
        group = record.shard // GROUP_SHARDS
        if group >= self._n_groups:
            return None
        self._n_missing[group] -= 1
        if group in self._records or len(self._records) < _MOST_OPEN:
            self._records.setdefault(group, {})[record.shard] = record
        return group if self._n_missing[group] == 0 else None

    def take(self, group: int) -> dict[int, ShardRecord]:
        """Return the records that are at hand, less those that may have been replaced since; forget them."""
        records = self._records.pop(group, {})
        for shard in self._retried.pop(group, ()):
            records.pop(shard, None)
        return records

    def write(self, group: int, records: dict[int, ShardRecord]) -> None:
        """Write a group, with the records that are not at hand read from the store."""
        shards = shards_of(group)
        try:
            for record in read_records(self.store, [shard for shard in shards if shard not in records]):
                records[record.shard] = record
        except NotFoundError:
            return  # Another process builds it, or un-committed it; whoever finds the group whole writes it.
        # A group has whole shards alone. A short one was the last before the dataset grew: another slice builds it.
        whole = self._spec.dataset_id, self._spec.rows_per_shard
        if all((record.dataset_id, record.n_rows) == whole for record in records.values()):
            write_group(self.store, group, to_table(records[shard] for shard in shards))
