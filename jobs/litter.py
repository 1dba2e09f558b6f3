"""Finds objects that no reader will ever look at, and those that are nobody's; deletes the former on request.

What a killed run leaves is harmless: readers ignore it, and the next build of a shard replaces it. It takes room.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from actlake.ingest.corpus_cuts import cut_key
from actlake.shards.prefetch import Workers, thread_count
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_files import reading
from actlake.storage.errors import NotFoundError
from actlake.storage.header import Header
from actlake.storage.listing import (
    Listed,
    Upload,
    abort_upload,
    delete_empty_parents,
    list_objects,
    list_uploads,
    modified_at,
)
from actlake.storage.manifest import read_root
from actlake.storage.manifest_files import INDEX_GROUPS, index_key
from actlake.storage.places import Place, corpus_kind, kind_of, place_of
from actlake.storage.records import GROUP_SHARDS, commit_key
from actlake.storage.stored_json import MAX_NBYTES, parse_object
from actlake.storage.stores import Store

#: What each kind is; ``foreign`` objects are never deleted.
KINDS = {
    "temporary": "a file that a killed writer had not finished",
    "uncommitted": "of a shard without a commit record",
    "unknown array": "of a hook point that the spec does not have",
    "outdated": "a summary of commits that nobody reads any more",
    "unlisted": "of a corpus build that did not finish, or was replaced",
    "upload": "a multipart upload that was not completed",
    "foreign": "of no name that actlake gives; never deleted",
}

#: How deep below a folder datasets and corpora are looked for.
_DEPTH = 4

_HELDOUT = "heldout/"


@dataclass(frozen=True, kw_only=True)
class Litter:
    """One object that is of no use to the dataset or corpus at ``store``.

    ``modified`` is when it was stored, in seconds since 1970, None where that is not known; ``batch`` is what it was
    written together with. ``shard`` is -1 for what is of no shard.
    """

    kind: str
    key: str
    nbytes: int
    modified: float | None
    batch: str = ""
    shard: int = -1
    upload_id: str = ""
    young: bool = False


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found at one dataset or corpus."""

    store: Store
    kind: str
    litter: tuple[Litter, ...]


def find_litter(store: Store, *, older_than_s: float, now: float | None = None) -> Iterator[Findings]:
    """Yield what lies about in each dataset and corpus at a URL and below.

    Litter is ``young`` where it, or anything that was written together with it, was stored less than ``older_than_s``
    ago or at a time that is not known: a job may be at work on it. Memory is that of one listing and of the litter.
    Raises ``NotFoundError`` where there is neither a dataset nor a corpus.
    """
    limit = (time.time() if now is None else now) - older_than_s
    places = list(_places(store, _DEPTH))
    if not places:
        raise NotFoundError(f"neither a dataset nor a corpus at {store.url}, nor {_DEPTH} folders below")
    for kind, place in places:
        found = _dataset_litter(place) if kind == "dataset" else _corpus_litter(place)
        litter = [*found, *map(_of_upload, list_uploads(place))]
        yield Findings(store=place, kind=kind, litter=tuple(_aged(litter, limit)))


def delete_litter(findings: Findings, on_delete: Callable[[Litter], None] = lambda litter: None) -> None:
    """Delete what is neither foreign nor young, and was not written again, or committed, since it was found."""
    store = findings.store
    chosen = (litter for litter in findings.litter if litter.kind != "foreign" and not litter.young)
    with Workers(thread_count(store.local)) as workers:
        for litter, gone in workers.map(lambda litter: (litter, _delete(store, litter)), chosen):
            if gone:
                on_delete(litter)


def _delete(store: Store, litter: Litter) -> bool:
    """Delete one object, unless it has become of use; say whether it is gone."""
    if litter.upload_id:
        abort_upload(store, Upload(key=litter.key, upload_id=litter.upload_id, modified=litter.modified))
        return True
    if _was_written(store, litter):
        return False
    if litter.shard >= 0 and store.exists(_commit_of(litter)):
        return False
    store.delete(litter.key)
    delete_empty_parents(store, litter.key)
    return True


def _was_written(store: Store, litter: Litter) -> bool:
    """Say whether an object is another than when it was found, or gone."""
    now = modified_at(store, litter.key)
    if now is None or litter.modified is None:
        return True
    # A service may tell whole seconds of one object, and fractions in a listing.
    return now != litter.modified if store.local else abs(now - litter.modified) >= 1


def _places(store: Store, depth: int) -> Iterator[tuple[str, Store]]:
    if (kind := kind_of(store)) is not None:
        yield kind, store
    elif depth:
        for name in store.folders():
            if not name.startswith("."):
                yield from _places(store.child(name), depth - 1)


def _aged(litter: Iterable[Litter], limit: float) -> Iterator[Litter]:
    """Yield all litter, marked as young by the youngest of its batch."""
    found, newest = list(litter), dict[str, float]()
    for item in found:
        modified = math.inf if item.modified is None else item.modified
        newest[item.batch] = max(newest.get(item.batch, -math.inf), modified)
    for item in found:
        yield replace(item, young=newest[item.batch] > limit)


def _of_upload(upload: Upload) -> Litter:
    return Litter(
        kind="upload",
        key=upload.key,
        nbytes=0,
        modified=upload.modified,
        batch=f"upload {upload.upload_id}",
        upload_id=upload.upload_id,
    )


def _commit_of(litter: Litter) -> str:
    return (_HELDOUT if litter.key.startswith(_HELDOUT) else "") + commit_key(litter.shard)


# --- A dataset -------------------------------------------------------------------------------------------------------


def _dataset_litter(store: Store) -> Iterator[Litter]:
    """Yield the litter of a dataset and of its held-out split; what was begun only, without ``spec.json``, has none."""
    if not store.exists("spec.json"):
        return
    splits = {""}
    if store.exists("heldout/spec.json"):
        splits.add(_HELDOUT)
    judges = {split: _Judge(store.child(split) if split else store) for split in splits}
    for found in list_objects(store):
        split = _HELDOUT if found.key.startswith(_HELDOUT) else ""
        litter = judges[split].judge(found, found.key.removeprefix(split)) if split in judges else None
        if litter is not None:
            yield litter


class _Judge:
    """Knows what a dataset needs, and so which objects are litter."""

    def __init__(self, store: Store) -> None:
        self.header = Header.read(store)
        self.arrays = self.header.spec.arrays()
        root = read_root(store)
        groups = {found.number for found in _kinds_in(store, "manifest", "group")}
        # After the summaries: whatever they count was committed before they were listed.
        self.committed = _committed(store, self.header)
        # Uncommitted, but the redaction that goes on needs what is stored.
        self.set_aside = {found.number for found in _kinds_in(store, "redacting", "aside")}
        self.lost_groups = {group for group in groups if not self._has_all(group * GROUP_SHARDS, GROUP_SHARDS)}
        stale = root is None or root["n_rows"] != self.header.n_rows
        self.lost_root = root is not None and (stale or not self._has_all(0, root["n_shards"]))
        self.index = set() if root is None or stale else set(root.get("index", ()))
        # Where a summary counts shards without a record, readers see them: only the summary is litter, this time.
        self.counted = root is not None and not stale and self.lost_root

    def _has_all(self, first: int, n: int) -> bool:
        return int(self.committed[first : first + n].sum()) == n

    def judge(self, found: Listed, key: str) -> Litter | None:
        """Return the litter that an object is, None for one that is of use; ``key`` is that below the split."""
        place = place_of(key)
        kind = "foreign" if place is None else self._kind(place, key)
        if kind is None:
            return None
        shard = place.number if place is not None and kind == "uncommitted" else -1
        split = found.key.removesuffix(key)
        batch = f"{split}shard {shard}" if shard >= 0 else found.key
        return Litter(kind=kind, key=found.key, nbytes=found.nbytes, modified=found.modified, batch=batch, shard=shard)

    def _kind(self, place: Place, key: str) -> str | None:
        if place.kind == "temporary":
            return "temporary"
        if place.array and place.array not in self.arrays:
            return "unknown array"
        outdated = {
            "root": self.lost_root,
            "group": place.number in self.lost_groups,
            # One of as many shards as can be outlives its totals: what grows takes it over.
            "index": key not in self.index and key != index_key(place.number, INDEX_GROUPS * GROUP_SHARDS),
        }
        if outdated.get(place.kind):
            return "outdated"
        if place.kind in ("object", "statistics") and not self._in_use(place.number):
            return "uncommitted"
        return None

    def _in_use(self, shard: int) -> bool:
        if self.counted or shard in self.set_aside or shard // GROUP_SHARDS in self.lost_groups:
            return True
        return shard < len(self.committed) and bool(self.committed[shard])


def _kinds_in(store: Store, folder: str, kind: str) -> Iterator[Place]:
    for found in list_objects(store, folder):
        if (place := place_of(found.key)) is not None and place.kind == kind:
            yield place


def _committed(store: Store, header: Header) -> npt.NDArray[np.bool_]:
    """Return bool [planned shards]: a byte a shard, where a set of numbers takes sixty."""
    flags = np.zeros(header.spec.row_space(header.n_rows).n_shards, dtype=np.bool_)
    for place in _kinds_in(store, "commits", "commit"):
        if place.number < len(flags):
            flags[place.number] = True
    return flags


# --- A corpus --------------------------------------------------------------------------------------------------------


def _corpus_litter(store: Store) -> Iterator[Litter]:
    """Yield what no header lists: of builds that were killed, or made way for a larger cut."""
    listed = _listed(store)
    for found in list_objects(store):
        kind = {None: "foreign", "temporary": "temporary"}.get(corpus_kind(found.key), "unlisted")
        if kind == "unlisted" and (found.key in listed or corpus_kind(found.key) in ("row index", "quarantine")):
            continue
        # One build writes them all, and needs them until it ends.
        batch = "build" if kind == "unlisted" else found.key
        yield Litter(kind=kind, key=found.key, nbytes=found.nbytes, modified=found.modified, batch=batch)


def _listed(store: Store) -> set[str]:
    """Return the keys that are of use: of ``corpus.json``, of cuts as large or larger, and what these list."""
    try:
        current = Corpus.open(store)
    except NotFoundError:
        return set()
    own = cut_key(current.corpus_id, current.splits["train"].n_sequences)
    cuts = [key for found in list_objects(store, "cuts") if (key := found.key) >= own and corpus_kind(key) == "cut"]
    listed = {"corpus.json", *current.files, *cuts}
    for key in cuts:
        with reading(f"{store.url}/{key}", "delete it: a corpus is read without it"):
            listed.update(parse_object(store.read(key, MAX_NBYTES))["files"])
    return listed
