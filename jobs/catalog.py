"""Finds the datasets and corpora below a URL."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from actlake.storage.errors import ActlakeError
from actlake.storage.header import Header
from actlake.storage.manifest import Manifest
from actlake.storage.stores import Store

#: How many folders below a URL are searched.
DEPTH = 4


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One dataset or corpus, or a folder; ``note`` says why it cannot be read."""

    kind: str
    url: str
    model: str = ""
    n_rows: int = 0
    n_planned: int = 0
    n_hook_points: int = 0
    nbytes: int = 0
    note: str = ""

    @property
    def complete(self) -> float:
        """The committed share of the planned rows."""
        return self.n_rows / self.n_planned if self.n_planned else 1.0


def find(store: Store, depth: int = DEPTH) -> Iterator[Entry]:
    """Yield what lies at a URL and below, not descending into datasets, corpora and hidden folders."""
    try:
        names = store.names()
    except PermissionError:
        yield Entry(kind="folder", url=store.url, note="cannot be listed: permission denied")
        return
    if "spec.json" in names:
        yield _dataset(store)
        if "heldout" in names and store.exists("heldout/spec.json"):
            yield _dataset(store.child("heldout"))
    elif "corpus.json" in names:
        yield _corpus(store)
    elif depth:
        for name in store.folders():
            if not name.startswith("."):
                yield from find(store.child(name), depth - 1)


def _dataset(store: Store) -> Entry:
    try:
        header = Header.read(store)
        manifest = Manifest.load(store, header.n_rows)
    except ActlakeError as error:
        return Entry(kind="dataset", url=store.url, note=str(error).splitlines()[0])
    return Entry(
        kind="dataset" if header.spec.split == "train" else header.spec.split,
        url=store.url,
        model=header.spec.model,
        n_rows=manifest.n_rows,
        n_planned=header.n_rows,
        n_hook_points=len(header.spec.hook_points),
        nbytes=manifest.nbytes,
    )


def _corpus(store: Store) -> Entry:
    try:
        n_tokens = sum(split["n_tokens"] for split in json.loads(store.read("corpus.json"))["splits"].values())
    except (ActlakeError, ValueError, KeyError, TypeError) as error:
        return Entry(kind="corpus", url=store.url, note=f"corpus.json cannot be read: {error}")
    return Entry(kind="corpus", url=store.url, n_rows=n_tokens, n_planned=n_tokens)
