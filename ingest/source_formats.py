"""The files that documents are read from, by the ending of their names; each gives records one at a time."""

import io
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from actlake.ingest.documents import BadDocument
from actlake.ingest.records import Fields, Record
from actlake.storage.corpus_spec import SourceFile
from actlake.storage.errors import BadInputError, SourceError

#: Parquet and Arrow rows decoded at a time.
_BATCH_ROWS = 1024
_CODECS = {".gz": "gzip", ".zst": "zstd"}
#: What an Arrow file begins with; an Arrow stream, as ``datasets`` writes it, does not.
_ARROW_FILE = b"ARROW1"

Reader = Callable[[SourceFile, BinaryIO, Fields, range | None], Iterator[Record | BadDocument]]


def reader_of(file: SourceFile) -> Reader:
    """Return what reads a file: ``reader(file, stream, fields, row_groups)``; raise ``SourceError`` where nothing does.

    ``row_groups`` are those of a Parquet file that are to be read, None: all; other files have none.
    """
    for ending, reader in _READERS.items():
        if file.name.endswith(ending):
            return reader
    raise SourceError(f"{file}: no reader for such a file; narrow the pattern to one of {', '.join(_READERS)}")


def _read_txt(
    file: SourceFile, stream: BinaryIO, fields: Fields, _groups: range | None
) -> Iterator[Record | BadDocument]:
    data = stream.read()
    try:
        yield Record(fields={fields.text: data.decode()}, default_id=file.name, place=file.name)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"not UTF-8 ({error.reason}); convert the file to UTF-8"
        yield BadDocument(document=file.name, source=file.source, place=f"{file.name}, line {line}", reason=reason)


def _read_jsonl(
    file: SourceFile, stream: BinaryIO, _fields: Fields, _groups: range | None
) -> Iterator[Record | BadDocument]:
    codec = _CODECS.get(posixpath.splitext(file.name)[1])
    lines: Any = stream
    if codec is not None:
        lines = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), codec))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{file.name}, line {number}"
        try:
            yield Record(fields=_parse(line), default_id=f"{file.name}:{number}", place=place)
        except BadInputError as error:
            yield BadDocument(document="", source=file.source, place=place, reason=str(error))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadInputError(f"not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise BadInputError(f"{type(record).__name__} instead of a JSON object; each line must be one object")
    return record


def _read_parquet(
    file: SourceFile, stream: BinaryIO, fields: Fields, groups: range | None
) -> Iterator[Record | BadDocument]:
    parquet = pq.ParquetFile(stream)
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    chosen = range(len(sizes)) if groups is None else groups
    columns = _columns(file, parquet.schema_arrow, fields)
    batches = parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=list(chosen), columns=columns)
    yield from _rows(file, batches, sum(sizes[: chosen.start]))


def _read_arrow(
    file: SourceFile, stream: BinaryIO, fields: Fields, _groups: range | None
) -> Iterator[Record | BadDocument]:
    is_file = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
    stream.seek(0)
    if is_file:
        arrow = pa.ipc.open_file(stream)
        batches = (arrow.get_batch(i) for i in range(arrow.num_record_batches))
    else:
        batches = arrow = pa.ipc.open_stream(stream)
    columns = _columns(file, arrow.schema, fields)
    parts = (
        batch.select(columns).slice(start, _BATCH_ROWS)
        for batch in batches
        for start in range(0, batch.num_rows, _BATCH_ROWS)
    )
    yield from _rows(file, parts, 0)


def _columns(file: SourceFile, schema: pa.Schema, fields: Fields) -> list[str]:
    try:
        fields.require_content(schema.names)
    except BadInputError as error:
        raise SourceError(f"{file}: {error}") from error
    fields.seen.fields.update(schema.names)
    return [name for name in schema.names if name in fields.names]


def _rows(file: SourceFile, batches: Iterator[Any], number: int) -> Iterator[Record | BadDocument]:
    for batch in batches:
        try:
            found = batch.to_pylist()
        except UnicodeDecodeError:
            # One of them; which, is known when each is read.
            found = None
        for i in range(batch.num_rows):
            place = f"{file.name}, row {number}"
            try:
                row = batch.slice(i, 1).to_pylist()[0] if found is None else found[i]
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 ({error.reason} at byte {error.start}); convert the column to UTF-8"
                yield BadDocument(document="", source=file.source, place=place, reason=reason)
            else:
                yield Record(fields=row, default_id=f"{file.name}:{number}", place=place)
            number += 1


_READERS: Mapping[str, Reader] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}

#: What the names of files that can be read end with.
ENDINGS = tuple(_READERS)
