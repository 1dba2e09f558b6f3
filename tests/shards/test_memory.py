"""Memory of batches: used again once every tensor of a batch is gone, and not before."""

import numpy as np
from formula_dataset import BOTH, NARROW, WIDE, make_spec

from actlake.shards.batch import to_tensor
from actlake.shards.memory import Memory


def make_memory(n_rows: int = 64) -> Memory:
    arrays = make_spec().arrays()
    return Memory({name: arrays[name] for name in BOTH}, n_rows)


def test_neighbours_lie_in_one_slab_and_no_two_slots_overlap() -> None:
    slots = make_memory().take(5)
    assert [slot.place for slot in slots] == list(range(5))
    assert len({id(slot.slab) for slot in slots}) == 1
    for name in BOTH:
        for i, slot in enumerate(slots):
            slot.rows(name)[:] = i
        assert all((slot.rows(name) == i).all() for i, slot in enumerate(slots))


def test_a_slot_comes_back_when_the_last_tensor_of_it_is_dropped() -> None:
    memory = make_memory()
    (slot,) = memory.take(1)
    lent = memory.lend(slot)
    one, other = to_tensor(lent[WIDE])[3:], to_tensor(lent[NARROW])
    del lent
    assert memory.take(1) != [slot]
    del one
    assert memory.take(1) != [slot]
    del other
    assert memory.take(1) == [slot]


def test_slots_that_come_back_in_any_order_are_handed_out_as_neighbours() -> None:
    memory = make_memory()
    slots = memory.take(4)
    for place in (2, 0, 3, 1):
        memory.give_back(slots[place])
    assert memory.take(4) == slots


def test_nothing_comes_back_after_the_end() -> None:
    memory = make_memory()
    (slot,) = memory.take(1)
    tensor = to_tensor(memory.lend(slot)[WIDE])
    memory.close()
    del tensor
    assert memory.take(1) != [slot]


def test_what_is_lent_is_the_slots_own_memory() -> None:
    memory = make_memory()
    (slot,) = memory.take(1)
    lent = memory.lend(slot)
    assert {name: rows.shape for name, rows in lent.items()} == {NARROW: (64, 4), WIDE: (64, 12)}
    for name, rows in lent.items():
        assert np.shares_memory(rows, slot.rows(name))
        assert rows.flags.c_contiguous
        assert rows.flags.writeable
