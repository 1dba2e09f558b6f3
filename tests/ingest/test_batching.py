"""Batches as a function of lengths: every sequence once, within the budget, and hardly any padding where packed."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actlake.ingest.batching import Batch, choose_batching, plan_batches

CONTEXT = 1024
lengths_of_sequences = st.lists(st.integers(1, CONTEXT) | st.integers(1, 80), max_size=60)


def members(batches: list[Batch]) -> list[int]:
    return [member for batch in batches for member in batch.members]


@given(lengths_of_sequences, st.integers(1, 9000), st.sampled_from(["padded", "packed"]))
def test_every_sequence_has_a_place_of_its_own(lengths: list[int], batch_tokens: int, batching: str) -> None:
    batches = plan_batches(lengths, batch_tokens, CONTEXT, batching)
    assert sorted(members(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert batch.n_tokens % 64 == 0
        assert batch.n_tokens <= CONTEXT
        assert all(0 < sum(lengths[member] for member in row) <= batch.n_tokens for row in batch.rows)
        assert len(batch.rows) == 1 or batch.n_run <= batch_tokens
        assert batch.is_packed == (len(batch.members) > len(batch.rows))


@given(lengths_of_sequences, st.integers(1, 9000))
def test_long_sequences_are_alone_and_short_ones_leave_no_room(lengths: list[int], batch_tokens: int) -> None:
    packed = plan_batches(lengths, batch_tokens, CONTEXT, "packed")
    long = [batch for batch in packed if lengths[batch.members[0]] > 512]
    assert packed[: len(long)] == long
    assert all(lengths[member] > 512 for member in members(long))
    assert not any(batch.is_packed for batch in long)
    short = packed[len(long) :]
    assert all(256 <= batch.n_tokens <= 512 for batch in short)
    rows = [(batch.n_tokens, [lengths[member] for member in row]) for batch in short for row in batch.rows]
    for place, (n_tokens, row) in enumerate(rows):
        room = n_tokens - sum(row)
        assert all(length > room for _, later in rows[place + 1 :] for length in later)


@given(lengths_of_sequences, st.integers(512, 9000))
def test_packing_runs_the_long_ones_as_padding_does(lengths: list[int], batch_tokens: int) -> None:
    long = [length for length in lengths if length > 512]
    packed = plan_batches(lengths, batch_tokens, CONTEXT, "packed")
    assert [b for b in packed if b.n_tokens > 512] == [
        Batch(rows=tuple((places[i],) for (i,) in batch.rows), n_tokens=batch.n_tokens)
        for places in [[place for place, length in enumerate(lengths) if length > 512]]
        for batch in plan_batches(long, batch_tokens, CONTEXT)
    ]


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_no_row_is_longer_than_the_context(batching: str) -> None:
    batches = plan_batches([100, 30, 70, 100], 250, 100, batching)
    assert [batch.n_tokens for batch in batches] == [100, 100]
    assert [batch.rows for batch in batches] == {
        "padded": [((0,), (3,)), ((2,), (1,))],
        "packed": [((0,), (3,)), ((2, 1),)],
    }[batching]


def test_short_texts_are_packed_where_that_saves_a_twentieth() -> None:
    assert choose_batching([80] * 200, 4096, CONTEXT) == "packed"
    assert choose_batching([1024] * 50, 4096, CONTEXT) == "padded"
    assert choose_batching([64] * 64, 4096, CONTEXT) == "padded"
    assert choose_batching([], 4096, CONTEXT) == "padded"
    # 60 rows of 128 tokens become 20 of 256, beside 20,480 tokens, or 61,440.
    for n_long, expected in ((20, "packed"), (60, "padded")):
        lengths = [1024] * n_long + [66] * 60
        padded, packed = (
            sum(b.n_run for b in plan_batches(lengths, 4096, CONTEXT, batching)) for batching in ("padded", "packed")
        )
        assert (padded, packed) == (1024 * n_long + 60 * 128, 1024 * n_long + 20 * 256)
        assert choose_batching(lengths, 4096, CONTEXT) == expected


def test_a_padded_spread_of_lengths_is_mostly_tokens() -> None:
    lengths = list(accumulate([5] * 190))
    shares = {
        batching: sum(lengths) / sum(batch.n_run for batch in plan_batches(lengths, 4096, CONTEXT, batching))
        for batching in ("padded", "packed")
    }
    assert 0.9 < shares["padded"] < shares["packed"]
