"""Documents from every kind of source, and a clear error for each that cannot be used."""

import gzip
import json
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from webserver import web_server

from actlake.ingest.documents import BadDocument, Document, good
from actlake.ingest.filters import Filter
from actlake.ingest.records import Fields
from actlake.ingest.sources import describe_sources, file_version, read_documents, read_file
from actlake.storage.corpus_spec import SourceFile
from actlake.storage.errors import BadInputError, SourceError, UnknownNameError


def _read(*sources: str, **fields: Any) -> list[Document]:
    return list(good(read_documents(sources, Fields(**fields))))


def _pairs(*sources: str, **fields: Any) -> list[tuple[str, str]]:
    return [(document.id, document.text) for document in _read(*sources, **fields)]


def _jsonl(records: Sequence[object]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def test_python_docs_are_one_document_a_topic_in_sorted_order() -> None:
    documents = _read("builtin:python-docs")
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
    expected = [(f"a.parquet:{i}", text) for i, text in enumerate(texts)]
    assert _pairs(f"{tmp_path}/a.parquet", text="body") == expected
    (file,) = describe_sources([f"{tmp_path}/a.parquet"])
    parts = [read_file(file, Fields(text="body"), row_groups=groups) for groups in (range(2), range(2, 3), range(3, 5))]
    assert [(d.id, d.text) for part in parts for d in good(part)] == expected
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
    found = _read(f"{tmp_path}/a.jsonl", metadata=("label", "n", "deep"))
    assert [dict(document.metadata) for document in found] == expected
    columns = {"text": ["A", "B"], "label": ["x", None], "n": [1, None], "tags": [["u", "v"], None]}
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("C")
    found = _read(f"{tmp_path}/b.parquet", f"{tmp_path}/c.txt", metadata=("label", "n", "tags"))
    assert [tuple(document.metadata.values()) for document in found] == [
        ("x", "1", '["u", "v"]'), (None, None, None), (None, None, None),
    ]  # fmt: skip


def test_metadata_that_no_document_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl([{"text": "A", "category": "x", "empty": None}]))
    pq.write_table(pa.table({"text": ["A"], "lang": ["en"]}), tmp_path / "b.parquet")
    sources = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.parquet"]
    assert len(_read(*sources, metadata=("lang", "category"))) == 2
    for name, match in (
        ("categori", "no document has the metadata field 'categori'; did you mean 'category'"),
        ("empty", "no document has the metadata field 'empty'; valid names: category, lang"),
        ("zzz", "valid names: category, empty, lang"),
    ):
        with pytest.raises(UnknownNameError, match=match):
            _read(*sources, metadata=("lang", name))


def test_metadata_without_a_json_text_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["A"], "score": [float("nan")], "raw": [b"x"]}), tmp_path / "a.parquet")
    for name in ("score", "raw"):
        with pytest.raises(
            SourceError, match=rf"a\.parquet, row 0 of .*: the metadata field '{name}' holds .* no JSON text"
        ):
            _read(f"{tmp_path}/a.parquet", metadata=(name,))
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "s", "text": "A", "label": "\\ud800"}\n')
    with pytest.raises(SourceError, match=r"document 's', .* the label holds half of a surrogate pair"):
        _read(f"{tmp_path}/a.jsonl", metadata=("label",))


def _raises(match: str, *sources: str, **fields: Any) -> None:
    with pytest.raises(SourceError, match=match):
        _read(*sources, **fields)


def test_unknown_builtin_names_the_nearest() -> None:
    _raises("did you mean 'builtin:python-docs'", "builtin:python-doc")


def test_absent_and_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text")
    (tmp_path / "folder").mkdir()
    _raises("matches no file; check the pattern", f"{tmp_path}/*.txt")
    _raises("gone.txt' does not exist", f"{tmp_path}/gone.txt")
    _raises(r"a\.csv of .* no reader .*\.jsonl\.zst, \.parquet", f"{tmp_path}/a.csv")
    _raises(r"to read a folder write e.g. '.*/folder/\*\.jsonl'", f"{tmp_path}/folder")
    for name in ("a.txt", "b.txt", "c.jsonl", "README.md"):
        (tmp_path / "folder" / name).write_text("text")
    _raises(r"to read a folder write e.g. '.*/folder/\*\.txt'", f"{tmp_path}/folder/")


def test_every_source_is_listed_before_the_first_is_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.txt"):
        next(read_documents(["builtin:python-docs", f"{tmp_path}/gone.txt"]))


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.txt", b"", r"'a\.txt', a\.txt of .*: it is empty; remove it .*on_bad = 'quarantine'"),
        ("a.txt", b"fine\nnot \xff", r"a\.txt, line 2 of .*: not UTF-8"),
        ("a.jsonl", b"\n\n", "holds no documents"),
        ("a.jsonl", b'{"text": "A"}\n{"text": "\xff"}\n', "line 2 of .*: not UTF-8"),
        ("a.jsonl", b'{"text": "A"}\n{"text": \n', "line 2 of .*: not JSON"),
        ("a.jsonl", b'["A"]\n', "line 1 of .*: list instead of a JSON object"),
        ("a.jsonl", b'{"id": 1, "body": "A"}\n', r"line 1 of .*: no field 'text'; .* present: 'id', 'body'"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 of .*: field 'text' holds int, not text"),
        ("a.jsonl", b'{"text": null}\n', "line 1 of .*: field 'text' holds NoneType"),
        ("a.jsonl", b'{"text": ""}\n', r"'a\.jsonl:1', a\.jsonl, line 1 of .*: it is empty"),
        ("a.jsonl", b'{"id": null, "text": "A"}\n', "line 1 of .*: the id is None"),
        ("a.jsonl", b'{"id": "", "text": "A"}\n', "the id is empty"),
        ("a.jsonl", b'{"id": "s", "text": "\\ud800"}\n', "document 's', .* the text holds half of a surrogate pair"),
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
    _raises("no field 'content'; .* present: 'text', 'body'", f"{tmp_path}/a.parquet", text="content")
    _raises("row 0 of .*: field 'text' holds int", f"{tmp_path}/a.parquet")
    _raises("row 1 of .*: field 'body' holds NoneType", f"{tmp_path}/a.parquet", text="body")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_value_that_is_no_utf8_is_named_and_the_others_are_read(tmp_path: Path, kind: str) -> None:
    edges = pa.array([0, 2, 4, 6], pa.int32()).buffers()[1]
    table = pa.table({"text": pa.StringArray.from_buffers(3, edges, pa.py_buffer(b"ok\xff\xfeOK"))})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    _raises(rf"a\.{kind}, row 1 of .*: not UTF-8 \(invalid start byte at byte 0\); convert", str(path))
    found = list(read_documents([str(path)], Fields()))
    assert [one.text for one in found if isinstance(one, Document)] == ["ok", "OK"]
    assert [one.place for one in found if isinstance(one, BadDocument)] == [f"a.{kind}, row 1"]


def test_a_document_must_have_text() -> None:
    with pytest.raises(BadInputError, match=r"it is empty; remove it or give it text"):
        Document(id="x", text="", source="s")


# --- what is read of a record ---


def test_the_id_is_the_field_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl([{"id": "x", "key": 7, "text": "A"}, {"id": "y", "text": "B"}]))
    assert _pairs(f"{tmp_path}/a.jsonl", id="key") == [("7", "A"), ("a.jsonl:2", "B")]


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("language == 'en'", "AC"),
        ('language != "en"', "BDE"),
        ("score >= 0.5", "AB"),
        ("score < 1", "BC"),
        ("score<=0.5", "BC"),
        ("score > 0", "ABC"),
        ("good == true", "A"),
        ("score == 1", "A"),
        ("language in ['de', 'fr']", "BD"),
        ("language not in ['de', 'fr']", "ACE"),
        ("language > 'de'", "ACD"),
    ],
)
def test_filters_choose_records(tmp_path: Path, condition: str, kept: str) -> None:
    records: list[dict[str, Any]] = [
        {"text": "A", "language": "en", "score": 1, "good": True},
        {"text": "B", "language": "de", "score": 0.5, "good": 1},
        {"text": "C", "language": "en", "score": 0.25},
        {"text": "D", "language": "fr", "score": None},
        {"text": "E"},
    ]
    (tmp_path / "a.jsonl").write_bytes(_jsonl(records))
    pq.write_table(pa.Table.from_pylist([{**record, "good": None} for record in records[:4]]), tmp_path / "b.parquet")
    found = _pairs(f"{tmp_path}/a.jsonl", filters=(Filter.parse(condition),))
    assert "".join(text for _, text in found) == kept
    if "good" not in condition:
        found = _pairs(f"{tmp_path}/b.parquet", filters=(Filter.parse(condition),))
        assert "".join(text for _, text in found) == kept.replace("E", "")


@pytest.mark.parametrize(
    ("condition", "match"),
    [
        ("language", "'language' is no condition; write e.g. language == 'en'"),
        ("language = 'en'", "is no condition"),
        ("language == en", "'en' is no value"),
        ("language == 'en'\nscore = 3", "compares what cannot be compared"),
        ("language in 'en'", "compares what cannot be compared"),
        ("language == ['en']", "compares what cannot be compared"),
        ("score > true", "compares what cannot be compared"),
    ],
)
def test_a_filter_that_cannot_be_understood_is_refused(condition: str, match: str) -> None:
    with pytest.raises(BadInputError, match=match):
        Filter.parse(condition)


def test_a_filter_over_other_kinds_or_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl([{"text": "A", "score": "high"}]))
    _raises(
        r"line 1 of .*: the filter score > 1 meets 'high'; both must be",
        f"{tmp_path}/a.jsonl",
        filters=(Filter.parse("score > 1"),),
    )
    with pytest.raises(UnknownNameError, match="no record has the field 'scor'; did you mean 'score'"):
        _read(f"{tmp_path}/a.jsonl", filters=(Filter.parse("scor != 1"),))
    _raises(
        "holds no documents that its filters let through", f"{tmp_path}/a.jsonl", filters=(Filter.parse("score == 1"),)
    )
    # No record can pass it: the field that none has is the reason.
    _raises(
        "no record has the field 'scor'; did you mean 'score'",
        f"{tmp_path}/a.jsonl",
        filters=(Filter.parse("scor == 1"),),
    )


def test_bad_documents_are_yielded_in_their_places(tmp_path: Path) -> None:
    lines = [b'{"text": "A"}', b"{", b'{"id": "\\ud800", "text": "x"}', b'{"id": "two", "text": ""}', b'{"text": "B"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source = f"{tmp_path}/a.jsonl"
    found = list(read_documents([source]))
    assert [one.text if isinstance(one, Document) else one.place for one in found] == [
        "A", "a.jsonl, line 2", "a.jsonl, line 3", "a.jsonl, line 4", "B",
    ]  # fmt: skip
    bad = [one for one in found if isinstance(one, BadDocument)]
    assert [one.document for one in bad] == ["", "\\ud800", "two"]
    assert bad[2] == BadDocument(
        document="two", source=source, place="a.jsonl, line 4", reason="it is empty; remove it or give it text"
    )
    (tmp_path / "a.jsonl").write_bytes(b"{")
    with pytest.raises(SourceError, match="holds no documents that can be used"):
        list(read_documents([source]))


# --- folders that datasets saved ---


def _save_dataset(folder: Path, texts: Sequence[str]) -> None:
    """Write what ``Dataset.save_to_disk`` writes: two Arrow streams, what they are called, and what they hold."""
    folder.mkdir(parents=True)
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    half = len(texts) // 2
    for name, part in zip(names, (texts[:half], texts[half:]), strict=True):
        table = pa.table({"text": part, "n": range(len(part))})
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_dataset_is_its_arrow_files(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(9)]
    _save_dataset(tmp_path / "saved", texts)
    (tmp_path / "saved" / "cache-0.arrow").write_bytes(b"left over")
    names = ["saved/data-00000-of-00002.arrow"] * 4 + ["saved/data-00001-of-00002.arrow"] * 5
    numbers = [*range(4), *range(5)]
    expected = [(f"{name}:{number}", text) for name, number, text in zip(names, numbers, texts, strict=True)]
    assert _pairs(f"{tmp_path}/saved") == _pairs(f"{tmp_path}/saved/") == _pairs(f"{tmp_path}/sa*") == expected
    found = _read(f"{tmp_path}/saved", metadata=("n",))
    assert [document.metadata["n"] for document in found] == [str(number) for number in numbers]


def test_splits_of_a_saved_dataset_are_named_one_at_a_time(tmp_path: Path) -> None:
    for split in ("train", "test"):
        _save_dataset(tmp_path / "saved" / split, ["A", split])
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [text for _, text in _pairs(f"{tmp_path}/saved/test")] == ["A", "test"]
    _raises(r"is a dataset of the splits train, test; name one, e\.g\. '.*/saved/train'", f"{tmp_path}/saved")
    (tmp_path / "saved/test/state.json").write_text('{"_indices_data_files": [{}], "_data_files": []}')
    _raises(r"is a selection of rows; save it again after flatten_indices", f"{tmp_path}/saved/test")


def test_an_arrow_file_is_read_as_a_stream_is(tmp_path: Path) -> None:
    table = pa.table({"text": [f"text {i}" for i in range(2500)]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert _pairs(f"{tmp_path}/a.arrow") == [(f"a.arrow:{i}", f"text {i}") for i in range(2500)]


class _Hub(MemoryFileSystem):  # type: ignore[misc]
    """Where ``hf://`` leads: paths as the real one has them, ``datasets/<owner>/<name>@<revision>/<file>``."""

    protocol = "hf"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]


def test_a_revision_of_a_hub_dataset_is_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(import_module("fsspec.registry")._registry, "hf", _Hub)
    for revision, text in (("abc123", "A"), ("refs%2Fpr%2F1", "B")):
        _Hub().pipe_file(f"datasets/someone/chats@{revision}/data/a.jsonl", _jsonl([{"text": text}]))
    assert _pairs("hf://datasets/someone/chats@abc123/**/*.jsonl") == [("data/a.jsonl:1", "A")]
    assert _pairs("hf://datasets/someone/chats@refs%2Fpr%2F1/data/*.jsonl") == [("a.jsonl:1", "B")]


@pytest.mark.parametrize("url", ["hf://datasets/someone/chats/**/*.jsonl", "hf://someone/model/a.jsonl"])
def test_files_of_the_hub_without_a_revision_are_refused(url: str) -> None:
    with pytest.raises(SourceError, match=r"names no revision.*(chats|model)@<commit>/"):
        describe_sources([url])


def test_a_version_changes_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A")
    (file,) = describe_sources([f"{tmp_path}/a.txt"])
    first = file_version(file)
    assert file_version(file) == first
    os.utime(tmp_path / "a.txt", (1, 1))
    assert file_version(file) != first
    (builtin,) = describe_sources(["builtin:python-docs"])
    assert file_version(builtin) == file_version(builtin)


# --- chats ---

_SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_chats_from_json_lines_parquet_and_saved_datasets(tmp_path: Path) -> None:
    records = [{"id": "a", "messages": _SAID, "category": "refusal"}, {"id": "b", "messages": _SAID[:1]}]
    (tmp_path / "a.jsonl").write_bytes(_jsonl(records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "b.parquet")
    _save_dataset(tmp_path / "saved", ["A", "B"])
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_stream(str(tmp_path / "saved/data-00000-of-00002.arrow"), table.schema) as writer:
        writer.write_table(table)
    for source in ("a.jsonl", "b.parquet", "saved/data-00000-of-00002.arrow"):
        found = _read(f"{tmp_path}/{source}", messages="messages", metadata=("category",))
        assert [(one.id, one.text, one.metadata["category"]) for one in found] == [
            ("a", "", "refusal"),
            ("b", "", None),
        ]
        assert [[(m.role, m.content) for m in one.messages] for one in found] == [
            [("user", "Hi"), ("model", "Ho")], [("user", "Hi")],
        ]  # fmt: skip


def test_texts_may_stand_among_chats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl([{"messages": _SAID, "text": "not read"}, {"text": "plain"}]))
    (tmp_path / "b.txt").write_text("file")
    found = _read(f"{tmp_path}/*", messages="messages")
    assert [(one.text, len(one.messages)) for one in found] == [("", 2), ("plain", 0), ("file", 0)]


def test_bad_chats_are_named(tmp_path: Path) -> None:
    records = [{"messages": [{"role": "robot", "content": "x"}]}]
    (tmp_path / "a.jsonl").write_bytes(_jsonl(records))
    _raises(r"line 1 of .*: message 0 has the unknown role 'robot'", f"{tmp_path}/a.jsonl", messages="messages")
    match = r"no field 'chat' or 'text'; set messages_field to one of those present: 'messages'"
    _raises(match, f"{tmp_path}/a.jsonl", messages="chat")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    _raises(match, f"{tmp_path}/a.parquet", messages="chat")


def test_files_of_a_web_server_by_name_and_by_pattern(tmp_path: Path) -> None:
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "a.jsonl").write_bytes(_jsonl([{"text": "one"}]))
    (tmp_path / "texts" / "b.jsonl.gz").write_bytes(gzip.compress(_jsonl([{"text": "two"}])))
    (tmp_path / "texts" / "more" / "c.jsonl").write_bytes(_jsonl([{"text": "three"}]))
    with web_server(tmp_path) as url:
        assert [document.text for document in _read(f"{url}/texts/a.jsonl")] == ["one"]
        assert [document.text for document in _read(f"{url}/texts/*.jsonl*")] == ["one", "two"]
        assert [document.text for document in _read(f"{url}/texts/**/*.jsonl*")] == ["one", "two", "three"]
        (file,) = describe_sources([f"{url}/texts/m*/c.jsonl"])
        assert (file.name, file.nbytes) == ("more/c.jsonl", (tmp_path / "texts" / "more" / "c.jsonl").stat().st_size)
        with pytest.raises(SourceError, match=r"d\.jsonl"):
            _read(f"{url}/texts/d.jsonl")
