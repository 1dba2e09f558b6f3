"""What the tests of this folder share."""

from collections.abc import Iterator
from uuid import uuid4

import pytest

from actlake.storage.stores import Store


@pytest.fixture
def memory_folder() -> Iterator[str]:
    """Return the URL of a folder in memory, emptied afterwards."""
    store = Store(f"memory://chaos-{uuid4().hex}")
    yield store.url
    store.fs.rm(store.root, recursive=True)
