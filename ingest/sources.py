"""Where documents lie: text files, object stores, dataset folders and built-in text, listed and read one at a time.

An id never names the machine: it is the document's own id field, or the file's path below the fixed part of the
source (``data/*/a.txt`` gives ``x/a.txt``) with a line or row number. File systems are opened through ``Store``.
"""

import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa

from actlake.ingest.documents import BadDocument, Document
from actlake.ingest.records import Fields, Record
from actlake.ingest.source_formats import ENDINGS, reader_of
from actlake.storage.corpus_spec import SourceFile
from actlake.storage.errors import SourceError, nearest
from actlake.storage.stores import Store

_MAGIC = re.compile(r"[*?\[]")
#: A repository of the Hub at the beginning of a URL, its revision included: owner, then name.
_HUB = re.compile(r"hf://(?:(?:datasets|spaces)/)?([^/]+)/([^/]+)")
_BUILTIN = "builtin:"

Options = Mapping[str, Any] | None


def read_documents(
    sources: Sequence[str], fields: Fields | None = None, *, storage_options: Options = None
) -> Iterator[Document | BadDocument]:
    """Yield the documents of all sources, files in the order of their names; bad ones in their places.

    ``builtin:python-docs`` is one document a topic; ``.txt`` one a file; ``.jsonl`` (``.gz``, ``.zst``) one a line
    (id: the id field, else ``<file>:<line>``, lines from 1); ``.parquet`` and ``.arrow`` one a row (id: the id column,
    else ``<file>:<row>``, rows from 0). A folder that ``datasets`` saved stands for its Arrow files. Every source is
    listed before the first is read. Metadata are fields of records: text as it is, any other value as its JSON text,
    null and absent fields as None.

    Raises ``SourceError`` for a source that is absent, unreadable or without documents, and for a file that breaks
    off; ``UnknownNameError`` at the end for a metadata field that no document has.
    """
    fields = fields or Fields()
    for source, files in [(source, _list(source, storage_options)) for source in sources]:
        n_documents = 0
        for file in files:
            for document in read_file(file, fields, storage_options=storage_options):
                n_documents += isinstance(document, Document)
                yield document
        require_documents(source, n_documents, fields)
    fields.require_seen()


def require_documents(source: str, n_documents: int, fields: Fields) -> None:
    """Raise ``SourceError`` for a source that gave no document."""
    if n_documents == 0:
        chosen = "that its filters let through, and that can be used" if fields.filters else "that can be used"
        absent = [one.field for one in fields.filters if one.field not in fields.seen.fields]
        why = f": no record has the field {absent[0]!r}{nearest(absent[0], fields.seen.fields)}" if absent else ""
        raise SourceError(f"source {source!r} holds no documents {chosen}{why}; add some or leave it out")


def describe_sources(sources: Sequence[str], *, storage_options: Options = None) -> list[SourceFile]:
    """List the files of all sources with their sizes, without reading them; raises as ``read_documents``."""
    return [file for source in sources for file in _list(source, storage_options)]


# --- Built-in text ------------------------------------------------------------------------------------------------


def _python_docs() -> dict[str, str]:
    from pydoc_data.topics import topics

    return {f"python-docs/{topic}": text for topic, text in sorted(topics.items())}


_BUILTINS: Mapping[str, Callable[[], dict[str, str]]] = {"python-docs": _python_docs}


def _builtin(source: str) -> dict[str, str]:
    name = source.removeprefix(_BUILTIN)
    if name not in _BUILTINS:
        raise SourceError(f"no built-in text {source!r}{nearest(source, {_BUILTIN + name for name in _BUILTINS})}")
    return _BUILTINS[name]()


# --- Listing ------------------------------------------------------------------------------------------------------


def _list(source: str, options: Options) -> list[SourceFile]:
    if source.startswith(_BUILTIN):
        nbytes = sum(len(text.encode()) for text in _builtin(source).values())
        return [SourceFile(source=source, name=source.removeprefix(_BUILTIN), nbytes=nbytes)]
    _require_revision(source)
    folder, pattern = _split(source)
    store = Store(folder, options)
    with _readable(f"source {source!r}"):
        if _MAGIC.search(pattern):
            found = store.fs.glob(f"{glob.escape(store.path(''))}/{pattern}", detail=True)
        else:
            info = store.fs.info(store.path(pattern))
            found = {info["name"]: info}
    root = store.path("").strip("/") + "/"
    files: list[SourceFile] = []
    for path, info in sorted(found.items()):
        name = path.lstrip("/").removeprefix(root)
        if info["type"] == "file":
            # Lists of HTTP servers have no sizes.
            nbytes = store.nbytes(name) if info["size"] is None else int(info["size"])
            files.append(SourceFile(source=source, name=name, nbytes=nbytes))
        else:
            files += _saved_dataset(source, store, name)
    if not files:
        remedy = "check the pattern" if _MAGIC.search(pattern) else _pattern_for(source, store.names(pattern))
        raise SourceError(f"source {source!r} matches no file; {remedy}")
    for file in files:
        reader_of(file)
    return files


def _pattern_for(folder: str, names: list[str]) -> str:
    """Say with which pattern the files of a folder are read: those of the kind that most of them are of."""
    kinds = Counter(ending for name in names for ending in ENDINGS if name.endswith(ending))
    ending = kinds.most_common(1)[0][0] if kinds else ".jsonl"
    return f"to read a folder write e.g. {folder.rstrip('/') + '/*' + ending!r}"


def _require_revision(source: str) -> None:
    """Raise ``SourceError`` for files of the Hub that may be others tomorrow."""
    repository = _HUB.match(source)
    if repository and "@" not in repository[2]:
        pinned = source.replace(repository[0], f"{repository[0]}@<commit>", 1)
        raise SourceError(
            f"source {source!r} names no revision, so a later run might read other files: write {pinned!r}; the commit "
            "stands on the repository's page on the Hub, under 'History'"
        )


def _split(source: str) -> tuple[str, str]:
    """Return a source's fixed folder, and the file name or pattern below it."""
    protocol, _, path = source.rpartition("://")
    parts = path.rstrip("/").split("/")
    n_fixed = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), len(parts) - 1)
    folder = "/".join(parts[:n_fixed])
    if not protocol:
        folder = folder or ("/" if path.startswith("/") else ".")
        return folder, "/".join(parts[n_fixed:])
    return f"{protocol}://{folder}", "/".join(parts[n_fixed:])


def _saved_dataset(source: str, store: Store, folder: str) -> list[SourceFile]:
    """Return the Arrow files of a folder that ``datasets`` saved, [] for any other folder."""
    if store.exists(f"{folder}/dataset_dict.json"):
        splits = json.loads(store.read(f"{folder}/dataset_dict.json"))["splits"]
        raise SourceError(
            f"source {source!r} is a dataset of the splits {', '.join(splits)}; name one, e.g. "
            f"{source.rstrip('/') + '/' + splits[0]!r}"
        )
    if not store.exists(f"{folder}/state.json"):
        return []
    state = json.loads(store.read(f"{folder}/state.json"))
    if state.get("_indices_data_files"):
        raise SourceError(f"source {source!r} is a selection of rows; save it again after flatten_indices()")
    keys = [f"{folder}/{file['filename']}" for file in state["_data_files"]]
    return [SourceFile(source=source, name=key, nbytes=store.nbytes(key)) for key in keys]


# --- Reading ------------------------------------------------------------------------------------------------------


def read_file(
    file: SourceFile, fields: Fields, *, row_groups: range | None = None, storage_options: Options = None
) -> Iterator[Document | BadDocument]:
    """Yield the documents of one file of a source, or of some row groups of a Parquet file; bad ones in their places.

    What filters leave out is not there. ``fields.seen`` grows. Raises ``SourceError`` for a file that cannot be read.
    """
    for record in _records(file, fields, row_groups, storage_options):
        document = fields.document(record, file.source) if isinstance(record, Record) else record
        if document is not None:
            yield document


def _records(
    file: SourceFile, fields: Fields, row_groups: range | None, options: Options
) -> Iterator[Record | BadDocument]:
    if file.source.startswith(_BUILTIN):
        for name, text in _builtin(file.source).items():
            yield Record(fields={fields.text: text}, default_id=name, place=name)
        return
    with open_source(file, storage_options=options) as stream:
        yield from reader_of(file)(file, stream, fields, row_groups)


@contextmanager
def open_source(file: SourceFile, *, storage_options: Options = None) -> Iterator[BinaryIO]:
    """Open a file of a source; raises ``SourceError`` for what goes wrong there and while it is read."""
    store = Store(_split(file.source)[0], storage_options)
    with _readable(str(file)), store.fs.open(store.path(file.name), "rb") as stream:
        yield stream


def file_version(file: SourceFile, *, storage_options: Options = None) -> str:
    """Return what changes when a file of a source does: of its time or tag, and its size; 16 hex digits."""
    if file.source.startswith(_BUILTIN):
        value: Any = _builtin(file.source)
    else:
        store = Store(_split(file.source)[0], storage_options)
        with _readable(str(file)):
            value = store.fs.ukey(store.path(file.name))
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise SourceError(f"{what} does not exist; check the path") from error
    except (OSError, EOFError, pa.ArrowException) as error:
        raise SourceError(
            f"{what} cannot be read ({error}); check that it is whole and that you may read it"
        ) from error
