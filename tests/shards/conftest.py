"""Places for datasets, and datasets of formulas."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from formula_dataset import Made

from actlake.storage.stores import Store


@pytest.fixture(params=["file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A URL for a dataset, on each kind of file system."""
    if request.param == "file":
        yield str(tmp_path / "data")
    else:
        root = f"memory://actlake-{uuid4().hex}"
        yield f"{root}/data"
        if (store := Store(root)).exists(""):
            store.fs.rm(store.root, recursive=True)


@pytest.fixture
def local(tmp_path: Path) -> str:
    return str(tmp_path / "data")


@pytest.fixture
def make(local: str) -> Callable[..., Made]:
    """Make a local dataset of 3 whole shards and one of 100 rows, or as told."""

    def make(n_rows: int = 868, **options: Any) -> Made:
        return Made(options.pop("url", local), n_rows, **options)

    return make
