"""What a dataset's corpus says by sequence: fields, lengths, text; lazily, in threads, after a fork, with damage."""

import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fakes import make_corpus, write_documents
from labelled import METADATA, Labelled, make_labelled

from actlake.ingest import corpus_build
from actlake.shards import corpus_rows
from actlake.shards.corpus_rows import CorpusRows
from actlake.storage.errors import (
    BadInputError,
    CorruptObjectError,
    MissingObjectError,
    SpecMismatchError,
    UnknownNameError,
)
from actlake.storage.stores import Store


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Labelled:
    """A corpus of many row groups and files."""
    monkeypatch.setattr(corpus_build, "SEQUENCES_PER_ROW_GROUP", 4)
    monkeypatch.setattr(corpus_build, "SEQUENCES_PER_FILE", 16)
    return make_labelled(tmp_path)


def test_fields_and_lengths_are_those_of_the_sequences(made: Labelled) -> None:
    rows, n = made.ds.corpus, made.corpus.splits["train"].n_sequences
    sequences = made.corpus.sequences("train", 0, n)
    assert n > 40
    asked = np.random.default_rng(0).integers(0, n, size=100).tolist()
    assert rows.fields == ("document", "source", *METADATA)
    assert rows.lengths(asked).tolist() == [len(sequences[i].tokens) for i in asked]
    assert rows.values("document", asked) == [sequences[i].document for i in asked]
    assert rows.values("source", asked) == [sequences[i].source for i in asked]
    for field in METADATA:
        truth = [sequences[i].metadata[field] for i in asked]
        assert rows.values(field, asked) == truth
        for wanted in (["refusal"], ["true", "1", None], []):
            assert rows.holds(field, wanted, asked).tolist() == [label in wanted for label in truth]
    assert [rows.sequence(i).document for i in (0, n - 1)] == [sequences[i].document for i in (0, n - 1)]
    assert rows.pieces()[:2] == [" w0", " w1"]
    assert rows.lengths([]).tolist() == rows.values("category", []) == rows.holds("category", ["x"], []).tolist() == []


def test_only_the_row_groups_and_columns_asked_for_are_read_and_once(
    made: Labelled, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, tuple[str, ...]]] = []
    read_row_group = pq.ParquetFile.read_row_group

    def watch(self: pq.ParquetFile, i: int, columns: list[str]) -> object:
        read.append((i, tuple(columns)))
        return read_row_group(self, i, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watch)
    for _ in range(2):
        made.ds.corpus.values("category", [17, 5, 5, 6, 30])
    # Sequences 5 and 6 are in group 1 of the first file; 17 and 30 in groups 0 and 3 of the second.
    assert read == [(i, ("sequence", "category")) for i in (1, 0, 3)]
    monkeypatch.setattr(corpus_rows, "_CACHE_NBYTES", 0)
    read.clear()
    for _ in range(2):
        made.ds.corpus.lengths([1, 5])
    assert read == [(i, ("sequence", "tokens")) for i in (0, 1)] * 2


def test_threads_agree(made: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_rows, "_CACHE_NBYTES", 300)
    expected = made.ds.corpus.values("document", range(40))
    rows: CorpusRows = pickle.loads(pickle.dumps(made.ds.corpus))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: rows.values("document", [i, (i * 7) % 40]), [*range(40)] * 5))
    assert found == [[expected[i], expected[(i * 7) % 40]] for i in range(40)] * 5


def _put_values(rows: CorpusRows, queue: "multiprocessing.Queue[list[str | None]]") -> None:
    queue.put(rows.values("document", [3, 1]))


def test_a_fork_while_the_parent_reads_goes_on(made: Labelled) -> None:
    rows, fork = made.ds.corpus, multiprocessing.get_context("fork")
    expected, queue = rows.values("document", [3, 1]), fork.Queue()
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with rows._lock:
            held.set()
            forked.wait(timeout=30)

    reader = threading.Thread(target=hold)
    reader.start()
    assert held.wait(timeout=30)
    child = fork.Process(target=_put_values, args=(rows, queue))
    child.start()
    try:
        assert queue.get(timeout=20) == expected
    finally:
        forked.set()
        reader.join(timeout=30)
        child.join(timeout=5)
        child.kill()
    assert child.exitcode == 0


def test_what_the_corpus_lacks_is_refused(made: Labelled) -> None:
    rows, n = made.ds.corpus, made.corpus.splits["train"].n_sequences
    with pytest.raises(UnknownNameError, match=r"keeps no field 'language'.*category.*\[corpus\] metadata"):
        rows.values("language", [0])
    with pytest.raises(BadInputError, match=rf"sequence {n} is not in the corpus at .*0\.\.{n - 1}"):
        rows.lengths([0, n])
    with pytest.raises(BadInputError, match="sequence -1 is not in the corpus"):
        rows.sequence(-1)


def test_another_corpus_at_that_place_is_refused(made: Labelled, tmp_path: Path) -> None:
    (tmp_path / "corpus").rename(tmp_path / "gone")
    make_corpus(Store(tmp_path / "corpus"), write_documents(tmp_path / "other"))
    with pytest.raises(SpecMismatchError, match=r"was made from corpus \w{12}\.\.\., but at .*corpus lies \w{12}"):
        made.ds.corpus.lengths([0])


def test_damage_is_named(made: Labelled, tmp_path: Path) -> None:
    (path,) = (tmp_path / "corpus/sequences").glob("train-0000000016-*.parquet")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert made.ds.corpus.values("category", [3]) == [made.corpus.sequences("train", 3, 4)[0].metadata["category"]]
    with pytest.raises(CorruptObjectError, match=rf"{path.name} is damaged .*build the corpus again"):
        made.ds.corpus.values("category", [17])
    path.unlink()
    with pytest.raises(MissingObjectError, match=rf"{path.name} is absent"):
        made.ds.corpus.lengths([17])
