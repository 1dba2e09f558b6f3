"""What summarises commits: compacted groups, the index and ``root.json``; and taking a shard out of all of them.

One driver may write a summary while another un-commits a shard of it. So a summary is checked after it is written, and
un-commit deletes summaries before the record and once more after it: the later of the two removes what is wrong.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from actlake.storage.errors import CorruptObjectError, NotFoundError
from actlake.storage.groups import commits_of, compacted_groups, groups_of_index, n_groups, shards_of
from actlake.storage.manifest_files import (
    INDEX_GROUPS,
    REMEDY,
    group_bytes,
    group_key,
    index_bytes,
    index_key,
    index_keys,
)
from actlake.storage.records import GROUP_SHARDS, commit_key
from actlake.storage.rowspace import MAX_SHARDS, RowSpace
from actlake.storage.sealed import check_seal, seal
from actlake.storage.stored_json import parse_object, require_fields
from actlake.storage.stores import Store

if TYPE_CHECKING:
    from actlake.storage.manifest import Manifest

#: A million groups have 10 MB of numbers.
_MAX_ROOT_NBYTES = 16 << 20

#: Folders listed at once: a store takes some 50 ms for each.
_LISTERS = 16


# --- Compacted groups ----------------------------------------------------------------------------------------------


def compact(store: Store, manifest: "Manifest", space: RowSpace) -> list[int]:
    """Write the groups that are full and not yet compacted; return all compacted groups."""
    present = set(compacted_groups(store))
    whole = manifest.numbers("shard")[manifest.numbers("n_rows") == space.rows_per_shard]
    n_whole = np.bincount(whole // GROUP_SHARDS, minlength=n_groups(space.n_shards))
    full = []
    for group in range(full_groups(space)):
        if n_whole[group] != GROUP_SHARDS:
            continue
        if group in present or write_group(store, group, next(manifest.tables(range(group, group + 1)))):
            full.append(group)
    return full


def full_groups(space: RowSpace) -> int:
    """Return how many groups a row space fills with whole shards: a short last shard may grow, so its group may not."""
    return space.n_rows // space.rows_per_shard // GROUP_SHARDS


def write_group(store: Store, group: int, table: pa.Table) -> bool:
    """Write the file of a group, whose records ``table`` has; say whether all of its commits are still there."""
    store.write(group_key(group), group_bytes(table))
    if commits_of(store, group) == list(shards_of(group)):
        return True
    _delete_summaries(store, group)
    return False


def drop_stale_groups(store: Store) -> None:
    """Delete the groups that count a commit which is not there: what whoever resumes a dataset begins with.

    A driver may have been killed after it wrote a group, before it saw that a commit had been taken back meanwhile.
    """
    if read_root(store) is not None:
        return  # Taking a commit back would have removed it.
    groups = compacted_groups(store)
    with ThreadPoolExecutor(_LISTERS) as pool:
        whole = pool.map(lambda group: commits_of(store, group) == list(shards_of(group)), groups)
        for group in [group for group, found in zip(groups, whole, strict=True) if not found]:
            _delete_summaries(store, group)


# --- root.json and the index ---------------------------------------------------------------------------------------


def write_root(store: Store, *, dataset_id: str, n_rows: int, manifest: "Manifest", groups: list[int]) -> None:
    """Write the index and ``root.json``: the totals of a complete dataset, its compacted groups and its index."""
    value: dict[str, Any] = {
        "dataset_id": dataset_id,
        "complete": True,
        "n_rows": n_rows,
        "n_shards": len(manifest),
        "nbytes": manifest.nbytes,
        "groups": groups,
        "index": index_keys(len(manifest)),
        "nbytes_by_array": manifest.nbytes_by_array(),
    }
    present = {f"manifest/{name}" for name in store.names("manifest")}
    if present.issuperset(value["index"]) and read_root(store) == value:
        return
    for number, key in enumerate(value["index"]):
        # A short one may be left of commits that were replaced since.
        if key not in present or key != index_key(number, INDEX_GROUPS * GROUP_SHARDS):
            store.write(key, index_bytes(manifest.tables(groups_of_index(number))))
    store.write("root.json", json.dumps(seal(value), sort_keys=True, indent=1).encode())
    for group in _lost_groups(store, value):
        _delete_summaries(store, group)
    for key in present.difference(value["index"]):
        if key.startswith("manifest/index-"):
            store.delete(key)


def read_root(store: Store) -> dict[str, Any] | None:
    """Return the totals of a complete dataset, None for one in the making; raise ``CorruptObjectError`` if damaged.

    ``index`` and ``nbytes_by_array`` are absent where an early actlake wrote them.
    """
    try:
        value = check_seal(parse_object(store.read("root.json", _MAX_ROOT_NBYTES)), f"{store.url}/root.json")
        if missing := {"dataset_id", "n_rows", "n_shards", "nbytes", "groups"} - set(value):
            raise ValueError(f"fields missing: {', '.join(sorted(missing))}")
        _check_root(value)
    except NotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CorruptObjectError(f"{store.url}/root.json is damaged ({error}); {REMEDY}") from error
    return value


@dataclass(frozen=True, kw_only=True)
class _Root:
    """The types of the totals."""

    dataset_id: str
    n_rows: int
    n_shards: int
    nbytes: int
    groups: tuple[int, ...]
    index: tuple[str, ...]
    nbytes_by_array: Mapping[str, int]


def _check_root(value: Mapping[str, Any]) -> None:
    require_fields(_Root, value)
    n_shards, groups = value["n_shards"], value["groups"]
    if not 0 <= n_shards <= MAX_SHARDS:
        raise ValueError(f"n_shards = {n_shards} is not 0 to {MAX_SHARDS}")
    if groups != sorted(set(groups)) or not set(groups) <= set(range(n_shards // GROUP_SHARDS)):
        raise ValueError("groups that there cannot be")
    if "index" in value and value["index"] != index_keys(n_shards):
        raise ValueError("keys of the index that there cannot be")
    if any(nbytes < 0 for nbytes in value.get("nbytes_by_array", {}).values()):
        raise ValueError("sizes below 0")


def _lost_groups(store: Store, root: Mapping[str, Any]) -> list[int]:
    """Return the groups of complete totals that are no longer there, or whose commits are not."""
    return sorted(set(root["groups"]).difference(compacted_groups(store)).union(short_groups(store, root)))


def short_groups(store: Store, root: Mapping[str, Any]) -> list[int]:
    """Return the groups that are not compacted and lack a commit that the totals count."""
    n_shards = root["n_shards"]
    loose = sorted(set(range(n_groups(n_shards))).difference(root["groups"]))
    return [group for group in loose if len(commits_of(store, group)) < len(shards_of(group, n_shards))]


# --- Un-commit -----------------------------------------------------------------------------------------------------


def uncommit(store: Store, shard: int) -> None:
    """Make a shard invisible again; what summarises it goes first, so that no reader sees the two disagree."""
    group = shard // GROUP_SHARDS
    _delete_summaries(store, group)
    store.delete(commit_key(shard))
    _delete_summaries(store, group)


def _delete_summaries(store: Store, group: int) -> None:
    store.delete("root.json")
    store.delete(index_key(group // INDEX_GROUPS, INDEX_GROUPS * GROUP_SHARDS))
    store.delete(group_key(group))
