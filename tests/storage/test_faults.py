"""Stores that misbehave, through a proxy on the loopback: nothing is lost, nothing hangs, nothing wrong is taken."""

import base64
import gc
import itertools
import pickle
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import bench_flips
import numpy as np
import pytest
from fakes import FormulaModel, make_corpus, make_spec, write_documents
from faults import Faults, proxy
from formula_dataset import bits
from servers import Servers

import actlake
from actlake.ingest.build import ShardBuilder
from actlake.storage.arrays import crc32c
from actlake.storage.errors import BadInputError, DataError, StoreError
from actlake.storage.header import Header, prepare
from actlake.storage.limits import Limits
from actlake.storage.manifest import Manifest, compact, write_root
from actlake.storage.stores import Store

#: Waits that suit a loopback.
QUICK = {"wait_s": 0.01, "stall_s": 20, "deadline_s": 120}
KINDS = ("gs", "s3", "az", "gs+obstore", "s3+obstore")


@contextmanager
def behind(servers: Servers, kind: str, faults: Faults, **options: Any) -> Iterator[tuple[Store, Store]]:
    """Give a folder, and the same folder seen through a proxy."""
    plain = servers.folder(kind)
    server = servers[plain.protocol]
    with proxy(server.port, faults) as port:
        yield plain, server.store(plain.url, port, **(QUICK | _client(kind) | options))


def _client(kind: str) -> dict[str, str]:
    return {"client": kind.partition("+")[2]} if "+" in kind else {}


def bad_network(seed: int, **changes: float) -> Faults:
    """Of every five requests one ends badly."""
    rates = dict.fromkeys(("429", "500", "503", "504", "reset", "truncate", "lost", "twice"), 0.025)
    return Faults(rates=rates | changes, seed=seed, latency_s=0.01)


# --- one call ---


@pytest.mark.parametrize("kind", KINDS)
def test_objects_arrive_whole_through_a_bad_network(servers: Servers, kind: str) -> None:
    random = np.random.default_rng(0)
    with behind(servers, kind, faults := bad_network(1, late=0.05)) as (plain, store):
        for number in range(25):
            data = random.bytes(int(random.integers(1, 200_000)))
            store.write(f"f/{number}", data)
            assert plain.read(f"f/{number}") == data
            assert store.read(f"f/{number}") == data
            assert store.read_range(f"f/{number}", 5, 5000) == data[5:5000]
            assert store.nbytes(f"f/{number}") == len(data)
        assert len(store.names("f")) == 25
    assert {"429", "500", "503", "504", "reset", "truncate", "lost", "twice", "late"} == set(faults.done)


@pytest.mark.parametrize("kind", ["gs", "s3", "az"])
def test_a_service_that_cannot_be_connected_to_is_asked_again(servers: Servers, kind: str) -> None:
    plain = servers.folder(kind)
    plain.write("f", b"there")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    store = servers[plain.protocol].store(plain.url, port, **(QUICK | {"attempts": 40}))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(store.read, "f")
        time.sleep(0.5)
        assert not answer.done()
        with proxy(servers[plain.protocol].port, Faults(), port=port):
            assert answer.result(60) == b"there"


@pytest.mark.parametrize("kind", ["gs", "s3", "az"])
def test_parts_of_an_upload_are_repeated_each_on_its_own(servers: Servers, kind: str) -> None:
    data = np.random.default_rng(0).bytes(23 << 20)
    # An answer that is lost ends an upload to the emulator of GCS: it knows a part that comes twice for no such upload.
    faults = Faults(rates={"503": 0.25} | ({"reset": 0.1} if kind != "gs" else {}), seed=3, only="^(PUT|POST)")
    with behind(servers, kind, faults, part_nbytes=5 << 20) as (plain, store):
        store.write("big", data)
        assert plain.read("big") == data
    # Whole, it would be one request; started again, more than these.
    assert 5 <= faults.n_requests <= 30
    assert faults.done.total() >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_that_stalls_is_begun_again(servers: Servers, kind: str) -> None:
    faults = Faults(rates={"stall": 1.0}, only="^GET", at_most=2)
    with behind(servers, kind, faults, stall_s=0.5) as (plain, store):
        plain.write("x", data := bytes(range(256)) * 400)
        assert store.read_range("x", 0, len(data)) == data
    assert faults.done["stall"] == 2


def test_a_read_that_trickles_is_begun_again(servers: Servers) -> None:
    faults = Faults(rates={"trickle": 1.0}, only="^GET", at_most=2)
    with behind(servers, "gs", faults, stall_s=0.5, bytes_per_s=1e7) as (plain, store):
        plain.write("x", data := bytes(range(256)) * 400)
        assert store.read_range("x", 0, len(data)) == data
    assert faults.done["trickle"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_requests_are_under_way_than_may_be(servers: Servers, kind: str) -> None:
    faults = Faults(rates={"late": 1.0}, latency_s=0.05, only="^GET")
    with behind(servers, kind, faults, max_requests=2) as (plain, store):
        plain.write("x", data := bytes(range(256)) * 4)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda start: store.read_range("x", start, 1024), range(16)))
    assert found == [data[start:] for start in range(16)]
    assert faults.most_at_once == 2


@pytest.mark.parametrize("kind", ["gs", "s3", "az"])
@pytest.mark.parametrize("fault", ["stall", "503"])
@pytest.mark.parametrize("call", ["write", "read", "names"])
def test_what_never_works_ends_with_an_error_that_names_it(servers: Servers, kind: str, fault: str, call: str) -> None:
    limits = {"stall_s": 0.2, "attempts": 3, "deadline_s": 3.0}
    begun = time.monotonic()
    with behind(servers, kind, Faults(rates={fault: 1.0}), **limits) as (_, store):
        with pytest.raises(
            StoreError, match=f"cannot {'write' if call == 'write' else 'read'} {store.url}/x: "
        ) as caught:
            store.write("x", b"1") if call == "write" else getattr(store, call)("x")
        assert isinstance(caught.value, OSError)
    # Far more than it takes here; without limits it would be an hour.
    assert time.monotonic() - begun < 60
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_call_ends_at_its_deadline_whatever_its_attempts(servers: Servers) -> None:
    with behind(servers, "gs", Faults(rates={"stall": 1.0}), stall_s=3600.0, deadline_s=0.5) as (_, store):
        with pytest.raises(StoreError, match=r"no end after 0\.5 s .* \(storage option deadline_s\)"):
            store.write("x", b"1")
        with pytest.raises(StoreError, match="no end after"):
            store.read("x")


@pytest.mark.parametrize("kind", ["gs", "az"])
def test_an_upload_that_arrives_damaged_is_refused_or_noticed(servers: Servers, kind: str) -> None:
    plain = servers.folder(kind)
    faults = Faults(rates={"flip_upload": 1.0}, seed=5, only="^(PUT|POST)", at_most=1)
    with proxy(servers[kind].port, faults) as port:
        store = servers[kind].store(plain.url, port, **QUICK)
        _touch(plain, store)
        try:
            store.write("x", data := bytes(1_000_000))
        except StoreError:
            assert faults.done["flip_upload"] == 1
        else:
            # The service refused it and the client sent it again, or the flip was in what is no part of the object.
            assert plain.read("x") == data


def test_s3_gets_a_checksum_to_compare(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    # The emulator takes what comes; the service refuses what does not have it.
    store, sent = servers.folder("s3"), []
    real = type(store.fs)._call_s3

    async def noted(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        sent.append((method, kwargs.get("ChecksumCRC32C")))
        return await real(self, method, *args, **kwargs)

    monkeypatch.setattr(store.fs, "_call_s3", noted.__get__(store.fs))
    store.write("x", data := b"0123456789")
    assert sent == [("put_object", base64.b64encode(crc32c(data).to_bytes(4, "big")).decode())]
    assert store.read("x") == data


def _touch(plain: Store, store: Store) -> None:
    # Signing in and the like are done before the faults are counted.
    plain.write("y", b"1")
    assert store.read("y") == b"1"


# --- a dataset ---


def ingest(store: Store, folder: Any, source: str) -> None:
    """Build a corpus and two hook points of it, as the engines do; what is there already stays."""
    corpus = make_corpus(store.child("corpus"), source)
    spec = make_spec(corpus)
    place = store.child("ds")
    prepare(place, Header(spec=spec, n_rows=corpus.row_index("train", spec.keep).n_rows, corpus="../corpus"))
    builder = ShardBuilder(store=place, corpus=corpus, forward=FormulaModel(spec.hook_points))
    for shard in range(builder.space.n_shards):
        builder.build(shard)
    manifest = Manifest.load(place, builder.header.n_rows)
    groups = compact(place, manifest, builder.space)
    write_root(place, dataset_id=spec.dataset_id, n_rows=builder.header.n_rows, manifest=manifest, groups=groups)


def read_all(ds: actlake.ActivationDataset) -> dict[str, Any]:
    """Return every row of every array, as it is read by slices and by a stream."""
    found: dict[str, Any] = {name: bits(ds[name][:]).tobytes() for name in ds.spec.arrays()}
    batches = list(ds.stream(list(ds.hook_points), batch_size=50, seed=1, drop_last=False))
    found["rows"] = list(itertools.chain.from_iterable(batch.row.tolist() for batch in batches))
    for point in ds.hook_points:
        found[f"stream {point}"] = b"".join(batch[point].view(_int16()).numpy().tobytes() for batch in batches)
        found[f"mean {point}"] = ds.statistics(point).mean.tobytes()
    return found


def _int16() -> Any:
    import torch

    return torch.int16


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(tmp_path_factory.mktemp("texts"), n_documents=20)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, source: str) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("expected")
    ingest(Store(folder), folder, source)
    return read_all(actlake.open(f"{folder}/ds"))


@pytest.mark.parametrize("kind", KINDS)
def test_ingestion_and_reading_through_a_bad_network_end_bit_exact(
    servers: Servers, kind: str, source: str, expected: dict[str, Any], tmp_path: Any
) -> None:
    faults = bad_network(2, stale=0.02, late=0.02)
    with behind(servers, kind, faults) as (plain, store):
        ingest(store, tmp_path, source)
        through = actlake.open(store.child("ds").url, store.options)
        assert read_all(through) == expected
        # And what is stored is whole, looked at without the proxy.
        assert read_all(actlake.open(plain.child("ds").url, plain.options)) == expected
    assert faults.done.total() > 50
    assert faults.done["stale"] >= 1


# --- flipped bits ---


@pytest.fixture(scope="module")
def targets() -> list[bench_flips.Target]:
    return [bench_flips.make_dataset("memory://flips/dataset"), bench_flips.make_manifest("memory://flips/manifest")]


def test_no_flip_of_a_stored_bit_is_missed(targets: list[bench_flips.Target]) -> None:
    found = bench_flips.run(targets, 140, seed=11)
    assert set(found) == {
        "commit records", "manifest", "root.json", "shard objects", "spec.json", "statistics", "zarr.json"
    }  # fmt: skip
    for kind, outcomes in found.items():
        assert set(outcomes) <= {"found", "harmless"}, kind
    # Bytes that are data, not JSON or the unread rest of a footer, are never harmless.
    assert all(found[kind]["harmless"] == 0 for kind in ("shard objects", "statistics", "zarr.json"))


def test_the_flips_would_show_a_missing_checksum(
    targets: list[bench_flips.Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actlake.storage.arrays.check_chunk", lambda *_: None)
    dataset = targets[0]
    key = next(key for key in dataset.kinds["shard objects"] if "rows/role" in key)
    assert "missed" in {dataset.flip(key, bit) for bit in range(8 * 20, 8 * 28)}


@pytest.mark.parametrize("kind", ["gs", "az", "s3+obstore"])
def test_no_flip_on_the_way_is_missed(
    servers: Servers, kind: str, source: str, expected: dict[str, Any], tmp_path: Any
) -> None:
    faults = Faults(rates={"flip": 1.0}, seed=7, at_most=0)
    with behind(servers, kind, faults) as (plain, store):
        ingest(plain, tmp_path, source)
        url = store.child("ds").url
        wanted, outcomes = {name: expected[name] for name in (*MEANS, *POINTS)}, Counter[str]()
        # Each look opens the dataset anew, and answers of a kind come with a flipped bit: one, or all of them.
        for number, what in enumerate(("spec.json", "root.json", "commits", "arrays", "stats") * 2):
            faults.only, faults.at_most = f"^GET .*{what}", faults.done.total() + (1 if number < 5 else 1000)
            try:
                # One flip of a chunk is found, and the chunk is read again.
                assert look(actlake.open(url, store.options)) == wanted, what
                outcomes["whole"] += 1
            except (DataError, StoreError):
                outcomes["found"] += 1
        assert outcomes["found"] >= 6
        faults.at_most = 0
        assert look(actlake.open(url, store.options)) == wanted


POINTS = ("layers.0.attn_z", "layers.1.resid_post")
MEANS = tuple(f"mean {point}" for point in POINTS)


def look(ds: actlake.ActivationDataset) -> dict[str, Any]:
    """Return the rows and the means of the hook points."""
    rows = {point: bits(ds[point][:]).tobytes() for point in POINTS}
    return rows | {f"mean {point}": ds.statistics(point).mean.tobytes() for point in POINTS}


def test_the_proxy_ends_what_a_client_has_left(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, proxy(silent.getsockname()[1], Faults()) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /x HTTP/1.1\r\n\r\n")
            server, _ = silent.accept()
        with server:
            time.sleep(0.2)
            gc.collect()
    assert not caplog.records


# --- settings ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"client": "obstor"}, "client = 'obstor'; did you mean 'obstore'"),
        ({"attempts": 0}, "attempts = 0 must be a whole number"),
        ({"attempts": 2.5}, "attempts = 2.5 must be a whole number"),
        ({"deadline_s": -1}, r"deadline_s = -1 must be a number above 0; 300\.0 is the default"),
        ({"part_nbytes": 1000}, "part_nbytes = 1000 must be a whole number of at least 5242880"),
        ({"stall_s": "soon"}, "stall_s = 'soon' must be a number"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Store("gs://bucket/x", options)


def test_a_large_upload_may_take_longer() -> None:
    limits = Limits(deadline_s=10, bytes_per_s=100, stall_s=1)
    assert (limits.deadline(), limits.deadline(1000), limits.attempt(1000)) == (10, 20, 11)


@pytest.mark.parametrize("url", ["hf://datasets/a/b", "https://example.org/a"])
def test_where_nothing_can_be_written_says_why(url: str) -> None:
    calls: list[Callable[[Store], None]] = [lambda store: store.write("x", b"1"), lambda store: store.delete("x")]
    for call in (*calls, Store.require_writable):
        with pytest.raises(BadInputError, match=r"cannot be written to: .*; write to a folder or"):
            call(Store(url, {"token": "hf_secret"}))
