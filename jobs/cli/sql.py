"""``actlake query``: SQL over the tables of a dataset, printed or written."""

import io
import json
import sys
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actlake.jobs.cli.app import ERRORS, app
from actlake.jobs.cli.options import AsJson, Dataset, Options, open_dataset, print_table
from actlake.storage.errors import BadInputError

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("table", "csv", "json", "parquet")

#: Rows that a table on the screen shows; the other formats have all.
_SHOWN = 100


@app.command()
def query(
    dataset: Dataset,
    sql: Annotated[str, typer.Argument(help="One SELECT, e.g. 'SELECT host, count(*) FROM shards GROUP BY host'.")],
    form: Annotated[
        str | None, typer.Option("--format", help=f"{', '.join(FORMATS)}; default: by the name of the file, or table.")
    ] = None,
    out: Annotated[str | None, typer.Option("--output", "-o", help="Write there instead of printing.")] = None,
    as_json: AsJson = False,
    options: Options = None,
) -> None:
    """Ask a dataset with SQL (DuckDB): the tables shards, objects, sequences, stats and quarantine."""
    chosen = "json" if as_json else form or _format_of(out)
    if chosen not in FORMATS:
        raise BadInputError(f"--format {chosen!r} is none of {', '.join(FORMATS)}")
    if out is not None and chosen == "table":
        raise BadInputError(f"a table is not for a file; name {out!r} .csv, .json or .parquet, or give --format")
    if chosen == "parquet" and out is None and sys.stdout.isatty():
        raise BadInputError("Parquet is no text; give it a file with -o result.parquet")
    from actlake.jobs.sql import ask

    found = ask(open_dataset(dataset, options), sql)
    if chosen == "table":
        _print(found)
    elif out is None:
        typer.echo(_encoded(found, chosen), nl=False)
    else:
        _write(out, _encoded(found, chosen))


# --- output --------------------------------------------------------------------------------------------------------


def _format_of(out: str | None) -> str:
    suffix = PurePosixPath(out or "").suffix.lstrip(".").lower()
    return suffix if suffix in FORMATS else "table"


def _print(found: "pa.Table") -> None:
    rows = found.slice(0, _SHOWN).to_pylist()
    print_table(found.column_names, ([_cell(value) for value in row.values()] for row in rows))
    if len(found) > _SHOWN:
        ERRORS.print(f"{_SHOWN} of {len(found):,} rows; --format csv, json or parquet gives all of them")


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.6g}"
        case dict() | list():
            return json.dumps(value, default=str)
        case _:
            return str(value)


def _encoded(found: "pa.Table", form: str) -> bytes:
    if form == "parquet":
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(found, sink, compression="zstd")
        return sink.getvalue()
    if form == "json":
        return (json.dumps(found.to_pylist(), indent=1, default=str) + "\n").encode()
    return _csv(found).encode()


def _csv(found: "pa.Table") -> str:
    import csv

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(found.column_names)
    for batch in found.to_batches():
        for row in batch.to_pylist():
            values = (json.dumps(v, default=str) if isinstance(v, dict | list) else v for v in row.values())
            writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def _write(out: str, data: bytes) -> None:
    from actlake.storage.stores import Store

    folder, _, name = out.rpartition("/")
    Store(folder or ("/" if out.startswith("/") else ".")).write(name, data)
