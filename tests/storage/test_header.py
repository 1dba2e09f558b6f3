import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actlake.storage.errors import CorruptObjectError, FormatVersionError, NotFoundError, SpecMismatchError
from actlake.storage.header import Header, prepare
from actlake.storage.spec import DatasetSpec
from actlake.storage.stores import Store

MakeSpec = Callable[..., DatasetSpec]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def header(make_spec: MakeSpec) -> Callable[..., Header]:
    return lambda n_rows=150, **changes: Header(spec=make_spec(**changes), n_rows=n_rows, corpus="../corpus")


def test_prepare_writes_the_spec_and_all_array_metadata(tmp_path: Path, header: Callable[..., Header]) -> None:
    assert prepare(Store(tmp_path), header()) == header()
    found = files(tmp_path)
    assert set(found) == {"spec.json", "arrays/zarr.json", "arrays/rows/zarr.json"} | {
        f"arrays/{name}/zarr.json" for name in header().spec.arrays()
    }
    for name, array in header().spec.arrays().items():
        assert json.loads(found[f"arrays/{name}/zarr.json"]) == array.zarr_json(150)
    assert Header.read(Store(tmp_path)) == header()


def test_the_spec_is_written_last(tmp_path: Path, watched: type[Any], header: Callable[..., Header]) -> None:
    store = watched(tmp_path)
    prepare(store, header())
    assert store.changes[-1] == "write spec.json"


def test_another_spec_is_refused_by_its_fields_and_nothing_is_written(
    tmp_path: Path, watched: type[Any], header: Callable[..., Header]
) -> None:
    prepare(Store(tmp_path), header())
    before, store = files(tmp_path), watched(tmp_path)
    with pytest.raises(SpecMismatchError) as caught:
        prepare(store, header(n_rows=300, seed=8, rows_per_block=64))
    assert "rows_per_block: here 32, there 64" in str(caught.value)
    assert "seed: here 7, there 8" in str(caught.value)
    assert str(caught.value).count(": here") == 2
    assert store.changes == []
    assert files(tmp_path) == before


def test_more_rows_grow_the_shapes_and_take_the_old_totals_away(tmp_path: Path, header: Callable[..., Header]) -> None:
    store = Store(tmp_path)
    prepare(store, header(150))
    store.write("root.json", b"{}")
    assert prepare(store, header(1000)).n_rows == 1000
    assert Header.read(store).n_rows == 1000
    assert not store.exists("root.json")
    shapes = [
        json.loads(data)["shape"][0]
        for name, data in files(tmp_path).items()
        if "/zarr.json" in name and b"array" in data
    ]
    assert shapes == [1000] * 6


@pytest.mark.parametrize("n_rows", [1, 150])
def test_as_many_rows_or_fewer_change_nothing(
    n_rows: int, tmp_path: Path, watched: type[Any], header: Callable[..., Header]
) -> None:
    prepare(Store(tmp_path), header(150))
    store = watched(tmp_path)
    store.fail_at = 0
    assert prepare(store, header(n_rows)) == header(150)


@pytest.mark.parametrize("n_rows", [150, 100])
@pytest.mark.parametrize("damage", [None, b"", b'{"zarr_format": 3}'])
@pytest.mark.parametrize("key", ["zarr.json", "rows/zarr.json", "rows/role/zarr.json", "layers.0.resid_post/zarr.json"])
def test_lost_or_damaged_metadata_are_written_again_and_nothing_else(
    key: str, damage: bytes | None, n_rows: int, tmp_path: Path, watched: type[Any], header: Callable[..., Header]
) -> None:
    prepare(Store(tmp_path), header(150))
    Store(tmp_path).write("root.json", b"{}")
    before, path = files(tmp_path), tmp_path / "arrays" / key
    path.unlink() if damage is None else path.write_bytes(damage)
    store = watched(tmp_path)
    assert prepare(store, header(n_rows)) == header(150)
    assert store.changes == [f"write arrays/{key}"]
    assert files(tmp_path) == before


def test_whole_metadata_cost_one_read_each(tmp_path: Path, watched: type[Any], header: Callable[..., Header]) -> None:
    prepare(Store(tmp_path), header())
    store = watched(tmp_path)
    prepare(store, header())
    assert sorted(store.reads) == sorted(files(tmp_path))
    assert store.listings == []


def test_a_growth_broken_off_anywhere_and_then_given_up_leaves_the_stored_shapes(
    tmp_path: Path, watched: type[Any], header: Callable[..., Header]
) -> None:
    prepare(Store(tmp_path / "whole"), header(100))
    whole = files(tmp_path / "whole")
    for fail_at in range(len(whole) + 1):  # Each of them, and the deletion of root.json.
        folder = tmp_path / f"crash-{fail_at}"
        prepare(Store(folder), header(100))
        store = watched(folder)
        store.fail_at = fail_at
        with pytest.raises(OSError, match="on purpose"):
            prepare(store, header(1000))
        assert prepare(Store(folder), header(100)) == header(100)
        assert files(folder) == whole


def test_a_growth_that_ends_while_metadata_are_compared_stands(
    tmp_path: Path, watched: type[Any], header: Callable[..., Header], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(Store(tmp_path), header(100))
    store, read = watched(tmp_path), watched.read

    def grown_after_the_header(self: Any, key: str, most: int | None = None) -> bytes:
        if len(self.reads) == 1:
            prepare(Store(tmp_path), header(1000))
        return bytes(read(self, key, most))

    monkeypatch.setattr(watched, "read", grown_after_the_header)
    assert prepare(store, header(100)) == header(1000)
    prepare(Store(tmp_path / "fresh"), header(1000))
    assert files(tmp_path / "fresh").items() <= {k: v for k, v in files(tmp_path).items() if "fresh" not in k}.items()
    assert store.changes == []


@pytest.mark.parametrize("stored_rows", [None, 100])
def test_a_crash_at_any_change_is_mended_by_running_again(
    stored_rows: int | None, tmp_path: Path, watched: type[Any], header: Callable[..., Header]
) -> None:
    def start(name: str) -> Path:
        if stored_rows is not None:
            prepare(Store(tmp_path / name), header(stored_rows))
            Store(tmp_path / name).write("root.json", b"{}")
        return tmp_path / name

    store = watched(start("whole"))
    prepare(store, header(150))
    n_changes, whole = len(store.changes), files(tmp_path / "whole")
    assert n_changes >= 9
    for fail_at in range(n_changes):
        folder = start(f"crash-{fail_at}")
        store = watched(folder)
        store.fail_at = fail_at
        with pytest.raises(OSError, match="on purpose"):
            prepare(store, header(150))
        # Until the last write there is what was there before: nothing, or the smaller plan.
        if stored_rows is None:
            assert not (folder / "spec.json").exists()
        else:
            assert Header.read(Store(folder)).n_rows == stored_rows
        assert prepare(Store(folder), header(150)) == header(150)
        assert files(folder) == whole


# --- reading ---


def test_no_dataset_says_what_is_there(tmp_path: Path) -> None:
    Store(tmp_path).write("corpus.json", b"{}")
    with pytest.raises(NotFoundError, match=r"no dataset at .*\(found there: corpus.json\); 'actlake ls'"):
        Header.read(Store(tmp_path))
    with pytest.raises(NotFoundError, match="found there: nothing"):
        Header.read(Store(tmp_path / "absent"))
    for name in range(8):
        Store(tmp_path).write(f"{name}.txt", b"")
    with pytest.raises(NotFoundError, match=r"0.txt, .*6.txt, 7.txt, \.\.\.\)"):
        Header.read(Store(tmp_path))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"format_version": 99},
            FormatVersionError,
            "has format version 99; this actlake reads 1, 2: pip install -U actlake",
        ),
        ({"format": "actlake corpus"}, CorruptObjectError, "'actlake corpus', not a dataset"),
        ({"dataset_id": "0" * 64}, CorruptObjectError, "does not hash to dataset_id 000000000000"),
        ({"spec": {}}, FormatVersionError, "fields differ from format 2: architecture"),
        ({"spec": 3}, CorruptObjectError, "is damaged"),
    ],
)
def test_a_strange_header_is_named(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, header: Callable[..., Header]
) -> None:
    store = Store(tmp_path)
    store.write("spec.json", json.dumps(json.loads(header().to_bytes()) | change).encode())
    with pytest.raises(error, match=message):
        Header.read(store)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"{}", b"null"])
def test_a_damaged_header_is_named(data: bytes, tmp_path: Path) -> None:
    Store(tmp_path).write("spec.json", data)
    with pytest.raises(CorruptObjectError, match=r"spec.json is damaged"):
        Header.read(Store(tmp_path))


def test_every_changed_spec_value_is_found(tmp_path: Path, header: Callable[..., Header]) -> None:
    store, value = Store(tmp_path), json.loads(header().to_bytes())
    value["spec"]["keep"]["skip_first"] = 1
    store.write("spec.json", json.dumps(value).encode())
    with pytest.raises(CorruptObjectError, match="does not hash"):
        Header.read(store)
