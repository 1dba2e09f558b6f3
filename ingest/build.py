"""Builds one shard: sequences to batches, forward passes, rows to their places, encoded objects, commit.

A plain class that knows neither Ray nor the command line. A shard is built from the spec, the corpus and the model
alone, so any worker may build it, in any order, any number of times; objects have determined names and the commit
record comes last.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from actlake.ingest.batching import Batch, plan_batches
from actlake.storage.arrays import ArraySpec, crc32c, encode_shard
from actlake.storage.corpus import Corpus
from actlake.storage.errors import DataError, NotFoundError, SpecMismatchError
from actlake.storage.header import Header
from actlake.storage.manifest import uncommit
from actlake.storage.moments import Moments, of_shard, to_parquet
from actlake.storage.records import ObjectRecord, Provenance, ShardRecord, commit, read_record, stats_key
from actlake.storage.rowspace import ROLE_VOID
from actlake.storage.shard_rows import ShardRows
from actlake.storage.spec import DatasetSpec
from actlake.storage.stores import Store

# Shapes: B sequences of a batch, T tokens, D width, N rows of a shard.


class ForwardPass(Protocol):
    """Runs the model: int64 [B, T] to ``{hook point: [B, T, D]}``; deterministic for one shape on one device.

    With ``position_ids``, int64 [B, T], each position 0 begins a sequence that sees no other one in its row.
    """

    def __call__(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, /
    ) -> Mapping[str, torch.Tensor]: ...


@dataclass
class Timing:
    """Seconds spent, and padded tokens run, for one shard."""

    forward_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    n_tokens: int = 0


class ShardBuilder:
    """Builds and commits shards of one split of one dataset.

    Holds the host memory of one shard, which it uses again for the next. Not thread-safe: one per worker. A row with a
    value that is not finite fails its shard; with ``void_nonfinite`` it becomes a void row, at all hook points.
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
        void_nonfinite: bool = False,
    ) -> None:
        self.header = Header.read(store)
        if corpus.corpus_id != self.header.spec.corpus_id:
            raise SpecMismatchError(
                f"{store.url} is made from corpus {self.header.spec.corpus_id[:12]}..., {corpus.store.url} is "
                f"{corpus.corpus_id[:12]}...; its sources have changed: choose another 'dataset' and 'corpus.url'"
            )
        self.store, self.corpus, self.forward, self.device = store, corpus, forward, device
        self.made_by, self.void_nonfinite = made_by or Provenance(), void_nonfinite
        self.space = self.header.spec.row_space(self.header.n_rows)
        self.index = corpus.row_index(self.header.spec.split, self.header.spec.keep)
        self._arrays = self.header.spec.arrays()
        largest = min(self.space.rows_per_shard, self.space.n_rows)
        self._memory = {name: _allocate(array, largest) for name, array in self._arrays.items()}
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="actlake-encode")

    def build(self, shard: int, on_rows: Callable[[int], None] = lambda n_rows: None) -> ShardRecord:
        """Build, store and commit a shard; return its record, or the one that another worker committed before.

        ``on_rows`` hears of rows as they are captured. Raises ``DataError`` for non-finite activations, unless they
        are to become void rows.
        """
        n_rows, found = len(self.space.rows_of(shard)), self._committed(shard)
        if found is not None and found.n_rows >= n_rows:
            return found
        started, timing = _now(), Timing()
        self._capture(shard, timing, on_rows)
        # First, because it refuses non-finite values: nothing of a bad shard is stored.
        moments, n_void = self._moments(shard, n_rows, timing)
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
            n_void=n_void,
            objects=objects,
            stats=stats,
            provenance=replace(
                self.made_by, attempt=uuid.uuid4().hex, started=started, finished=_now(), **vars(timing)
            ),
        )
        commit(self.store, record)
        return record

    def _capture(self, shard: int, timing: Timing, on_rows: Callable[[int], None]) -> None:
        rows = ShardRows.of(self.corpus, self.index, self.header.spec, self.space, shard)
        for name, column in rows.columns().items():
            self._memory[f"rows/{name}"][: len(column)] = column
        start = time.perf_counter()
        for batch in batches_of(rows, self.header.spec, self.corpus):
            acts = run_batch(self.forward, batch, rows, self.device)
            source_N, target_N = gathered(batch, rows)
            for point in self.header.spec.hook_points:
                self._memory[point.name][target_N] = take(acts[point.name], source_N)
            timing.n_tokens += batch.n_run
            on_rows(len(target_N))
        for name in self.header.spec.point_names:
            self._memory[name][rows.void] = 0
        timing.forward_s += time.perf_counter() - start

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

    def _moments(self, shard: int, n_rows: int, timing: Timing) -> tuple[dict[str, Moments], int]:
        start, kept = time.perf_counter(), self._kept(n_rows)
        moments = {point: self._moments_of(point, shard, kept) for point in self.header.spec.point_names}
        if bad := {point: found.n_nonfinite for point, found in moments.items() if found.n_nonfinite}:
            if not self.void_nonfinite:
                point, n_bad = next(iter(bad.items()))
                raise DataError(
                    f"shard {shard}, {point}: {n_bad} of {n_rows} rows hold non-finite values, so do "
                    f"{len(bad) - 1} other hook points; capture.void_nonfinite = true makes them void rows"
                )
            self._void(bad, n_rows)
            kept = self._kept(n_rows)
            # The number of bad rows at each hook point stays known, though zeros are stored.
            moments = {
                point: replace(self._moments_of(point, shard, kept), n_nonfinite=found.n_nonfinite)
                for point, found in moments.items()
            }
        timing.encode_s += time.perf_counter() - start
        return moments, n_rows - len(kept)

    def _kept(self, n_rows: int) -> npt.NDArray[np.int64]:
        """Return the places of the rows that are not void."""
        return np.flatnonzero(self._memory["rows/role"][:n_rows] != ROLE_VOID)

    def _moments_of(self, point: str, shard: int, kept: npt.NDArray[np.int64]) -> Moments:
        first, rows = self.space.rows_of(shard).start, self._memory[point].view(self._arrays[point].numpy_dtype)
        whole = rows[: len(kept)] if len(kept) and kept[-1] == len(kept) - 1 else rows[kept]
        return of_shard(whole, self._pool.map, first + kept)

    def _void(self, points: Iterable[str], n_rows: int) -> None:
        """Make void the rows that are not finite at one of these hook points."""
        finite = np.ones(n_rows, dtype=np.bool_)
        for point in points:
            rows = self._memory[point][:n_rows].view(self._arrays[point].numpy_dtype)
            finite &= np.isfinite(rows.astype(np.float32)).all(axis=1)
        for point in self.header.spec.point_names:
            self._memory[point][:n_rows][~finite] = 0
        self._memory["rows/role"][:n_rows][~finite] = ROLE_VOID

    def _store_statistics(self, shard: int, moments: Mapping[str, Moments], timing: Timing) -> ObjectRecord:
        data, start = to_parquet(moments), time.perf_counter()
        self.store.write(stats_key(shard), data)
        timing.write_s += time.perf_counter() - start
        return ObjectRecord(nbytes=len(data), crc32c=crc32c(data))


def _allocate(array: ArraySpec, n_rows: int) -> npt.NDArray[Any]:
    # bfloat16 is kept as its bits: numpy moves uint16 faster than an extension type.
    dtype = np.dtype("<u2") if array.dtype == "bfloat16" else array.numpy_dtype
    return np.zeros(array.shape(n_rows), dtype=dtype)


def batches_of(rows: ShardRows, spec: DatasetSpec, corpus: Corpus) -> list[Batch]:
    """Return the batches that the sequences with rows in a shard run in; members are places in ``rows.sequences``."""
    owners = [number for number, places in enumerate(rows.places) if len(places)]
    lengths = [len(rows.sequences[number].tokens) for number in owners]
    batches = plan_batches(lengths, spec.batch_tokens, corpus.spec.context_length, spec.batching)
    return [replace(batch, rows=tuple(tuple(owners[i] for i in row) for row in batch.rows)) for batch in batches]


def run_batch(forward: ForwardPass, batch: Batch, rows: ShardRows, device: str) -> Mapping[str, torch.Tensor]:
    """Run one batch, padded on the right with id 0; return what ``forward`` does."""
    tokens_BT = np.zeros((len(batch.rows), batch.n_tokens), dtype=np.int64)
    positions_BT = np.zeros_like(tokens_BT)
    for b, start, member in _laid_out(batch, rows):
        tokens = rows.sequences[member].tokens
        # What was taken out of a redacted sequence runs as padding does; its rows are void.
        tokens_BT[b, start : start + len(tokens)] = np.maximum(tokens, 0)
        # Padding goes on with the last sequence of its row, which it follows and therefore cannot change.
        positions_BT[b, start:] = np.arange(batch.n_tokens - start)
    token_ids = torch.from_numpy(tokens_BT).to(device)
    if not batch.is_packed:
        # Without positions the model needs no mask, or one for all rows.
        return forward(token_ids)
    return forward(token_ids, torch.from_numpy(positions_BT).to(device))


def gathered(batch: Batch, rows: ShardRows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return int64 [N] twice: where in a batch's B x T tokens its rows are, and where in the shard they are stored."""
    source = [b * batch.n_tokens + start + rows.positions[member] for b, start, member in _laid_out(batch, rows)]
    return np.concatenate(source), np.concatenate([rows.places[member] for member in batch.members])


def _laid_out(batch: Batch, rows: ShardRows) -> Iterator[tuple[int, int, int]]:
    """Yield the row in the batch, the place of the first token in that row, and the number of each sequence."""
    for b, row in enumerate(batch.rows):
        start = 0
        for member in row:
            yield b, start, member
            start += len(rows.sequences[member].tokens)


def take(acts_BTD: torch.Tensor, source_N: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Return the rows [N, D] of a batch's activations in host memory; of bfloat16 their bits."""
    kept_ND = acts_BTD.reshape(-1, acts_BTD.shape[-1])[torch.from_numpy(source_N).to(acts_BTD.device)].cpu()
    return kept_ND.view(torch.uint16).numpy() if kept_ND.dtype == torch.bfloat16 else kept_ND.numpy()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
