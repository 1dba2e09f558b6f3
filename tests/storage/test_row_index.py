"""The row index: which sequences own which rows, and how many rows each sequence has."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actlake.storage.errors import BadInputError
from actlake.storage.row_index import RowIndex, count_rows
from actlake.storage.rowspace import KeepRule


@given(st.lists(st.integers(0, 3), max_size=12), st.data())
def test_sequences_of_are_exactly_the_owners(counts: list[int], data: st.DataObject) -> None:
    index = RowIndex.from_counts(counts)
    owners = [sequence for sequence, count in enumerate(counts) for _ in range(count)]
    assert index.n_sequences == len(counts)
    assert index.n_rows == len(owners)
    start = data.draw(st.integers(0, len(owners)))
    stop = data.draw(st.integers(start, len(owners)))
    found = index.sequences_of(range(start, stop))
    if start == stop:
        assert len(found) == 0
    else:
        assert (found.start, found.stop) == (owners[start], owners[stop - 1] + 1)


def test_rows_that_are_not_there_are_refused() -> None:
    index = RowIndex.from_counts([2, 0, 3])
    for rows in (range(4, 6), range(-1, 2), range(0, 4, 2)):
        with pytest.raises(BadInputError, match=r"its rows are 0\.\.4"):
            index.sequences_of(rows)


def test_prefix_sums_are_checked() -> None:
    for wrong in ([], [1, 2], [0, 2, 1]):
        with pytest.raises(BadInputError, match="first_row"):
            RowIndex(np.array(wrong, dtype=np.int64))


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=8),
    st.sets(st.integers(0, 5), max_size=3),
    st.integers(0, 7),
    st.sets(st.sampled_from(["text", "user", "model"]), max_size=2),
)
def test_counts_equal_the_mask_of_each_sequence(
    sequences: list[list[int]], exclude: set[int], skip: int, roles: set[str]
) -> None:
    keep = KeepRule(exclude=tuple(exclude), skip_first=skip, roles=tuple(roles))
    tokens = np.array([token for sequence in sequences for token in sequence], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
    of_token = (np.arange(len(tokens)) * 7 % 4).astype(np.uint8)
    parts = [slice(start, stop) for start, stop in itertools.pairwise(offsets)]
    expected = [int(keep.mask(tokens[part], of_token[part]).sum()) for part in parts]
    assert count_rows(tokens, of_token, offsets, keep).tolist() == expected
    assert count_rows(tokens, of_token, offsets[1:], keep).tolist() == expected[1:]
