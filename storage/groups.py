"""Groups of 1,024 commits: which of them a store lists, compacted or not, and which shards they are of."""

import re

from actlake.storage.manifest_files import INDEX_GROUPS
from actlake.storage.records import GROUP_SHARDS, commit_folder
from actlake.storage.stores import Store


def compacted_groups(store: Store) -> list[int]:
    """Return the groups that have a file in ``manifest/``, ascending."""
    return _numbers(store, "manifest", ".parquet")


def commit_groups(store: Store) -> list[int]:
    """Return the groups that have a folder in ``commits/``, ascending."""
    return _numbers(store, "commits", "")


def commits_of(store: Store, group: int) -> list[int]:
    """Return the shards of a group that have a commit record, ascending."""
    # A record in another group's folder is nobody's: its shard is read from its own place, or not there.
    return [shard for shard in _numbers(store, commit_folder(group), ".json") if shard // GROUP_SHARDS == group]


def shards_of(group: int, n_shards: int | None = None) -> range:
    """Return the shards of a group, in a dataset of so many shards."""
    stop = (group + 1) * GROUP_SHARDS
    return range(group * GROUP_SHARDS, stop if n_shards is None else min(stop, n_shards))


def n_groups(n_shards: int) -> int:
    """Return how many groups so many shards have, a short one included."""
    return -(-n_shards // GROUP_SHARDS)


def groups_of_index(number: int) -> range:
    """Return the groups of an object of the index."""
    return range(number * INDEX_GROUPS, (number + 1) * INDEX_GROUPS)


def shards_of_index(number: int, n_shards: int) -> range:
    """Return the shards of an object of the index, in a dataset of so many shards."""
    most = INDEX_GROUPS * GROUP_SHARDS
    return range(number * most, min((number + 1) * most, n_shards))


def _numbers(store: Store, folder: str, suffix: str) -> list[int]:
    # Folders in buckets may hold what no one of us wrote: marker objects, .DS_Store.
    pattern = re.compile(r"([0-9]{8}|[0-9]{10})" + re.escape(suffix))
    return [int(match[1]) for name in store.names(folder) if (match := pattern.fullmatch(name))]
