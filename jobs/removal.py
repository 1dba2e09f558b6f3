"""Removes datasets and corpora, and nothing else: objects of no known name stay and are named.

What makes data visible goes first, so that no reader ever takes half of it for the whole, and what tells that there is
something to remove goes last: a removal that was interrupted is run again.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from actlake.shards.prefetch import Workers, thread_count
from actlake.storage.errors import ActlakeError, NotFoundError
from actlake.storage.header import Header
from actlake.storage.listing import delete_empty_folders, found_at, is_linked, list_objects
from actlake.storage.places import corpus_kind, kind_of, place_of
from actlake.storage.stores import Store, resolve_url

#: Foreign objects that are named; more are only counted.
_NAMED = 20

#: How deep below a folder datasets are looked for that may use a corpus.
_DEPTH = 2

_HELDOUT = "heldout/"


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What a removal takes: ``n_objects`` of ``nbytes``; of the ``n_foreign`` objects that stay, some names."""

    url: str
    kind: str
    n_objects: int
    nbytes: int
    n_foreign: int
    foreign: tuple[str, ...]


def survey(store: Store) -> Inventory:
    """Return what would be removed.

    Raises ``NotFoundError`` where neither a dataset nor a corpus lies, ``BadInputError`` where nothing can be removed.
    """
    kind = _require_kind(store)
    store.require_writable()
    n_objects = nbytes = n_foreign = 0
    foreign: list[str] = []
    for found in list_objects(store):
        if _owned(kind, found.key):
            n_objects, nbytes = n_objects + 1, nbytes + found.nbytes
        else:
            n_foreign += 1
            foreign += [found.key] if n_foreign <= _NAMED else []
    return Inventory(
        url=store.url, kind=kind, n_objects=n_objects, nbytes=nbytes, n_foreign=n_foreign, foreign=tuple(foreign)
    )


def remove(store: Store, on_delete: Callable[[int], None] = lambda n_objects: None) -> None:
    """Remove the dataset or corpus at a URL; ``on_delete`` hears of deleted objects. Foreign objects stay.

    Raises ``NotFoundError`` where neither lies there.
    """
    phases = _dataset_phases(store) if _require_kind(store) == "dataset" else _corpus_phases(store)
    with Workers(thread_count(store.local)) as workers:
        for keys in phases:
            # One phase after another: the order is what keeps half a dataset from being taken for a whole one.
            for _ in workers.map(store.delete, (key for key in keys if not is_linked(store, key))):
                on_delete(1)
    delete_empty_folders(store)


def corpus_of(dataset: Store) -> Store | None:
    """Return where the corpus of a dataset lies; None where it is gone. Raises as ``Header.read``."""
    corpus = resolve_url(Header.read(dataset).corpus, dataset)
    return corpus if kind_of(corpus) == "corpus" else None


def users_of(corpus: Store) -> list[str]:
    """Return the URLs of the datasets near a corpus whose header names it: beside it, or beside its ``corpora/``."""
    folder = _parent(corpus)
    if folder is not None and folder.root.rpartition("/")[2] == "corpora":
        folder = _parent(folder)
    return [] if folder is None else list(_users_below(folder, corpus, _DEPTH))


def _users_below(folder: Store, corpus: Store, depth: int) -> Iterator[str]:
    if "spec.json" in folder.names():
        try:
            if resolve_url(Header.read(folder).corpus, folder).url == corpus.url:
                yield folder.url
        except ActlakeError:
            return  # What its header says cannot be read, so it cannot be read at all.
    elif depth:
        for name in folder.folders():
            if not name.startswith("."):
                yield from _users_below(folder.child(name), corpus, depth - 1)


def _parent(store: Store) -> Store | None:
    path = store.root.rpartition("/")[0]
    if not path.strip("/"):
        return None
    return Store(path if store.local else f"{store.protocol}://{path}", store.options)


def _require_kind(store: Store) -> str:
    if (kind := kind_of(store)) is None:
        raise NotFoundError(
            f"neither a dataset nor a corpus at {store.url} (found there: {found_at(store)}); nothing was removed"
        )
    return kind


def _owned(kind: str, key: str) -> bool:
    if kind == "corpus":
        return corpus_kind(key) is not None
    return place_of(key.removeprefix(_HELDOUT)) is not None


# --- In which order --------------------------------------------------------------------------------------------------


def _dataset_phases(store: Store) -> Iterator[Iterable[str]]:
    """Yield keys, a phase after another: summaries before commits, as un-commit does, and ``spec.json`` last.

    A driver may have written summaries again meanwhile; without commits none comes after that.
    """
    splits = ("", _HELDOUT)
    for kinds in ({"root"}, {"group", "index"}, {"commit"}, {"root"}, {"group", "index"}):
        yield (key for split in splits for key in _of_kinds(store, split, kinds))
    # Other readers of Zarr take objects that are gone for zeros, so their metadata go before the objects.
    yield (key for split in splits for key in _metadata(store, split))
    specs = ("heldout/spec.json", "spec.json")
    yield (found.key for found in list_objects(store) if _owned("dataset", found.key) and found.key not in specs)
    yield from ([key] for key in specs)


def _of_kinds(store: Store, split: str, kinds: set[str]) -> Iterator[str]:
    if "root" in kinds:
        yield f"{split}root.json"
        return
    for found in list_objects(store, split + ("commits" if "commit" in kinds else "manifest")):
        place = place_of(found.key.removeprefix(split))
        if place is not None and place.kind in kinds:
            yield found.key


def _metadata(store: Store, split: str) -> Iterator[str]:
    yield f"{split}arrays/zarr.json"
    for folder in ("arrays", "arrays/rows"):
        for name in store.folders(f"{split}{folder}"):
            if place_of(key := f"{folder}/{name}/zarr.json") is not None:
                yield split + key


def _corpus_phases(store: Store) -> Iterator[Iterable[str]]:
    """Yield keys, a phase after another: what makes it visible, then what could make it so again, sequences last."""
    yield ["corpus.json"]
    yield (found.key for found in list_objects(store, "cuts") if corpus_kind(found.key) == "cut")
    yield ["corpus.json"]
    every = (found.key for found in list_objects(store) if corpus_kind(found.key) is not None)
    yield (key for key in every if not key.startswith("sequences/"))
    yield (found.key for found in list_objects(store, "sequences") if corpus_kind(found.key) is not None)
