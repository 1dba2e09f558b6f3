"""`verify` against the corpus: every row's token, position, sequence and role."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FormulaModel, make_corpus, make_spec, write_documents

import actlake
from actlake.ingest.build import ShardBuilder
from actlake.shards.dataset import ActivationDataset
from actlake.shards.verify import Problem, VerifyReport, verify
from actlake.storage.arrays import encode_shard
from actlake.storage.codecs import Codec
from actlake.storage.corpus import Corpus
from actlake.storage.errors import SpecMismatchError
from actlake.storage.header import Header, prepare
from actlake.storage.records import ObjectRecord, commit, read_record
from actlake.storage.stores import Store


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(Store(tmp_path / "corpus"), write_documents(tmp_path / "texts"))


def build(place: Path, corpus: Corpus, n_rows: int = 200, nan_at: int | None = None, **changes: Any) -> Store:
    store, spec = Store(place), make_spec(corpus, **changes)
    prepare(store, Header(spec=spec, n_rows=n_rows, corpus="../corpus"))
    model = FormulaModel(spec.hook_points, nan_at=nan_at)
    builder = ShardBuilder(store=store, corpus=corpus, forward=model, void_nonfinite=True)
    for shard in range(builder.space.n_shards):
        builder.build(shard)
    return store


def rewrite(ds: ActivationDataset, name: str, shard: int, row: int, value: int) -> None:
    """Store another value for a row, with checksums and a record that agree with it."""
    record, array = read_record(ds.store, shard), ds.spec.arrays()[name]
    rows = ds[name][record.first_row : record.first_row + record.n_rows].copy()
    rows[row] = value
    encoded = encode_shard(array, rows)
    ds.store.write(array.object_key(shard), *encoded.parts)
    found = ObjectRecord(nbytes=encoded.nbytes, crc32c=encoded.crc32c, index_crc32c=encoded.index_crc32c)
    commit(ds.store, replace(record, objects=dict(record.objects) | {name: found}))


def only(report: VerifyReport) -> Problem:
    (problem,) = report.problems
    return problem


@pytest.mark.parametrize("order", ["shuffled", "sequence"])
def test_the_rows_of_a_sound_dataset_are_those_of_the_corpus(tmp_path: Path, corpus: Corpus, order: str) -> None:
    ds = actlake.open(build(tmp_path / "ds", corpus, order=order).url)
    report = verify(ds, corpus=corpus)
    assert (report.problems, report.n_rows, report.n_deep, report.corpus) == ((), 200, 4, True)
    assert not verify(ds).corpus


@pytest.mark.parametrize(
    ("column", "kind"), [("token_id", "token"), ("position", "rows"), ("sequence", "rows"), ("role", "rows")]
)
def test_a_wrong_value_in_a_row_column(tmp_path: Path, corpus: Corpus, column: str, kind: str) -> None:
    ds = actlake.open(build(tmp_path / "ds", corpus).url)
    right = int(ds[f"rows/{column}"][64 + 5])
    rewrite(ds, f"rows/{column}", 1, 5, right + 1)
    problem = only(verify(ds, corpus=corpus))
    assert (problem.kind, problem.shard, problem.array) == (kind, 1, f"rows/{column}")
    assert f"{column} of 1 rows" in problem.message
    assert f"row 5: {right + 1} stored, {right} in the corpus" in problem.message


def test_row_columns_of_two_shards_exchanged_without_compression(tmp_path: Path, corpus: Corpus) -> None:
    # Equal sizes, equal indexes, equal checksums of whole objects: nothing but the corpus tells.
    store = build(tmp_path / "ds", corpus, codec=Codec(name="none"))
    for column in ("token_id", "position", "sequence", "role"):
        left, right = (f"arrays/rows/{column}/c/{shard}" for shard in (0, 1))
        one, other = store.read(left), store.read(right)
        store.write(left, other)
        store.write(right, one)
    ds = actlake.open(store.url)
    assert verify(ds).problems == ()
    report = verify(ds, corpus=corpus)
    assert report.bad_shards == (0, 1)
    assert {problem.kind for problem in report.problems} == {"token", "rows"}


def test_void_rows_keep_their_token_and_are_no_problem(tmp_path: Path, corpus: Corpus) -> None:
    token = int(corpus.sequences("train", 0, 1)[0].tokens[1])
    ds = actlake.open(build(tmp_path / "ds", corpus, nan_at=token).url)
    report = verify(ds, corpus=corpus)
    assert sum(ds.manifest["n_void"].to_pylist()) > 0
    assert report.problems == ()


def test_a_short_last_shard_before_and_after_the_plan_has_grown(tmp_path: Path, corpus: Corpus) -> None:
    store = build(tmp_path / "ds", corpus, n_rows=100)
    prepare(store, Header(spec=make_spec(corpus), n_rows=200, corpus="../corpus"))
    report = verify(actlake.open(store.url), corpus=corpus)
    assert (report.problems, report.n_rows, report.missing_shards) == ((), 100, (1, 2, 3))


def test_another_corpus_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    ds = actlake.open(build(tmp_path / "ds", corpus).url)
    other = make_corpus(Store(tmp_path / "other"), write_documents(tmp_path / "others", seed=1))
    with pytest.raises(SpecMismatchError, match="give the one that it was made from"):
        verify(ds, corpus=other)


def test_statistics_of_built_shards_fold_to_those_of_all_rows(tmp_path: Path, corpus: Corpus) -> None:
    ds = actlake.open(build(tmp_path / "ds", corpus).url)
    for point in ds.hook_points:
        rows, found = ds[point][:].astype(np.float64), ds.statistics(point)
        norms = np.sqrt((rows**2).sum(axis=1))
        assert found.count == 200
        assert np.allclose(found.mean, rows.mean(axis=0), rtol=1e-9, atol=0)
        assert np.allclose(found.variance, rows.var(axis=0), rtol=1e-9, atol=0)
        assert found.norm_mean == pytest.approx(norms.mean(), rel=1e-9)
        assert found.outlier_rows is not None
        assert [item.row for item in found.outlier_rows] == np.lexsort((np.arange(200), -norms))[:16].tolist()
        assert [item.norm for item in found.outlier_rows] == pytest.approx(np.sort(norms)[::-1][:16].tolist(), rel=1e-9)
        assert abs(found.median_norm / np.median(norms) - 1) < 0.01
