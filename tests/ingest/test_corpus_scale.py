"""Builds in parts, runs and buckets: the same bytes as at once, taken up after any crash, and bounded in memory."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actlake.ingest import corpus_build, corpus_map, corpus_merge, corpus_parts, corpus_spill
from actlake.ingest.corpus import build_corpus
from actlake.ingest.sources import describe_sources
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_spec import CorpusSpec, TokenSequence
from actlake.storage.errors import BadInputError, CorruptObjectError, SourceError, SpecMismatchError
from actlake.storage.rowspace import KeepRule
from actlake.storage.stores import Store

BOS = 2
SOURCES = ("in/a/*.jsonl", "in/b.parquet", "in/c.jsonl")


class Characters:
    """One token a character; counts the texts it was given."""

    bos_token_id = BOS

    def __init__(self) -> None:
        self.n_texts = 0

    def __call__(self, text: list[str], /, *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert add_special_tokens is False
        self.n_texts += len(text)
        return {"input_ids": [[3 + ord(character) % 60 for character in one] for one in text]}

    def __len__(self) -> int:
        return 64

    def convert_ids_to_tokens(self, ids: list[int], /) -> list[str]:
        return [f"\u2581{i}" for i in ids]


def text_of(number: int) -> str:
    source = random.Random(number)
    return "".join(chr(97 + source.randrange(26)) for _ in range(1 + source.randrange(60)))


def record(number: int) -> dict[str, Any]:
    return {"id": f"d\u00e9{number}", "text": text_of(number), "kind": [None, "x", "y"][number % 3]}


def write_jsonl(path: Path, numbers: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record(number)) + "\n" for number in numbers))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with three sources, and small files so that a corpus has several."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus_build, "SEQUENCES_PER_FILE", 64)
    monkeypatch.setattr(corpus_build, "SEQUENCES_PER_ROW_GROUP", 16)
    for file in range(4):
        write_jsonl(tmp_path / f"in/a/{file}.jsonl", range(file * 20, file * 20 + 20))
    rows = pa.Table.from_pylist([record(number) for number in range(100, 160)])
    pq.write_table(rows, tmp_path / "in/b.parquet", row_group_size=7)
    write_jsonl(tmp_path / "in/c.jsonl", range(200, 260))
    return tmp_path


@pytest.fixture
def spilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a large corpus is built: many parts, many runs of each, many buckets, many ranges of ids."""
    monkeypatch.setattr(corpus_build, "IN_MEMORY_NBYTES", -1)
    monkeypatch.setattr(corpus_parts, "PART_NBYTES", 3_000)
    monkeypatch.setattr(corpus_map, "RUN_NBYTES", 2_000)
    monkeypatch.setattr(corpus_map, "BUCKET_NBYTES", 2_000)
    monkeypatch.setattr(corpus_spill, "DOCUMENTS_PER_TABLE", 4)
    monkeypatch.setattr(corpus_spill, "GROUPS_PER_RUN", 2)
    monkeypatch.setattr(corpus_merge, "_BLOCKS_PER_RANGE", 5)
    monkeypatch.setattr("actlake.ingest.tokenising._BATCH_DOCUMENTS", 6)


def spec_of(**changes: Any) -> CorpusSpec:
    values = {"sources": SOURCES, "context_length": 12, "holdout": 0.2, "tokenizer": "t", "metadata": ("kind",)}
    return CorpusSpec(**{**values, **changes})


def build(place: str, using: Characters | None = None, **changes: Any) -> Corpus:
    return build_corpus(Store(place), spec_of(**changes), using or Characters())


def files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def sequences(corpus: Corpus, split: str = "train") -> list[TokenSequence]:
    return corpus.sequences(split, 0, corpus.splits[split].n_sequences)


def plain(found: list[TokenSequence]) -> list[tuple[object, ...]]:
    return [
        (s.index, s.tokens.tolist(), s.roles.tolist(), s.document, s.window, s.offset, s.source, dict(s.metadata))
        for s in found
    ]


CASES: list[dict[str, Any]] = [
    {},
    {"metadata": (), "sources": ("in/c.jsonl",)},
    {"prepend_bos": False, "seed": 5},
    {"max_tokens": 700},
    {"stride": 5},
    {"weights": dict(zip(SOURCES, (5, 1, 2), strict=True))},
    {"weights": dict(zip(SOURCES, (5, 1, 2), strict=True)), "max_tokens": 500},
    {"quotas": {SOURCES[0]: 300, SOURCES[2]: 41}},
    {"quotas": {SOURCES[0]: 300}, "max_tokens": 900},
    {"quotas": {SOURCES[0]: 300}, "weights": dict.fromkeys(SOURCES, 1)},
]


@pytest.mark.parametrize("changes", CASES)
def test_parts_runs_and_buckets_do_not_show_in_the_bytes(
    work: Path, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    build("once", **changes)
    request.getfixturevalue("spilled")
    corpus = build("spilled", **changes)
    assert files(work / "spilled") == files(work / "once")
    assert corpus.verify() > 2


# --- The bytes ----------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_file_follow_from_its_sequences_alone(work: Path) -> None:
    """A file is what the plainest writer makes of its sequences, row group by row group."""
    corpus = build("c")
    (path,) = (work / "c/sequences").glob("train-0000000064-*.parquet")
    label = pa.dictionary(pa.int32(), pa.string())
    lists = {"tokens": pa.list_(pa.int32()), "roles": pa.list_(pa.uint8())}
    kinds = {"sequence": pa.int64(), **lists, "document": pa.string(), "window": pa.int32(), "offset": pa.int32()}
    schema = pa.schema({**kinds, "source": label, "kind": label})
    written = pa.BufferOutputStream()
    options: Any = {"compression": "zstd", "use_dictionary": ["document", "source", "kind"]}
    with pq.ParquetWriter(written, schema, write_page_checksum=True, **options) as writer:
        for start in range(64, 128, 16):
            found = corpus.sequences("train", start, start + 16)
            columns: dict[str, Any] = {
                "sequence": [s.index for s in found],
                "tokens": pa.array([s.tokens.tolist() for s in found], lists["tokens"]),
                "roles": pa.array([s.roles.tolist() for s in found], lists["roles"]),
                "document": [s.document for s in found],
                "window": [s.window for s in found],
                "offset": [s.offset for s in found],
                "source": pa.array([s.source for s in found]).dictionary_encode(),
                "kind": pa.array([s.metadata["kind"] for s in found], pa.string()).dictionary_encode(),
            }
            writer.write_table(pa.table(columns, schema=schema), row_group_size=16)
    assert path.read_bytes() == written.getvalue().to_pybytes()


def test_a_row_group_of_a_large_parquet_file_is_a_piece_and_rows_keep_their_numbers(work: Path, spilled: None) -> None:
    rows = pa.table({"text": [text_of(i) for i in range(90)], "kind": ["x"] * 90})
    pq.write_table(rows, work / "in/large.parquet", row_group_size=8)
    store = Store(work / "in")
    parts = corpus_parts.plan_parts(describe_sources(("in/large.parquet",)), None)
    assert len(parts) > 1
    assert store.nbytes("large.parquet") > corpus_parts.PART_NBYTES
    groups = [piece.groups for part in parts for piece in part.pieces]
    assert [group for span in groups if span for group in range(*span)] == list(range(12))
    found = {
        s.document: s
        for split in ("train", "heldout")
        for s in sequences(build("c", sources=("in/large.parquet",)), split)
    }
    assert set(found) == {f"large.parquet:{i}" for i in range(90)}


# --- Crashes ------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, n_writes: int) -> Callable[[], None]:
    """Have the write number ``n_writes`` from now fail; return what mends it."""
    write, n_done = Store.write, 0

    def fail(self: Store, key: str, *parts: bytes | memoryview) -> None:
        nonlocal n_done
        n_done += 1
        if n_done > n_writes:
            raise Interrupted
        write(self, key, *parts)

    monkeypatch.setattr(Store, "write", fail)
    return lambda: monkeypatch.setattr(Store, "write", write)


def test_a_part_that_is_done_is_not_tokenised_again(work: Path, spilled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Characters()
    build("whole", whole)
    n_texts = 0
    for n_writes in range(2, 400, 23):
        before, after = Characters(), Characters()
        mend = interrupt(monkeypatch, n_writes)
        try:
            build(f"c{n_writes}", before)
            break
        except Interrupted:
            mend()
        assert not (work / f"c{n_writes}/corpus.json").exists() or n_writes > 100
        build(f"c{n_writes}", after)
        assert files(work / f"c{n_writes}") == files(work / "whole")
        # Only the part that broke off is done twice.
        assert whole.n_texts <= before.n_texts + after.n_texts <= whole.n_texts + 60
        n_texts += after.n_texts < whole.n_texts
    else:
        raise AssertionError("no build ended")
    mend()
    assert n_texts > 0


def test_a_file_that_has_changed_since_the_crash_is_read_again(
    work: Path, spilled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend = interrupt(monkeypatch, 20)
    with pytest.raises(Interrupted):
        build("c")
    mend()
    path = work / "in/a/0.jsonl"
    path.write_text(path.read_text().replace('"kind": "x"', '"kind": "y"'))  # of the same size
    build("c")
    build("fresh")
    assert files(work / "c") == files(work / "fresh")


def test_a_damaged_run_is_named(work: Path, spilled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mend = interrupt(monkeypatch, 20)
    with pytest.raises(Interrupted):
        build("c")
    mend()
    run = sorted((work / "c/building").rglob("*-windows"))[0]
    data = bytearray(run.read_bytes())
    data[len(data) // 2] ^= 1
    run.write_bytes(data)
    with pytest.raises(CorruptObjectError, match=r"-windows, bytes \d+:\d+: damaged .*delete the folder 'building'"):
        build("c")


def test_what_was_kept_meanwhile_is_gone_at_the_end(work: Path, spilled: None) -> None:
    kept: list[int] = []

    def look(_documents: int, _tokens: int) -> None:
        kept.append(len(list((work / "c/building").rglob("*"))))

    build_corpus(Store("c"), spec_of(), Characters(), progress=look)
    assert max(kept) > 10
    assert not [path for path in (work / "c").rglob("building/**/*") if path.is_file()]


def test_sequences_are_counted_as_they_are_written(work: Path) -> None:
    told: list[tuple[int, int]] = []
    corpus = build_corpus(Store("c"), spec_of(), Characters(), sequences=lambda *done: told.append(done))
    total = sum(info.n_sequences for info in corpus.splits.values())
    assert told == sorted(told)
    assert len(told) > 3
    assert told[-1] == (total, total)


# --- Mixtures -----------------------------------------------------------------------------------------------------


def test_weights_give_every_prefix_its_proportions(work: Path) -> None:
    for source in (0, 1):
        write_jsonl(work / f"in/{source}.jsonl", range(source * 3000, (1 + source) * 3000))
    sources = ("in/0.jsonl", "in/1.jsonl")
    weights = {sources[0]: 0.8, sources[1]: 0.2}
    whole = build("whole", sources=sources, metadata=(), weights=weights, holdout=0.0)
    share = whole.mixture[sources[1]]["share"]
    assert whole.mixture[sources[0]]["share"] == 1.0
    assert share == pytest.approx(0.25, rel=0.1)
    for n in (len(sequences(whole)) // 8, len(sequences(whole))):
        prefix = sequences(whole)[:n]
        of_first = sum(len(s.tokens) for s in prefix if s.source == sources[0])
        assert of_first / sum(len(s.tokens) for s in prefix) == pytest.approx(0.8, abs=0.03)
    # No document is torn: kept ones have all of their windows.
    every = build("every", sources=sources, metadata=(), holdout=0.0)
    kept = {s.document for s in sequences(whole)}
    assert [(s.document, s.window) for s in sequences(whole)] == [
        (s.document, s.window) for s in sequences(every) if s.document in kept
    ]
    assert whole.corpus_id != every.corpus_id


def test_a_quota_takes_the_first_windows_of_its_source(work: Path) -> None:
    every = build("every", metadata=())
    corpus = build("c", metadata=(), quotas={SOURCES[1]: 100})
    wanted, n_tokens = [], 0
    for s in sequences(every):
        if s.source == SOURCES[1]:
            if n_tokens >= 100:
                continue
            n_tokens += len(s.tokens)
        wanted.append((s.document, s.window))
    assert [(s.document, s.window) for s in sequences(corpus)] == wanted
    assert corpus.splits["train"].tokens_by_source[SOURCES[1]] == n_tokens
    # As large a share of the held-out split: ceil(100 * 0.2 / 0.8) tokens.
    n_heldout = corpus.splits["heldout"].tokens_by_source[SOURCES[1]]
    assert 25 <= n_heldout < 25 + 12
    assert corpus.complete


def test_a_larger_limit_extends_a_mixture(work: Path) -> None:
    changes: dict[str, Any] = {"weights": dict(zip(SOURCES, (5, 1, 2), strict=True)), "quotas": {SOURCES[0]: 200}}
    small = plain(sequences(build("c", **changes, max_tokens=200)))
    grown = build("c", **changes)
    assert plain(sequences(grown))[: len(small)] == small
    build("fresh", **changes)
    assert files(work / "c") == files(work / "fresh")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"weights": {"in/d.jsonl": 1}},
            r"weights names 'in/d\.jsonl', which is no source; did you mean 'in/c\.jsonl'",
        ),
        ({"weights": {SOURCES[0]: 1}}, r"weights has none for 'in/b\.parquet'"),
        ({"weights": {SOURCES[0]: 0}}, r"weights\['in/a/\*\.jsonl'\] = 0 must be above 0"),
        ({"quotas": {SOURCES[0]: "many"}}, r"quotas\['in/a/\*\.jsonl'\] = many must be above 0"),
    ],
)
def test_a_mixture_is_checked(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(BadInputError, match=match):
        spec_of(**changes)


# --- Labels and bad documents -------------------------------------------------------------------------------------


def test_tokens_are_counted_by_label(work: Path) -> None:
    corpus = build("c")
    for split, info in corpus.splits.items():
        counts: dict[str, int] = {}
        for s in sequences(corpus, split):
            if s.metadata["kind"] is not None:
                counts[s.metadata["kind"]] = counts.get(s.metadata["kind"], 0) + len(s.tokens)
        assert info.tokens_by_label == {"kind": counts}
        assert list(info.tokens_by_label["kind"].values()) == sorted(counts.values(), reverse=True)


def test_a_field_of_very_many_labels_lists_those_with_most_tokens(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = build("every", metadata=("id",)).splits["train"].tokens_by_label["id"]
    monkeypatch.setattr("actlake.ingest.corpus_write.LABELS_LISTED", 7)
    few = build("few", metadata=("id",)).splits["train"].tokens_by_label["id"]
    assert list(few.items()) == sorted(every.items(), key=lambda item: (-item[1], item[0]))[:7]


@pytest.mark.parametrize("many", [False, True])
def test_bad_documents_are_put_aside_and_the_rest_is_what_it_is_without_them(
    work: Path, many: bool, request: pytest.FixtureRequest
) -> None:
    if many:
        request.getfixturevalue("spilled")
    build("good")
    lines = [
        '{"id": "d\u00e92", "text": "a twin"}',
        '{"id": "e", "text": ""}',
        "{",
        '{"id": "d\u00e92", "text": "third"}',
    ]
    with (work / "in/c.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    for on_bad, expected in (("raise", SourceError), ("skip", BadInputError)):
        with pytest.raises(expected):
            build_corpus(Store("c"), spec_of(), Characters(), on_bad=on_bad)
    corpus = build_corpus(Store("c"), spec_of(), Characters(), on_bad="quarantine")
    assert corpus.corpus_id == Corpus.open(Store("good")).corpus_id
    assert plain(sequences(corpus)) == plain(sequences(Corpus.open(Store("good"))))
    found = corpus.quarantine().to_pylist()
    assert found == pq.read_table(io.BytesIO(Store("c").read("quarantine.parquet"))).to_pylist()
    names = [(bad["document"], bad["place"].removeprefix("c.jsonl, line ")) for bad in found]
    assert names == [("d\u00e92", "61"), ("e", "62"), ("", "63"), ("d\u00e92", "64")]
    assert "two documents have the id" in found[0]["reason"]
    assert "0.jsonl, line 3 of 'in/a/*.jsonl' has it too" in found[3]["reason"]
    assert corpus.verify() == Corpus.open(Store("good")).verify() + 1


# --- Segments -----------------------------------------------------------------------------------------------------


def append(place: str, **changes: Any) -> Corpus:
    return build_corpus(Store(place), spec_of(**changes), Characters(), append=True)


@pytest.mark.parametrize("many", [False, True])
def test_new_documents_follow_those_that_are_there(work: Path, many: bool, request: pytest.FixtureRequest) -> None:
    if many:
        request.getfixturevalue("spilled")
    first = build("c")
    index = first.row_index("train", KeepRule(exclude=(BOS,))).first_row
    old = {split: plain(sequences(first, split)) for split in first.splits}
    write_jsonl(work / "in/a/4.jsonl", range(400, 430))
    second = append("c")
    write_jsonl(work / "more.jsonl", range(500, 560))
    third = append("c", sources=(*SOURCES, "more.jsonl"))
    assert third.corpus_id == first.corpus_id
    assert third.chain[:2] == second.chain
    assert (len(second.chain), len(third.chain), third.chain[0]) == (2, 3, first.corpus_id)
    for split, before in old.items():
        found = plain(sequences(third, split))
        assert found[: len(before)] == before
        # What came later has an order of its own: that of a corpus of these documents alone.
        write_jsonl(work / "alone.jsonl", range(500, 560))
        alone = build(f"alone-{split}", sources=("alone.jsonl",))
        n = alone.splits[split].n_sequences
        assert [s[1:6] for s in found[len(found) - n :]] == [s[1:6] for s in plain(sequences(alone, split))]
        assert [s[0] for s in found] == list(range(len(found)))
        info = third.splits[split]
        assert info.n_sequences == len(found)
        assert info.n_documents == sum(segment.splits[split].n_documents for segment in third.segments)
    grown = third.row_index("train", KeepRule(exclude=(BOS,))).first_row
    assert grown[: len(index)].tolist() == index.tolist()
    assert len(grown) == third.splits["train"].n_sequences + 1
    assert third.verify() > 4
    # A handle of before reads on.
    assert plain(sequences(first)) == old["train"]
    # Every job whose documents are a prefix of these is served.
    assert build("c", sources=(*SOURCES, "more.jsonl")).chain == third.chain


def test_a_corpus_in_segments_needs_a_reader_that_knows_them(work: Path) -> None:
    build("c")
    write_jsonl(work / "in/a/4.jsonl", range(400, 430))
    append("c")
    header = json.loads((work / "c/corpus.json").read_bytes())
    assert header["format_version"] == 4
    assert [len(segment["source_files"]) for segment in header["segments"]] == [6, 1]
    assert len(header["source_files"]) == 7


def test_documents_are_appended_on_request_alone(work: Path) -> None:
    build("c")
    before = files(work / "c")
    write_jsonl(work / "in/a/4.jsonl", range(400, 430))
    with pytest.raises(SourceError, match=r"4\.jsonl of .*; restore them.*or append the new files with"):
        build("c")
    write_jsonl(work / "more.jsonl", range(500, 560))
    with pytest.raises(SourceError, match=r"sources changed .*4\.jsonl .*more\.jsonl"):
        build("c", sources=(*SOURCES, "more.jsonl"))
    with pytest.raises(SpecMismatchError, match=r"sources: .* there, .* asked"):
        append("c", sources=("more.jsonl",))
    write_jsonl(work / "in/c.jsonl", range(200, 261))
    with pytest.raises(SourceError, match=r"sources changed .* c\.jsonl of 'in/c\.jsonl'"):
        append("c")
    assert files(work / "c") == before


def test_a_segment_cannot_be_appended_to_a_part_nor_to_a_mixture(work: Path) -> None:
    build("cut", max_tokens=300)
    build("mixed", weights=dict.fromkeys(SOURCES, 1))
    write_jsonl(work / "in/a/4.jsonl", range(400, 430))
    with pytest.raises(BadInputError, match="is cut by max_tokens = 300: documents are appended to a whole corpus"):
        append("cut")
    with pytest.raises(BadInputError, match="is a mixture by weights or quotas"):
        append("mixed", weights=dict.fromkeys(SOURCES, 1))


def test_an_id_that_the_corpus_holds_is_not_appended_again(work: Path, spilled: None) -> None:
    build("c")
    write_jsonl(work / "in/a/4.jsonl", range(100, 103))
    with pytest.raises(SourceError, match=r"document 'dé100'.*two documents have the id .*the corpus holds it already"):
        append("c")


def test_a_segment_that_is_cut_grows(work: Path) -> None:
    first = build("c")
    write_jsonl(work / "in/a/4.jsonl", range(400, 430))
    limit = first.splits["train"].n_tokens + 50
    cut = append("c", max_tokens=limit)
    assert not cut.complete
    assert cut.splits["train"].n_tokens >= limit > first.splits["train"].n_tokens
    grown = append("c")
    assert grown.complete
    assert grown.chain == cut.chain
    n = cut.splits["train"].n_sequences
    assert plain(sequences(grown))[:n] == plain(sequences(cut))


def test_of_two_appends_at_once_one_is_told_to_run_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("c")
    write_jsonl(work / "in/a/4.jsonl", range(400, 430))
    write, pending = Store.write, ["the other append"]

    def interleaved(self: Store, key: str, *parts: bytes | memoryview) -> None:
        if pending and key.startswith("sequences/"):
            pending.clear()
            (work / "in/a/4.jsonl").rename(work / "4.jsonl")
            write_jsonl(work / "in/a/5.jsonl", range(600, 650))
            append("c")
        write(self, key, *parts)

    monkeypatch.setattr(Store, "write", interleaved)
    with pytest.raises(SourceError, match=r"appended to .* at the same time; run this build again"):
        append("c")
    found = Corpus.open(Store("c"))
    assert [file.name for file in found.segments[1].source_files] == ["5.jsonl"]
    assert found.verify() > 3


# --- What is there, and what differs ------------------------------------------------------------------------------


def test_a_finished_corpus_needs_no_sources(work: Path) -> None:
    build("c", max_tokens=300)
    (work / "in").rename(work / "gone")
    tokenizer = Characters()
    assert build("c", tokenizer, max_tokens=200).splits["train"].n_tokens >= 300
    assert tokenizer.n_texts == 0
    with pytest.raises(SourceError):
        build("c", max_tokens=600)


class Renamed(Characters):
    def convert_ids_to_tokens(self, ids: list[int], /) -> list[str]:
        return ["other" if i == 17 else f"\u2581{i}" for i in ids]


def test_another_tokenizer_is_told_by_the_first_token_that_differs(work: Path) -> None:
    build("c")
    for tokenizer, match in (
        (Renamed(), "the first token id that differs is 17: ' 17' there, 'other' asked"),
        (Characters(), "all pieces of the vocabulary are the same: special ids, or the way texts are cut"),
    ):
        with pytest.raises(SpecMismatchError, match=rf"tokenizer: 't' there, 'u' asked; {match}"):
            build("c", tokenizer, tokenizer="u")
