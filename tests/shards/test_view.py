"""Views and aligned datasets have what a dataset has: samples, contexts, sequences, row numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from formula_dataset import BOTH, NARROW, SMALL, WIDE, Made, flat, make_spec, same_bits

import actlake
from actlake.storage.errors import BadInputError, RowRangeError

Make = Callable[..., Made]

OPTIONS: dict[str, Any] = {"batch_size": 50, "buffer_bytes": SMALL, "drop_last": False}


def pair(make: Make, **chat: Any) -> tuple[Made, Made]:
    """Two models' datasets of one row space."""
    base = make(868)
    return base, Made(f"{base.url}-chat", 868, spec=make_spec(model="formula-chat"), offset=3.0, **chat)


def test_a_view_counts_and_numbers_the_rows_that_its_stream_has(make: Make) -> None:
    base, chat = pair(make, voids=frozenset({5, 300, 867}))
    both = actlake.align(base=base.build(0, 1, 3).open(), chat=chat.build(3, 1, 2).open())
    for conditions in ({"position": (4, None)}, {"norm": {f"chat:{WIDE}": (None, 1.0)}}):
        view = both.where(**conditions)
        streamed = sorted(flat(list(view.stream([f"base:{WIDE}", f"chat:{WIDE}"], **OPTIONS))))
        assert streamed
        assert view.row_numbers.tolist() == streamed
        assert view.n_rows == len(streamed)
        assert {300, 867}.isdisjoint(streamed)


def test_a_sample_of_a_view_is_of_chosen_rows(make: Make) -> None:
    ds = make(voids=frozenset({0, 255})).build_all().open()
    view = ds.where(position=(30, 60))
    batch = view.sample("layers.*.resid_post", 40, seed=1)
    rows = batch.row.numpy()
    assert len({*rows.tolist()}) == 40
    assert {*rows.tolist()} <= {*view.row_numbers.tolist()}
    assert batch.hook_points == ds.select("layers.*.resid_post")
    assert same_bits(batch[WIDE], ds[WIDE][rows])
    assert batch.position.tolist() == ds["rows/position"][rows].tolist()
    assert torch.equal(view.sample(WIDE, 40, seed=1).row, batch.row)
    assert not torch.equal(view.sample(WIDE, 40, seed=2).row, batch.row)
    with pytest.raises(BadInputError, match=rf"n = {view.n_rows + 1} rows cannot be drawn from the {view.n_rows} that"):
        view.sample(WIDE, view.n_rows + 1)


def test_a_sample_of_aligned_datasets_is_of_rows_that_all_have(make: Make) -> None:
    base, chat = pair(make, voids=frozenset({300, 867}))
    both = actlake.align(base=base.build(0, 1, 3).open(), chat=chat.build(3, 1, 2).open())
    there = [row for row in (*range(256, 512), *range(768, 868)) if row not in (300, 867)]
    batch = both.sample([f"chat:{NARROW}", f"base:{WIDE}"], len(there))
    rows = batch.row.numpy()
    assert sorted(rows.tolist()) == there
    assert same_bits(batch[f"chat:{NARROW}"], both.datasets["chat"][NARROW][rows])
    assert same_bits(batch[f"base:{WIDE}"], both.datasets["base"][WIDE][rows])
    assert batch.token_id.tolist() == both.datasets["base"]["rows/token_id"][rows].tolist()
    with pytest.raises(BadInputError, match=rf"cannot be drawn from {len(there)}; use"):
        both.sample(f"base:{WIDE}", len(there) + 1)


def test_a_sequence_of_aligned_datasets_has_the_points_of_all(make: Make) -> None:
    base, chat = pair(make)
    voided = int(base.build_all().open().sequence(3).row[2])
    chat = Made(f"{chat.url}-void", 868, spec=make_spec(model="formula-chat"), offset=3.0, voids=frozenset({voided}))
    both = actlake.align(base=base.open(), chat=chat.build_all().open())
    found = both.sequence(3, ["chat:layers.*.resid_post", f"base:{NARROW}"])
    whole = base.open().sequence(3)
    kept = whole.row != voided
    assert torch.equal(found.row, whole.row[kept])
    assert torch.equal(found.position, whole.position[kept])
    assert torch.equal(found[f"base:{NARROW}"], whole[NARROW][kept])
    assert same_bits(found[f"chat:{WIDE}"], chat.open()[WIDE][found.row.numpy()])
    assert {*both.sequence(3).activations} == {f"{name}:{point}" for name in ("base", "chat") for point in BOTH}
    assert torch.equal(both.where(position=(2, None)).sequence(3).row, found.row)
    with pytest.raises(RowRangeError, match="no row is of sequence 999"):
        both.sequence(999)


def test_a_norm_is_of_every_point_of_a_pattern(make: Make) -> None:
    ds = make().build_all().open()
    each = [{*ds.where(norm={point: (None, 1.0)}).row_numbers.tolist()} for point in BOTH]
    assert each[0] != each[1]
    found = ds.where(norm={"layers.*.*": (None, 1.0)}).row_numbers
    assert {*found.tolist()} == each[0] & each[1]
    with pytest.raises(BadInputError, match=r"norm = \(None, 10\): write the hook point"):
        ds.where(norm=(None, 10))


def test_a_state_of_another_normalisation_is_named(make: Make) -> None:
    ds = make().build_all().open()
    state = ds.stream(WIDE, batch_size=50, normalize="unit").state_dict()
    with pytest.raises(BadInputError, match="normalize: the state has 'unit', this stream 'sqrt_d'"):
        ds.stream(WIDE, batch_size=50, normalize="sqrt_d").load_state_dict(state)
    # Of before there was the field.
    plain = ds.stream(WIDE, batch_size=50).state_dict()
    del plain["of"]["normalize"]
    ds.stream(WIDE, batch_size=50).load_state_dict(plain)


def test_a_dtype_may_be_named(make: Make) -> None:
    ds = make().build_all().open()
    (batch, *_) = ds.stream(WIDE, batch_size=50, dtype="float32")
    assert batch[WIDE].dtype == torch.float32
    assert np.array_equal(batch[WIDE].numpy(), ds[WIDE][batch.row.numpy()].astype(np.float32))
    for wrong in ("float23", "int32", "nn", 3):
        with pytest.raises(BadInputError, match=rf"dtype = '?{wrong}'? is no dtype of activations"):
            ds.stream(WIDE, dtype=wrong)


def test_sequences_of_a_stream_leave_nothing_out(make: Make) -> None:
    stream = make().build_all().open().stream(WIDE, batch_size=50, order="sequence")
    assert stream.settings.drop_last
    assert sum(int(batch["lengths"].sum()) for batch in stream.sequences(n_sequences=7)) == 868


def test_pinned_memory_is_no_matter_where_there_is_no_accelerator(make: Make) -> None:
    ds = make().build_all().open()
    options: dict[str, Any] = {"batch_size": 50, "seed": 4}
    pinned = [batch[WIDE] for batch in ds.stream(WIDE, pin_memory=True, **options)]
    assert len(pinned) == 868 // 50
    for one, other in zip(pinned, ds.stream(WIDE, **options), strict=True):
        assert torch.equal(one, other[WIDE])
