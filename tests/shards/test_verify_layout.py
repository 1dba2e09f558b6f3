"""What `verify` finds beside the shards: metadata, the manifest, damaged records, and objects of no known name."""

from collections.abc import Callable

import pytest
from formula_dataset import Made

from actlake.shards.verify import merged, open_damaged, repair, verify
from actlake.storage.errors import CorruptObjectError
from actlake.storage.records import commit_key

Make = Callable[..., Made]


@pytest.fixture
def made(make: Make) -> Made:
    return make().build_all()


def test_objects_of_no_known_name_are_named(made: Made) -> None:
    foreign = {
        "arrays/layers.3.resid_post/c/4",  # beyond the last shard
        "arrays/layers.3.resid_post/c/01",
        "arrays/layers.9.other",
        "arrays/rows/other",
        "commits/00000000/0000000001.json.bak",
        "commits/00000000/0000000004.json",
        "commits/00000001",
        "manifest/00000001.parquet",
        "notes.txt",
        "stats/0000000004.parquet",
        "stats/covariance/layers.9.other.parquet",
    }
    ds = made.open()
    for key in foreign:
        # A folder of no known name is named as a whole.
        made.store.write(key if key.endswith((".bak", ".json", ".parquet", ".txt")) else f"{key}/0", b"x")
    for key in (".DS_Store", "stats/covariance/layers.3.resid_post.parquet", "heldout/spec.json"):
        made.store.write(key, b"x")
    problems = verify(ds, deep=False).problems
    assert {(problem.kind, problem.shard) for problem in problems} == {("foreign", None)}
    assert {problem.message.split(" ")[0].removeprefix(f"{made.store.url}/") for problem in problems} == foreign


def test_metadata_that_are_not_the_specs_are_named_and_written_again(made: Made) -> None:
    keys = ["arrays/zarr.json", "arrays/layers.3.resid_post/zarr.json"]
    before = {key: made.store.read(key) for key in keys}
    made.store.delete(keys[0])
    made.store.write(keys[1], before[keys[1]].replace(b"868", b"869"))
    ds = made.open()
    report = verify(ds, deep=False)
    assert [problem.kind for problem in report.problems] == ["metadata", "metadata"]
    assert all(any(key in problem.message for problem in report.problems) for key in keys)
    assert repair(ds, report) == ()
    assert {key: made.store.read(key) for key in keys} == before
    assert verify(made.open()).problems == ()


def test_damaged_records_are_found_without_opening_the_dataset_and_repaired(made: Made) -> None:
    made.store.write(commit_key(2), b"{}")
    made.store.write(commit_key(0), made.store.read(commit_key(1)))
    with pytest.raises(CorruptObjectError):
        made.open()
    ds, damage = open_damaged(made.url)
    assert [(problem.kind, problem.shard) for problem in damage.problems] == [("record", 0), ("record", 2)]
    assert "is the record of shard 1" in damage.problems[0].message
    report = merged([damage, verify(ds)])
    assert (report.n_shards, report.bad_shards, report.missing_shards) == (2, (0, 2), (0, 2))
    assert repair(ds, report) == (0, 2)
    assert made.open().missing_shards == [0, 2]
    assert verify(made.build(0, 2).open()).problems == ()


@pytest.mark.parametrize("key", ["root.json", "manifest/00000000.parquet"])
def test_a_damaged_manifest_is_found_and_removed(made: Made, key: str) -> None:
    made.store.write(key, b"{}")
    ds, damage = open_damaged(made.url)
    (problem,) = damage.problems
    assert (problem.kind, problem.shard) == ("manifest", None)
    report = merged([damage, verify(ds)])
    assert report.problems == (problem,)
    assert (report.n_shards, repair(ds, report)) == (4, ())
    assert not made.store.exists(key)
    assert open_damaged(made.url)[1].problems == ()
