"""Damage and mixed attempts: each read of them raises the right error and names what is wrong."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from formula_dataset import NARROW, WIDE, Made, bits, make_spec

from actlake.storage.codecs import Codec
from actlake.storage.errors import (
    CorruptObjectError,
    DataError,
    MissingObjectError,
    MixedShardError,
    UncommittedShardError,
)
from actlake.storage.manifest import uncommit
from actlake.storage.records import commit, read_record

Make = Callable[..., Made]


@pytest.mark.parametrize("codec", ["blosc", "none"])
def test_a_flipped_bit_names_shard_point_chunk_and_both_checksums(make: Make, codec: str) -> None:
    made = make(spec=make_spec(codec=Codec(name=codec))).build_all()
    start, stop = made.chunk_span(WIDE, 1, 3)
    made.flip(WIDE, 1, (start + stop) // 2)
    view = made.open()[WIDE]
    with pytest.raises(CorruptObjectError) as caught:
        view[256 + 3 * 32]
    assert not isinstance(caught.value, MixedShardError)
    expected = r"shard 1, layers\.3\.resid_post, chunk 3: crc32c expected (0x[0-9a-f]{8}), found (0x[0-9a-f]{8}); .*"
    found = re.search(expected, str(caught.value))
    assert found is not None
    assert found[1] != found[2]
    assert "actlake verify --repair" in str(caught.value)
    # Its neighbours are sound.
    assert np.array_equal(bits(view[256:352]), bits(made.values(WIDE, np.arange(256, 352))))


def test_a_truncated_object_says_both_sizes(place: str) -> None:
    made = Made(place, 868).build_all()
    data = made.store.read(made.key(WIDE, 2))
    made.store.write(made.key(WIDE, 2), data[: len(data) - 7])
    message = rf"shard 2, layers\.3\.resid_post.*\({len(data) - 7} bytes, its record says {len(data)}\).*--repair"
    with pytest.raises(CorruptObjectError, match=message):
        made.open()[WIDE][600]
    made.store.write(made.key(WIDE, 2), b"")
    with pytest.raises(CorruptObjectError, match=rf"\(0 bytes, its record says {len(data)}\)"):
        made.open()[WIDE][600]


def test_an_object_truncated_after_its_index_was_read_is_noticed(make: Make) -> None:
    made = make().build_all()
    view = made.open()[WIDE]
    assert view[0].shape == (12,)
    data = made.store.read(made.key(WIDE, 0))
    made.store.write(made.key(WIDE, 0), data[: made.chunk_span(WIDE, 0, 5)[0] + 3])
    with pytest.raises(CorruptObjectError, match=r"shard 0, layers\.3\.resid_post, chunk 5: 3 of \d+ bytes are there"):
        view[5 * 32]


def test_a_damaged_index_is_named(make: Make) -> None:
    made = make().build_all()
    made.flip(WIDE, 1, -20)
    with pytest.raises(CorruptObjectError, match=r"shard 1, layers\.3\.resid_post: shard index crc32c expected 0x"):
        made.open()[WIDE][300]


def test_a_lost_object_is_missing(place: str) -> None:
    made = Made(place, 868).build_all()
    made.store.delete(made.key(NARROW, 1))
    ds = made.open()
    with pytest.raises(MissingObjectError, match=r"shard 1, layers\.3\.mlp_out.*--repair"):
        ds[NARROW][300]
    assert np.array_equal(bits(ds[WIDE][300]), bits(made.values(WIDE, np.array([300]))[0]))


def test_an_object_of_another_attempt_is_refused_though_all_its_checksums_hold(place: str) -> None:
    made = Made(place, 868).build_all()
    other = Made(f"{place}-other", 868, offset=0.37).build_all()
    expected, found = (read_record(m.store, 1).objects[WIDE].index_crc32c for m in (made, other))
    made.store.write(made.key(WIDE, 1), other.store.read(made.key(WIDE, 1)))
    ds = made.open()
    message = rf"shard 1, layers\.3\.resid_post.*expected {expected:#010x}, found {found:#010x}; .*verify --repair"
    with pytest.raises(MixedShardError, match=message):
        ds[WIDE][300]
    assert ds[NARROW][300].shape == (4,)
    with pytest.raises(MixedShardError, match=message):
        list(ds.stream([WIDE], batch_size=32))


def test_two_attempts_swapped_between_datasets_are_found_in_both(make: Make, tmp_path: object) -> None:
    one, other = make().build_all(), Made(f"{tmp_path}/other", 868, offset=0.37).build_all()
    key = one.key(NARROW, 0)
    mine, theirs = one.store.read(key), other.store.read(key)
    one.store.write(key, theirs)
    other.store.write(key, mine)
    for made in (one, other):
        with pytest.raises(MixedShardError, match=r"shard 0, layers\.3\.mlp_out"):
            made.open()[NARROW][0]


def test_an_attempt_that_commits_after_opening_is_read_whole(make: Make) -> None:
    made = make().build_all()
    ds = made.open()
    again = Made(made.url, 868, offset=0.37).build(1)
    rows = np.arange(868)
    found = bits(ds[WIDE][:])
    assert np.array_equal(found[256:512], bits(again.values(WIDE, rows[256:512])))
    assert np.array_equal(found[:256], bits(made.values(WIDE, rows[:256])))


def test_a_commit_after_some_objects_were_read_is_never_half_read(make: Make) -> None:
    made = make().build_all()
    ds = made.open()
    assert np.array_equal(bits(ds[WIDE][256:288]), bits(made.values(WIDE, np.arange(256, 288))))
    again = Made(made.url, 868, offset=0.37).build(1)
    rows = np.arange(256, 512)
    for point in (WIDE, NARROW):
        assert np.array_equal(bits(ds[point][256:512]), bits(again.values(point, rows)))


def test_a_short_shard_rebuilt_longer_is_not_read_under_its_old_row_numbers(local: str) -> None:
    made = Made(local, 300).build_all()
    ds = made.open()
    stream = ds.stream([WIDE], batch_size=50)
    Made(local, 868, offset=0.37).build(1, revision=1)
    # Rows have other numbers in a longer shuffle block: neither a view nor a stream may take them for the old ones.
    for read in (lambda: ds[WIDE][256:300], lambda: ds["rows/token_id"][299], lambda: list(stream)):
        with pytest.raises(DataError, match=r"shard 1 was rebuilt with 256 rows and had 44 .*start a new stream"):
            read()


def test_a_shard_uncommitted_after_opening_is_not_read(make: Make) -> None:
    made = make().build_all()
    ds = made.open()
    uncommit(made.store, 2)
    made.store.delete(made.key(WIDE, 2))
    with pytest.raises(UncommittedShardError, match="shard 2 has lost its commit record"):
        ds[WIDE][600]


def test_a_record_of_another_dataset_is_refused(make: Make, tmp_path: object) -> None:
    made = make().build_all()
    other = Made(f"{tmp_path}/other", 868, spec=make_spec(model="other")).build_all()
    commit(made.store, read_record(other.store, 1))
    with pytest.raises(MixedShardError, match="shard 1: its record is of dataset"):
        made.open()[WIDE][300]


def test_forgotten_indexes_are_read_again(make: Make) -> None:
    made = make().build_all()
    ds = made.open()
    ds.reader._max_open = 1
    rows = np.array([0, 300, 600, 800, 1, 301])
    for row in rows:
        assert np.array_equal(bits(ds[WIDE][row]), bits(made.values(WIDE, np.array([row]))[0]))
    assert len(ds.reader._open) == 1
