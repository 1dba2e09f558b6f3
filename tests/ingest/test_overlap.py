"""Several shards in the making at once: forward passes of one beside the storing of another, in bounded memory."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FormulaModel, make_corpus, make_spec, write_documents

from actlake.ingest.build import ShardBuilder
from actlake.ingest.shard_memory import ShardMemory, carve, nbytes_of
from actlake.ingest.workshop import Workshop
from actlake.storage.corpus import Corpus
from actlake.storage.errors import StoreError
from actlake.storage.header import Header, prepare
from actlake.storage.records import commit_key
from actlake.storage.spec import PointSpec
from actlake.storage.stores import Store

#: Nothing here takes a second; what waits for longer waits for ever.
SOON = 30.0


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(Store(tmp_path / "corpus"), write_documents(tmp_path / "texts"))


def make_builder(
    path: Path,
    corpus: Corpus,
    split: str = "train",
    points: tuple[PointSpec, ...] | None = None,
    n_rows: int = 256,
    **options: Any,
) -> ShardBuilder:
    changes: dict[str, Any] = {} if points is None else {"hook_points": points}
    spec = make_spec(corpus, split=split, batch_tokens=34, **changes)
    n_rows = min(n_rows, corpus.row_index(split, spec.keep).n_rows)
    prepare(Store(path), Header(spec=spec, n_rows=n_rows, corpus="../corpus"))
    values: dict[str, Any] = {"forward": FormulaModel(spec.hook_points), "n_threads": 2}
    return ShardBuilder(store=Store(path), corpus=corpus, **(values | options))


def files(folder: Path) -> dict[str, bytes]:
    """Return all files but the commit records, which tell of time."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if "commits" not in name.split("/")}


class Gated(FormulaModel):
    """A formula model whose passes wait for a gate; says when one has come to it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gate, self.came = threading.Event(), threading.Event()
        self.gate.set()
        self.seen: Callable[[], None] = lambda: None

    def __call__(self, *ids: Any) -> Mapping[str, torch.Tensor]:
        self.came.set()
        self.seen()
        assert self.gate.wait(SOON)
        return super().__call__(*ids)


class GatedStore:
    """Holds up the writes of one shard's arrays until its gate opens; says when the first has come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shard: int, fails: bool = False) -> None:
        self.gate, self.came = threading.Event(), threading.Event()
        write = Store.write

        def held(store: Store, key: str, *parts: bytes) -> None:
            if key.startswith("arrays/") and f"/c/{shard}" in key:
                self.came.set()
                assert self.gate.wait(SOON)
                if fails:
                    raise StoreError(f"planted for {key}")
            write(store, key, *parts)

        monkeypatch.setattr(Store, "write", held)


def test_the_next_shard_runs_through_the_model_while_one_is_being_stored(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Gated(make_spec(corpus).hook_points)
    builder, store = make_builder(tmp_path / "ds", corpus, forward=model), GatedStore(monkeypatch, 0)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(builder.build, 0)
        assert store.came.wait(SOON)
        rows, through = list[int](), threading.Event()

        def heard(n_rows: int, forward_s: float) -> None:
            rows.append(n_rows)
            if sum(rows) == 64:
                through.set()

        second = threads.submit(builder.build, 1, heard)
        # All rows of the second shard are captured before anything of the first is stored.
        assert through.wait(SOON)
        assert not first.done()
        assert Store(tmp_path / "ds").names("arrays/layers.0.attn_z") == ["zarr.json"]
        store.gate.set()
        assert (first.result(SOON).n_rows, second.result(SOON).n_rows) == (64, 64)
    alone = make_builder(tmp_path / "alone", corpus)
    assert [alone.build(shard).content for shard in (0, 1)] == [first.result().content, second.result().content]
    assert files(tmp_path / "ds") == files(tmp_path / "alone")


def test_one_shard_at_a_time_runs_through_the_model(tmp_path: Path, corpus: Corpus) -> None:
    inside, most = list[int](), list[int]()

    class Counting(FormulaModel):
        def __call__(self, *ids: Any) -> Mapping[str, torch.Tensor]:
            inside.append(1)
            most.append(len(inside))
            found = super().__call__(*ids)
            inside.pop()
            return found

    spec = make_spec(corpus)
    builder = make_builder(tmp_path / "ds", corpus, forward=Counting(spec.hook_points))
    with ThreadPoolExecutor(4) as threads:
        records = list(threads.map(builder.build, range(4)))
    assert set(most) == {1}
    alone = make_builder(tmp_path / "alone", corpus)
    assert [record.content for record in records] == [alone.build(shard).content for shard in range(4)]
    assert files(tmp_path / "ds") == files(tmp_path / "alone")


def test_no_more_shards_are_held_than_there_is_memory_for(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shop, asked = Gated(make_spec(corpus).hook_points), Workshop(2, n_shards=1), threading.Semaphore(0)
    builder, store = make_builder(tmp_path / "ds", corpus, forward=model, workshop=shop), GatedStore(monkeypatch, 0)
    lease, write, order = shop.memory.lease, Store.write, list[str]()

    def asking(nbytes: int) -> Any:
        asked.release()
        return lease(nbytes)

    def noting(place: Store, key: str, *parts: bytes) -> None:
        write(place, key, *parts)
        order.append(key)

    monkeypatch.setattr(shop.memory, "lease", asking)
    monkeypatch.setattr(Store, "write", noting)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(builder.build, 0)
        assert store.came.wait(SOON)
        model.seen = lambda: order.append("forward")
        second = threads.submit(builder.build, 1)
        assert asked.acquire(timeout=SOON)
        assert asked.acquire(timeout=SOON)
        store.gate.set()
        assert (first.result(SOON).n_rows, second.result(SOON).n_rows) == (64, 64)
    assert order.index(commit_key(0)) < order.index("forward")


def test_the_builders_of_both_splits_share_memory_and_model(tmp_path: Path, corpus: Corpus) -> None:
    shop, folders = Workshop(2), {"train": "ds", "heldout": "ds/heldout"}
    builders = {split: make_builder(tmp_path / at, corpus, split, workshop=shop) for split, at in folders.items()}
    tasks = [(split, shard) for split, builder in builders.items() for shard in range(builder.space.n_shards)]
    assert len({split for split, _ in tasks}) == 2
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda task: builders[task[0]].build(task[1]), tasks))
    for split, at in {"train": "other", "heldout": "other/heldout"}.items():
        alone = make_builder(tmp_path / at, corpus, split)
        for shard in range(alone.space.n_shards):
            alone.build(shard)
    assert files(tmp_path / "ds") == files(tmp_path / "other")
    # Two at most, the smaller one of the held-out split having made room where both were too small.
    assert 1 <= len(shop.memory._free) <= 2


@pytest.mark.parametrize("place", ["upload", "forward", "landing", "tokens", "heard"])
def test_an_error_anywhere_is_raised_and_frees_memory_and_model(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    model = FormulaModel(make_spec(corpus).hook_points)
    builder = make_builder(tmp_path / "ds", corpus, forward=model, workshop=Workshop(2, n_shards=1))
    before = set(threading.enumerate())
    with monkeypatch.context() as planted:
        fail = _plant(planted, place, model)
        heard: Callable[[int, float], None] = fail if place == "heard" else lambda n_rows, forward_s: None
        with pytest.raises((RuntimeError, StoreError), match="planted"):
            builder.build(0, heard)
        assert not Store(tmp_path / "ds").exists(commit_key(0))
    model.fail_after = None
    # Threads of pools stay for the next shard; they are idle, so that nothing is written behind its back.
    assert all(thread.name.startswith("actlake-") for thread in set(threading.enumerate()) - before)
    assert not builder.workshop.model.locked()
    alone = make_builder(tmp_path / "alone", corpus)
    assert builder.build(0).content == alone.build(0).content
    assert builder.build(1).content == alone.build(1).content
    assert files(tmp_path / "ds") == files(tmp_path / "alone")


def _plant(planted: pytest.MonkeyPatch, place: str, model: FormulaModel) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise RuntimeError(f"planted in {place}")

    if place == "forward":
        model.fail_after = 2
    elif place == "upload":
        GatedStore(planted, 0, fails=True).gate.set()
    elif place == "landing":
        planted.setattr("actlake.ingest.landing.scatter", fail)
    elif place == "tokens":
        planted.setattr("actlake.ingest.batch_feed.gathered", fail)
    return fail


def test_uploads_that_have_not_begun_are_given_up_after_one_has_failed(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = tuple(PointSpec(name=f"layers.{i}.mlp_in", width=4, rows_per_chunk=16) for i in range(8))
    builder = make_builder(tmp_path / "ds", corpus, points=points, n_threads=1)
    tried, write = list[str](), Store.write

    def failing(store: Store, key: str, *parts: bytes) -> None:
        if key.startswith("arrays/"):
            tried.append(key)
            raise StoreError("planted")
        write(store, key, *parts)

    monkeypatch.setattr(Store, "write", failing)
    with pytest.raises(StoreError, match="planted"):
        builder.build(0)
    assert 1 <= len(tried) <= builder.workshop.n_uploads == 2


def test_objects_are_uploaded_beside_each_other(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting, write = threading.Barrier(2), Store.write

    def meeting_others(store: Store, key: str, *parts: bytes) -> None:
        if key.startswith("arrays/layers") and "/c/" in key:
            meeting.wait(SOON)
        write(store, key, *parts)

    monkeypatch.setattr(Store, "write", meeting_others)
    assert make_builder(tmp_path / "ds", corpus).build(0).n_rows == 64


def test_the_next_batch_is_laid_out_while_one_runs(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, laid = Gated(make_spec(corpus).hook_points), threading.Semaphore(0)
    from actlake.ingest import batch_feed

    gathered = batch_feed.gathered

    def noting(*args: Any) -> Any:
        found = gathered(*args)
        laid.release()
        return found

    monkeypatch.setattr(batch_feed, "gathered", noting)
    builder = make_builder(tmp_path / "ds", corpus, forward=model)
    model.gate.clear()
    with ThreadPoolExecutor(1) as threads:
        building: Future[Any] = threads.submit(builder.build, 0)
        assert model.came.wait(SOON)
        # Two batches, although the first has not been through the model.
        assert laid.acquire(timeout=SOON)
        assert laid.acquire(timeout=SOON)
        assert model.shapes == []
        model.gate.set()
        assert building.result(SOON).n_rows == 64


def test_memory_is_used_again_and_never_more_than_allowed() -> None:
    memory = ShardMemory(2)
    with memory.lease(100) as first, memory.lease(50) as second:
        assert (len(first), len(second)) == (100, 50)
        assert not np.shares_memory(first, second)
    with memory.lease(40) as found:
        assert found is second  # the smallest that is large enough
    with memory.lease(120) as large, memory.lease(10) as small:
        assert len(large) == 120
        assert small is second  # the larger of the two had made room
    assert sorted(map(len, memory._free)) == [50, 120]


def test_arrays_are_cut_out_of_memory_without_touching_each_other(corpus: Corpus) -> None:
    arrays = [array for array in make_spec(corpus).arrays().values() if array.width is not None]
    arena = np.zeros(nbytes_of(arrays, 7), dtype=np.uint8)
    cut = carve(arena, arrays, 7)
    assert {name: (rows.shape, rows.dtype) for name, rows in cut.items()} == {
        array.name: (array.shape(7), np.dtype("<u2")) for array in arrays
    }
    for number, rows in enumerate(cut.values(), start=1):
        rows[:] = number
    assert [set(rows.ravel().tolist()) for rows in cut.values()] == [{1}, {2}]
