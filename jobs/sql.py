"""SQL over the tables of a dataset (DuckDB), with no way to files, extensions or the network."""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from actlake.jobs.tables import LakeTable, tables
from actlake.shards.dataset import ActivationDataset
from actlake.storage.errors import BadInputError, MissingExtraError

if TYPE_CHECKING:
    import duckdb

#: Tables of more rows than this go through a file that is deleted afterwards: 25 bytes a row on disk, 60 in memory.
_IN_MEMORY = 20_000_000


def ask(ds: ActivationDataset, sql: str) -> pa.Table:
    """Return the answer to one SQL query over the tables of a dataset.

    Raises ``BadInputError`` with the tables' columns for SQL that cannot be answered, and for whatever would touch
    files, extensions or the network.
    """
    duckdb = _duckdb()
    known = tables(ds)
    with _database(known, _named(sql, known)) as connection:
        try:
            statements = [statement.type for statement in connection.extract_statements(sql)]
            if len(statements) != 1 or statements[0] not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
                raise BadInputError(f"{sql!r} is not one SELECT, and nothing else is answered")
            answer: pa.Table = connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            raise BadInputError(f"{error}\nthe tables are\n{_columns(known)}") from error
    return _with_integers(answer)


def _with_integers(answer: pa.Table) -> pa.Table:
    """Return sums of integers as int64 where they fit: DuckDB gives them as decimals of 38 digits, JSON as text."""
    for place, field in enumerate(answer.schema):
        if pa.types.is_decimal(field.type) and field.type.scale == 0:
            try:
                answer = answer.set_column(place, field.name, answer[field.name].cast(pa.int64()))
            except pa.ArrowInvalid:
                continue  # past 64 bits
    return answer


def _named(sql: str, known: Mapping[str, LakeTable]) -> set[str]:
    words = {word.lower() for word in re.findall(r"\w+", sql)}
    return {name for name in known if name in words}


@contextmanager
def _database(known: Mapping[str, LakeTable], wanted: set[str]) -> "Iterator[duckdb.DuckDBPyConnection]":
    """Open a database of the tables, filled where they are wanted, that reaches nothing outside of itself."""
    large = any(known[name].n_rows_most > _IN_MEMORY for name in wanted)
    with tempfile.TemporaryDirectory(prefix="actlake-query-") as folder:
        place = f"{folder}/tables.duckdb" if large else ":memory:"
        connection = _duckdb().connect(place, config={"temp_directory": folder})
        try:
            for name, table in known.items():
                _fill(connection, name, table, filled=name in wanted)
            # No files, no extensions, no network, and no tables from variables of ours.
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            yield connection
        finally:
            connection.close()


def _fill(connection: "duckdb.DuckDBPyConnection", name: str, table: LakeTable, *, filled: bool) -> None:
    connection.register("incoming", table.schema.empty_table())
    connection.execute(f"CREATE TABLE {name} AS SELECT * FROM incoming")
    # Piece by piece from here: what a piece raises keeps its type, and one of them fits into memory.
    for piece in table.pieces() if filled else ():
        connection.register("incoming", piece)
        connection.execute(f"INSERT INTO {name} SELECT * FROM incoming")
    connection.unregister("incoming")


def _duckdb() -> Any:
    try:
        import duckdb
    except ImportError as error:
        raise MissingExtraError("SQL needs duckdb, which is not installed; pip install 'actlake[query]'") from error
    return duckdb


def _columns(known: Mapping[str, LakeTable]) -> str:
    return "\n".join(f"  {name}({', '.join(table.schema.names)})" for name, table in known.items())
