import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from actlake.storage.errors import BadInputError, CorruptObjectError, NotFoundError
from actlake.storage.records import (
    ObjectRecord,
    Provenance,
    ShardRecord,
    commit,
    commit_folder,
    commit_key,
    read_record,
    stats_key,
)
from actlake.storage.sealed import seal
from actlake.storage.stores import Store


def test_keys() -> None:
    assert commit_key(1023) == "commits/00000000/0000001023.json"
    assert commit_key(1024) == "commits/00000001/0000001024.json"
    assert commit_folder(3) == "commits/00000003"
    assert stats_key(7) == "stats/0000000007.parquet"


def test_a_record_reads_its_own_bytes(make_record: Callable[..., ShardRecord]) -> None:
    record = make_record(5)
    assert ShardRecord.from_bytes(record.to_bytes(), "w") == record
    assert record.nbytes == sum(1005 + i for i in range(len(record.objects)))


def test_content_and_history_are_apart(make_record: Callable[..., ShardRecord]) -> None:
    record = make_record(5)
    other = replace(record, revision=3, provenance=Provenance(attempt="another", host="elsewhere", forward_s=3.5))
    value = json.loads(record.to_bytes())
    assert set(value) == {"content", "revision", "provenance", "crc32c"}
    assert value["content"] == record.content == other.content
    assert json.loads(other.to_bytes())["provenance"] != value["provenance"]
    assert replace(record, n_void=9).content != record.content


def test_the_bytes_do_not_depend_on_the_order_of_objects(make_record: Callable[..., ShardRecord]) -> None:
    record = make_record(5)
    assert replace(record, objects=dict(reversed(list(record.objects.items())))).to_bytes() == record.to_bytes()


def test_what_a_later_version_adds_to_provenance_is_passed_over(make_record: Callable[..., ShardRecord]) -> None:
    record = make_record(5)
    value = json.loads(record.to_bytes())
    value["provenance"]["gpu_hours"] = 3
    assert ShardRecord.from_bytes(json.dumps(seal(value)).encode(), "w") == record


def test_sizes_that_do_not_add_up_to_63_bits_are_refused(make_record: Callable[..., ShardRecord]) -> None:
    """Each of two objects may have 2**62 bytes for all that is known; their sum is a column of int64."""
    record, half = make_record(5), ObjectRecord(nbytes=2**62, crc32c=0)
    one, other, *_ = record.objects
    replace(record, objects={one: half})
    with pytest.raises(BadInputError, match="shard 5: 9,223,372,036,854,775,808 bytes are no shard's"):
        replace(record, objects={one: half, other: half})
    sealed = record.to_bytes().replace(b'"nbytes": 1005', b'"nbytes": 9223372036854775807')
    with pytest.raises(CorruptObjectError, match="is no commit record"):
        ShardRecord.from_bytes(sealed, "w")


@pytest.mark.parametrize("damage", ["cut", "list", "no content", "extra", "object field", "objects list", "not utf-8"])
def test_what_is_no_record_is_named(damage: str, make_record: Callable[..., ShardRecord]) -> None:
    whole = make_record(5).to_bytes()
    value = json.loads(whole)
    content = value["content"]
    data = {
        "cut": whole[:-5],
        "list": b"[1]",
        "no content": b"{}",
        "extra": json.dumps(value | {"content": content | {"n_tokens": 3}}).encode(),
        "object field": json.dumps(value | {"content": content | {"objects": {"x": {"size": 3}}}}).encode(),
        "objects list": json.dumps(value | {"content": content | {"objects": []}}).encode(),
        "not utf-8": b"\xff\xfe{}",
    }[damage]
    with pytest.raises(CorruptObjectError, match="commits/x is no commit record"):
        ShardRecord.from_bytes(data, "commits/x")


def test_commit_makes_visible_and_the_last_one_wins(tmp_path: Path, make_record: Callable[..., ShardRecord]) -> None:
    store = Store(tmp_path)
    with pytest.raises(NotFoundError, match=r"commits/00000000/0000000005\.json"):
        read_record(store, 5)
    commit(store, make_record(5))
    commit(store, make_record(5, revision=1))
    assert read_record(store, 5) == make_record(5, revision=1)
    assert store.names("commits/00000000") == ["0000000005.json"]


def test_a_record_under_another_number_is_refused(tmp_path: Path, make_record: Callable[..., ShardRecord]) -> None:
    store = Store(tmp_path)
    store.write(commit_key(6), make_record(5).to_bytes())
    with pytest.raises(CorruptObjectError, match=r"0000000006\.json is the record of shard 5"):
        read_record(store, 6)


def test_an_object_without_an_index_has_none() -> None:
    assert ObjectRecord(nbytes=1, crc32c=2).index_crc32c == 0
