"""Two attempts at one shard, with other bytes each: of what they can leave, the mixtures are found, and only those."""

import itertools

import pytest
from formula_dataset import BOTH, Made, make_spec

import actlake
from actlake.shards.verify import verify
from actlake.storage.codecs import Codec
from actlake.storage.errors import CorruptObjectError, MixedShardError
from actlake.storage.records import commit_key, stats_key
from actlake.storage.stores import Store

KEYS = [*(make_spec().arrays()[name].object_key(0) for name in BOTH), stats_key(0), commit_key(0)]


def attempt(url: str, offset: float, codec: str) -> dict[str, bytes]:
    """Build a shard; return its objects but the row columns, which are the same in every attempt."""
    made = Made(url, 200, make_spec(codec=Codec(name=codec)), offset=offset).build(0)
    return {key: made.store.read(key) for key in KEYS}


@pytest.mark.parametrize("codec", ["blosc", "none"])
def test_of_all_that_two_attempts_can_leave_every_mixture_is_found(memory_folder: str, codec: str) -> None:
    attempts = [attempt(memory_folder, offset, codec) for offset in (0.0, 0.37)]
    store = Store(memory_folder)
    # Whatever the order of their writes: of each object there is what was written last.
    for owners in itertools.product((0, 1), repeat=len(KEYS)):
        for key, owner in zip(KEYS, owners, strict=True):
            store.write(key, attempts[owner][key])
        found = {problem.kind for problem in verify(actlake.open(memory_folder), n_threads=1).problems}
        assert bool(found) == (len(set(owners)) > 1), owners
        if codec == "blosc":
            assert raised(memory_folder) == mixed_objects(owners)


def mixed_objects(owners: tuple[int, ...]) -> list[type[Exception] | None]:
    """What reading each object raises: those of another attempt than the record's, which is the last."""
    *objects, statistics, record = owners
    found: list[type[Exception] | None] = [MixedShardError if owner != record else None for owner in objects]
    return [*found, CorruptObjectError if statistics != record else None]


def raised(url: str) -> list[type[Exception] | None]:
    """Read both hook points and the statistics as a reader does that has just opened the dataset."""
    found: list[type[Exception] | None] = []
    for what in (*BOTH, None):
        ds = actlake.open(url)
        try:
            ds.reader.statistics(0) if what is None else ds[what][:200]
        except CorruptObjectError as error:
            found.append(type(error))
        else:
            found.append(None)
    return found
