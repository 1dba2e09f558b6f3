import logging
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from emulators import OPTIONS
from hypothesis import given
from hypothesis import strategies as st
from servers import REMOTE, Servers

from actlake.storage.clients import FsspecClient
from actlake.storage.errors import BadInputError, MissingExtraError, NotFoundError, StoreError
from actlake.storage.secrets import redacted
from actlake.storage.stores import Store, relative_url, resolve_url


@pytest.fixture(params=["local", "memory", *REMOTE])
def store(request: pytest.FixtureRequest, tmp_path: Path, memory_url: str, servers: Servers) -> Store:
    """An empty folder of each kind: every test with it is part of the contract of a store."""
    if request.param in REMOTE:
        return servers.folder(request.param)
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


def test_buffers_are_filled_one_after_another(store: Store) -> None:
    store.write("x", b"0123456789")
    first, second = memoryview(bytearray(3)), memoryview(bytearray(2))
    assert store.read_into("x", 4, first, second) == 5
    assert (bytes(first), bytes(second)) == (b"456", b"78")
    assert store.read_into("x", 8, first, second) == 2
    assert bytes(first) == b"896"


def test_spans_come_in_order_however_they_are_asked_for(store: Store) -> None:
    data = bytes(range(256)) * 2000
    store.write("x", data)
    near = replace(store.limits, gap_nbytes=1000, range_nbytes=4096)
    spans = [
        (0, 100),
        (100, 300),
        (1200, 1300),
        (4000, 9000),
        (400_000, 400_010),
        (511_990, 512_010),
        (600_000, 600_001),
    ]
    for limits in (near, store.limits, replace(near, gap_nbytes=0)):
        store.limits = limits
        assert [bytes(view) for view in store.read_ranges("x", spans)] == [data[start:stop] for start, stop in spans]
    assert store.read_ranges("x", []) == []


@pytest.mark.parametrize(
    "key", ["a b/c d", "ü/日本", "100%/a%20b", "a#b", "a+b&c=d?e", "~(a)'b'!*", "{0}/{x}", "a//b/./c"]
)
def test_odd_keys(store: Store, key: str) -> None:
    store.write(key, b"1")
    store.write("other", b"2")
    assert store.read(key) == b"1"
    assert store.read_range(key, 0, 1) == b"1"
    assert store.nbytes(key) == 1
    assert store.exists(key)
    folder, _, name = "/".join(part for part in key.split("/") if part not in ("", ".")).rpartition("/")
    assert name in store.names(folder)
    assert store.child(folder or ".").read(name) == b"1"
    store.delete(key)
    assert not store.exists(key)
    # On a disk the folder stays.
    assert store.names() == (["other"] if not store.local or not folder else sorted([folder.split("/")[0], "other"]))


def test_a_store_is_used_by_many_threads_at_once(store: Store) -> None:
    def work(number: int) -> bytes:
        store.write(f"f/{number}", str(number).encode())
        assert str(number) in store.names("f")
        return store.read(f"f/{number}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(32))) == [str(number).encode() for number in range(32)]
    assert len(store.names("f")) == 32


def _read_in_child(store: Store, to: Any) -> None:
    store.write("child", b"from the child")
    to.send(store.read("x"))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_goes_on_with_connections_of_its_own(store: Store) -> None:
    if store.protocol == "memory":
        pytest.skip("the memory of another process is not this one's")
    store.write("x", b"1")
    assert store.read("x") == b"1"
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(store, send), daemon=True)
    child.start()
    try:
        assert receive.poll(60), "the child waits for what it does not have"
        assert receive.recv() == b"1"
    finally:
        child.kill()
    assert store.read("child") == b"from the child"


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
    assert b"FileSystem" not in pickle.dumps(store)
    found = pickle.loads(pickle.dumps(store))
    assert (found.url, found.read("x")) == (store.url, b"1")


def test_the_file_system_is_opened_anew_in_another_process(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    of_parent = store._clients()
    assert store._clients() is of_parent
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert store._clients()[0] is not of_parent[0]


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
    monkeypatch.setattr(FsspecClient, "call", refused)
    monkeypatch.setattr("actlake.storage.obstore_client.ObstoreReader.read", refused)
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
    found = resolve_url(text, here, trusted=[target])
    assert found.url == Store(target).url
    assert found.protocol == Store(target).protocol


def test_a_local_folder_seen_from_a_bucket_comes_back() -> None:
    # The dataset is in a bucket, the corpus on this machine's disk.
    base = Store("gs://bucket/demo")
    assert resolve_url(relative_url(Store("/data/corpus"), base), base, ["/data"]).url == "/data/corpus"


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


@pytest.mark.parametrize("protocol", ["gs", "s3"])
def test_a_store_that_is_not_there_is_named_without_its_options(
    protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    caplog.set_level(logging.DEBUG)
    store = Store(f"{protocol}://bucket/x", OPTIONS[protocol](port) | {"attempts": 1, "connect_s": 1, "deadline_s": 20})
    with pytest.raises(StoreError, match=f"cannot read {store.url}/x: ") as caught:
        store.read("x")
    shown = "".join(traceback.format_exception(caught.value)) + repr(store)
    assert "bench-secret" not in shown + caplog.text
    assert isinstance(caught.value, OSError)


@pytest.mark.parametrize(
    ("options", "text", "shown"),
    [
        ({"secret": "s3cr3t+/="}, "GET /?sig=s3cr3t%2B%2F%3D and s3cr3t+/=", "GET /?sig=*** and ***"),
        ({"client_kwargs": {"aws_session_token": "tokentoken"}}, "tokentoken!", "***!"),
        ({"connection_string": "AccountName=dev;AccountKey=a2V5a2V5"}, "key a2V5a2V5 of dev", "key *** of dev"),
        ({"sas_token": "sv=2024&sig=abcdefgh"}, "?sv=2024&sig=abcdefgh", "?***"),
        ({"endpoint_url": "http://127.0.0.1:9", "key": "x"}, "http://127.0.0.1:9/x", "http://127.0.0.1:9/x"),
    ],
)
def test_values_of_options_are_struck_out(options: dict[str, Any], text: str, shown: str) -> None:
    assert redacted(text, options) == shown


def test_an_unknown_file_system_is_named_without_its_options() -> None:
    with pytest.raises(BadInputError, match="no file system for nope://: ") as caught:
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
