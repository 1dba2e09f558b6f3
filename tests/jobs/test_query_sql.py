"""SQL over a dataset: every table says what is stored, and SQL reaches nothing else."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import make_data_demo
from labelled import Labelled, make_labelled
from typer.testing import CliRunner, Result

import actlake
from actlake.jobs import sql
from actlake.jobs.cli import sql as command  # noqa: F401 - registers it
from actlake.jobs.cli.app import app
from actlake.jobs.sql import ask
from actlake.jobs.tables import _OBJECTS, _SEQUENCES, _STATS, tables
from actlake.storage.corpus_files import QUARANTINE, QUARANTINE_STEM, write_by_content
from actlake.storage.errors import BadInputError, MissingExtraError, NotFoundError
from actlake.storage.hookpoints import HookPoint
from actlake.storage.manifest import uncommit
from actlake.storage.stores import Store

PAGE = (Path(__file__).parents[2] / "docs/query.md").read_text()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    return make_labelled(tmp_path_factory.mktemp("labelled"))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- tables --------------------------------------------------------------------------------------------------------


def test_objects_are_those_of_the_records(labelled: Labelled) -> None:
    ds = labelled.ds
    expected = []
    for record in ds.reader.manifest.records():
        for name, item in sorted(record.objects.items()):
            point = None if name.startswith("rows/") else HookPoint.parse(name)
            raw = record.n_rows * ds.spec.arrays()[name].nbytes_per_row
            expected.append(
                {
                    "shard": record.shard,
                    "name": name,
                    "layer": point.layer if point else None,
                    "stream": point.stream if point else None,
                    "nbytes": item.nbytes,
                    "raw_nbytes": raw,
                    "crc32c": item.crc32c,
                    "index_crc32c": item.index_crc32c,
                }
            )
    assert ask(ds, "SELECT * FROM objects ORDER BY shard, name").to_pylist() == expected


def test_sequences_count_rows_by_label_and_role(labelled: Labelled) -> None:
    ds = labelled.ds
    by_category = Counter(truth.sequence.metadata["category"] for truth in labelled.rows)
    found = ask(ds, "SELECT category, sum(n_rows) AS n, sum(n_text) AS t FROM sequences GROUP BY category").to_pylist()
    assert {row["category"]: (row["n"], row["t"]) for row in found} == {c: (n, n) for c, n in by_category.items()}
    rows = ask(ds, "SELECT * FROM sequences ORDER BY sequence").to_pylist()
    # In corpus order, so the place in the list is the number that the row index counts.
    first = {truth.sequence.index: i for i, truth in reversed([*enumerate(labelled.rows)])}
    count = Counter(truth.sequence.index for truth in labelled.rows)
    assert [(row["sequence"], row["first_row"], row["n_rows"]) for row in rows] == [
        (number, first[number], count[number]) for number in sorted(count)
    ]
    by_number = {truth.sequence.index: truth.sequence for truth in labelled.rows}
    for row in rows:
        sequence = by_number[row["sequence"]]
        assert (row["document"], row["document_window"]) == (sequence.document, sequence.window)
        assert (row["n_tokens"], row["n_committed"]) == (len(sequence.tokens), row["n_rows"])


def test_uncommitted_shards_are_rows_without_a_record(tmp_path: Path) -> None:
    labelled = make_labelled(tmp_path)
    uncommit(labelled.ds.store, 1)
    ds = labelled.ds.reopened()
    found = ask(ds, "SELECT shard, committed, n_rows, n_rows_planned FROM shards ORDER BY shard").to_pylist()
    planned = ds.planned_shards
    assert found == [
        {"shard": k, "committed": k != 1, "n_rows": None if k == 1 else n, "n_rows_planned": n}
        for k, n in enumerate(planned)
    ]
    committed = ask(ds, "SELECT sum(n_committed) AS n FROM sequences").to_pylist()
    assert committed == [{"n": sum(planned) - planned[1]}]
    # Of each sequence, the rows that the committed shards hold.
    lost = range(ds.spec.rows_per_shard, ds.spec.rows_per_shard + planned[1])
    for row in ask(ds, "SELECT first_row, n_rows, n_committed FROM sequences").to_pylist():
        rows = range(row["first_row"], row["first_row"] + row["n_rows"])
        assert row["n_committed"] == len([number for number in rows if number not in lost])


def test_stats_are_those_of_the_rows(labelled: Labelled) -> None:
    ds = labelled.ds
    for row in ask(ds, "SELECT * FROM stats").to_pylist():
        values = np.asarray(ds[row["hook_point"]][:]).astype(np.float64)
        norms = np.linalg.norm(values, axis=1)
        assert row["n_rows"] == len(values)
        assert row["norm_mean"] == pytest.approx(norms.mean(), rel=1e-9)
        assert row["unit_scale"] == pytest.approx((norms**2).mean() ** -0.5, rel=1e-9)
        assert row["top_channel"] == int(np.argmax((values**2).sum(axis=0)))
        assert row["ratio"] == pytest.approx(values.size * 2 / row["nbytes"])


def test_a_quarantine_list_is_a_table_and_without_one_it_is_empty(tmp_path: Path) -> None:
    labelled = make_labelled(tmp_path)
    ds = labelled.ds
    assert ask(ds, "SELECT count(*) AS n FROM quarantine").to_pylist() == [{"n": 0}]
    bad, store = {"document": "d7", "source": "s", "place": "line 3", "reason": "empty"}, labelled.corpus.store
    ((key, file),) = write_by_content(store, QUARANTINE_STEM, QUARANTINE, [pa.Table.from_pylist([bad])]).items()
    header = json.loads(store.read("corpus.json"))
    header["files"][key] = {"nbytes": file.nbytes, "crc32c": file.crc32c}
    store.write("corpus.json", json.dumps(header).encode())
    assert ask(actlake.open(ds.url), "SELECT * FROM quarantine").to_pylist() == [bad]


def test_what_needs_a_lost_corpus_says_so_and_the_rest_goes_on(tmp_path: Path) -> None:
    labelled = make_labelled(tmp_path)
    labelled.corpus.store.delete("corpus.json")
    assert ask(labelled.ds, "SELECT count(*) AS n FROM shards").to_pylist()[0]["n"] > 1
    with pytest.raises(NotFoundError, match="no corpus at"):
        ask(labelled.ds, "SELECT * FROM sequences")


def test_large_tables_go_through_a_file(labelled: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    question = "SELECT name, sum(nbytes) AS n FROM objects GROUP BY name ORDER BY name"
    expected = ask(labelled.ds, question)
    monkeypatch.setattr(sql, "_IN_MEMORY", 1)
    assert ask(labelled.ds, question).equals(expected)
    with pytest.raises(BadInputError, match="file system operations are disabled"):
        ask(labelled.ds, "SELECT * FROM read_csv('/etc/passwd')")


def test_every_column_can_be_named_without_quotes(labelled: Labelled) -> None:
    for name, table in tables(labelled.ds).items():
        assert (
            ask(labelled.ds, f"SELECT {', '.join(table.schema.names)} FROM {name}").column_names == table.schema.names
        )


def test_the_statements_of_the_page_are_answered(labelled: Labelled) -> None:
    (code,) = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    answers = [ask(labelled.ds, statement) for statement in code.strip().splitlines()]
    assert [len(answer) for answer in answers] == [3, 3, 1, 0]


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_data_demo()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/query.md", "exec"), names)
    assert (len(names["lake"]), len(names["unfinished"]), len(names["slow"])) == (3, 0, 0)


def test_the_page_has_every_column() -> None:
    described = dict(re.findall(r"^\| `(\w+)` \| .*? \| (.*) \|$", PAGE, re.MULTILINE))
    for name, schema in (("objects", _OBJECTS), ("sequences", _SEQUENCES), ("stats", _STATS)):
        assert re.findall(r"`(\w+)`", described[name]) == schema.names


# --- what SQL may not do -------------------------------------------------------------------------------------------

READS = [
    "SELECT * FROM read_csv('{file}')",
    "SELECT * FROM read_parquet('{file}')",
    "SELECT * FROM read_text('{file}')",
    "SELECT * FROM read_blob('{file}')",
    "SELECT * FROM read_json('{file}')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM sniff_csv('{file}')",
    "SELECT * FROM read_parquet('https://example.org/x.parquet')",
    "SELECT * FROM '{file}'",
    "SELECT * FROM query('SELECT * FROM read_text(''{file}'')')",
]
CHANGES = [
    "COPY shards TO '{folder}/out.csv'",
    "COPY (SELECT 1) TO '{folder}/out.parquet'",
    "EXPORT DATABASE '{folder}/out'",
    "ATTACH '{folder}/out.db'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "PRAGMA enable_external_access = true",
]


@pytest.mark.parametrize("statement", [*READS, *CHANGES])
def test_sql_reaches_no_file_and_no_network(statement: str, labelled: Labelled, tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "secret.csv").write_text("secret\n1\n")
    statement = statement.format(file=folder / "secret.csv", folder=folder)
    with pytest.raises(BadInputError):
        ask(labelled.ds, statement)
    # The database itself refuses it too, not only the check of what kind of statement it is.
    with sql._database(tables(labelled.ds), {"shards"}) as connection, pytest.raises(duckdb.Error):
        connection.execute(statement)
    assert [path.name for path in folder.iterdir()] == ["secret.csv"]


def test_variables_of_ours_are_no_tables(labelled: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "private", pa.table({"secret": [1]}), raising=False)
    with pytest.raises(BadInputError, match="private"):
        ask(labelled.ds, "SELECT * FROM private")


@pytest.mark.parametrize("text", ["", "CREATE TABLE x AS SELECT 1", "SELECT 1; SELECT 2", "DROP TABLE shards"])
def test_only_one_select_is_answered(text: str, labelled: Labelled) -> None:
    with pytest.raises(BadInputError, match="is not one SELECT"):
        ask(labelled.ds, text)


@pytest.mark.parametrize("text", ["SELECT nosuch FROM shards", "SELECT FROM WHERE", "SELECT * FROM nosuch"])
def test_an_error_shows_the_columns_of_the_tables(text: str, labelled: Labelled) -> None:
    with pytest.raises(BadInputError) as caught:
        ask(labelled.ds, text)
    for line in ("shards(shard, committed, ", "objects(shard, name, ", "stats(hook_point, ", "quarantine(document"):
        assert line in str(caught.value)
    assert "category, safe, turns)" in str(caught.value)


# --- the command ---------------------------------------------------------------------------------------------------


def test_answers_come_as_a_table_csv_json_and_parquet(labelled: Labelled, tmp_path: Path) -> None:
    url, text = labelled.ds.url, "SELECT shard, n_rows, [1, 2] AS list FROM shards ORDER BY shard"
    expected = ask(labelled.ds, text).to_pylist()
    shown = run("query", url, text)
    assert shown.exit_code == 0
    assert shown.output.splitlines()[1].split() == ["shard", "n_rows", "list"]
    assert len(shown.output.strip().splitlines()) == len(expected) + 2
    assert json.loads(run("query", url, text, "--json").stdout) == expected
    assert json.loads(run("query", url, text, "--format", "json").stdout) == expected
    lines = run("query", url, text, "--format", "csv").stdout.splitlines()
    assert lines == ["shard,n_rows,list", *(f'{row["shard"]},{row["n_rows"]},"[1, 2]"' for row in expected)]
    for name in ("a.parquet", "a.json", "a.csv"):
        assert run("query", url, text, "-o", tmp_path / name).exit_code == 0
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == expected
    assert json.loads((tmp_path / "a.json").read_text()) == expected
    assert (tmp_path / "a.csv").read_text().splitlines() == lines


def test_a_long_answer_says_what_it_leaves_out(labelled: Labelled) -> None:
    shown = run("query", labelled.ds.url, "SELECT * FROM range(250)")
    assert "100 of 250 rows; --format csv" in shown.output
    assert len(run("query", labelled.ds.url, "SELECT * FROM range(250)", "--format", "csv").stdout.split()) == 251


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "xml"], "'xml' is none of table, csv, json, parquet"),
        (["-o", "answer.txt"], "a table is not for a file; name 'answer.txt' .csv"),
        (["--storage-option", "nonsense"], "a --storage-option is neither KEY=VALUE nor a JSON object"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, labelled: Labelled) -> None:
    result = run("query", labelled.ds.url, "SELECT 1", *options)
    assert result.exit_code == 2
    assert message in result.output


def test_without_duckdb_it_says_what_to_install(labelled: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'actlake\[query\]'"):
        ask(labelled.ds, "SELECT 1")


def test_answers_keep_no_markup(labelled: Labelled) -> None:
    shown: Any = run("query", labelled.ds.url, "SELECT '[red]x[/red] :warning:' AS t")
    assert "[red]x[/red] :warning:" in shown.output


def test_storage_options_reach_the_file_system(labelled: Labelled, tmp_path: Path) -> None:
    memory = Store("memory://query-options")
    root = Path(labelled.ds.store.root)
    for path in root.rglob("*"):
        if path.is_file():
            memory.write(str(path.relative_to(root)), path.read_bytes())
    result = run("query", memory.url, "SELECT count(*) AS n FROM shards", "--json", "-O", '{"asynchronous": false}')
    assert json.loads(result.stdout) == [{"n": len(labelled.ds.planned_shards)}]


def test_sums_are_numbers_in_json_even_past_64_bits(labelled: Labelled) -> None:
    text = "SELECT sum(n_rows) AS n, sum(n_rows) * 1e0 AS x, 9223372036854775807::HUGEINT + 1 AS big FROM shards"
    (found,) = json.loads(run("query", labelled.ds.url, text, "--json").stdout)
    assert found["n"] == found["x"] > 0
    assert isinstance(found["n"], int)
    assert int(found["big"]) == 2**63
