"""Documents from every kind of source, and a clear error for each that cannot be used."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actlake.ingest.sources import Document, describe_sources, read_documents
from actlake.storage.corpus_spec import SourceFile
from actlake.storage.errors import SourceError, UnknownNameError


def _pairs(*sources: str) -> list[tuple[str, str]]:
    return [(document.id, document.text) for document in read_documents(sources)]


def _jsonl(records: Sequence[object]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def test_python_docs_are_one_document_a_topic_in_sorted_order() -> None:
    documents = list(read_documents(["builtin:python-docs"]))
    assert [document.id for document in documents] == [f"python-docs/{topic}" for topic in sorted(topics)]
    assert [document.text for document in documents] == [topics[topic] for topic in sorted(topics)]
    assert {document.source for document in documents} == {"builtin:python-docs"}
    (file,) = describe_sources(["builtin:python-docs"])
    assert file.nbytes == sum(len(text.encode()) for text in topics.values())


def test_text_files_are_one_document_each_with_bytes_kept(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_bytes("zwei\r\nZeilen é".encode())
    (tmp_path / "one.txt").write_bytes(b"one")
    assert _pairs(f"{tmp_path}/**/*.txt") == [("b/two.txt", "zwei\r\nZeilen é"), ("one.txt", "one")]
    assert _pairs(f"{tmp_path}/b/two.txt") == [("two.txt", "zwei\r\nZeilen é")]
    assert _pairs(f"file://{tmp_path}/*/two.txt") == [("b/two.txt", "zwei\r\nZeilen é")]


def test_ids_do_not_depend_on_where_the_folder_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("here", "there/deep"):
        (tmp_path / place / "x").mkdir(parents=True)
        (tmp_path / place / "x" / "a.jsonl").write_bytes(_jsonl([{"text": "A"}]))
    monkeypatch.chdir(tmp_path / "here")
    expected = [("x/a.jsonl:1", "A")]
    assert _pairs("*/a.jsonl") == _pairs(f"{tmp_path}/there/deep/*/a.jsonl") == expected


def test_a_folder_with_pattern_characters_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]" / "a.txt").write_text("A")
    monkeypatch.chdir(tmp_path / "run[1]")
    assert _pairs("*.txt") == [("a.txt", "A")]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines_plain_and_compressed(tmp_path: Path, ending: str) -> None:
    first, second = _jsonl([{"text": "A\u2028a"}, {"id": "own", "text": "B"}]), b"\n" + _jsonl([{"id": 7, "text": "C"}])
    # Compressed files may be several streams end to end.
    encoders: dict[str, Callable[[bytes], bytes]] = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": _zstd}
    encode = encoders[ending]
    (tmp_path / f"a.{ending}").write_bytes(encode(first) + encode(second))
    assert _pairs(f"{tmp_path}/a.{ending}") == [(f"a.{ending}:1", "A\u2028a"), ("own", "B"), ("7", "C")]


def test_parquet_rows_are_numbered_through_the_file(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(3000)]
    pq.write_table(pa.table({"body": texts, "n": range(3000)}), tmp_path / "a.parquet", row_group_size=700)
    documents = list(read_documents([f"{tmp_path}/a.parquet"], text_field="body"))
    assert [(d.id, d.text) for d in documents] == [(f"a.parquet:{i}", text) for i, text in enumerate(texts)]
    pq.write_table(pa.table({"text": ["A", "B"], "id": [5, 6]}), tmp_path / "b.parquet")
    assert _pairs(f"{tmp_path}/b.parquet") == [("5", "A"), ("6", "B")]


def test_any_file_system_and_listing(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/sources-test/x/a.jsonl", _jsonl([{"text": "A"}]))
    memory.pipe_file("/sources-test/x/b.txt", b"BB")
    assert _pairs("memory://sources-test/*/a.jsonl") == [("x/a.jsonl:1", "A")]
    assert describe_sources(["memory://sources-test/x/*"]) == [
        SourceFile(source="memory://sources-test/x/*", name="a.jsonl", nbytes=14),
        SourceFile(source="memory://sources-test/x/*", name="b.txt", nbytes=2),
    ]


def test_metadata_are_text_as_it_is_and_other_values_as_json(tmp_path: Path) -> None:
    records = [
        {"text": "A", "label": "caf\u00e9", "n": 3, "deep": {"b": [1.5, None], "a": "\u00e9"}, "other": 1},
        {"text": "B", "label": None, "n": True},
        {"text": "C", "label": "", "n": 0.5},
    ]
    expected = [
        {"label": "caf\u00e9", "n": "3", "deep": '{"a": "\u00e9", "b": [1.5, null]}'},
        {"label": None, "n": "true", "deep": None},
        {"label": "", "n": "0.5", "deep": None},
    ]
    (tmp_path / "a.jsonl").write_bytes(_jsonl(records))
    found = read_documents([f"{tmp_path}/a.jsonl"], metadata=["label", "n", "deep"])
    assert [dict(document.metadata) for document in found] == expected
    columns = {"text": ["A", "B"], "label": ["x", None], "n": [1, None], "tags": [["u", "v"], None]}
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("C")
    found = read_documents([f"{tmp_path}/b.parquet", f"{tmp_path}/c.txt"], metadata=["label", "n", "tags"])
    assert [tuple(document.metadata.values()) for document in found] == [
        ("x", "1", '["u", "v"]'), (None, None, None), (None, None, None),
    ]  # fmt: skip


def test_metadata_that_no_document_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl([{"text": "A", "category": "x", "empty": None}]))
    pq.write_table(pa.table({"text": ["A"], "lang": ["en"]}), tmp_path / "b.parquet")
    sources = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.parquet"]
    assert len(list(read_documents(sources, metadata=["lang", "category"]))) == 2
    for name, match in (
        ("categori", "no document has the metadata field 'categori'; did you mean 'category'"),
        ("empty", "no document has the metadata field 'empty'; valid names: category, lang"),
        ("zzz", "valid names: category, empty, lang"),
    ):
        with pytest.raises(UnknownNameError, match=match):
            list(read_documents(sources, metadata=["lang", name]))


def test_metadata_without_a_json_text_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["A"], "score": [float("nan")], "raw": [b"x"]}), tmp_path / "a.parquet")
    for name in ("score", "raw"):
        with pytest.raises(
            SourceError, match=rf"a\.parquet of .*, row 0: the metadata field '{name}' holds .* no JSON text"
        ):
            list(read_documents([f"{tmp_path}/a.parquet"], metadata=[name]))
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "s", "text": "A", "label": "\\ud800"}\n')
    with pytest.raises(SourceError, match=r"the label of document 's' .* half of a surrogate pair"):
        list(read_documents([f"{tmp_path}/a.jsonl"], metadata=["label"]))


def _raises(match: str, *sources: str, text_field: str = "text") -> None:
    with pytest.raises(SourceError, match=match):
        list(read_documents(sources, text_field=text_field))


def test_unknown_builtin_names_the_nearest() -> None:
    _raises("did you mean 'builtin:python-docs'", "builtin:python-doc")


def test_absent_and_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text")
    (tmp_path / "folder").mkdir()
    _raises("matches no file; check the pattern", f"{tmp_path}/*.txt")
    _raises("gone.txt' does not exist", f"{tmp_path}/gone.txt")
    _raises(r"a\.csv of .* no reader .*\.jsonl\.zst, \.parquet", f"{tmp_path}/a.csv")
    _raises(r"to read a folder write e.g. '.*/folder/\*\.jsonl'", f"{tmp_path}/folder")


def test_every_source_is_listed_before_the_first_is_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.txt"):
        next(read_documents(["builtin:python-docs", f"{tmp_path}/gone.txt"]))


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.txt", b"", r"'a\.txt' of .* is empty; remove it"),
        ("a.txt", b"fine\nnot \xff", r"a\.txt of .*, line 2: not UTF-8"),
        ("a.jsonl", b"\n\n", "holds no documents"),
        ("a.jsonl", b'{"text": "A"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "A"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'["A"]\n', "line 1: list instead of a JSON object"),
        ("a.jsonl", b'{"id": 1, "body": "A"}\n', r"line 1: no field 'text'; .* present: 'id', 'body'"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' holds int, not text"),
        ("a.jsonl", b'{"text": null}\n', "line 1: field 'text' holds NoneType"),
        ("a.jsonl", b'{"text": ""}\n', r"'a\.jsonl:1' of .* is empty"),
        ("a.jsonl", b'{"id": null, "text": "A"}\n', "line 1: the id is None"),
        ("a.jsonl", b'{"id": "", "text": "A"}\n', "has an empty id"),
        ("a.jsonl", b'{"id": "s", "text": "\\ud800"}\n', "the text of document 's' .* half of a surrogate pair"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "A"}\n' * 9)[:-9], r"a\.jsonl\.gz of .* cannot be read \(Truncated"),
        ("a.jsonl.zst", b"not zstd", r"a\.jsonl\.zst of .* cannot be read"),
        ("a.parquet", b"not parquet", r"a\.parquet of .* cannot be read"),
    ],
)
def test_bad_content_is_named(tmp_path: Path, name: str, data: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(data)
    _raises(match, f"{tmp_path}/{name}")


def test_bad_parquet_columns_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2], "body": ["A", None]}), tmp_path / "a.parquet")
    _raises("no field 'content'; .* present: 'text', 'body'", f"{tmp_path}/a.parquet", text_field="content")
    _raises("row 0: field 'text' holds int", f"{tmp_path}/a.parquet")
    _raises("row 1: field 'body' holds NoneType", f"{tmp_path}/a.parquet", text_field="body")


def test_a_document_must_have_text() -> None:
    with pytest.raises(SourceError, match=r"document 'x' of 's' is empty"):
        Document(id="x", text="", source="s")
