"""Two processes that finish one dataset at once: wherever one stops while the other runs, the same summaries result."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from actlake.storage import groups, manifest_files, manifest_parts, records, summaries
from actlake.storage import manifest as manifest_module
from actlake.storage.finish import finish
from actlake.storage.header import Header
from actlake.storage.manifest import Manifest
from actlake.storage.records import ShardRecord, commit
from actlake.storage.spec import DatasetSpec
from actlake.storage.stores import Store

N_SHARDS = 9
#: More than the operations of ``finish`` on that many shards.
_MOST_OPERATIONS = 200


class Interrupted(Store):
    """A store that lets another process run once, before its operation number ``at``."""

    def __init__(self, url: str, at: int, other: Callable[[], Any]) -> None:
        super().__init__(url)
        self.n, self._at, self._other, self._counting = 0, at, other, threading.Lock()

    @contextmanager
    def _answering(self, key: str, verb: str = "read") -> Iterator[None]:
        with self._counting:
            self.n += 1
            if self.n == self._at:
                self._other()
        with super()._answering(key, verb):
            yield


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have groups of 4 commits, and two of them in a file of the index."""
    for name, value in (("GROUP_SHARDS", 4), ("INDEX_GROUPS", 2)):
        for module in (records, manifest_module, manifest_files, manifest_parts, groups, summaries):
            monkeypatch.setattr(module, name, value, raising=False)


def stored(url: str) -> dict[str, bytes]:
    """Return everything but the commits."""
    store = Store(url)
    keys = [f"manifest/{name}" for name in store.names("manifest")] + [n for n in store.names() if n == "root.json"]
    return {key: store.read(key) for key in keys}


@pytest.mark.parametrize("there", [N_SHARDS, N_SHARDS - 1], ids=["whole before", "made whole by the other"])
def test_wherever_one_stops_while_the_other_runs_the_same_results(
    there: int,
    memory_url: str,
    small_groups: None,
    make_record: Callable[..., ShardRecord],
    make_spec: Callable[..., DatasetSpec],
) -> None:
    header, made = Header(spec=make_spec(), n_rows=64 * N_SHARDS, corpus="c"), list(map(make_record, range(N_SHARDS)))

    def begin(name: str, n: int) -> str:
        for record in made[:n]:
            commit(Store(f"{memory_url}/{name}"), record)
        return f"{memory_url}/{name}"

    alone = begin("alone", N_SHARDS)
    finish(Store(alone), header)
    expected = stored(alone)
    assert len(expected) == 2 + 2 + 1  # Groups, files of the index, totals.
    for at in range(1, _MOST_OPERATIONS):
        url = begin(str(at), there)

        def other(url: str = url) -> None:
            for record in made[there:]:
                commit(Store(url), record)
            finish(Store(url), header)

        one = Interrupted(url, at, other)
        finish(one, header)
        if one.n < at:
            return
        assert stored(url) == expected, at
        assert len(Manifest.load(Store(url), header.n_rows)) == N_SHARDS
    pytest.fail("finish takes more operations than were tried")
