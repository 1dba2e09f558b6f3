import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actlake.storage.errors import BadInputError, MissingExtraError, NotFoundError
from actlake.storage.stores import Store, relative_url, resolve_url


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, memory_url: str) -> Store:
    return Store(tmp_path / "a folder" if request.param == "local" else memory_url)


def test_objects_are_whole_and_replaced_whole(store: Store) -> None:
    store.write("a/b/c", b"0123", b"", memoryview(b"456789"))
    assert store.read("a/b/c") == b"0123456789"
    assert store.nbytes("a/b/c") == 10
    store.write("a/b/c", b"new")
    assert store.read("a/b/c") == b"new"
    store.write("empty")
    assert store.read("empty") == b""


@pytest.mark.parametrize(
    ("start", "stop", "found"),
    [
        (0, 4, b"0123"),
        (3, 7, b"3456"),
        (8, 50, b"89"),
        (4, 4, b""),
        (10, 20, b""),
        (-4, 0, b"6789"),
        (-50, 0, b"0123456789"),
    ],
)
def test_ranges(store: Store, start: int, stop: int, found: bytes) -> None:
    store.write("x", b"0123456789")
    assert store.read_range("x", start, stop) == found


def test_names_are_sorted_and_direct(store: Store) -> None:
    for key in ("f/b", "f/a", "f/d/e", "g"):
        store.write(key, b"x")
    assert store.names("f") == ["a", "b", "d"]
    assert store.names() == ["f", "g"]
    assert store.names("nothing/there") == []


def test_folders_are_told_from_objects(store: Store) -> None:
    for key in ("v1.0/x", "b/x", "a.json"):
        store.write(key, b"x")
    assert store.folders() == ["b", "v1.0"]
    assert store.folders("b") == []
    assert store.folders("a.json") == []


def test_delete_and_exists(store: Store) -> None:
    store.write("f/x", b"1")
    assert store.exists("f/x")
    assert store.exists("f")
    store.delete("f/x")
    store.delete("f/x")
    assert not store.exists("f/x")


@pytest.mark.parametrize("call", ["read", "nbytes", "read_range"])
def test_what_is_not_there_is_named(store: Store, call: str) -> None:
    arguments = ("f/x", 0, 3) if call == "read_range" else ("f/x",)
    with pytest.raises(NotFoundError) as caught:
        getattr(store, call)(*arguments)
    assert str(caught.value) == f"nothing stored at {store.url}/f/x"


def test_child_is_the_folder(store: Store) -> None:
    store.child("heldout").write("a/x", b"1")
    assert store.read("heldout/a/x") == b"1"
    assert store.child("heldout").child("a").read("x") == b"1"


@pytest.mark.parametrize("key", ["../x", "a/../../x", "a/..", "/etc/passwd", "a\\..\\x", "a\0b"])
@pytest.mark.parametrize("call", ["path", "read", "write", "delete", "exists", "names", "child", "nbytes"])
def test_keys_that_leave_the_folder_are_refused(store: Store, key: str, call: str) -> None:
    with pytest.raises(BadInputError, match="leaves its folder"):
        getattr(store, call)(key)


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b c", "/", "é", "..."]), max_size=6).map("/".join))
def test_no_key_leaves_the_folder(key: str) -> None:
    store = Store("/base/folder")
    try:
        path = store.path(key)
    except BadInputError:
        assert ".." in key.split("/") or key.startswith("/")
    else:
        assert (os.path.normpath(path) + "/").startswith("/base/folder/")


def test_a_pickled_store_opens_again(store: Store) -> None:
    store.write("x", b"1")
    assert store.fs is not None
    assert b"MemoryFileSystem" not in pickle.dumps(store)
    found = pickle.loads(pickle.dumps(store))
    assert (found.url, found.read("x")) == (store.url, b"1")


def test_the_file_system_is_opened_anew_in_another_process(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    of_parent = object()
    store._fs = of_parent
    assert store.fs is of_parent
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert store.fs is not of_parent


# --- local disks ---


def test_an_unfinished_write_is_invisible_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write("f/x", b"old")
    seen: list[list[str]] = []

    def interrupted(source: Path, target: Path) -> None:
        seen.append(store.names("f"))
        assert len(os.listdir(tmp_path / "f")) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write("f/x", b"new")
    assert seen == [["x"]]
    assert os.listdir(tmp_path / "f") == ["x"]
    assert store.read("f/x") == b"old"


@pytest.mark.parametrize(
    ("key", "call"),
    [("file/x", "read"), ("file/x", "nbytes"), ("file/x", "read_range"), ("folder", "read"), ("folder", "read_range")],
)
def test_below_a_file_is_nothing_and_a_folder_is_no_object(tmp_path: Path, key: str, call: str) -> None:
    store = Store(tmp_path)
    store.write("file", b"1")
    store.write("folder/x", b"1")
    with pytest.raises(NotFoundError, match=f"nothing stored at {store.url}/{key}"):
        getattr(store, call)(*((key, 0, 3) if call == "read_range" else (key,)))


def test_below_a_file_nothing_is_listed_and_deleted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("file", b"1")
    assert store.names("file") == store.names("file/x") == []
    assert not store.exists("file/x")
    store.delete("file/x")
    assert store.read("file") == b"1"


@pytest.mark.parametrize("key", ["file/x", "file/x/y", "folder"])
def test_what_cannot_be_written_is_named(tmp_path: Path, key: str) -> None:
    store = Store(tmp_path)
    store.write("file", b"1")
    store.write("folder/x", b"1")
    with pytest.raises(BadInputError, match=f"cannot write {store.url}/{key}: .+; choose a place"):
        store.write(key, b"2")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "x"]


def test_what_may_not_be_touched_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    if not store.local:
        monkeypatch.setattr(store.fs, "cat_file", refused)
        monkeypatch.setattr(store.fs, "pipe_file", refused)
    with pytest.raises(BadInputError, match=f"cannot read {store.url}/x: Permission denied"):
        store.read("x")
    with pytest.raises(BadInputError, match=f"cannot write {store.url}/x: Permission denied"):
        store.write("x", b"1")


def test_bytes_are_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        events.append("sync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "sync file")
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    Store(tmp_path).write("x", b"1")
    assert events == ["sync file", "rename", "sync folder"]


def test_paths_and_file_urls_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    urls = {
        Store(url).url for url in (tmp_path / "d", f"{tmp_path}/d/", f"file://{tmp_path}/d", "d", "./x/../d", "~/d")
    }
    assert urls == {str(tmp_path / "d")}
    with pytest.raises(BadInputError, match="URL is empty"):
        Store("")


# --- where things lie relative to each other ---


@pytest.mark.parametrize(
    ("target", "base", "text"),
    [
        ("/data/corpus", "/data/demo", "../corpus"),
        ("/data/demo/corpus", "/data/demo", "corpus"),
        ("/data/corpus", "/data/demo/heldout", "../../corpus"),
        ("/other/corpus", "/data/demo/heldout", "/other/corpus"),
        ("gs://bucket/a/corpus", "gs://bucket/a/demo", "../corpus"),
        ("gs://bucket/corpus", "gs://bucket/demo/heldout", "../../corpus"),
        ("gs://bucket/b/corpus", "gs://bucket/a/x/demo", "gs://bucket/b/corpus"),
        ("gs://other/corpus", "gs://bucket/a/demo", "gs://other/corpus"),
        ("s3://bucket/corpus", "gs://bucket/demo", "s3://bucket/corpus"),
        ("gs://bucket/corpus", "/data/demo", "gs://bucket/corpus"),
        ("memory://corpus", "memory://demo", "../corpus"),
        ("memory://demo", "memory://demo/heldout", ".."),
    ],
)
def test_relative_urls_come_back(target: str, base: str, text: str) -> None:
    here = Store(base, {"token": "t"})
    assert relative_url(Store(target), here) == text
    found = resolve_url(text, here)
    assert found.url == Store(target).url
    assert found.protocol == Store(target).protocol


def test_a_local_folder_seen_from_a_bucket_comes_back() -> None:
    # The dataset is in a bucket, the corpus on this machine's disk.
    base = Store("gs://bucket/demo")
    assert resolve_url(relative_url(Store("/data/corpus"), base), base).url == "/data/corpus"


def test_a_pair_of_folders_can_move_together(tmp_path: Path) -> None:
    text = relative_url(Store(tmp_path / "a/corpus"), Store(tmp_path / "a/demo"))
    (tmp_path / "b/corpus").mkdir(parents=True)
    assert resolve_url(text, Store(tmp_path / "b/demo")).url == str(tmp_path / "b/corpus")


# --- what people see ---

SECRET = "AKIA-very-secret"


def complaint(store: Store, key: str) -> str:
    with pytest.raises((NotFoundError, BadInputError)) as caught:
        store.read(key)
    return str(caught.value)


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        lambda store: f"{store!r} {store.url}",
        lambda store: repr([store.child("a"), resolve_url("../b", store)]),
        lambda store: complaint(store, "x"),
        lambda store: complaint(store, "../x"),
        lambda store: relative_url(store, Store("/x")),
    ],
)
def test_credentials_are_never_shown(show: Callable[[Store], str], memory_url: str) -> None:
    options: dict[str, Any] = {"secret": SECRET, "client_kwargs": {"token": SECRET}}
    store = Store(memory_url, options)
    assert store.options == options
    assert store.child("a").options == options
    assert SECRET not in show(store)


def test_an_unknown_file_system_is_named_without_its_options() -> None:
    with pytest.raises(BadInputError, match="no file system for 'nope://bucket/x'") as caught:
        Store("nope://bucket/x", {"token": SECRET}).read("x")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(("protocol", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_an_absent_package_is_answered_with_its_extra(
    protocol: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str, **options: Any) -> None:
        raise ImportError("Install it")

    monkeypatch.setattr("fsspec.filesystem", absent)
    with pytest.raises(MissingExtraError, match=rf"pip install 'actlake\[{extra}\]'"):
        Store(f"{protocol}://bucket/x").read("x")
