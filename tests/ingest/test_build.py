"""The shard builder against a model whose activations are a formula: exact arrays, exact failures."""

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FormulaModel, formula, make_corpus, make_spec, write_documents

from actlake.ingest.batching import plan_batches
from actlake.ingest.build import ShardBuilder
from actlake.ingest.storing import Statistics
from actlake.ingest.workshop import Workshop
from actlake.storage.arrays import ShardIndex, decode_chunk
from actlake.storage.codecs import Codec
from actlake.storage.corpus import Corpus
from actlake.storage.errors import DataError, SpecMismatchError
from actlake.storage.finish import finish
from actlake.storage.header import Header, prepare
from actlake.storage.moments import from_parquet, of_shard, to_parquet
from actlake.storage.records import ShardRecord, commit_key, read_record, stats_key
from actlake.storage.rowspace import KeepRule
from actlake.storage.spec import DatasetSpec
from actlake.storage.stores import Store


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(Store(tmp_path / "corpus"), write_documents(tmp_path / "texts"))


def make_builder(path: Path, corpus: Corpus, n_rows: int = 200, model: Any = None, **changes: Any) -> ShardBuilder:
    spec = make_spec(corpus, **changes)
    prepare(Store(path), Header(spec=spec, n_rows=n_rows, corpus="../corpus"))
    return ShardBuilder(store=Store(path), corpus=corpus, forward=model or FormulaModel(spec.hook_points), n_threads=2)


def read_shard(store: Store, spec: DatasetSpec, shard: int) -> dict[str, np.ndarray[Any, Any]]:
    """Decode a whole shard with the storage functions alone."""
    record, found = read_record(store, shard), {}
    for name, array in spec.arrays().items():
        data = store.read(array.object_key(shard))
        index = ShardIndex.parse(array, data[-array.index_nbytes :], record.n_rows, len(data), name)
        rows = np.zeros(array.shape(array.rows_per_shard), dtype=array.numpy_dtype)
        for chunk in range(-(-record.n_rows // array.rows_per_chunk)):
            start = int(index.offsets[chunk])
            part = data[start : start + int(index.lengths[chunk])]
            out = rows[chunk * array.rows_per_chunk : (chunk + 1) * array.rows_per_chunk]
            decode_chunk(array, part, out, name)
        found[name] = rows[: record.n_rows]
    return found


def kept_tokens(corpus: Corpus, spec: DatasetSpec) -> Iterator[tuple[int, int, int]]:
    """Yield (token id, position, sequence) of every row in corpus order, the slow and obvious way."""
    for sequence in corpus.sequences(spec.split, 0, corpus.splits[spec.split].n_sequences):
        for position, token in enumerate(sequence.tokens.tolist()):
            if token not in spec.keep.exclude and position >= spec.keep.skip_first:
                yield token, position, sequence.index


@pytest.mark.parametrize(
    ("order", "batching"), [("shuffled", "padded"), ("sequence", "padded"), ("shuffled", "packed")]
)
def test_every_row_is_stored_once_at_its_place_with_its_own_activation(
    tmp_path: Path, corpus: Corpus, order: str, batching: str
) -> None:
    builder = make_builder(tmp_path / "ds", corpus, order=order, batching=batching)
    spec, rows = builder.header.spec, list(kept_tokens(corpus, builder.header.spec))[:200]
    for shard in (3, 1, 0, 2):
        assert builder.build(shard).n_rows == min(64, 200 - 64 * shard)
    for shard in range(4):
        stored = read_shard(Store(tmp_path / "ds"), spec, shard)
        expected = np.array(rows[64 * shard : 64 * (shard + 1)])
        places = builder.space.places(shard)
        assert (places == np.arange(len(places))).all() == (order == "sequence")
        for column, name in enumerate(("token_id", "position", "sequence")):
            assert np.array_equal(stored[f"rows/{name}"][places], expected[:, column])
        assert not stored["rows/role"].any()
        for number, point in enumerate(spec.hook_points):
            wanted = formula(expected[:, 0], expected[:, 1], number, point.width)
            assert np.array_equal(stored[point.name][places].view("u2"), wanted.view("u2"))


def test_two_builders_make_the_same_bytes_and_record_contents(tmp_path: Path, corpus: Corpus) -> None:
    for name, shards in (("a", (0, 1, 2, 3)), ("b", (3, 2, 1, 0))):
        builder = make_builder(tmp_path / name, corpus)
        for shard in shards:
            builder.build(shard)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file())
    for file in files:
        if file.parts[0] != "commits":
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    for shard in range(4):
        one, other = (read_record(Store(tmp_path / name), shard) for name in "ab")
        assert one.content == other.content
        assert one.provenance.attempt != other.provenance.attempt


def test_a_committed_shard_is_not_built_again(tmp_path: Path, corpus: Corpus) -> None:
    first = make_builder(tmp_path / "ds", corpus).build(1)
    again = make_builder(tmp_path / "ds", corpus)
    assert again.build(1) == first
    assert again.forward.shapes == []  # type: ignore[attr-defined]


def test_growth_rebuilds_the_short_last_shard_under_a_new_revision(tmp_path: Path, corpus: Corpus) -> None:
    small = make_builder(tmp_path / "ds", corpus, n_rows=100)
    assert [small.build(shard).n_rows for shard in (0, 1)] == [64, 36]
    before = read_shard(Store(tmp_path / "ds"), small.header.spec, 0)
    large = make_builder(tmp_path / "ds", corpus, n_rows=200)
    records = [large.build(shard) for shard in range(4)]
    assert [(r.n_rows, r.revision) for r in records] == [(64, 0), (64, 1), (64, 0), (8, 0)]
    after = read_shard(Store(tmp_path / "ds"), large.header.spec, 0)
    assert all(np.array_equal(before[name].view("u1"), after[name].view("u1")) for name in before)
    fresh = make_builder(tmp_path / "fresh", corpus, n_rows=200)
    assert all(fresh.build(s).objects == records[s].objects for s in range(4))


@pytest.mark.parametrize("codec", ["blosc", "none"])
def test_a_growth_that_dies_between_two_objects_shows_no_old_record_beside_new_rows(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    small = make_builder(tmp_path / "ds", corpus, n_rows=100, codec=Codec(name=codec))
    small.build(1)
    large = make_builder(tmp_path / "ds", corpus, n_rows=128, codec=Codec(name=codec))
    write = Store.write

    def dying(store: Store, key: str, *parts: bytes) -> None:
        write(store, key, *parts)
        if key.startswith("arrays/layers.0.attn_z/c/"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        large.build(1)
    monkeypatch.setattr(Store, "write", write)
    assert not Store(tmp_path / "ds").exists(commit_key(1))
    fresh = make_builder(tmp_path / "fresh", corpus, n_rows=128, codec=Codec(name=codec))
    assert large.build(1).content == fresh.build(1).content


def test_a_late_attempt_leaves_alone_what_another_has_committed_meanwhile(tmp_path: Path, corpus: Corpus) -> None:
    small = make_builder(tmp_path / "ds", corpus, n_rows=100)
    small.build(0)
    small.build(1)
    late, in_time = (make_builder(tmp_path / "ds", corpus, n_rows=128) for _ in range(2))
    others = list[ShardRecord]()

    def overtaken(n_rows: int, forward_s: float) -> None:
        if not others:
            others.append(in_time.build(1))
            assert not finish(in_time.store, in_time.header).missing(in_time.space)

    assert late.build(1, overtaken) == others[0] == read_record(late.store, 1)
    assert others[0].revision == 1
    assert late.store.exists("root.json")


def test_a_shorter_commit_of_meanwhile_counts_in_the_revision(tmp_path: Path, corpus: Corpus) -> None:
    shorter, growing = (make_builder(tmp_path / "ds", corpus, n_rows=n) for n in (100, 128))
    others = list[ShardRecord]()

    def overtaken(n_rows: int, forward_s: float) -> None:
        if not others:
            others.append(shorter.build(1))

    assert growing.build(1, overtaken).revision == others[0].revision + 1 == 1


def test_a_builder_that_plans_fewer_rows_does_not_shrink_a_shard(tmp_path: Path, corpus: Corpus) -> None:
    stale = make_builder(tmp_path / "ds", corpus, n_rows=100)
    grown = make_builder(tmp_path / "ds", corpus, n_rows=128).build(1)
    assert stale.build(1) == grown
    assert read_record(Store(tmp_path / "ds"), 1) == grown


def test_another_corpus_than_the_specs_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    make_builder(tmp_path / "ds", corpus)
    other = make_corpus(Store(tmp_path / "other"), write_documents(tmp_path / "others", seed=1))
    with pytest.raises(SpecMismatchError, match="its sources have changed"):
        ShardBuilder(store=Store(tmp_path / "ds"), corpus=other, forward=FormulaModel(()))


def test_a_failed_forward_pass_leaves_no_commit_and_the_next_attempt_is_whole(tmp_path: Path, corpus: Corpus) -> None:
    broken = make_builder(tmp_path / "ds", corpus, batch_tokens=34)
    broken.forward.fail_after = 1  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="planted"):
        broken.build(0)
    assert not Store(tmp_path / "ds").exists(commit_key(0))
    broken.forward.fail_after = None  # type: ignore[attr-defined]
    assert broken.build(0).objects == make_builder(tmp_path / "other", corpus, batch_tokens=34).build(0).objects


def test_non_finite_activations_are_refused_by_name_before_anything_is_stored(tmp_path: Path, corpus: Corpus) -> None:
    builder = make_builder(tmp_path / "ds", corpus)
    token = next(kept_tokens(corpus, builder.header.spec))[0]
    builder.forward.nan_at = token  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"shard 0, layers\.0\.attn_z: \d+ of 64 rows hold non-finite values"):
        builder.build(0)
    assert Store(tmp_path / "ds").names("stats") == []
    assert Store(tmp_path / "ds").names("arrays/layers.0.attn_z") == ["zarr.json"]


def test_rows_that_are_not_finite_become_void_where_that_is_asked_for(tmp_path: Path, corpus: Corpus) -> None:
    builder = make_builder(tmp_path / "ds", corpus)
    builder.void_nonfinite = True
    token = next(kept_tokens(corpus, builder.header.spec))[0]
    builder.forward.nan_at = token  # type: ignore[attr-defined]
    record = builder.build(0)
    clean = make_builder(tmp_path / "clean", corpus)
    clean.build(0)
    found, expected = (read_shard(Store(tmp_path / name), builder.header.spec, 0) for name in ("ds", "clean"))
    bad = expected["rows/token_id"] == token
    assert record.n_void == bad.sum() > 0
    assert np.array_equal(found["rows/role"], np.where(bad, 255, expected["rows/role"]))
    for name in ("rows/token_id", "rows/position", "rows/sequence"):
        assert np.array_equal(found[name], expected[name])
    moments = from_parquet(Store(tmp_path / "ds").read(stats_key(0)))
    for point in builder.header.spec.point_names:
        assert not found[point][bad].any()
        assert np.array_equal(found[point][~bad].view("u2"), expected[point][~bad].view("u2"))
        assert (moments[point].count, moments[point].n_nonfinite) == (64 - bad.sum(), bad.sum())
        wanted = of_shard(expected[point][~bad], numbers=np.flatnonzero(~bad))
        assert to_parquet({"x": replace(moments[point], n_nonfinite=0)}) == to_parquet({"x": wanted})


def test_a_row_that_is_not_finite_costs_no_second_copy_of_its_hook_point(corpus: Corpus) -> None:
    point = replace(make_spec(corpus).arrays()["layers.0.attn_z"], width=256)
    rows = np.ones(point.shape(32_768), dtype=point.numpy_dtype)
    rows[5, 0] = np.nan
    statistics = Statistics(0, 0, np.zeros(len(rows), dtype=np.bool_), {point.name: point})
    tracemalloc.start()
    try:
        assert statistics.measure({point.name: rows.view("u2")}, Workshop(), void_nonfinite=True)
        _, highest = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert highest < rows.nbytes // 2
    assert np.flatnonzero(statistics.void).tolist() == [5]


def test_the_commit_is_the_last_object_written(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    builder, written = make_builder(tmp_path / "ds", corpus), list[str]()
    write = Store.write

    def noting(store: Store, key: str, *parts: bytes) -> None:
        written.append(key)
        write(store, key, *parts)

    monkeypatch.setattr(Store, "write", noting)
    builder.build(2)
    assert written[-1] == commit_key(2)
    assert written.count(commit_key(2)) == 1
    assert set(written[:-1]) == {stats_key(2)} | {a.object_key(2) for a in builder.header.spec.arrays().values()}


def test_statistics_are_of_the_stored_rows(tmp_path: Path, corpus: Corpus) -> None:
    builder = make_builder(tmp_path / "ds", corpus)
    builder.build(0)
    stored = read_shard(Store(tmp_path / "ds"), builder.header.spec, 0)
    moments = from_parquet(Store(tmp_path / "ds").read(stats_key(0)))
    for point in builder.header.spec.hook_points:
        rows = stored[point.name].astype(np.float64)
        assert np.allclose(moments[point.name].mean, rows.mean(axis=0), rtol=1e-12)
        assert np.allclose(moments[point.name].variance, rows.var(axis=0), rtol=1e-9)
        assert np.isclose(moments[point.name].norm_mean, np.linalg.norm(rows, axis=1).mean(), rtol=1e-12)


def test_skip_first_and_exclusion_decide_the_rows(tmp_path: Path, corpus: Corpus) -> None:
    builder = make_builder(tmp_path / "plain", corpus)
    excluded = next(kept_tokens(corpus, builder.header.spec))[0]
    keep = type(builder.header.spec.keep)(exclude=(0, 1, 2, excluded), skip_first=3)
    builder = make_builder(tmp_path / "ds", corpus, keep=keep, n_rows=64)
    builder.build(0)
    stored = read_shard(Store(tmp_path / "ds"), builder.header.spec, 0)
    assert excluded not in stored["rows/token_id"]
    assert stored["rows/position"].min() == 3
    rows = list(kept_tokens(corpus, builder.header.spec))[:64]
    assert sorted(stored["rows/token_id"].tolist()) == sorted(row[0] for row in rows)


def test_packed_batches_run_fewer_tokens_and_the_record_counts_them(tmp_path: Path, corpus: Corpus) -> None:
    n_run = {}
    for batching in ("padded", "packed"):
        builder = make_builder(tmp_path / batching, corpus, batching=batching)
        n_run[batching] = builder.build(0).provenance.n_tokens
        shapes: list[tuple[int, int]] = builder.forward.shapes  # type: ignore[attr-defined]
        assert sum(n_rows * n_tokens for n_rows, n_tokens in shapes) == n_run[batching]
    chosen = builder.index.sequences_of(builder.space.rows_of(0))
    n_tokens = sum(len(one.tokens) for one in corpus.sequences("train", chosen.start, chosen.stop))
    assert n_tokens <= n_run["packed"] < n_run["padded"]


def test_sequences_without_rows_are_not_run(tmp_path: Path, corpus: Corpus) -> None:
    keep = KeepRule(exclude=(0, 1, 2), skip_first=16)
    builder = make_builder(tmp_path / "ds", corpus, keep=keep, n_rows=20, batch_tokens=17)
    builder.build(0)
    # Only those of the context's 17 tokens have a row, and each is a batch.
    assert builder.forward.shapes == [(1, 17)] * 20  # type: ignore[attr-defined]
    chosen = builder.index.sequences_of(range(20))
    assert len(chosen) > 20


def test_batches_cover_every_sequence_once_within_the_token_budget() -> None:
    lengths = [1, 64, 65, 512, 300, 300, 2, 130]
    batches = plan_batches(lengths, batch_tokens=512, context_length=4096)
    assert sorted(member for batch in batches for member in batch.members) == list(range(len(lengths)))
    for batch in batches:
        assert max(lengths[m] for m in batch.members) <= batch.n_tokens
        assert batch.n_tokens % 64 == 0
        assert batch.n_tokens - max(lengths[m] for m in batch.members) < 64
        assert len(batch.members) == 1 or len(batch.members) * batch.n_tokens <= 512
    assert plan_batches([2000], batch_tokens=512, context_length=4096)[0].n_tokens == 2048
    assert plan_batches([100, 70], batch_tokens=512, context_length=100)[0].n_tokens == 100
    assert plan_batches([], batch_tokens=512, context_length=4096) == []
