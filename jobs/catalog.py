"""Finds the datasets and corpora below a URL. Needs the reader's packages alone."""

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from actlake.storage.corpus import Corpus
from actlake.storage.errors import ActlakeError, BadInputError
from actlake.storage.header import Header
from actlake.storage.hookpoints import HookPoint
from actlake.storage.manifest import Manifest
from actlake.storage.stores import Store

#: How many folders below a URL are searched.
DEPTH = 4

_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("url", pa.string()),
        ("model", pa.string()),
        ("n_rows", pa.int64()),
        ("n_planned", pa.int64()),
        ("complete", pa.bool_()),
        ("n_layers", pa.int64()),
        ("streams", pa.list_(pa.string())),
        ("n_hook_points", pa.int64()),
        ("nbytes", pa.int64()),
        ("updated", pa.timestamp("ms", "UTC")),
        ("dataset_id", pa.string()),
        ("row_space_id", pa.string()),
        ("corpus_id", pa.string()),
        ("note", pa.string()),
    ]
)
_PLURALS = {"dataset": "datasets", "corpus": "corpora"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One dataset or corpus, or a folder; ``note`` says why it cannot be read.

    ``n_rows`` are committed rows, of a corpus its tokens. ``complete`` says that every planned row is committed, of a
    corpus that it is whole. ``updated`` is when the newest shard was finished.
    """

    kind: str
    url: str
    model: str = ""
    n_rows: int = 0
    n_planned: int = 0
    complete: bool = False
    n_layers: int = 0
    streams: tuple[str, ...] = ()
    n_hook_points: int = 0
    nbytes: int = 0
    updated: datetime | None = None
    dataset_id: str = ""
    row_space_id: str = ""
    corpus_id: str = ""
    note: str = ""

    @property
    def share(self) -> float:
        """The committed share of the planned rows: 1.0 only for a complete dataset."""
        share = self.n_rows / self.n_planned if self.n_planned else 0.0
        return 1.0 if self.complete else min(share, 0.999)

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        value = asdict(self) | {"streams": list(self.streams), "share": self.share}
        return value | {"updated": self.updated.isoformat() if self.updated else None}


def catalog(url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> pa.Table:
    """Return what lies at a URL and below as a table, one row a dataset, held-out split or corpus.

    ``streams`` are the streams that are stored, ``complete`` whether every planned row is committed, ``note`` why an
    entry cannot be read. Folders more than 4 below are not searched. ``storage_options`` go to the file system.
    """
    entries = list(find(Store(url, storage_options)))
    columns = {field.name: [getattr(entry, field.name) for entry in entries] for field in fields(Entry)}
    return pa.table(columns, schema=_SCHEMA)


def find(store: Store, depth: int = DEPTH) -> Iterator[Entry]:
    """Yield what lies at a URL and below, not descending into datasets, corpora and hidden folders."""
    try:
        names = store.names()
    except BadInputError as error:
        yield Entry(kind="folder", url=store.url, note=str(error))
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


def explain(store: Store, wanted: str = "dataset") -> str | None:
    """Say what is at a URL that holds no such thing, and where one is; None where nothing more than names is known.

    ``wanted`` is ``dataset`` or ``corpus``.
    """
    if store.exists("corpus.json"):
        return f"it is a corpus: actlake corpus show {store.url}"
    parent, name = _parent(store), PurePosixPath(store.root).name
    if name and name in parent.names() and name not in parent.folders():
        return "it is a file"
    for above, path in _above(store):
        if above.exists("spec.json"):
            return f"it is {path} of the dataset {above.url}"
    entries = list(find(store, depth=2))
    for kind in sorted(_PLURALS, key=lambda kind: kind != wanted):
        urls = [entry.url for entry in entries if entry.kind == kind]
        if urls:
            shown = ", ".join(urls[:5]) + (f" and {len(urls) - 5} more" if urls[5:] else "")
            return f"below it are {_PLURALS[kind]}: {shown}"
    if "arrays" in store.names():
        return "it has arrays/ but no spec.json, so its ingestion was never prepared or it was copied in part"
    close = [] if store.names() else difflib.get_close_matches(name, parent.folders(), n=1)
    return f"nothing is there; did you mean {parent.child(close[0]).url}?" if close else None


def _parent(store: Store) -> Store:
    path = str(PurePosixPath(store.root).parent)
    return Store(path if store.local else f"{store.protocol}://{path}", store.options)


def _above(store: Store) -> Iterator[tuple[Store, str]]:
    path = ""
    for _ in range(DEPTH):
        name, above = PurePosixPath(store.root).name, _parent(store)
        if not name or above.root in ("", ".", store.root):
            return
        path, store = f"{name}/{path}" if path else name, above
        yield store, path


def _dataset(store: Store) -> Entry:
    try:
        header = Header.read(store)
        manifest = Manifest.load(store, header.n_rows)
        return _entry(store, header, manifest)
    except ActlakeError as error:
        return Entry(kind="dataset", url=store.url, note=str(error).splitlines()[0])


def _entry(store: Store, header: Header, manifest: Manifest) -> Entry:
    spec = header.spec
    points = [HookPoint.parse(name) for name in spec.point_names]
    newest = pc.max(manifest.columns("finished")["finished"]).as_py()
    return Entry(
        kind="dataset" if spec.split == "train" else spec.split,
        url=store.url,
        model=spec.model,
        n_rows=manifest.n_rows,
        n_planned=header.n_rows,
        complete=not manifest.missing(spec.row_space(header.n_rows)),
        n_layers=len({point.layer for point in points}),
        streams=tuple(dict.fromkeys(point.stream for point in points)),
        n_hook_points=len(points),
        nbytes=manifest.nbytes,
        updated=_time(newest),
        dataset_id=spec.dataset_id,
        row_space_id=spec.row_space_id,
        corpus_id=spec.corpus_id,
    )


def _time(text: str | None) -> datetime | None:
    """Return an ISO 8601 time; None for none and for what is no time, since provenance is free text."""
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _corpus(store: Store) -> Entry:
    try:
        corpus = Corpus.open(store)
    except ActlakeError as error:
        return Entry(kind="corpus", url=store.url, note=f"corpus.json cannot be read: {error}")
    n_tokens = sum(split.n_tokens for split in corpus.splits.values())
    return Entry(
        kind="corpus",
        url=store.url,
        n_rows=n_tokens,
        n_planned=n_tokens,
        complete=True,
        nbytes=sum(item.nbytes for item in corpus.files.values()),
        corpus_id=corpus.corpus_id,
    )
