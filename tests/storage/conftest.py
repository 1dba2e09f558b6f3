"""A tiny dataset whose every value is a formula of the row id, so that tests compare exact arrays."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from actlake.storage.codecs import Codec
from actlake.storage.records import ObjectRecord, Provenance, ShardRecord
from actlake.storage.rowspace import KeepRule
from actlake.storage.spec import DatasetSpec, PointSpec
from actlake.storage.stores import Store

SPEC = DatasetSpec(
    model="formula",
    model_revision=None,
    model_fingerprint="0" * 64,
    architecture="Formula",
    corpus_id="1" * 64,
    split="train",
    keep=KeepRule(exclude=(2, 0, 1)),
    hook_points=(
        PointSpec(name="layers.0.resid_post", width=8, rows_per_chunk=16),
        PointSpec(name="layers.3.mlp_out", width=4, rows_per_chunk=32),
    ),
    dtype="bfloat16",
    seed=7,
    order="shuffled",
    rows_per_shard=64,
    rows_per_block=32,
    batch_tokens=256,
    codec=Codec(),
)


@pytest.fixture
def make_spec() -> Callable[..., DatasetSpec]:
    """Return a function that gives the tiny spec with some fields changed."""
    return lambda **changes: replace(SPEC, **changes)


@pytest.fixture
def make_rows() -> Callable[..., npt.NDArray[Any]]:
    """Return a function that gives rows ``[n, width]``, or ``[n]``, of a dtype: small numbers, exact in bfloat16."""

    def rows(n: int, width: int | None, dtype: str = "bfloat16") -> npt.NDArray[Any]:
        numbers = np.arange(n * (width or 1), dtype=np.int64) * 37 % 251
        shaped = numbers if width is None else numbers.reshape(n, width)
        if dtype in ("bfloat16", "float32"):
            return ((shaped - 125) / 4).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        return shaped.astype(dtype)

    return rows


@pytest.fixture
def make_record() -> Callable[..., ShardRecord]:
    """Return a function that gives the commit record of shard k of 64-row shards."""

    def record(shard: int, **changes: Any) -> ShardRecord:
        made = ShardRecord(
            dataset_id=SPEC.dataset_id,
            shard=shard,
            revision=0,
            first_row=64 * shard,
            n_rows=64,
            n_void=shard % 3,
            objects={
                name: ObjectRecord(nbytes=1000 + shard + i, crc32c=2**32 - 1 - shard, index_crc32c=shard * 31 + i)
                for i, name in enumerate(SPEC.arrays())
            },
            stats=ObjectRecord(nbytes=500, crc32c=shard),
            provenance=Provenance(attempt=f"a{shard}", software={"torch": "2.13.0", "actlake": "1"}, n_tokens=70),
        )
        return replace(made, **changes)

    return record


class WatchedStore(Store):
    """A store that notes its calls; call number ``fail_at`` of those that change something raises (-1: none does)."""

    fail_at = -1

    def __init__(self, url: str | Path, options: dict[str, Any] | None = None) -> None:
        super().__init__(url, options)
        self.changes: list[str] = []
        self.reads: list[str] = []
        self.ranges: set[str] = set()
        self.listings: list[str] = []

    def _change(self, what: str) -> None:
        self.changes.append(what)
        if len(self.changes) - 1 == self.fail_at:
            raise OSError(f"change {self.fail_at} ({what}) fails on purpose")

    def write(self, key: str, *parts: bytes | memoryview) -> None:
        self._change(f"write {key}")
        super().write(key, *parts)

    def delete(self, key: str) -> None:
        self._change(f"delete {key}")
        super().delete(key)

    def read(self, key: str, most: int | None = None) -> bytes:
        self.reads.append(key)
        return super().read(key, most)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        self.ranges.add(key)
        return super().read_range(key, start, stop)

    def names(self, key: str = "") -> list[str]:
        self.listings.append(key)
        return super().names(key)


@pytest.fixture
def watched() -> type[WatchedStore]:
    return WatchedStore


@pytest.fixture
def memory_url(tmp_path: Path) -> Iterator[str]:
    """Return the URL of a folder in fsspec's memory file system, emptied afterwards."""
    store = Store(f"memory:/{tmp_path}")
    yield store.url
    # Its own rm looks every object up again.
    objects = store.fs.store
    for path in [path for path in objects if path.startswith(f"/{store.root}/")]:
        del objects[path]
