"""`verify` finds each planted damage, names it, and raises nothing; `repair` makes the shard invisible."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from formula_dataset import NARROW, WIDE, Made, bits, make_spec

from actlake.shards.verify import Problem, VerifyReport, completed, repair, verify
from actlake.storage.arrays import crc32c, encode_shard
from actlake.storage.codecs import Codec
from actlake.storage.errors import BadInputError
from actlake.storage.moments import from_parquet, to_parquet
from actlake.storage.norms import NormHistogram
from actlake.storage.records import ObjectRecord, commit, commit_key, read_record, stats_key

Make = Callable[..., Made]


@pytest.fixture
def made(make: Make) -> Made:
    return make().build_all()


def only(report: VerifyReport) -> Problem:
    (problem,) = report.problems
    return problem


def named(problem: Problem) -> tuple[str, int | None, str, int | None]:
    return problem.kind, problem.shard, problem.array, problem.chunk


def test_a_sound_dataset_has_no_problem_and_everything_is_counted(place: str) -> None:
    ds = Made(place, 868, voids=frozenset({5, 300})).build_all().open()
    heard: list[int] = []
    report = verify(ds, on_progress=heard.append)
    assert report.problems == ()
    # 6 arrays; of WIDE 8 chunks in each of 3 shards and 4 in the last, of the others (64 rows a chunk) 4 and 2.
    assert (report.n_shards, report.n_objects, report.n_chunks, report.n_rows) == (4, 24, 28 + 5 * 14, 868)
    assert report.nbytes == sum(heard) == sum(ds.manifest["nbytes"].to_pylist())
    assert report.missing_shards == report.bad_shards == ()
    shallow = verify(ds, deep=False)
    assert (shallow.problems, shallow.n_objects, shallow.n_chunks) == ((), 24, 0)


def test_missing_shards_are_not_problems(make: Make) -> None:
    report = verify(make().build(0, 2).open())
    assert (report.problems, report.missing_shards, report.n_shards) == ((), (1, 3), 2)


@pytest.mark.parametrize("codec", ["blosc", "none"])
def test_a_damaged_chunk(make: Make, codec: str) -> None:
    made = make(spec=make_spec(codec=Codec(name=codec))).build_all()
    made.flip(WIDE, 1, made.chunk_span(WIDE, 1, 3)[0] + 20)
    made.flip(WIDE, 1, made.chunk_span(WIDE, 1, 5)[0] + 20)
    made.flip("rows/role", 2, made.chunk_span("rows/role", 2, 0)[1] - 1)
    report = verify(made.open())
    assert [named(problem) for problem in report.problems] == [
        ("chunk", 1, WIDE, 3),
        ("chunk", 1, WIDE, 5),
        ("chunk", 2, "rows/role", 0),
    ]
    assert all("crc32c expected 0x" in problem.message for problem in report.problems)
    assert report.bad_shards == (1, 2)


@pytest.mark.parametrize("deep", [True, False])
def test_a_lost_object(made: Made, deep: bool) -> None:
    made.store.delete(made.key(NARROW, 3))
    problem = only(verify(made.open(), deep=deep))
    assert named(problem) == ("missing", 3, NARROW, None)


@pytest.mark.parametrize("deep", [True, False])
def test_a_truncated_and_a_damaged_index(made: Made, deep: bool) -> None:
    data = made.store.read(made.key(WIDE, 0))
    made.store.write(made.key(WIDE, 0), data[:-5])
    made.flip(WIDE, 1, -30)
    report = verify(made.open(), deep=deep)
    assert [named(problem) for problem in report.problems] == [("index", 0, WIDE, None), ("index", 1, WIDE, None)]
    assert f"({len(data) - 5} bytes, its record says {len(data)})" in report.problems[0].message


@pytest.mark.parametrize("deep", [True, False])
def test_an_object_of_another_attempt(made: Made, deep: bool) -> None:
    other = Made(f"{made.url}-other", 868, offset=0.37).build_all()
    made.store.write(made.key(WIDE, 1), other.store.read(made.key(WIDE, 1)))
    problem = only(verify(made.open(), deep=deep))
    assert named(problem) == ("mixed", 1, WIDE, None)


def test_an_object_of_another_attempt_with_chunks_of_equal_lengths(make: Make) -> None:
    # Without compression the shard indexes of all attempts are equal, and so are the checksums of the whole objects: a
    # crc32c that runs over chunks which end with theirs depends on lengths alone. The statistics tell.
    spec = make_spec(codec=Codec(name="none"))
    made = make(spec=spec).build_all()
    other = Made(f"{made.url}-other", 868, spec=spec, offset=0.37).build_all()
    made.store.write(made.key(WIDE, 1), other.store.read(made.key(WIDE, 1)))
    assert named(only(verify(made.open()))) == ("statistics", 1, WIDE, None)


def test_a_record_with_another_checksum_than_its_object(made: Made) -> None:
    objects = dict(read_record(made.store, 1).objects)
    changed(made, 1, objects=objects | {WIDE: replace(objects[WIDE], crc32c=5)})
    problem = only(verify(made.open()))
    assert named(problem) == ("checksum", 1, WIDE, None)
    assert "crc32c 0x00000005 expected" in problem.message


@pytest.mark.parametrize("deep", [True, False])
def test_an_object_with_bytes_between(made: Made, deep: bool) -> None:
    data = made.store.read(made.key(WIDE, 1))
    tail = made.spec.arrays()[WIDE].index_nbytes
    made.store.write(made.key(WIDE, 1), data[:-tail] + b"extra" + data[-tail:])
    assert named(only(verify(made.open(), deep=deep))) == ("size", 1, WIDE, None)


def test_a_lost_or_damaged_record(made: Made) -> None:
    ds = made.open()
    made.store.delete(commit_key(0))
    made.store.write(commit_key(2), b"{}")
    report = verify(ds)
    assert [named(problem) for problem in report.problems] == [("record", 0, "", None), ("record", 2, "", None)]


def changed(made: Made, shard: int, **changes: Any) -> None:
    commit(made.store, replace(read_record(made.store, shard), **changes))


@pytest.mark.parametrize(
    "changes", [{"dataset_id": "f" * 64}, {"first_row": 1}, {"n_rows": 257}, {"n_rows": 0}, {"n_void": 300}], ids=str
)
def test_a_record_that_cannot_be(made: Made, changes: dict[str, Any]) -> None:
    ds = made.open()
    changed(made, 1, **changes)
    problem = only(verify(ds))
    assert (problem.kind, problem.shard) == ("record", 1)


def test_a_record_with_an_array_too_few(made: Made) -> None:
    objects = dict(read_record(made.store, 1).objects)
    del objects[WIDE]
    changed(made, 1, objects=objects)
    assert named(only(verify(made.open()))) == ("index", 1, WIDE, None)


def test_void_rows_that_are_not_counted(make: Make) -> None:
    made = make(voids=frozenset({300, 301})).build_all()
    changed(made, 1, n_void=1)
    assert named(only(verify(made.open()))) == ("rows", 1, "rows/role", None)


def rewritten(made: Made, name: str, shard: int, rows: Any) -> None:
    """Store other rows for an array, with a record that agrees with them."""
    encoded = encode_shard(made.spec.arrays()[name], rows)
    made.store.write(made.key(name, shard), *encoded.parts)
    objects = dict(read_record(made.store, shard).objects)
    objects[name] = ObjectRecord(nbytes=encoded.nbytes, crc32c=encoded.crc32c, index_crc32c=encoded.index_crc32c)
    changed(made, shard, objects=objects)


@pytest.mark.parametrize("name", ["rows/token_id", "rows/position", "rows/sequence"])
def test_row_columns_that_cannot_be(made: Made, name: str) -> None:
    rows = made.values(name, made.rows_of(1))
    rows[7] = -1
    rewritten(made, name, 1, rows)
    problem = only(verify(made.open()))
    assert named(problem) == ("rows", 1, name, None)
    assert "row 7 is negative" in problem.message


def test_a_row_that_is_there_twice(made: Made) -> None:
    for name in ("rows/position", "rows/sequence"):
        rows = made.values(name, made.rows_of(1))
        rows[7] = rows[9]
        rewritten(made, name, 1, rows)
    problem = only(verify(made.open()))
    assert named(problem) == ("rows", 1, "rows/position", None)
    assert "1 rows have the sequence and position of another" in problem.message


def test_activations_that_are_not_those_of_the_statistics(made: Made) -> None:
    rows = made.values(WIDE, made.rows_of(1)).copy()
    bits(rows)[100, 3] ^= 1
    rewritten(made, WIDE, 1, rows)
    problem = only(verify(made.open()))
    assert named(problem) == ("statistics", 1, WIDE, None)
    assert "channel 3" in problem.message


@pytest.mark.parametrize("deep", [True, False])
def test_damaged_or_lost_statistics(made: Made, deep: bool) -> None:
    data = bytearray(made.store.read(stats_key(1)))
    data[50] ^= 1
    made.store.write(stats_key(1), bytes(data))
    made.store.delete(stats_key(2))
    report = verify(made.open(), deep=deep)
    assert [named(problem) for problem in report.problems] == [("statistics", 1, "", None), ("missing", 2, "", None)]


def test_statistics_without_a_point_or_with_another_count(made: Made) -> None:
    def store(shard: int, moments: dict[str, Any]) -> None:
        data = to_parquet(moments)
        made.store.write(stats_key(shard), data)
        changed(made, shard, stats=ObjectRecord(nbytes=len(data), crc32c=crc32c(data)))

    moments = from_parquet(made.store.read(stats_key(1)))
    store(1, {NARROW: moments[NARROW]})
    moments = from_parquet(made.store.read(stats_key(2)))
    store(2, moments | {WIDE: replace(moments[WIDE], count=255)})
    moments = from_parquet(made.store.read(stats_key(0)))
    store(0, moments | {WIDE: replace(moments[WIDE], norm_mean=float("nan"), mean=moments[WIDE].mean + 1e-6)})
    report = verify(made.open())
    assert [named(p) for p in report.problems] == [("statistics", shard, WIDE, None) for shard in (0, 1, 2)]
    assert "norm_mean" in report.problems[0].message
    assert "mean of channel 0 off by" in report.problems[0].message
    assert "count 255 stored, 256 found" in report.problems[2].message


def test_rounding_of_another_processor_is_no_problem(made: Made) -> None:
    moments = from_parquet(made.store.read(stats_key(1)))
    wide = moments[WIDE]
    nudged = replace(
        wide, mean=np.nextafter(wide.mean, 9), m2=np.nextafter(wide.m2, 0), norm_mean=wide.norm_mean * (1 + 1e-15)
    )
    data = to_parquet(moments | {WIDE: nudged})
    made.store.write(stats_key(1), data)
    changed(made, 1, stats=ObjectRecord(nbytes=len(data), crc32c=crc32c(data)))
    assert verify(made.open()).problems == ()


def test_repair_makes_the_bad_shards_invisible_and_building_them_again_mends(made: Made) -> None:
    made.flip(WIDE, 1, 30)
    made.store.delete(made.key(NARROW, 3))
    ds = made.open()
    assert repair(ds, verify(ds)) == (1, 3)
    left = made.open()
    assert left.missing_shards == [1, 3]
    assert verify(left).problems == ()
    mended = made.build(1, 3).open()
    assert verify(mended).problems == ()
    assert np.array_equal(bits(mended[WIDE][:]), bits(made.values(WIDE, np.arange(868))))


def test_a_shard_committed_again_since_opening_is_no_problem(made: Made) -> None:
    ds = made.open()
    Made(made.url, 868, offset=0.37).build(1)
    assert verify(ds).problems == ()


# --- which shards ---


def test_a_sample_reads_some_shards_whole_and_the_others_quickly(made: Made) -> None:
    for shard in range(4):
        made.flip(WIDE, shard, made.chunk_span(WIDE, shard, 0)[0] + 20)
    report = verify(made.open(), sample=0.5)
    assert (report.n_shards, report.n_deep, len(report.bad_shards)) == (4, 2, 2)
    assert verify(made.open(), sample=0.5).bad_shards == report.bad_shards
    assert verify(made.open(), sample=0.0001).n_deep == 1
    with pytest.raises(BadInputError, match=r"sample = 1\.5 is not a share"):
        verify(made.open(), sample=1.5)


def test_reports_of_some_shards_add_up_to_that_of_all(made: Made) -> None:
    made.flip(WIDE, 2, made.chunk_span(WIDE, 2, 0)[0] + 20)
    ds = made.open()
    whole = verify(ds)
    parts = [verify(ds, shards=[3, 2], n_threads=1), verify(ds, shards=[0, 1])]
    assert completed(ds, parts, deep=True) == whole


# --- statistics ---


def with_statistics(made: Made, shard: int, **changes: Any) -> None:
    """Store other statistics of WIDE, with a record that agrees with them."""
    moments = from_parquet(made.store.read(stats_key(shard)))
    data = to_parquet(moments | {WIDE: replace(moments[WIDE], **changes)})
    made.store.write(stats_key(shard), data)
    changed(made, shard, stats=ObjectRecord(nbytes=len(data), crc32c=crc32c(data)))


def test_changed_norms_and_outlier_rows(made: Made) -> None:
    for shard in (0, 1, 2):
        found = from_parquet(made.store.read(stats_key(shard)))[WIDE]
        assert found.norm_histogram is not None
        assert found.outlier_rows is not None
        first, *others = found.outlier_rows
        moved = NormHistogram(bins=found.norm_histogram.bins + 1, counts=found.norm_histogram.counts)
        with_statistics(
            made,
            shard,
            **(
                {"norm_histogram": moved},
                {"outlier_rows": (first._replace(row=first.row + 1), *others)},
                {"outlier_rows": (first._replace(norm=first.norm * 1.01), *others)},
            )[shard],
        )
    with_statistics(made, 3, n_nonfinite=1)
    report = verify(made.open())
    assert [named(p) for p in report.problems] == [("statistics", shard, WIDE, None) for shard in range(4)]
    for problem, text in zip(
        report.problems, ("norm_counts", "outlier_rows", "outlier_norms", "n_nonfinite"), strict=True
    ):
        assert text in problem.message


def test_statistics_of_an_earlier_actlake_are_no_problem(made: Made) -> None:
    with_statistics(made, 1, norm_histogram=None, outlier_rows=None, n_nonfinite=None)
    assert verify(made.open()).problems == ()


def test_stored_rows_that_are_not_finite(made: Made) -> None:
    rows = made.values(WIDE, made.rows_of(1)).copy()
    rows[100, 3] = np.nan
    rewritten(made, WIDE, 1, rows)
    problem = only(verify(made.open()))
    assert named(problem) == ("rows", 1, WIDE, None)
    assert "1 rows hold values not finite" in problem.message
