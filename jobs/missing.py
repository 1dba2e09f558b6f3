"""The shards that a run has to build, as numbers: a million of them are a few megabytes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from actlake.jobs.work import Task, split_store
from actlake.storage.groups import commit_groups, compacted_groups
from actlake.storage.header import Header
from actlake.storage.manifest import Manifest
from actlake.storage.rowspace import RowSpace
from actlake.storage.stores import Store
from actlake.storage.summaries import drop_stale_groups
from actlake.storage.whole_commits import whole_commits

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitShards:
    """Some shards of one split: their numbers, ascending, and the row space that they are of."""

    space: RowSpace
    shards: I64

    @property
    def n_rows(self) -> int:
        """Rows of these shards."""
        return int(self.space.n_rows_by_shard()[self.shards].sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class MissingShards:
    """Shards by split. Sized; iterates, as often as it is asked to, over one ``Task`` for each, ascending."""

    splits: Mapping[str, SplitShards] = field(default_factory=dict)

    @classmethod
    def find(cls, store: Store, headers: Mapping[str, Header]) -> "MissingShards":
        """Return what a dataset lacks of the rows that its headers plan."""
        return cls(splits={split: _missing(split_store(store, split), header) for split, header in headers.items()})

    def __len__(self) -> int:
        return sum(len(found.shards) for found in self.splits.values())

    def __iter__(self) -> Iterator[Task]:
        for split, found in self.splits.items():
            for shard in found.shards:
                yield Task(split=split, shard=int(shard), n_rows=len(found.space.rows_of(int(shard))))

    @property
    def n_rows(self) -> int:
        """Rows of all these shards."""
        return sum(found.n_rows for found in self.splits.values())

    def slice(self, number: int, count: int) -> "MissingShards":
        """Return those shards ``k`` of each split with ``k % count == number % count``."""
        return MissingShards(
            splits={
                split: SplitShards(space=found.space, shards=found.shards[found.shards % count == number % count])
                for split, found in self.splits.items()
            }
        )


def _missing(store: Store, header: Header) -> SplitShards:
    drop_stale_groups(store)
    # Records of another dataset count for nothing: someone put another spec in their place.
    dataset_id, also = header.spec.dataset_id, ["dataset_id"]
    space = header.spec.row_space(header.n_rows)
    manifest = Manifest.load_finished(store, header.n_rows, also)
    if manifest is not None:
        return SplitShards(space=space, shards=manifest.missing_numbers(space, dataset_id))
    compacted = compacted_groups(store)
    shards = Manifest.of_groups(store, compacted, also).missing_numbers(space, dataset_id)
    loose = sorted(set(commit_groups(store)).difference(compacted))
    whole = whole_commits(store, loose, space, dataset_id)
    return SplitShards(space=space, shards=np.setdiff1d(shards, whole, assume_unique=True))
