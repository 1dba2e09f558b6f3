"""Documents from text files, object stores and built-in text, streamed one at a time with stable ids.

An id never names the machine: it is the document's own ``id`` field, or the file's path below the fixed part of the
source (``data/*/a.txt`` gives ``x/a.txt``) with a line or row number. File systems are opened through ``Store``.
"""

import glob
import io
import json
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from actlake.storage.corpus_spec import SourceFile
from actlake.storage.errors import SourceError, UnknownNameError, nearest
from actlake.storage.stores import Store

#: Parquet rows decoded at a time.
_BATCH_ROWS = 1024
_MAGIC = re.compile(r"[*?\[]")
_BUILTIN = "builtin:"
_ENDINGS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True, kw_only=True)
class Document:
    """One input text with a stable id; ``source`` is the source string that named it.

    ``metadata`` are the fields that were asked for, as text, None where the document lacks one.
    """

    id: str
    text: str
    source: str
    metadata: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            raise SourceError(f"a document of {self.source!r} has an empty id; give it one, or drop the id field")
        if not self.text:
            raise SourceError(f"document {self.id!r} of {self.source!r} is empty; remove it or give it text")
        for what, value in (("id", self.id), ("text", self.text), *self.metadata.items()):
            if value is not None and not _is_unicode(value):
                raise SourceError(
                    f"the {what} of document {self.id!r} of {self.source!r} holds half of a surrogate pair; "
                    "replace it by a whole character"
                )


@dataclass(frozen=True, kw_only=True)
class _Fields:
    # What is read of a record: its text, and these fields. ``seen`` are all that records have, ``found`` those of the
    # metadata that a document has.
    text: str
    metadata: tuple[str, ...]
    seen: set[str] = field(default_factory=set)
    found: set[str] = field(default_factory=set)


def read_documents(
    sources: Sequence[str],
    *,
    text_field: str = "text",
    metadata: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[Document]:
    """Yield the documents of all sources, files in the order of their names.

    ``builtin:python-docs`` is one document a topic; ``.txt`` one a file; ``.jsonl`` (``.gz``, ``.zst``) one a line
    (id: the ``id`` field, else ``<file>:<line>``, lines from 1); ``.parquet`` one a row (``id`` column, else
    ``<file>:<row>``, rows from 0). Every source is listed before the first is read. ``metadata`` are fields of JSON
    lines and Parquet rows to keep: text as it is, any other value as its JSON text, null and absent fields as None.

    Raises ``SourceError`` for a source that is absent, unreadable, empty or malformed; it names the file and the line.
    At the end ``UnknownNameError`` for a metadata field that no document has.
    """
    wanted = _Fields(text=text_field, metadata=tuple(metadata))
    for source, files in [(source, _list(source, storage_options)) for source in sources]:
        n_documents = 0
        for file in files:
            for document in _read(file, wanted, storage_options):
                n_documents += 1
                yield document
        if n_documents == 0:
            raise SourceError(f"source {source!r} holds no documents; add some or leave it out")
    for name in wanted.metadata:
        if name not in wanted.found:
            others = wanted.seen - {name, text_field}
            raise UnknownNameError(f"no document has the metadata field {name!r}{nearest(name, others)}")


def describe_sources(sources: Sequence[str], *, storage_options: Mapping[str, Any] | None = None) -> list[SourceFile]:
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


def _list(source: str, options: Mapping[str, Any] | None) -> list[SourceFile]:
    if source.startswith(_BUILTIN):
        nbytes = sum(len(text.encode()) for text in _builtin(source).values())
        return [SourceFile(source=source, name=source.removeprefix(_BUILTIN), nbytes=nbytes)]
    folder, pattern = _split(source)
    store = Store(folder, options)
    file_system = store.fs
    with _readable(f"source {source!r}"):
        if _MAGIC.search(pattern):
            found = file_system.glob(f"{glob.escape(store.root)}/{pattern}", detail=True)
        else:
            info = file_system.info(store.path(pattern))
            found = {info["name"]: info}
    root = store.root.strip("/") + "/"
    files = [
        SourceFile(source=source, name=path.lstrip("/").removeprefix(root), nbytes=int(info["size"]))
        for path, info in sorted(found.items())
        if info["type"] == "file"
    ]
    if not files:
        remedy = (
            "check the pattern" if _MAGIC.search(pattern) else f"to read a folder write e.g. {source + '/*.jsonl'!r}"
        )
        raise SourceError(f"source {source!r} matches no file; {remedy}")
    for file in files:
        _reader(file)
    return files


def _split(source: str) -> tuple[str, str]:
    """Return a source's fixed folder, and the file name or pattern below it."""
    protocol, _, path = source.rpartition("://")
    parts = path.split("/")
    n_fixed = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), len(parts) - 1)
    folder = "/".join(parts[:n_fixed])
    if not protocol:
        folder = folder or ("/" if path.startswith("/") else ".")
        return folder, "/".join(parts[n_fixed:])
    return f"{protocol}://{folder}", "/".join(parts[n_fixed:])


# --- Reading ------------------------------------------------------------------------------------------------------


def _read(file: SourceFile, wanted: _Fields, options: Mapping[str, Any] | None) -> Iterator[Document]:
    if file.source.startswith(_BUILTIN):
        for name, text in _builtin(file.source).items():
            yield Document(id=name, text=text, source=file.source, metadata=dict.fromkeys(wanted.metadata))
        return
    store = Store(_split(file.source)[0], options)
    reader = _reader(file)
    with _readable(str(file)), store.fs.open(store.path(file.name), "rb") as stream:
        yield from reader(file, stream, wanted)


def _read_txt(file: SourceFile, stream: BinaryIO, wanted: _Fields) -> Iterator[Document]:
    data = stream.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError(f"{file}, line {line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    yield Document(id=file.name, text=text, source=file.source, metadata=dict.fromkeys(wanted.metadata))


def _read_jsonl(file: SourceFile, stream: BinaryIO, wanted: _Fields) -> Iterator[Document]:
    codec = _ENDINGS.get(posixpath.splitext(file.name)[1])
    lines: Any = stream
    if codec is not None:
        lines = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), codec))
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{file}, line {number}"
            record = _parse(line, where)
            wanted.seen.update(record)
            yield _document(record, file, number, wanted, where)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise SourceError(f"{where}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise SourceError(f"{where}: {type(record).__name__} instead of a JSON object; each line must be one object")
    return record


def _read_parquet(file: SourceFile, stream: BinaryIO, wanted: _Fields) -> Iterator[Document]:
    parquet = pq.ParquetFile(stream)
    schema = parquet.schema_arrow
    _require(schema.names, wanted.text, str(file))
    wanted.seen.update(schema.names)
    columns = [name for name in schema.names if name in (wanted.text, "id", *wanted.metadata)]
    number = 0
    for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
        for record in batch.to_pylist():
            yield _document(record, file, number, wanted, f"{file}, row {number}")
            number += 1


_Reader = Callable[[SourceFile, BinaryIO, _Fields], Iterator[Document]]
_READERS: Mapping[str, _Reader] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
}


def _reader(file: SourceFile) -> _Reader:
    for ending, reader in _READERS.items():
        if file.name.endswith(ending):
            return reader
    raise SourceError(f"{file}: no reader for such a file; narrow the pattern to one of {', '.join(_READERS)}")


def _document(record: Mapping[str, Any], file: SourceFile, number: int, wanted: _Fields, where: str) -> Document:
    metadata = {name: _label(record.get(name), name, where) for name in wanted.metadata}
    wanted.found.update(name for name, value in metadata.items() if value is not None)
    return Document(
        id=_id(record, f"{file.name}:{number}", where),
        text=_text(record, wanted.text, where),
        source=file.source,
        metadata=metadata,
    )


def _label(value: Any, name: str, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"{where}: the metadata field {name!r} holds {value!r}, which has no JSON text ({error}); make it text"
        ) from error


def _require(names: Sequence[str], text_field: str, where: str) -> None:
    if text_field not in names:
        shown = ", ".join(map(repr, names)) or "none"
        raise SourceError(f"{where}: no field {text_field!r}; set text_field to one of those present: {shown}")


def _text(record: Mapping[str, Any], text_field: str, where: str) -> str:
    _require(list(record), text_field, where)
    text = record[text_field]
    if not isinstance(text, str):
        raise SourceError(
            f"{where}: field {text_field!r} holds {type(text).__name__}, not text; set another text_field"
        )
    return text


def _id(record: Mapping[str, Any], default: str, where: str) -> str:
    value = record.get("id", default)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise SourceError(f"{where}: the id is {value!r}; it must be text or an integer, or absent in the whole file")
    return str(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
