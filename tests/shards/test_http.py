"""A dataset behind a web server is read as one on a disk is, with ranges or without; the server takes no objects."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from formula_dataset import WIDE, Made
from webserver import web_server

import actlake
from actlake.jobs.catalog import find
from actlake.jobs.removal import survey
from actlake.storage.errors import BadInputError, NotFoundError, StoreError
from actlake.storage.listing import list_objects
from actlake.storage.stores import Store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(str(tmp_path_factory.mktemp("web") / "made"), 868).build_all()


@pytest.fixture(params=[True, False], ids=["ranges", "whole"])
def url(request: pytest.FixtureRequest, made: Made) -> Iterator[str]:
    folder = Path(made.store.root)
    with web_server(folder.parent, ranges=request.param) as server:
        yield f"{server}/{folder.name}"


def test_a_stream_has_the_batches_of_the_disk(made: Made, url: str) -> None:
    there, here = (list(ds.stream(WIDE, batch_size=50)) for ds in (actlake.open(url), made.open()))
    assert len(here) > 10
    assert all(torch.equal(a[WIDE], b[WIDE]) for a, b in zip(there, here, strict=True))


def test_stores_of_folders_below_it_and_all_objects(made: Made, url: str) -> None:
    store = Store(url)
    key = made.key(WIDE, 0)
    folder, _, name = key.rpartition("/")
    assert store.child(folder).read(name) == made.store.read(key)
    assert store.read_range(key, -5, 0) == made.store.read(key)[-5:]
    assert store.read_range(key, 1 << 30, 1 << 31) == b""
    assert {found.key for found in list_objects(store)} == {found.key for found in list_objects(made.store)}
    assert [entry.url for entry in find(Store(url.rpartition("/")[0]), depth=1)] == [url]


def test_what_is_absent_and_a_server_that_is_gone(url: str) -> None:
    with pytest.raises(NotFoundError, match="nothing stored at http://127"):
        Store(url).read("spec.jsonl")
    with pytest.raises(match="no dataset at http://127"):
        actlake.open(f"{url}s")
    with web_server(Path("tests")) as gone:
        pass
    with pytest.raises(StoreError, match="cannot read http://127"):
        actlake.open(gone)


def test_it_takes_no_objects_and_loses_none(url: str) -> None:
    with pytest.raises(BadInputError, match="HTTP servers take no objects"):
        Store(url).write("spec.json", b"{}")
    with pytest.raises(BadInputError, match="HTTP servers take no objects"):
        survey(Store(url))
