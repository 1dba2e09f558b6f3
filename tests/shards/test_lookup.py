"""Looking rows up: contexts, sequences and samples, against what the corpus and the formulas say."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fakes import formula
from formula_dataset import BOTH, NARROW, WIDE, Made, make_spec, same_bits
from labelled import Labelled, Truth, make_labelled

from actlake.shards.lookup import _draw, context, sequence
from actlake.storage.arrays import ArraySpec
from actlake.storage.errors import (
    BadInputError,
    CorruptObjectError,
    NotFoundError,
    RowRangeError,
    UncommittedShardError,
    UnknownNameError,
)

POINTS = ("layers.0.attn_z", "layers.1.resid_post")
WIDTHS = (6, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    return make_labelled(tmp_path_factory.mktemp("labelled"))


# --- context ---


def test_every_row_knows_its_window_and_its_document(made: Labelled) -> None:
    truths = {truth.row: truth for truth in made.rows}
    numbers = np.random.default_rng(0).integers(0, len(truths), size=300)
    found = context(made.ds, numbers, before=5, after=3)
    assert [one.row for one in found] == numbers.tolist()
    for one in found:
        truth = truths[one.row]
        of, at = truth.sequence, truth.position
        assert one.tokens == tuple(of.tokens[max(0, at - 5) : at + 4].tolist())
        assert (one.token_id, one.position, one.sequence, one.role) == (truth.token_id, at, of.index, "text")
        assert (one.document, one.window, one.source, one.metadata) == (of.document, of.window, of.source, of.metadata)
        assert one.pieces == tuple(f" w{token}" for token in one.tokens)
        assert one.before + one.token + one.after == "".join(one.pieces)
        assert one.before.count(" w") == min(5, at)


def test_a_context_reads_as_one_line(made: Labelled) -> None:
    (one,) = context(made.ds, made.rows[0].row, before=1, after=1)
    after = made.rows[0].sequence.tokens[2]
    assert str(one) == (
        f"row {one.row}   w2\u27e6 w{one.token_id}\u27e7 w{after}  (d35, token 1 of window 2, safe=true, turns=3)"
    )


def test_contexts_read_no_activations(made: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    read_chunk = made.ds.reader.read_chunk

    def watch(array: ArraySpec, *arguments: Any) -> None:
        assert array.name.startswith("rows/")
        read_chunk(array, *arguments)

    monkeypatch.setattr(made.ds.reader, "read_chunk", watch)
    assert len(context(made.ds, slice(0, 100))) == 100
    assert context(made.ds, []) == []


def test_a_context_that_cannot_be_given(made: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RowRangeError, match="row 230 is out of range"):
        context(made.ds, 230)
    with pytest.raises(BadInputError, match="before = -1 and after = 10 must not be negative"):
        context(made.ds, 0, before=-1)
    rows = made.ds.rows
    monkeypatch.setattr(made.ds, "rows", lambda key: rows(key) | {"token_id": rows(key)["token_id"] + 1})
    with pytest.raises(CorruptObjectError, match=r"row 7 is of token \d+, but the corpus has \d+ at place"):
        context(made.ds, 7)


def test_a_context_needs_the_corpus_and_a_sequence_does_not(tmp_path: Path) -> None:
    made = make_labelled(tmp_path, n_rows=100)
    (tmp_path / "corpus").rename(tmp_path / "gone")
    with pytest.raises(NotFoundError, match=r"was made from the corpus at .*which is not there"):
        context(made.ds, 0)
    assert sequence(made.ds, 0).row.tolist() == [truth.row for truth in made.rows if truth.sequence.index == 0]


# --- sequence ---


def by_sequence(rows: list[Truth]) -> dict[int, list[Truth]]:
    groups = itertools.groupby(rows, key=lambda truth: truth.sequence.index)
    return {number: list(group) for number, group in groups}


@pytest.mark.parametrize("order", ["shuffled", "sequence"])
@pytest.mark.parametrize("n_rows", [230, 64])
def test_a_sequence_has_all_its_rows_in_corpus_order(tmp_path: Path, order: str, n_rows: int) -> None:
    made = make_labelled(tmp_path, n_rows=n_rows, order=order)
    for number, truths in by_sequence(made.rows).items():
        rows = sequence(made.ds, number)
        assert (rows.sequence, len(rows)) == (number, len(truths))
        assert rows.row.tolist() == [truth.row for truth in truths]
        tokens, positions = [t.token_id for t in truths], [t.position for t in truths]
        assert (rows.token_id.tolist(), rows.position.tolist()) == (tokens, positions)
        for place, (point, width) in enumerate(zip(POINTS, WIDTHS, strict=True)):
            assert same_bits(rows[point], formula(tokens, positions, place, width))


def test_a_sequence_is_read_at_the_points_asked_for(made: Labelled) -> None:
    assert list(sequence(made.ds, 3, "layers.1.*").activations) == [POINTS[1]]
    with pytest.raises(UnknownNameError, match=r"no hook point 'layers\.0\.attn_z' among these"):
        sequence(made.ds, 3, [POINTS[1]])[POINTS[0]]


class Redacted(Made):
    """Void rows keep their token, position and sequence, as the format says."""

    def values(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        if name not in ("rows/token_id", "rows/position", "rows/sequence"):
            return super().values(name, rows)
        voids, self.voids = self.voids, frozenset()
        try:
            return super().values(name, rows)
        finally:
            self.voids = voids


def test_void_rows_are_left_out_of_a_sequence(local: str) -> None:
    redacted = Redacted(local, 868, spec=make_spec(order="sequence"), voids=frozenset({97, 100, 400}))
    rows = sequence(redacted.build_all().open(), 1)
    assert rows.row.tolist() == [98, 99, *range(101, 194)]
    assert rows.position.tolist() == [1, 2, *range(4, 97)]
    assert rows.role.unique().tolist() == [0]


@pytest.mark.parametrize("number", [-1, 10_000])
def test_a_sequence_without_rows_is_refused(made: Labelled, number: int) -> None:
    with pytest.raises(RowRangeError, match=f"no row is of sequence {number}"):
        sequence(made.ds, number)


@pytest.mark.parametrize("shards", [[0, 2], [1, 3], [2], []])
def test_a_sequence_is_whole_or_refused_where_shards_are_missing(tmp_path: Path, shards: list[int]) -> None:
    made = make_labelled(tmp_path, shards=shards)
    n_found = 0
    for number, truths in by_sequence(made.rows).items():
        needed = {truth.row // 64 for truth in truths}
        # Whether the neighbours of a whole shard's first and last row are of it cannot be seen.
        inside = min(made.rows.index(t) for t in truths) % 64 and (made.rows.index(truths[-1]) + 1) % 64
        if needed <= set(shards) and inside:
            assert sequence(made.ds, number).row.tolist() == [truth.row for truth in truths]
            n_found += 1
        elif not needed <= set(shards):
            with pytest.raises(UncommittedShardError, match=rf"sequence {number} may be in shard \d.*ingest"):
                sequence(made.ds, number)
    assert n_found >= 2 * len(shards)


# --- sample ---


def test_a_sample_of_all_rows_has_each_once_and_no_void(make: Callable[..., Made]) -> None:
    voids = frozenset({0, 255, 256, 600})
    dataset = make(voids=voids).build_all().open()
    batch = dataset.sample(BOTH, 864, seed=3)
    tensors, rows = batch.activations, batch.row
    assert sorted(rows.tolist()) == sorted(set(range(868)) - voids)
    assert rows.tolist() != sorted(rows.tolist())
    assert list(tensors) == BOTH
    for name, tensor in tensors.items():
        assert same_bits(tensor, dataset[name][rows.numpy()])


def test_a_sample_depends_on_its_seed_alone(make: Callable[..., Made]) -> None:
    dataset = make().build(0, 2).open()
    one, two, other = (dataset.sample(WIDE, 50, seed=seed).row for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert set((one // 256).tolist()) == {0, 2}
    assert len(set(one.tolist())) == 50


@pytest.mark.parametrize(("n", "total"), [(2, 5), (4, 5), (3, 3), (1, 6)])
def test_every_ordered_draw_is_equally_likely(n: int, total: int) -> None:
    draws = Counter(tuple(_draw(np.random.default_rng(seed), n, total).tolist()) for seed in range(6000))
    outcomes = list(itertools.permutations(range(total), n))
    assert set(draws) == set(outcomes)
    mean = 6000 / len(outcomes)
    assert max(abs(draws[outcome] - mean) for outcome in outcomes) < 5 * mean**0.5


@pytest.mark.parametrize("n", [0, -1, 869])
def test_a_sample_that_cannot_be_drawn(make: Callable[..., Made], n: int) -> None:
    with pytest.raises(BadInputError, match=rf"n = {n} rows cannot be drawn from 868; use 1\.\.868"):
        make().build_all().open().sample(NARROW, n)
