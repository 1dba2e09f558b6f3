"""What a store's server is asked for: neighbouring chunks come by one request, and what nobody wants does not come."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import Faults, proxy
from formula_dataset import NARROW, WIDE, Made, bits, flat
from servers import REMOTE, Servers

import actlake
from actlake.shards.dataset import ActivationDataset
from actlake.storage.stores import Store


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A dataset behind a proxy that counts; ``made`` is the same on a disk."""

    made: Made
    plain: Store
    servers: Servers
    kind: str

    @contextmanager
    def opened(self, **options: Any) -> Iterator[tuple[ActivationDataset, Faults]]:
        """Open it anew through the proxy, with these storage options."""
        counts, server = Faults(), self.servers[self.plain.protocol]
        client = self.kind.partition("+")[2]
        with proxy(server.port, counts) as port:
            store = server.store(self.plain.url, port, **(({"client": client} if client else {}) | options))
            yield actlake.open(store.url, store.options), counts

    def stored(self, name: str, shard: int, *chunks: int) -> int:
        """Return the bytes of some chunks as they are stored."""
        return sum(stop - start for start, stop in (self.made.chunk_span(name, shard, chunk) for chunk in chunks))


@pytest.fixture(scope="module", params=REMOTE)
def watched(request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("made")
    made, plain = Made(str(folder), 868).build_all(), servers.folder(request.param)
    for path in Path(folder).rglob("*"):
        if path.is_file():
            plain.write(str(path.relative_to(folder)), path.read_bytes())
    return Watched(made=made, plain=plain, servers=servers, kind=request.param)


@contextmanager
def counted(counts: Faults) -> Iterator[list[int]]:
    """Give the requests and the bytes of their answers within the block, once it has ended."""
    before, found = (counts.n_requests, counts.nbytes), list[int]()
    yield found
    found += [counts.n_requests - before[0], counts.nbytes - before[1]]


@pytest.mark.parametrize(
    ("spans", "options", "n_requests", "fetched"),
    [
        # Chunks 1 to 5 lie side by side.
        ([(32, 192)], {"gap_nbytes": 0}, 1, (1, 2, 3, 4, 5)),
        # 3 and 4 are not wanted, and do not come where gaps are not worth it.
        ([(32, 96), (160, 192)], {"gap_nbytes": 0}, 2, (1, 2, 5)),
        # By default a gap of two small chunks is cheaper than a request.
        ([(32, 96), (160, 192)], {}, 1, (1, 2, 3, 4, 5)),
        # No request is larger than it may be: one for each chunk here.
        ([(32, 192)], {"range_nbytes": 1}, 5, (1, 2, 3, 4, 5)),
    ],
    ids=["neighbours", "a gap", "a small gap", "small requests"],
)
def test_chunks_that_lie_close_come_by_one_request(
    watched: Watched, spans: list[tuple[int, int]], options: dict[str, int], n_requests: int, fetched: tuple[int, ...]
) -> None:
    with watched.opened(**options) as (ds, counts):
        array = ds.spec.arrays()[WIDE]
        # The shard's index is read once.
        ds.reader.fetch(array, 1, [(0, 32)])
        with counted(counts) as found:
            chunks = ds.reader.fetch(array, 1, spans)
    assert found == [n_requests, watched.stored(WIDE, 1, *fetched)]
    assert sorted(chunks) == [chunk for start, stop in spans for chunk in range(start // 32, stop // 32)]


def test_rows_of_several_chunks_come_by_one_request(watched: Watched) -> None:
    with watched.opened() as (ds, counts):
        array = ds.spec.arrays()[NARROW]
        out = np.empty(array.shape(192), dtype=array.numpy_dtype)
        ds.reader.read_rows(array, 2, 0, 64, out[:64])
        with counted(counts) as found:
            ds.reader.read_rows(array, 2, 64, 256, out)
    assert found == [1, watched.stored(NARROW, 2, 1, 2, 3)]
    assert np.array_equal(bits(out), bits(watched.made.values(NARROW, np.arange(2 * 256 + 64, 3 * 256))))


def test_a_stream_asks_for_its_hook_points_alone_and_once(watched: Watched) -> None:
    with watched.opened() as (ds, counts):
        n_shards = len(ds.reader.manifest.shards)
        with counted(counts) as found:
            batches = list(ds.stream([NARROW], batch_size=50, drop_last=False))
    assert sorted(flat(batches)) == list(range(868))
    n_requests, nbytes = found
    whole = [watched.made.store.nbytes(watched.made.key(NARROW, shard)) for shard in range(n_shards)]
    assert sum(whole) <= nbytes < sum(whole) + watched.made.store.nbytes(watched.made.key(WIDE, 0))
    # An index and its chunks of each shard: 4 chunks, which would be 4 requests.
    assert n_requests <= 2 * n_shards
