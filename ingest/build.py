"""Builds one shard: sequences to batches, forward passes, rows to their places, encoded objects, commit.

A plain class that knows neither Ray nor the command line. A shard is built from the spec, the corpus and the model
alone, so any worker may build it, in any order, any number of times; objects have determined names and the commit
record comes last.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from actlake.ingest.batching import Batch, plan_batches
from actlake.ingest.corpus import Corpus, TokenSequence
from actlake.storage.arrays import ArraySpec, crc32c, encode_shard
from actlake.storage.errors import DataError, NotFoundError, SpecMismatchError
from actlake.storage.header import Header
from actlake.storage.manifest import uncommit
from actlake.storage.moments import Moments, of_shard, to_parquet
from actlake.storage.records import ObjectRecord, Provenance, ShardRecord, commit, read_record, stats_key
from actlake.storage.stores import Store

# Shapes: B sequences of a batch, T tokens, D width, N rows of a shard.


class ForwardPass(Protocol):
    """Runs the model: int64 [B, T] to ``{hook point: [B, T, D]}``; deterministic for one shape on one device."""

    def __call__(self, input_ids: torch.Tensor, /) -> Mapping[str, torch.Tensor]: ...


@dataclass
class Timing:
    """Seconds spent, and padded tokens run, for one shard."""

    forward_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    n_tokens: int = 0


class ShardBuilder:
    """Builds and commits shards of one split of one dataset.

    Holds the host memory of one shard, which it uses again for the next. Not thread-safe: one per worker.
    """

    def __init__(
        self,
        *,
        store: Store,
        corpus: Corpus,
        forward: ForwardPass,
        device: str = "cpu",
        made_by: Provenance | None = None,
        n_threads: int = 1,
    ) -> None:
        self.header = Header.read(store)
        if corpus.corpus_id != self.header.spec.corpus_id:
            raise SpecMismatchError(
                f"{store.url} is made from corpus {self.header.spec.corpus_id[:12]}..., {corpus.store.url} is "
                f"{corpus.corpus_id[:12]}...; its sources have changed: choose another 'dataset' and 'corpus.url'"
            )
        self.store, self.corpus, self.forward, self.device = store, corpus, forward, device
        self.made_by = made_by or Provenance()
        self.space = self.header.spec.row_space(self.header.n_rows)
        self.index = corpus.row_index(self.header.spec.split, self.header.spec.keep)
        self._arrays = self.header.spec.arrays()
        largest = min(self.space.rows_per_shard, self.space.n_rows)
        self._memory = {name: _allocate(array, largest) for name, array in self._arrays.items()}
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="actlake-encode")

    def build(self, shard: int, on_rows: Callable[[int], None] = lambda n_rows: None) -> ShardRecord:
        """Build, store and commit a shard; return its record, or the one that another worker committed before.

        ``on_rows`` hears of rows as they are captured. Raises ``DataError`` for non-finite activations.
        """
        n_rows, found = len(self.space.rows_of(shard)), self._committed(shard)
        if found is not None and found.n_rows >= n_rows:
            return found
        started, timing = _now(), Timing()
        self._capture(shard, timing, on_rows)
        # First, because it refuses non-finite values: nothing of a bad shard is stored.
        moments = self._moments(shard, n_rows, timing)
        if found is not None:
            # A short shard that has grown takes the keys of its objects: no reader may see them beside the old record.
            uncommit(self.store, shard)
        stats = self._store_statistics(shard, moments, timing)
        objects = {name: self._store_array(array, shard, n_rows, timing) for name, array in self._arrays.items()}
        record = ShardRecord(
            dataset_id=self.header.spec.dataset_id,
            shard=shard,
            revision=0 if found is None else found.revision + 1,
            first_row=self.space.rows_of(shard).start,
            n_rows=n_rows,
            n_void=0,
            objects=objects,
            stats=stats,
            provenance=replace(
                self.made_by, attempt=uuid.uuid4().hex, started=started, finished=_now(), **vars(timing)
            ),
        )
        commit(self.store, record)
        return record

    def _capture(self, shard: int, timing: Timing, on_rows: Callable[[int], None]) -> None:
        rows, places = self.space.rows_of(shard), self.space.places(shard)
        chosen = self.index.sequences_of(rows)
        sequences = self.corpus.sequences(self.header.spec.split, chosen.start, chosen.stop)
        wanted = [self._rows_of_sequence(sequence, rows) for sequence in sequences]
        lengths = [len(sequence.tokens) for sequence in sequences]
        batches = plan_batches(lengths, self.header.spec.batch_tokens, self.corpus.spec.context_length)
        start = time.perf_counter()
        n_placed = 0
        for batch in batches:
            tokens_BT = _pad(batch, sequences)
            captured = self.forward(torch.from_numpy(tokens_BT).to(self.device))
            n_placed += self._place(batch, sequences, wanted, places, captured)
            timing.n_tokens += tokens_BT.size
            on_rows(sum(len(wanted[member][0]) for member in batch.members))
        timing.forward_s += time.perf_counter() - start
        if n_placed != len(rows):
            raise DataError(f"shard {shard}: the corpus gave {n_placed} rows, its row index promises {len(rows)}")

    def _rows_of_sequence(self, sequence: TokenSequence, rows: range) -> tuple[npt.NDArray[np.int64], int]:
        # Positions of the sequence's tokens that are rows of this shard, and where the first of them comes in it.
        positions = np.flatnonzero(self.header.spec.keep.mask(sequence.tokens))
        first = int(self.index.first_row[sequence.index])
        low, high = max(0, rows.start - first), max(0, rows.stop - first)
        return positions[low:high], max(first, rows.start) - rows.start

    def _place(
        self,
        batch: Batch,
        sequences: list[TokenSequence],
        wanted: list[tuple[npt.NDArray[np.int64], int]],
        places: npt.NDArray[np.int64],
        captured: Mapping[str, torch.Tensor],
    ) -> int:
        source, target = [], []
        for b, member in enumerate(batch.members):
            positions, first = wanted[member]
            place = places[first : first + len(positions)]
            source.append(b * batch.n_tokens + positions)
            target.append(place)
            self._memory["rows/token_id"][place] = sequences[member].tokens[positions]
            self._memory["rows/position"][place] = positions
            self._memory["rows/sequence"][place] = sequences[member].index
            self._memory["rows/role"][place] = sequences[member].roles[positions]
        source_N, target_N = np.concatenate(source), np.concatenate(target)
        for point in self.header.spec.hook_points:
            acts_BTD = captured[point.name]
            kept_ND = acts_BTD.reshape(-1, point.width)[torch.from_numpy(source_N).to(acts_BTD.device)]
            self._memory[point.name][target_N] = _bits(kept_ND.cpu())
        return len(target_N)

    def _store_array(self, array: ArraySpec, shard: int, n_rows: int, timing: Timing) -> ObjectRecord:
        start = time.perf_counter()
        rows = self._memory[array.name][:n_rows].view(array.numpy_dtype)
        encoded = encode_shard(array, rows, self._pool.map)
        timing.encode_s += (middle := time.perf_counter()) - start
        self.store.write(array.object_key(shard), *encoded.parts)
        timing.write_s += time.perf_counter() - middle
        return ObjectRecord(nbytes=encoded.nbytes, crc32c=encoded.crc32c, index_crc32c=encoded.index_crc32c)

    def _committed(self, shard: int) -> ShardRecord | None:
        try:
            record = read_record(self.store, shard)
        except NotFoundError:
            return None
        return record if record.dataset_id == self.header.spec.dataset_id else None

    def _moments(self, shard: int, n_rows: int, timing: Timing) -> dict[str, Moments]:
        start = time.perf_counter()
        moments = {}
        for point in self.header.spec.hook_points:
            rows = self._memory[point.name][:n_rows].view(self._arrays[point.name].numpy_dtype)
            moments[point.name] = of_shard(rows, self._pool.map)
            if not np.isfinite(moments[point.name].m2).all():
                n_bad = int((~np.isfinite(rows.astype(np.float32)).all(axis=1)).sum())
                raise DataError(f"shard {shard}, {point.name}: {n_bad} of {n_rows} rows hold non-finite values")
        timing.encode_s += time.perf_counter() - start
        return moments

    def _store_statistics(self, shard: int, moments: Mapping[str, Moments], timing: Timing) -> ObjectRecord:
        data, start = to_parquet(moments), time.perf_counter()
        self.store.write(stats_key(shard), data)
        timing.write_s += time.perf_counter() - start
        return ObjectRecord(nbytes=len(data), crc32c=crc32c(data))


def _allocate(array: ArraySpec, n_rows: int) -> npt.NDArray[Any]:
    # bfloat16 is kept as its bits: numpy moves uint16 faster than an extension type.
    dtype = np.dtype("<u2") if array.dtype == "bfloat16" else array.numpy_dtype
    return np.zeros(array.shape(n_rows), dtype=dtype)


def _bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _pad(batch: Batch, sequences: list[TokenSequence]) -> npt.NDArray[np.int64]:
    tokens_BT = np.zeros((len(batch.members), batch.n_tokens), dtype=np.int64)
    for b, member in enumerate(batch.members):
        tokens_BT[b, : len(sequences[member].tokens)] = sequences[member].tokens
    return tokens_BT


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
