"""Copies the shards of one split: objects in threads, then each shard's commit record, then what summarises them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from actlake.jobs.transfer_objects import STATISTICS, Budget, ShardCopier
from actlake.shards.covariance import covariance_key, read_covariance, write_covariance
from actlake.shards.dataset import ActivationDataset
from actlake.shards.prefetch import Workers
from actlake.storage.errors import DataError
from actlake.storage.finish import finish
from actlake.storage.header import Header, prepare
from actlake.storage.manifest import Manifest, uncommit
from actlake.storage.records import ObjectRecord, ShardRecord, commit
from actlake.storage.stores import Store


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What became of one split.

    ``n_present`` shards were at the target before, ``missing_shards`` were asked for and are not committed at the
    source, ``failures`` say which shards were not copied and why. ``complete``: all planned shards are at the target.
    """

    split: str
    source: str
    target: str
    dataset_id: str
    n_copied: int
    n_present: int
    missing_shards: tuple[int, ...]
    failures: tuple[str, ...]
    nbytes: int
    complete: bool


class SplitCopy:
    """One split on its way: the header there is, the header to be, and the shards to copy.

    A shard that is committed at the target with other content is replaced where the source's is of a higher revision,
    or of the same with more rows, and has no fewer void rows, or ``replace`` says so; else it stays and is a failure.
    """

    def __init__(self, source: Store, target: Store, old: Header, new: Header, shards: range, *, replace: bool) -> None:
        self.source, self.target, self.old, self.new = source, target, old, new
        self.shards, self.replace = shards, replace
        self.manifest = Manifest.load(source, old.n_rows)
        self.copier = ShardCopier(source, target, old.spec, new.spec)
        self.failures: dict[int, str] = {}
        self.n_copied = self.n_present = self.nbytes = 0

    @property
    def planned_nbytes(self) -> int:
        """About how many bytes of arrays are to be copied: shards are taken for equally large."""
        by_array = self.manifest.nbytes_by_array()
        n_chosen = sum(shard in self.shards for shard in self.manifest.shards)
        return sum(by_array.get(name, 0) for name in self.new.spec.arrays()) * n_chosen // max(1, len(self.manifest))

    def run(self, budget: Budget, n_threads: int, advance: Callable[[int], None]) -> SplitReport:
        """Copy what the target lacks.

        Damage is collected and does not stop the other shards; what a network or a disk says is raised.
        """
        held = prepare(self.target, self.new)
        if held.corpus != self.new.corpus:
            held = replace(held, corpus=self.new.corpus)
            self.target.write("spec.json", held.to_bytes())

        def copy(task: tuple[ShardRecord, str]) -> tuple[ShardRecord, str, ObjectRecord | None]:
            return *task, self._copied(*task, budget)

        objects: dict[str, ObjectRecord] = {}
        with Workers(n_threads) as workers:
            # In the order of the tasks, so that the statistics are the last of a shard.
            for record, name, found in workers.map(copy, self._tasks(advance)):
                if found is not None:
                    objects[name] = found
                    advance(found.nbytes if name != STATISTICS else 0)
                if name == STATISTICS:
                    self._commit(record, objects)
                    objects = {}
        return self._report(finish(self.target, held))

    def _copied(self, record: ShardRecord, name: str, budget: Budget) -> ObjectRecord | None:
        if record.shard in self.failures:
            return None
        expected = record.stats if name == STATISTICS else record.objects.get(name)
        try:
            # An object store's client joins what it is given: twice the bytes.
            with budget.holding(2 * expected.nbytes if expected else 0):
                return self.copier.copy(record, name)
        except DataError as error:
            self.failures[record.shard] = str(error)
            return None

    def _tasks(self, advance: Callable[[int], None]) -> Iterator[tuple[ShardRecord, str]]:
        """Yield what is to be copied, shard by shard; what a shard replaces is un-committed before its first object."""
        there = Manifest.load(self.target).records()
        for record, other in _paired(self.manifest.records(), there):
            if record.shard not in self.shards:
                continue
            if reason := self._refused(record, other):
                self.failures[record.shard] = reason
            elif other is not None and self.copier.same(record, other):
                self.n_present += 1
                advance(sum(record.objects[name].nbytes for name in self.copier.new))
            else:
                if other is not None:
                    uncommit(self.target, record.shard)
                yield from ((record, name) for name in (*self.copier.new, STATISTICS))

    def _refused(self, record: ShardRecord, other: ShardRecord | None) -> str | None:
        """Say why a shard cannot be copied; None where it can, or need not be."""
        if record.dataset_id != self.old.spec.dataset_id:
            return f"{self.source.url}: shard {record.shard}: its record is of dataset {record.dataset_id[:12]}..."
        if other is None or self.replace or self.copier.same(record, other):
            return None
        # Void rows are redacted ones, which no older copy may bring back.
        if (record.revision, record.n_rows) > (other.revision, other.n_rows) and record.n_void >= other.n_void:
            return None
        return (
            f"{self.target.url}: shard {record.shard} is committed with other content than in {self.source.url}; "
            "--replace copies it over what is there"
        )

    def _commit(self, record: ShardRecord, objects: dict[str, ObjectRecord]) -> None:
        if record.shard in self.failures:
            return
        stats = objects.pop(STATISTICS)
        made_by = replace(record.provenance, copied_from=self.source.url)
        copied = replace(record, dataset_id=self.new.spec.dataset_id, objects=objects, stats=stats, provenance=made_by)
        commit(self.target, copied)
        self.n_copied += 1
        self.nbytes += copied.nbytes + stats.nbytes

    def _report(self, there: Manifest) -> SplitReport:
        space = self.old.spec.row_space(self.old.n_rows)
        return SplitReport(
            split=self.old.spec.split,
            source=self.source.url,
            target=self.target.url,
            dataset_id=self.new.spec.dataset_id,
            n_copied=self.n_copied,
            n_present=self.n_present,
            missing_shards=tuple(shard for shard in self.manifest.missing(space) if shard in self.shards),
            failures=tuple(self.failures[shard] for shard in sorted(self.failures)),
            nbytes=self.nbytes,
            complete=not there.missing(self.new.spec.row_space(Header.read(self.target).n_rows)),
        )


def copy_covariances(source: Store, target: Store) -> None:
    """Copy what ``actlake stats --covariance`` stored of the hook points that the target has.

    Raises ``DataError`` for a damaged one.
    """
    present = set(source.names("stats/covariance"))
    old, new = (ActivationDataset(store, Header.read(store), Manifest.of([])) for store in (source, target))
    for point in new.hook_points:
        if covariance_key(point).rpartition("/")[2] in present:
            write_covariance(new, point, read_covariance(old, point))


def _paired(
    records: Iterator[ShardRecord], others: Iterator[ShardRecord]
) -> Iterator[tuple[ShardRecord, ShardRecord | None]]:
    """Yield each record with the other of the same shard, if there is one; both ascend."""
    other = next(others, None)
    for record in records:
        while other is not None and other.shard < record.shard:
            other = next(others, None)
        yield record, other if other is not None and other.shard == record.shard else None
