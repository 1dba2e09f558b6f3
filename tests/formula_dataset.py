"""Datasets of formulas, made through `actlake.storage` alone, and what tests of streams over them share."""

import itertools
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

import actlake
from actlake.shards.batch import TokenBatch
from actlake.shards.dataset import ActivationDataset
from actlake.storage.arrays import crc32c, encode_shard
from actlake.storage.codecs import Codec
from actlake.storage.header import Header, prepare
from actlake.storage.moments import of_shard, to_parquet
from actlake.storage.records import ObjectRecord, Provenance, ShardRecord, commit, stats_key
from actlake.storage.rowspace import ROLE_VOID, KeepRule
from actlake.storage.spec import DatasetSpec, PointSpec
from actlake.storage.stores import Store

WIDE, NARROW = "layers.3.resid_post", "layers.3.mlp_out"
BOTH = [NARROW, WIDE]

#: A buffer of several windows an epoch on 868 rows.
SMALL = 16_000


def make_spec(**changes: Any) -> DatasetSpec:
    spec = DatasetSpec(
        model="formula",
        model_revision=None,
        model_fingerprint="0" * 64,
        architecture="FormulaForCausalLM",
        corpus_id="c" * 64,
        split="train",
        keep=KeepRule(),
        hook_points=(
            PointSpec(name=NARROW, width=4, rows_per_chunk=64),
            PointSpec(name=WIDE, width=12, rows_per_chunk=32),
        ),
        dtype="bfloat16",
        seed=0,
        order="shuffled",
        rows_per_shard=256,
        rows_per_block=128,
        batch_tokens=512,
        codec=Codec(),
    )
    return replace(spec, **changes)


@dataclass
class Made:
    """A dataset on its way: builds shards by formula, as often and as differently as a test wants."""

    url: str
    n_rows: int
    spec: DatasetSpec = field(default_factory=make_spec)
    voids: frozenset[int] = frozenset()
    #: Added to every activation: what another device would have rounded otherwise.
    offset: float = 0.0

    def __post_init__(self) -> None:
        self.store = Store(self.url)
        prepare(self.store, Header(spec=self.spec, n_rows=self.n_rows, corpus="../corpus"))

    def rows_of(self, shard: int) -> npt.NDArray[np.int64]:
        rows = self.spec.row_space(self.n_rows).rows_of(shard)
        return np.arange(rows.start, rows.stop)

    def values(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """What is stored for some rows of an array."""
        array = self.spec.arrays()[name]
        void = np.isin(rows, list(self.voids))
        columns = {
            "rows/token_id": rows * 7 % 1009,
            "rows/position": rows % 97,
            "rows/sequence": rows // 97,
            "rows/role": np.zeros_like(rows),
        }
        if name in columns:
            column = np.where(void, ROLE_VOID if name == "rows/role" else 0, columns[name])
            return column.astype(array.numpy_dtype)
        channels = np.arange(array.width or 1)
        place = self.spec.point_names.index(name)
        values = np.sin(rows[:, None] * 0.37 + channels * 1.7 + place) * (1 + channels) + self.offset
        return np.where(void[:, None], 0.0, values).astype(array.numpy_dtype)

    def build(self, *shards: int, revision: int = 0) -> "Made":
        for shard in shards:
            rows = self.rows_of(shard)
            objects = {name: self._store(name, shard, rows) for name in self.spec.arrays()}
            self.commit(shard, objects, revision)
        return self

    def build_all(self) -> "Made":
        return self.build(*range(self.spec.row_space(self.n_rows).n_shards))

    def commit(self, shard: int, objects: dict[str, ObjectRecord], revision: int = 0) -> None:
        rows = self.rows_of(shard)
        kept = rows[~np.isin(rows, list(self.voids))]
        data = to_parquet({name: of_shard(self.values(name, kept), numbers=kept) for name in self.spec.point_names})
        self.store.write(stats_key(shard), data)
        record = ShardRecord(
            dataset_id=self.spec.dataset_id,
            shard=shard,
            revision=revision,
            first_row=int(rows[0]),
            n_rows=len(rows),
            n_void=len(rows) - len(kept),
            objects=objects,
            stats=ObjectRecord(nbytes=len(data), crc32c=crc32c(data)),
            provenance=Provenance(attempt=uuid4().hex),
        )
        commit(self.store, record)

    def _store(self, name: str, shard: int, rows: npt.NDArray[np.int64]) -> ObjectRecord:
        array = self.spec.arrays()[name]
        encoded = encode_shard(array, self.values(name, rows))
        self.store.write(array.object_key(shard), *encoded.parts)
        return ObjectRecord(nbytes=encoded.nbytes, crc32c=encoded.crc32c, index_crc32c=encoded.index_crc32c)

    def open(self) -> ActivationDataset:
        return actlake.open(self.url)

    # --- damage ---

    def key(self, name: str, shard: int) -> str:
        return self.spec.arrays()[name].object_key(shard)

    def chunk_span(self, name: str, shard: int, chunk: int) -> tuple[int, int]:
        array = self.spec.arrays()[name]
        tail = self.store.read(self.key(name, shard))[-array.index_nbytes : -4]
        offset, length = np.frombuffer(tail, dtype="<u8").reshape(-1, 2)[chunk].tolist()
        return offset, offset + length

    def flip(self, name: str, shard: int, place: int) -> None:
        """Flip one bit of an object; a negative place counts from its end."""
        data = bytearray(self.store.read(self.key(name, shard)))
        data[place] ^= 0x10
        self.store.write(self.key(name, shard), bytes(data))


def bits(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows as something that compares exactly."""
    return rows.view(np.uint16) if rows.dtype == ml_dtypes.bfloat16 else rows


def rows_of(batches: list[TokenBatch]) -> list[list[int]]:
    return [batch.row.tolist() for batch in batches]


def flat(batches: list[TokenBatch]) -> list[int]:
    return list(itertools.chain.from_iterable(rows_of(batches)))


def same_bits(tensor: torch.Tensor, rows: Any) -> bool:
    return np.array_equal(tensor.view(torch.int16).numpy(), rows.view(np.int16))
