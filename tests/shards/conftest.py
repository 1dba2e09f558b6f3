"""Places for datasets, and datasets of formulas."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from formula_dataset import Made

from actlake.shards.dataset import ActivationDataset
from actlake.storage.stores import Store


@contextmanager
def in_memory() -> Iterator[str]:
    root = f"memory://actlake-{uuid4().hex}"
    yield f"{root}/data"
    if (store := Store(root)).exists(""):
        store.fs.rm(store.root, recursive=True)


@pytest.fixture
def local(tmp_path: Path) -> str:
    return str(tmp_path / "data")


@pytest.fixture(params=["file", "memory"])
def place(request: pytest.FixtureRequest, local: str) -> Iterator[str]:
    """A URL for a dataset, on each kind of file system."""
    if request.param == "file":
        yield local
    else:
        with in_memory() as url:
            yield url


@pytest.fixture
def make() -> Iterator[Callable[..., Made]]:
    """Make a dataset in memory, of 3 whole shards and one of 100 rows, or as told."""
    with in_memory() as url:
        yield lambda n_rows=868, **options: Made(url, n_rows, **options)


@pytest.fixture
def ds(make: Callable[..., Made]) -> ActivationDataset:
    return make().build_all().open()
