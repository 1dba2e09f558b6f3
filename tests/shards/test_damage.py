"""Shards that are lost or damaged while they are streamed: named, or left out and counted where that is asked for."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from formula_dataset import BOTH, NARROW, SMALL, WIDE, Made, flat, same_bits

from actlake.storage.errors import CorruptObjectError, DataError, MissingObjectError, MixedShardError

Make = Callable[..., Made]

OPTIONS: dict[str, Any] = {"batch_size": 50, "buffer_bytes": SMALL, "drop_last": False}


def lose(made: Made, *names: str, shard: int = 1) -> None:
    for name in names:
        made.store.delete(made.key(name, shard))


def other_attempt(made: Made) -> None:
    twin = Made(f"{made.url}-twin", made.n_rows, offset=1.0).build(1)
    made.store.write(made.key(WIDE, 1), twin.store.read(twin.key(WIDE, 1)))


DAMAGE: list[tuple[Callable[[Made], None], type[DataError], str, set[int]]] = [
    (lambda made: lose(made, WIDE), MissingObjectError, r"shard 1, layers\.3\.resid_post", {*range(256, 512)}),
    (lambda made: lose(made, NARROW), MissingObjectError, r"shard 1, layers\.3\.mlp_out", {*range(256, 512)}),
    # Inside of chunk 2 of 32 rows, which with its neighbour is a unit of 64.
    (
        lambda made: made.flip(WIDE, 1, made.chunk_span(WIDE, 1, 2)[0] + 20),
        CorruptObjectError,
        r"shard 1, layers\.3\.resid_post, chunk 2",
        {*range(320, 384)},
    ),
    # The index.
    (lambda made: made.flip(WIDE, 1, -9), CorruptObjectError, r"shard 1, layers\.3\.resid_post", {*range(256, 512)}),
    (other_attempt, MixedShardError, r"shard 1, layers\.3\.resid_post.*of another attempt", {*range(256, 512)}),
]


@pytest.mark.parametrize(("damage", "error", "named", "lost"), DAMAGE)
def test_damage_is_named(
    make: Make, damage: Callable[[Made], None], error: type[DataError], named: str, lost: set[int]
) -> None:
    made = make().build_all()
    stream = made.open().stream(BOTH, **OPTIONS)
    damage(made)
    with pytest.raises(error, match=f"{named}.*verify --repair"):
        list(stream)


@pytest.mark.parametrize(("damage", "error", "named", "lost"), DAMAGE)
@pytest.mark.parametrize("order", ["shuffled", "sequence"])
def test_what_is_damaged_is_left_out_and_counted_where_that_is_asked_for(
    make: Make, damage: Callable[[Made], None], error: type[DataError], named: str, lost: set[int], order: str
) -> None:
    made = make(voids=frozenset({10, 330})).build_all()
    options = OPTIONS | {"order": order}
    whole = list(made.open().stream(BOTH, **options))
    damage(made)
    stream = made.open().stream(BOTH, **options, on_damage="skip")
    batches, states = [], []
    for batch in stream:
        batches.append((batch.row.tolist(), batch.token_id.tolist(), batch[WIDE], batch[NARROW]))
        states.append(stream.state_dict())
    # Exactly those rows are left out; all others stay in their batches, in their order.
    wanted = [(batch, [row not in lost for row in batch.row.tolist()]) for batch in whole]
    wanted = [(batch, keep) for batch, keep in wanted if any(keep)]
    for (rows, tokens, wide, narrow), (batch, keep) in zip(batches, wanted, strict=True):
        assert rows == list(itertools.compress(batch.row.tolist(), keep))
        assert tokens == list(itertools.compress(batch.token_id.tolist(), keep))
        assert same_bits(wide, made.values(WIDE, batch.row.numpy()[keep]))
        assert same_bits(narrow, made.values(NARROW, batch.row.numpy()[keep]))
    stats = stream.stats()
    assert stats["n_skipped_rows"] == len(lost - {10, 330})
    assert stats["n_rows"] == 866 - stats["n_skipped_rows"]
    assert list(stats["damaged_shards"]) == [1]
    assert f"shard 1, layers.3.{'mlp_out' if 'mlp' in named else 'resid_post'}" in stats["damaged_shards"][1]
    for step in (1, 4, len(states) - 2):
        again = made.open().stream(BOTH, **options, on_damage="skip")
        again.load_state_dict(states[step - 1])
        assert [batch.row.tolist() for batch in again] == [rows for rows, *_ in batches[step:]]


def test_a_shard_that_is_lost_as_a_whole_takes_its_row_columns_with_it(make: Make) -> None:
    made = make().build_all()
    lose(made, *made.spec.arrays())
    stream = made.open().stream(BOTH, **OPTIONS, on_damage="skip", epochs=2)
    tokens = sorted(token for batch in stream for token in batch.token_id.tolist())
    assert tokens == sorted(row * 7 % 1009 for row in range(868) if not 256 <= row < 512 for _ in range(2))
    assert stream.stats()["n_skipped_rows"] == 2 * 256


def test_a_row_column_that_is_damaged_is_named_when_it_is_asked_for(make: Make) -> None:
    made = make().build_all()
    made.flip("rows/token_id", 1, 5)
    stream = made.open().stream(BOTH, **OPTIONS, on_damage="skip")
    with pytest.raises(CorruptObjectError, match=r"shard 1, rows/token_id, chunk 0"):
        [batch.token_id for batch in stream]
    # Who does not ask for it is not held up.
    assert sorted(flat(list(made.open().stream(BOTH, **OPTIONS)))) == list(range(868))
