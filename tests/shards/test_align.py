"""Datasets that are read as one: the same rows of each, and what is said where they do not line up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from formula_dataset import BOTH, NARROW, SMALL, WIDE, Made, flat, make_spec, rows_of, same_bits

import actlake
from actlake.shards.dataset import ActivationDataset
from actlake.storage.errors import BadInputError, SpecMismatchError, UnknownNameError

Make = Callable[..., Made]
Pair = Callable[..., tuple[Made, Made]]

POINTS = [f"base:{WIDE}", f"chat:{WIDE}", f"chat:{NARROW}"]
OPTIONS: dict[str, Any] = {"batch_size": 50, "buffer_bytes": SMALL, "drop_last": False}


@pytest.fixture
def two(make: Make) -> Pair:
    """Two models' datasets of one row space."""

    def pair(rows: tuple[int, int] = (868, 868), **chat: Any) -> tuple[Made, Made]:
        base = make(rows[0])
        spec = make_spec(model="formula-chat")
        options: dict[str, Any] = {"spec": spec, "offset": 3.0} | chat
        return base, Made(f"{base.url}-chat", rows[1], **options)

    return pair


def aligned(base: Made, chat: Made) -> Any:
    return actlake.align(base=base.open(), chat=chat.open())


def check(both: Any, batch: Any) -> None:
    row = batch.row.numpy()
    for full in batch.hook_points:
        name, point = full.split(":")
        assert same_bits(batch[full], both.datasets[name][point][row])
    for name in ("base", "chat"):
        assert both.datasets[name]["rows/token_id"][row].tolist() == batch.token_id.tolist()


def test_both_give_the_same_rows_under_their_names(two: Pair) -> None:
    base, chat = two()
    both = aligned(base.build_all(), chat.build_all())
    stream = both.stream(POINTS, **OPTIONS)
    batches = list(stream)
    assert sorted(flat(batches)) == list(range(868))
    for batch in batches:
        assert batch.hook_points == tuple(POINTS)
        check(both, batch)
        assert not torch.equal(batch[POINTS[0]], batch[POINTS[1]])
    assert stream.widths == dict(zip(POINTS, (12, 12, 4), strict=True))
    # The order is that of one dataset alone, where the buffer holds as many units of it.
    options = OPTIONS | {"buffer_bytes": "1GiB"}
    assert rows_of(list(both.stream(POINTS, **options))) == rows_of(list(base.open().stream(BOTH, **options)))
    sides = both.stream({"inputs": f"base:{WIDE}", "targets": "chat:layers.*.resid_post"}, **OPTIONS)
    assert (sides.inputs, sides.targets) == ((POINTS[0],), (POINTS[1],))


def test_only_shards_that_both_have_committed_are_read(two: Pair) -> None:
    base, chat = two()
    both = aligned(base.build(0, 1, 3), chat.build(3, 1, 2))
    batches = list(both.stream(POINTS, **OPTIONS))
    assert sorted(flat(batches)) == [*range(256, 512), *range(768, 868)]
    for batch in batches:
        check(both, batch)


@pytest.mark.parametrize(
    ("rows", "common"), [((868, 900), 768), ((868, 1500), 768), ((1000, 899), 896), ((868, 868), 868)]
)
@pytest.mark.parametrize("order", ["shuffled", "sequence"])
@pytest.mark.parametrize("followed", [False, True])
def test_a_short_last_block_counts_only_where_it_is_as_long_in_both(
    two: Pair, rows: tuple[int, int], common: int, order: str, followed: bool
) -> None:
    base, chat = two(rows, spec=make_spec(model="formula-chat", order=order))
    base = Made(f"{base.url}-{order}", rows[0], spec=make_spec(order=order))
    both = aligned(base.build_all(), chat.build_all())
    found = sorted(flat(list(both.stream(POINTS, **OPTIONS, follow=followed))))
    assert found == list(range(common if order == "shuffled" else min(rows)))


def test_a_row_that_is_void_in_one_is_left_out_of_both(two: Pair) -> None:
    base, chat = two(voids=frozenset({5, 300, 867}))
    both = aligned(base.build_all(), chat.build_all())
    rows = flat(list(both.stream(POINTS[:2], **OPTIONS)))
    assert sorted(rows) == [row for row in range(868) if row not in (5, 300, 867)]


def test_each_is_normalised_by_its_own_statistics(two: Pair) -> None:
    base, chat = two()
    options = OPTIONS | {"buffer_bytes": "1GiB", "normalize": "unit"}
    both = aligned(base.build_all(), chat.build_all())
    alone = {name: made.open().stream(WIDE, **options) for name, made in (("base", base), ("chat", chat))}
    for batch, one, other in zip(both.stream(POINTS[:2], **options), *alone.values(), strict=True):
        assert torch.equal(batch[POINTS[0]], one[WIDE])
        assert torch.equal(batch[POINTS[1]], other[WIDE])


def test_rows_are_chosen_by_columns_and_by_the_norms_of_either(two: Pair) -> None:
    base, chat = two()
    both = aligned(base.build_all(), chat.build_all())
    view = both.where(position=(20, 60), norm={f"chat:{WIDE}": (None, 1.0), f"base:{NARROW}": (0.5, None)})
    own = {*chat.open().where(norm={WIDE: (None, 1.0)}).row_numbers.tolist()}
    own &= {*base.open().where(norm={NARROW: (0.5, None)}, position=(20, 60)).row_numbers.tolist()}
    batches = list(view.stream(POINTS, **OPTIONS))
    assert own
    assert sorted(flat(batches)) == sorted(own) == view.row_numbers.tolist()
    for batch in batches:
        check(both, batch)


def test_a_state_goes_on_and_names_the_dataset_that_is_another(two: Pair) -> None:
    base, chat = two()
    base.build_all()
    chat.build_all()
    stream = aligned(base, chat).stream(POINTS, **OPTIONS)
    it = iter(stream)
    next(it)
    state = stream.state_dict()
    rest = rows_of(list(it))
    again = aligned(base, chat).stream(POINTS, **OPTIONS)
    again.load_state_dict(state)
    assert rows_of(list(again)) == rest
    other = Made(f"{base.url}-other", 868, spec=make_spec(model="other")).build_all()
    with pytest.raises(BadInputError, match="dataset_id: the state has"):
        aligned(base, other).stream(POINTS, **OPTIONS).load_state_dict(state)


def token_shifted(made: Made, at: int) -> Made:
    """The same but for the tokens from a row on."""
    values = made.values

    def shifted(name: str, rows: Any) -> Any:
        found = values(name, rows)
        return found + (rows >= at).astype(found.dtype) if name == "rows/token_id" else found

    made.values = shifted  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"corpus_id": "d" * 64}, ["corpus_id: base has 'ccc", "chat 'ddd"]),
        ({"seed": 7}, ["seed: base has 0, chat 7"]),
        ({"rows_per_block": 64}, ["rows_per_block: base has 128, chat 64"]),
        ({"rows_per_shard": 512, "order": "sequence"}, ["rows_per_shard: base has 256, chat 512", "order: base has"]),
    ],
)
def test_what_does_not_line_up_is_refused_with_the_fields_and_the_first_token(
    make: Make, change: dict[str, Any], fields: list[str]
) -> None:
    base = make().build_all()
    same = Made(f"{base.url}-same", 868, spec=make_spec(**change)).build_all()
    with pytest.raises(SpecMismatchError, match="the tokens of the first 868 rows are the same") as caught:
        aligned(base, same)
    assert all(field in str(caught.value) for field in fields)
    assert base.url in str(caught.value)
    shifted = token_shifted(Made(f"{base.url}-shifted", 868, spec=make_spec(**change)), at=300).build_all()
    token = 300 * 7 % 1009
    message = f"first token that differs is that of row 300: {token} and {token + 1}"
    with pytest.raises(SpecMismatchError, match=message):
        aligned(base, shifted)


def test_names_that_there_are_not_are_refused(ds: ActivationDataset) -> None:
    both = actlake.align(base=ds, chat=ds)
    with pytest.raises(
        UnknownNameError, match=r"no hook point 'layers\.3\.resid_post': write name:point, the names are"
    ):
        both.stream(WIDE)
    with pytest.raises(UnknownNameError, match="did you mean 'chat'"):
        both.stream(f"chatt:{WIDE}")
    with pytest.raises(BadInputError, match="needs datasets by name"):
        actlake.align()
