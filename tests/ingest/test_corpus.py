"""Corpora: exact windows, an order by hash that survives any cut of the input, growth, resume, damage, refusals."""

import hashlib
import json
import multiprocessing
import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actlake.ingest import corpus_build
from actlake.ingest.corpus import build_corpus
from actlake.ingest.corpus_cuts import cut_key
from actlake.ingest.corpus_windows import order_key, split_of
from actlake.ingest.documents import Document
from actlake.ingest.tokenising import batches
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_spec import CorpusSpec, TokenSequence
from actlake.storage.errors import (
    BadInputError,
    CorruptObjectError,
    FormatVersionError,
    MissingObjectError,
    NotFoundError,
    SourceError,
    SpecMismatchError,
)
from actlake.storage.rowspace import KeepRule, content_hash
from actlake.storage.stores import Store

BOS = 2
N_DOCUMENTS = 60


class CharacterTokenizer:
    """One token a character; a tab gives none."""

    def __init__(self, bos: int | None = BOS) -> None:
        self.bos_token_id = bos
        self.n_calls = 0

    def __call__(self, text: list[str], /, *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert add_special_tokens is False
        self.n_calls += 1
        return {"input_ids": [_tokens(one) for one in text]}

    def __len__(self) -> int:
        return 64

    def convert_ids_to_tokens(self, ids: list[int], /) -> list[str | None]:
        return [None if i == 63 else f"\u2581{i}" for i in ids]


def _tokens(text: str) -> list[int]:
    return [3 + ord(character) % 60 for character in text if character != "\t"]


def _text(i: int) -> str:
    """Return 1 to 40 characters that depend on the number of the document."""
    return "".join(chr(97 + (i * 7 + j * j) % 26) for j in range(1 + i * 13 % 40))


def _write_sources(folder: Path, numbers: list[int], n_files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(n_files):
        part = numbers[file * len(numbers) // n_files : (file + 1) * len(numbers) // n_files]
        lines = [json.dumps({"id": f"d{i}", "text": _text(i)}) for i in part]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the documents below ``in/``, and small files so that a corpus has several."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus_build, "SEQUENCES_PER_FILE", 32)
    monkeypatch.setattr(corpus_build, "SEQUENCES_PER_ROW_GROUP", 8)
    _write_sources(tmp_path / "in", list(range(N_DOCUMENTS)), 3)
    return tmp_path


def _spec(**changes: Any) -> CorpusSpec:
    values = {"sources": ("in/*.jsonl",), "context_length": 8, "holdout": 0.2, "tokenizer": "characters"}
    return CorpusSpec(**{**values, **changes})


def _build(place: Path | str, **changes: Any) -> Corpus:
    return build_corpus(Store(place), _spec(**changes), CharacterTokenizer())


def _all(corpus: Corpus, split: str) -> list[TokenSequence]:
    return corpus.sequences(split, 0, corpus.splits[split].n_sequences)


def _plain(sequences: list[TokenSequence]) -> list[tuple[object, ...]]:
    return [(s.index, s.tokens.tolist(), s.roles.tolist(), s.document, s.window, s.offset, s.source) for s in sequences]


def _files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def _hash(message: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "big")


def _expected(split: str, context: int, bos: list[int], seed: int = 0) -> list[tuple[object, ...]]:
    """Cut and order the documents by the words of the format alone."""
    found = []
    step = context - len(bos)
    for i in range(N_DOCUMENTS):
        name = f"d{i}".encode()
        held_out = _hash(b"holdout" + seed.to_bytes(8, "big") + name) / 2**64 < 0.2
        if held_out == (split == "heldout"):
            tokens = _tokens(_text(i))
            for window, offset in enumerate(range(0, len(tokens), step)):
                key = _hash(b"order" + seed.to_bytes(8, "big") + name + window.to_bytes(4, "big"))
                found.append((key, name, window, bos + tokens[offset : offset + step], offset))
    return [
        (index, tokens, [0] * len(tokens), name.decode(), window, offset, "in/*.jsonl")
        for index, (_, name, window, tokens, offset) in enumerate(sorted(found))
    ]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize(("context", "prepend_bos", "seed"), [(8, True, 0), (7, False, 0), (64, True, 5), (2, True, 0)])
def test_sequences_are_windows_of_documents_in_the_order_of_their_hashes(
    work: Path, split: str, context: int, prepend_bos: bool, seed: int
) -> None:
    corpus = _build("c", context_length=context, prepend_bos=prepend_bos, seed=seed)
    expected = _expected(split, context, [BOS] if prepend_bos else [], seed)
    sequences = _all(corpus, split)
    assert _plain(sequences) == expected
    assert {(s.tokens.dtype, s.roles.dtype) for s in sequences} == {(np.dtype(np.int32), np.dtype(np.uint8))}
    info = corpus.splits[split]
    assert info.n_sequences == len(expected)
    assert info.n_tokens == info.tokens_by_source["in/*.jsonl"] == sum(len(s.tokens) for s in sequences)
    assert info.n_documents == len({s.document for s in sequences})
    corpus.verify()


def test_splits_share_no_document(work: Path) -> None:
    corpus = _build("c")
    train, heldout = ({s.document for s in _all(corpus, split)} for split in ("train", "heldout"))
    assert train.isdisjoint(heldout)
    assert train | heldout == {f"d{i}" for i in range(N_DOCUMENTS)}
    assert heldout


def test_order_and_split_are_fixed_for_ever() -> None:
    # Values of blake2b over the bytes that docs/format.md gives.
    message = b"order" + bytes(7) + b"\x05" + "d\u00e9".encode() + b"\x00\x00\x01\x00"
    assert order_key(5, "d\u00e9", 256) == _hash(message)
    assert order_key(0, "python-docs/assert", 0) == 0x17C497716DEB0F9F
    assert [split_of(0, 0.0, "x"), split_of(0, 1 - 2**-53, "x")] == ["train", "heldout"]
    n_held_out = sum(split_of(0, 0.05, f"d{i}") == "heldout" for i in range(4000))
    assert n_held_out == 207


def test_same_documents_give_same_bytes_however_they_are_cut_and_listed(work: Path) -> None:
    first = _build("one")
    for split in first.splits:
        first.row_index(split, KeepRule(exclude=(BOS,)))
    one = _files(work / "one")
    again = _build("again")
    for split in again.splits:
        again.row_index(split, KeepRule(exclude=(BOS,)))
    assert _files(work / "again") == one
    for path in (work / "in").iterdir():
        path.unlink()
    _write_sources(work / "in", [i * 7 % N_DOCUMENTS for i in range(N_DOCUMENTS)], 5)
    other = _build("other")
    for split in other.splits:
        other.row_index(split, KeepRule(exclude=(BOS,)))
    two = _files(work / "other")
    assert other.corpus_id == first.corpus_id
    # Only the list of source files differs.
    cut = cut_key(first.corpus_id, first.splits["train"].n_sequences)
    assert {key for key in one | two if one.get(key) != two.get(key)} == {"corpus.json", cut}
    assert len([key for key in one if key.startswith("sequences/train")]) > 1


def test_batches_do_not_show_in_the_bytes(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _build("one")
    monkeypatch.setattr("actlake.ingest.tokenising._BATCH_DOCUMENTS", 7)
    _build("two")
    assert _files(work / "one") == _files(work / "two")


def test_order_of_sources_does_not_matter(work: Path) -> None:
    sources = ("in/0.jsonl", "in/1.jsonl", "in/2.jsonl")
    one, two = _build("one", sources=sources), _build("two", sources=sources[::-1])
    assert _files(work / "one") == _files(work / "two")
    info = one.splits["train"]
    assert set(info.tokens_by_source) == set(sources)
    assert sum(info.tokens_by_source.values()) == info.n_tokens == two.splits["train"].n_tokens


def test_identity_is_of_the_text_not_of_its_place(work: Path) -> None:
    corpus = _build("c")
    _write_sources(work / "elsewhere", list(range(N_DOCUMENTS)), 1)
    assert _build("moved", sources=("elsewhere/*.jsonl",)).corpus_id == corpus.corpus_id
    assert _build("seeded", seed=1).corpus_id != corpus.corpus_id
    _write_sources(work / "changed", [*range(N_DOCUMENTS - 1), N_DOCUMENTS], 1)
    assert _build("changed-corpus", sources=("changed/*.jsonl",)).corpus_id != corpus.corpus_id
    assert b"/" + work.name.encode() not in (work / "c" / "corpus.json").read_bytes()


def test_a_limit_keeps_the_shortest_prefix_and_twice_the_limit_extends_it(work: Path) -> None:
    whole = _plain(_all(_build("whole"), "train"))
    running = np.cumsum([len(tokens) for _, tokens, *_ in whole])  # type: ignore[arg-type]
    for limit in (1, 100, int(running[20]), int(running[20]) + 1, 200, 400):
        corpus = _build("grown", max_tokens=limit)
        assert corpus.splits["train"].n_sequences == int(np.searchsorted(running, limit)) + 1
        assert _plain(_all(corpus, "train")) == whole[: corpus.splits["train"].n_sequences]
        assert corpus.row_index("train", KeepRule()).n_rows == corpus.splits["train"].n_tokens >= limit
        _build(f"fresh-{limit}", max_tokens=limit).row_index("train", KeepRule())
        assert _files(work / "grown") == _files(work / f"fresh-{limit}")
    assert _build("grown").corpus_id == Corpus.open(Store("fresh-1")).corpus_id
    assert _plain(_all(Corpus.open(Store("grown")), "train")) == whole


def test_what_is_there_is_opened_without_tokenising(work: Path) -> None:
    _build("c", max_tokens=300)
    before = _files(work / "c")
    tokenizer = CharacterTokenizer()
    for limit in (300, 100):
        corpus = build_corpus(Store("c"), _spec(max_tokens=limit), tokenizer)
        assert corpus.spec.max_tokens == 300
    assert tokenizer.n_calls == 0
    assert _files(work / "c") == before
    _build("whole")
    assert build_corpus(Store("whole"), _spec(max_tokens=10**9), tokenizer).complete
    assert tokenizer.n_calls == 0


class _Interrupted(Exception):
    pass


def _interrupt(place: str, monkeypatch: pytest.MonkeyPatch, n_writes: int, **changes: Any) -> None:
    write, n_done = Store.write, 0

    def fail(self: Store, key: str, data: bytes) -> None:
        nonlocal n_done
        if n_done == n_writes:
            raise _Interrupted
        n_done += 1
        write(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", fail)
        with pytest.raises(_Interrupted):
            _build(place, **changes)


def test_a_build_broken_off_anywhere_is_invisible_and_the_next_one_whole(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _build("whole")
    n_files = len(_files(work / "whole"))
    for n_writes in range(n_files):
        _interrupt("c", monkeypatch, n_writes)
        with pytest.raises(NotFoundError, match="no corpus at"):
            Corpus.open(Store("c"))
    # All but corpus.json was there: the larger build is taken up where it stopped.
    assert _build("c", max_tokens=100).complete
    assert _files(work / "c") == _files(work / "whole")


def test_a_smaller_build_leaves_what_may_be_of_a_larger_one_at_work_and_the_larger_takes_it_up(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _build("whole")
    _build("small", max_tokens=100)
    _interrupt("c", monkeypatch, 4)
    unfinished = _files(work / "c")
    assert len(unfinished) == 4
    _build("c", max_tokens=100).verify()
    assert _files(work / "c") == unfinished | _files(work / "small")
    _build("c")
    assert _files(work / "c") == _files(work / "whole")


def test_an_extension_broken_off_anywhere_leaves_the_smaller_corpus_readable(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = _plain(_all(_build("small", max_tokens=200), "train"))
    n_files = len(_files(work / "small"))
    for n_writes in range(n_files):
        _build(f"c{n_writes}", max_tokens=200)
        _interrupt(f"c{n_writes}", monkeypatch, n_writes)
        corpus = Corpus.open(Store(f"c{n_writes}"))
        assert _plain(_all(corpus, "train")) == small
        assert corpus.row_index("train", KeepRule()).n_sequences == len(small)


# --- Metadata -----------------------------------------------------------------------------------------------------


def _write_labelled(folder: Path, label: Callable[[int], str | None], n_files: int = 2) -> None:
    folder.mkdir(exist_ok=True)
    for file in range(n_files):
        lines = [
            json.dumps({"id": f"d{i}", "text": _text(i), "kind": label(i), "n": i % 3})
            for i in range(file, N_DOCUMENTS, n_files)
        ]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))


def _kind(i: int) -> str | None:
    return None if i % 4 == 0 else f"kind-{i % 4}"


def test_metadata_travel_with_every_window_of_their_document(work: Path) -> None:
    _write_labelled(work / "labelled", _kind)
    corpus = _build("c", sources=("labelled/*.jsonl",), metadata=("n", "kind"))
    for split in corpus.splits:
        sequences = _all(corpus, split)
        # The same sequences as without, with labels.
        assert [s[:-1] for s in _plain(sequences)] == [s[:-1] for s in _expected(split, 8, [BOS])]
        for sequence in sequences:
            i = int(sequence.document[1:])
            assert dict(sequence.metadata) == {"kind": _kind(i), "n": str(i % 3)}
    schema = pq.read_schema(next((work / "c/sequences").iterdir()))
    assert schema.names[-3:] == ["source", "kind", "n"]
    assert {schema.field(name).type for name in schema.names[-3:]} == {schema.field("source").type}
    assert _plain(corpus.sequences("train", 3, 5)) == _plain(_all(corpus, "train")[3:5])


def test_without_metadata_nothing_changes(work: Path) -> None:
    _write_labelled(work / "in", _kind, n_files=3)
    corpus = _build("c")
    value = json.loads((work / "c/corpus.json").read_bytes())
    assert value["format_version"] == 1
    assert "metadata" not in value["spec"]
    assert corpus.spec.metadata == ()
    assert {dict(s.metadata) == {} for s in _all(corpus, "train")} == {True}
    # What an actlake without metadata gave these texts.
    assert corpus.corpus_id == "432fb35185cca876c2974718026ca9431432bd32ed787f2a9117e96bed2c3e8a"
    assert corpus.spec.definition_id == "b4d44ac526ebc30a"


def test_metadata_are_part_of_the_identity_and_the_version(work: Path) -> None:
    _write_labelled(work / "labelled", _kind)
    sources = ("labelled/*.jsonl",)
    plain, kinds = _build("plain", sources=sources), _build("kinds", sources=sources, metadata=["kind"])
    assert json.loads((work / "kinds/corpus.json").read_bytes())["format_version"] == 3
    assert plain.corpus_id != kinds.corpus_id
    assert _build("twice", sources=sources, metadata=("n", "kind")).spec == _spec(
        sources=sources, metadata=("kind", "n")
    )
    # The same fields with other values.
    _write_labelled(work / "labelled", lambda i: _kind(i + 1))
    assert _build("plain-2", sources=sources).corpus_id == plain.corpus_id
    assert _build("kinds-2", sources=sources, metadata=("kind",)).corpus_id != kinds.corpus_id
    # By the words of the format alone.
    digest = hashlib.sha256()
    for i in sorted(range(N_DOCUMENTS), key=lambda i: f"d{i}"):
        label = json.dumps({"kind": _kind(i)}, separators=(",", ":"))
        for part in (f"d{i}", _text(i), label):
            digest.update(hashlib.sha256(part.encode()).digest())
    assert kinds.corpus_id == content_hash(kinds.spec.rules | {"documents": digest.hexdigest()})


def test_a_labelled_corpus_grows_and_survives_another_cut_of_its_files(work: Path) -> None:
    _write_labelled(work / "labelled", _kind)
    options: dict[str, Any] = {"sources": ("labelled/*.jsonl",), "metadata": ("kind",)}
    _build("grown", **options, max_tokens=100)
    _build("grown", **options)
    _build("whole", **options)
    assert _files(work / "grown") == _files(work / "whole")
    sequences = {key: data for key, data in _files(work / "whole").items() if key.startswith("sequences")}
    (work / "labelled/1.jsonl").unlink()
    _write_labelled(work / "labelled", _kind, n_files=1)
    _build("again", **options)
    again = {key: data for key, data in _files(work / "again").items() if key.startswith("sequences")}
    assert again == sequences
    with pytest.raises(SpecMismatchError, match=r"metadata: \['kind'\] there, None asked"):
        _build("whole", sources=options["sources"])


# --- Several builds at once ---------------------------------------------------------------------------------------


def _during_write(n_writes: int, then: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something happen right before write number ``n_writes`` from now, when the writer has made up its mind."""
    write, n_done = Store.write, 0

    def interleaved(self: Store, key: str, *parts: bytes | memoryview) -> None:
        nonlocal n_done
        n_done += 1
        if n_done - 1 == n_writes:
            then()
        write(self, key, *parts)

    monkeypatch.setattr(Store, "write", interleaved)


@pytest.mark.parametrize("present", [None, 50])
@pytest.mark.parametrize("limits", [(100, 400), (400, 100), (200, 200)])
def test_a_build_inside_another_at_any_write_loses_nothing(
    work: Path, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], present: int | None
) -> None:
    _build("fresh", max_tokens=max(limits))
    expected, train = _files(work / "fresh"), _plain(_all(Corpus.open(Store("fresh")), "train"))
    for n_writes in range(len(expected)):
        place = f"c{n_writes}"
        inner: list[Corpus] = []
        handles = [] if present is None else [_build(place, max_tokens=present)]
        for handle in handles:
            _all(handle, "train")  # Its files are open: they go away under it.
            handle._groups.clear()
        with monkeypatch.context() as patch:
            then = partial(_append_build, inner, place, max_tokens=limits[1])
            _during_write(n_writes, then, patch)
            handles.append(_build(place, max_tokens=limits[0]))
        if not inner:  # The outer build was over before.
            assert n_writes > 4
            return
        assert _files(work / place) == expected
        for corpus in (*handles, *inner):
            assert _plain(_all(corpus, "train")) == train[: corpus.splits["train"].n_sequences]
            assert corpus.row_index("train", KeepRule()).n_sequences == corpus.splits["train"].n_sequences
            assert corpus.pieces()[:2] == [" 0", " 1"]
        assert handles[-1].splits["train"].n_sequences == len(train)


def _append_build(to: list[Corpus], place: str, **changes: Any) -> None:
    to.append(_build(place, **changes))


class _Turns:
    """Lets one of several threads go on at a time, chosen by a seed at each of their calls of a store."""

    def __init__(self, seed: int, names: list[str]) -> None:
        self._random = random.Random(seed)
        self._running = sorted(names)
        self._changed = threading.Condition()
        self._next = self._random.choice(self._running)

    def take(self) -> None:
        with self._changed:
            name = threading.current_thread().name
            self._pass_on()
            assert self._changed.wait_for(lambda: self._next == name, timeout=30)

    def end(self) -> None:
        with self._changed:
            self._running.remove(threading.current_thread().name)
            self._pass_on()

    def _pass_on(self) -> None:
        if self._running:
            self._next = self._random.choice(self._running)
        self._changed.notify_all()


def _take_turns(method: Callable[..., Any], turns: _Turns) -> Callable[..., Any]:
    def waiting(self: Store, *arguments: Any) -> Any:
        turns.take()
        return method(self, *arguments)

    return waiting


def test_builds_at_once_end_as_the_largest_in_any_order_of_their_calls(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = (100, 300, 400)
    _build("fresh", max_tokens=max(limits))
    expected, train = _files(work / "fresh"), _plain(_all(Corpus.open(Store("fresh")), "train"))
    for seed in range(30):
        place, turns = f"c{seed}", _Turns(seed, [str(limit) for limit in limits])
        with monkeypatch.context() as patch, ThreadPoolExecutor(len(limits)) as pool:
            for name in ("read", "write", "delete", "names"):
                patch.setattr(Store, name, _take_turns(getattr(Store, name), turns))

            def build(limit: int, place: str = place, turns: _Turns = turns) -> Corpus:
                threading.current_thread().name = str(limit)
                try:
                    return _build(place, max_tokens=limit)
                finally:
                    turns.end()

            built = list(pool.map(build, limits))
        assert _files(work / place) == expected, seed
        for limit, corpus in zip(limits, built, strict=True):
            assert corpus.splits["train"].n_tokens >= limit
            assert _plain(_all(corpus, "train")) == train[: corpus.splits["train"].n_sequences]


def test_two_processes_that_build_one_corpus_both_end_well(work: Path) -> None:
    _build("fresh")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        built = list(pool.map(_build_small_files, ["c"] * 2))
    assert _files(work / "c") == _files(work / "fresh")
    assert [corpus.verify() for corpus in built] == [len(built[0].files)] * 2


def _build_small_files(place: str) -> Corpus:
    return _build(place)


def test_another_corpus_that_ends_at_that_place_meanwhile_is_not_replaced(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _during_write(2, lambda: _build("c", seed=1), patch)
        with pytest.raises(SpecMismatchError, match=r"another corpus lies at .*seed: 1 there, 0 asked"):
            _build("c")
    corpus = Corpus.open(Store("c"))
    assert corpus.spec.seed == 1
    corpus.verify()


def test_a_crash_while_a_smaller_cut_is_dropped_is_mended_by_the_next_extension(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _build("fresh")
    delete = Store.delete
    for n_deletes in range(3):
        place = f"c{n_deletes}"
        _build(place, max_tokens=100)
        deletes: list[str] = []

        def fail(self: Store, key: str, done: list[str] = deletes, stop: int = n_deletes) -> None:
            if len(done) == stop:
                raise _Interrupted
            done.append(key)
            delete(self, key)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "delete", fail)
            if n_deletes < 2:  # One file and one cut are dropped.
                with pytest.raises(_Interrupted):
                    _build(place, max_tokens=300)
            else:
                _build(place, max_tokens=300)
        assert Corpus.open(Store(place)).verify() > 0
        _build(place)
        assert _files(work / place) == _files(work / "fresh")


def test_a_damaged_cut_is_named(work: Path) -> None:
    _build("c", max_tokens=100)
    (path,) = (work / "c" / "cuts").iterdir()
    path.write_text("{")
    with pytest.raises(CorruptObjectError, match=rf"{path.name} is damaged .*delete it"):
        _build("c")
    path.unlink()
    assert _build("c").complete


def test_random_access_reads_only_the_files_and_row_groups_it_needs(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = _build("c")
    whole = _plain(_all(corpus, "train"))
    assert len(whole) > 100
    for start, stop in ((0, 0), (0, 1), (7, 9), (31, 33), (5, 70), (len(whole) - 1, len(whole)), (0, len(whole))):
        assert _plain(Corpus.open(Store("c")).sequences("train", start, stop)) == whole[start:stop]
    read: list[tuple[str, int]] = []
    read_row_group = pq.ParquetFile.read_row_group

    def watch(self: pq.ParquetFile, i: int, **options: Any) -> Any:
        read.append((corpus_key(self), i))
        return read_row_group(self, i, **options)

    def corpus_key(file: pq.ParquetFile) -> str:
        return next(key for key, opened in corpus._open_files.items() if opened is file)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watch)
    corpus = Corpus.open(Store("c"))
    corpus.sequences("train", 30, 42)
    corpus.sequences("train", 33, 40)
    assert [(key[: -len("-01234567.parquet")], i) for key, i in read] == [
        (f"sequences/train-{first:010d}", i) for first, i in ((0, 3), (32, 0), (32, 1))
    ]


def test_a_handle_pickles_and_works_on_any_file_system(work: Path) -> None:
    local = _build("c")
    corpus = _build("memory://corpus-pickle-test")
    corpus.sequences("train", 0, 3)
    copy = pickle.loads(pickle.dumps(corpus))
    assert _plain(_all(copy, "train")) == _plain(_all(local, "train"))
    assert copy.corpus_id == local.corpus_id
    assert copy.row_index("heldout", KeepRule()).n_rows == local.splits["heldout"].n_tokens


def test_row_index_is_stored_once_and_counts_kept_tokens(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = _build("c")
    keep = KeepRule(exclude=(BOS, 40), skip_first=2)
    for split in corpus.splits:
        counts = [int(keep.mask(s.tokens, s.roles).sum()) for s in _all(corpus, split)]
        index = corpus.row_index(split, keep)
        assert index.first_row.tolist() == [0, *np.cumsum(counts).tolist()]
        assert 0 in counts
        assert (work / "c" / "rows" / keep.keep_id / f"{split}.parquet").exists()

        def refuse(self: Store, key: str, data: bytes) -> None:
            raise AssertionError(f"{key} was written again")

        with monkeypatch.context() as patch:
            patch.setattr(Store, "write", refuse)
            assert Corpus.open(Store("c")).row_index(split, keep).first_row.tolist() == index.first_row.tolist()


def test_a_row_index_of_another_corpus_is_made_again(work: Path) -> None:
    _build("c").row_index("train", KeepRule())
    other = _build("other", seed=1)
    (work / "other" / "rows").mkdir()
    (work / "c" / "rows" / KeepRule().keep_id).rename(work / "other" / "rows" / KeepRule().keep_id)
    expected = [0, *np.cumsum([len(s.tokens) for s in _all(other, "train")]).tolist()]
    assert other.row_index("train", KeepRule()).first_row.tolist() == expected


def test_an_empty_heldout_split_has_no_rows(work: Path) -> None:
    corpus = _build("c", holdout=0.0)
    assert corpus.splits["heldout"].n_sequences == 0
    assert corpus.sequences("heldout", 0, 0) == []
    assert corpus.row_index("heldout", KeepRule()).n_rows == 0
    assert corpus.splits["train"].n_documents == N_DOCUMENTS


def test_pieces_are_readable_text_by_token_id(work: Path) -> None:
    assert _build("c").pieces() == [f" {i}" for i in range(63)] + [""]


def test_progress_counts_documents_and_tokens(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actlake.ingest.tokenising._BATCH_DOCUMENTS", 25)
    seen: list[tuple[int, int]] = []
    build_corpus(Store("c"), _spec(), CharacterTokenizer(), progress=lambda *done: seen.append(done))
    lengths = [len(_text(i)) for i in range(N_DOCUMENTS)]
    assert seen == [(n, sum(lengths[:n])) for n in (25, 50, 60)]


def test_batches_end_at_a_number_of_documents_or_of_characters() -> None:
    documents = [Document(id=str(i), text="x" * 400_000, source="s") for i in range(7)]
    assert [len(batch) for batch in batches(documents)] == [3, 3, 1]
    documents = [Document(id=str(i), text="x", source="s") for i in range(2001)]
    assert [len(batch) for batch in batches(documents)] == [1000, 1000, 1]


# --- Damage -------------------------------------------------------------------------------------------------------


def _sequences_at(place: Path, split: str, first: int) -> Path:
    (path,) = (place / "sequences").glob(f"{split}-{first:010d}-*.parquet")
    return path


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_file_is_named_on_reading_and_by_verify(work: Path) -> None:
    corpus = _build("c")
    assert corpus.verify() == len(list((work / "c").rglob("*.parquet"))) > 4
    path = _sequences_at(work / "c", "train", 0)
    _flip(path, 100)
    for check in (lambda: corpus.sequences("train", 0, 8), corpus.verify):
        with pytest.raises(CorruptObjectError, match=rf"{path.name}.*build the corpus again"):
            check()
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CorruptObjectError, match=path.name):
        Corpus.open(Store("c")).sequences("train", 0, 8)
    path.unlink()
    for check in (lambda: Corpus.open(Store("c")).sequences("train", 0, 8), corpus.verify):
        with pytest.raises(MissingObjectError, match=rf"{path.name} is absent, but .* lists it; .*build the corpus"):
            check()


def _flips(path: Path, read: Callable[[], object], step: int) -> tuple[int, int]:
    """Flip bits all through a file; return how many were found out, and how many changed what is read."""
    data, right = path.read_bytes(), read()
    n_found = n_wrong = 0
    for at in range(0, len(data), step):
        _flip(path, at)
        try:
            n_wrong += read() != right
        except CorruptObjectError:
            n_found += 1
        path.write_bytes(data)
    return n_found, n_wrong


def test_flipped_bits_never_give_other_tokens_or_rows(work: Path) -> None:
    corpus = _build("c", holdout=0.1)
    corpus.row_index("heldout", KeepRule())
    path = _sequences_at(work / "c", "heldout", 0)

    def tokens() -> object:
        return [(s.index, s.tokens.tolist()) for s in _all(Corpus.open(Store("c")), "heldout")]

    n_found, n_wrong = _flips(path, tokens, 31)
    assert n_found > 60
    assert n_wrong == 0
    path = work / "c" / "rows" / KeepRule().keep_id / "heldout.parquet"
    n_found, n_wrong = _flips(path, lambda: corpus.row_index("heldout", KeepRule()).first_row.tolist(), 7)
    assert n_found > 60
    assert n_wrong == 0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda text: text[:50], CorruptObjectError, r"corpus\.json is damaged"),
        (lambda text: text.replace('"train"', '"trains"'), CorruptObjectError, r"is damaged \(KeyError: 'train'\)"),
        (lambda text: text.replace('"seed": 0', '"seed": -1'), CorruptObjectError, "seed = -1 is out of range"),
        (
            lambda text: text.replace('"format_version": 1', '"format_version": 99'),
            FormatVersionError,
            "pip install -U",
        ),
        (lambda text: text.replace("actlake corpus", "actlake dataset"), CorruptObjectError, "not a corpus"),
    ],
)
def test_a_header_that_cannot_be_used(
    work: Path, change: Callable[[str], str], error: type[Exception], match: str
) -> None:
    _build("c")
    path = work / "c" / "corpus.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(error, match=match):
        Corpus.open(Store("c"))


def test_places_that_are_not_there(work: Path) -> None:
    corpus = _build("c")
    with pytest.raises(BadInputError, match="no split 'test'; the splits are train, heldout"):
        corpus.sequences("test", 0, 1)
    with pytest.raises(BadInputError, match=r"sequences 0:100000 are not in 'train'; it holds 0:\d+"):
        corpus.sequences("train", 0, 100_000)


# --- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sources": ()}, "give a list of at least one"),
        ({"sources": "in/*.jsonl"}, "give a list of at least one"),
        ({"sources": ("a.txt", "a.txt")}, "names one twice"),
        ({"context_length": 1}, "context_length = 1 is too short"),
        ({"holdout": 1.0}, r"holdout = 1\.0 is not a share"),
        ({"holdout": float("nan")}, "holdout = nan"),
        ({"seed": -1}, "seed = -1 is out of range"),
        ({"max_tokens": 0}, "max_tokens = 0 keeps nothing"),
        ({"tokenizer": ""}, "fingerprint"),
        ({"metadata": "kind"}, r"metadata = 'kind'; give a list of fields"),
        ({"metadata": ("kind", "")}, "give a list of fields"),
        ({"metadata": ("kind", "kind")}, "names one twice"),
        ({"metadata": ("kind", "source", "role")}, "'source', 'role' is the name of something else"),
        ({"metadata": ("text",)}, "'text' is the name of something else"),
    ],
)
def test_a_spec_is_checked(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(BadInputError, match=match):
        _spec(**changes)


def test_a_definition_is_everything_but_the_limit() -> None:
    assert _spec(max_tokens=5).definition_id == _spec().definition_id
    for changes in (
        *({"seed": 1}, {"holdout": 0.1}, {"tokenizer": "x"}, {"text_field": "x"}, {"sources": ("x.txt",)}),
        {"metadata": ("x",)},
    ):
        assert _spec(**changes).definition_id != _spec().definition_id
    assert CorpusSpec.from_json(json.loads(json.dumps(_spec(max_tokens=5).to_json()))) == _spec(max_tokens=5)


def test_differences_name_the_places_of_texts_only_where_they_matter() -> None:
    moved = _spec(sources=("x.txt",), text_field="x", seed=1)
    assert len(_spec().differences(moved)) == 3
    assert _spec().differences(moved, places=False) == ["seed: 0 there, 1 asked"]
    assert _spec().differences(_spec(sources=("x.txt",), max_tokens=1), places=False) == []


def _nothing_made(work: Path, error: type[Exception], match: str, bos: int | None = BOS, **changes: Any) -> None:
    before = _files(work)
    with pytest.raises(error, match=match):
        build_corpus(Store("c"), _spec(**changes), CharacterTokenizer(bos))
    assert _files(work) == before


def test_unusable_input_makes_nothing(work: Path) -> None:
    _nothing_made(work, BadInputError, "this tokenizer has no BOS token; set prepend_bos = false", bos=None)
    _nothing_made(work, SourceError, "matches no file", sources=("in/*.txt",))
    _nothing_made(work, SourceError, "all 60 documents are held out", holdout=1 - 2**-53)
    (work / "in" / "more.jsonl").write_text('{"id": "d7", "text": "again"}')
    _nothing_made(work, SourceError, r"two documents have the id 'd7': 0\.jsonl, line 8 of 'in/\*\.jsonl'")
    (work / "in" / "more.jsonl").write_text('{"id": "blank", "text": "\\t"}')
    _nothing_made(work, SourceError, r"document 'blank', more\.jsonl, line 1 of .* gives no tokens")


def test_without_bos_a_tokenizer_needs_none(work: Path) -> None:
    corpus = build_corpus(Store("c"), _spec(prepend_bos=False), CharacterTokenizer(None))
    assert sum(len(s.tokens) for split in corpus.splits for s in _all(corpus, split)) == sum(
        len(_text(i)) for i in range(N_DOCUMENTS)
    )


def test_another_corpus_at_that_place_is_refused_field_by_field(work: Path) -> None:
    _build("c")
    match = r"context_length: 8 there, 9 asked; seed: 0 there, 1 asked"
    _nothing_made(work, SpecMismatchError, match, context_length=9, seed=1)


def test_changed_sources_are_named(work: Path) -> None:
    _build("c", max_tokens=100)
    (work / "in" / "3.jsonl").write_text('{"id": "new", "text": "new"}')
    for limit in (100, 200):
        _nothing_made(work, SourceError, r"sources changed .* 3\.jsonl of 'in/\*\.jsonl'; restore", max_tokens=limit)
    (work / "in" / "3.jsonl").unlink()
    path = work / "in" / "1.jsonl"
    text = path.read_text()
    path.write_text(text + " ")
    _nothing_made(work, SourceError, r"sources changed .* 1\.jsonl of", max_tokens=100)
    # The same sizes, another text: seen as soon as the text is read again.
    path.write_text(text.replace("a", "b"))
    _nothing_made(work, SourceError, "texts of the same size differ", max_tokens=200)
    path.write_text(text)
    assert _build("c", max_tokens=200).splits["train"].n_tokens >= 200
