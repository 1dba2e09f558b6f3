"""Builds one shard: sequences to batches, forward passes, rows to their places, encoded objects, commit.

A plain class that knows neither Ray nor the command line. A shard is built from the spec, the corpus and the model
alone, so any worker may build it, in any order, any number of times; objects have determined names and the commit
record comes last.
"""

import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.ingest.batch_feed import ForwardPass, LaidBatch, ahead, batches_of
from actlake.ingest.passes import plan_passes
from actlake.ingest.shard_memory import carve, nbytes_of
from actlake.ingest.storing import Memory, Statistics, Timing, store_arrays, store_statistics
from actlake.ingest.workshop import Workshop
from actlake.storage.arrays import ArraySpec
from actlake.storage.corpus import Corpus
from actlake.storage.errors import NotFoundError, SpecMismatchError
from actlake.storage.header import Header
from actlake.storage.manifest import uncommit
from actlake.storage.records import ObjectRecord, Provenance, ShardRecord, commit, read_record
from actlake.storage.rowspace import ROLE_VOID
from actlake.storage.shard_rows import ShardRows
from actlake.storage.stores import Store

#: Hears of rows that are captured, and of the seconds of their forward pass.
OnRows = Callable[[int, float], None]


def _unheard(n_rows: int, forward_s: float) -> None:
    pass


class ShardBuilder:
    """Builds and commits shards of one split of one dataset.

    Thread-safe: one thread runs batches, while others encode and store what they have captured. As many shards are in
    the making as ``workshop`` has memory for, by default two; the builders of both splits share one.

    ``narrow`` gives the forward pass of some hook points alone; without it, all passes run ``forward`` whole.
    ``shard_memory`` are the bytes that a shard may take: where its hook points want more, they are captured in passes.
    A row with a value that is not finite fails its shard; with ``void_nonfinite`` it becomes a void row, at all hook
    points.
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
        shard_memory: int | None = None,
        narrow: Callable[[Sequence[str]], ForwardPass] | None = None,
        workshop: Workshop | None = None,
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
        self.workshop = workshop or Workshop(n_threads)
        with self.workshop.corpus:
            self.index = corpus.row_index(self.header.spec.split, self.header.spec.keep)
        self._arrays = self.header.spec.arrays()
        self._largest = min(self.space.rows_per_shard, self.space.n_rows)
        self.passes = plan_passes(self.header.spec, self._largest, shard_memory)
        self._forwards = {
            points: narrow(points) if narrow is not None and len(self.passes) > 1 else forward for points in self.passes
        }
        self._nbytes = max(nbytes_of(self._of(points), self._largest + 1) for points in self.passes)

    def build(self, shard: int, on_rows: OnRows = _unheard) -> ShardRecord:
        """Build, store and commit a shard; return its record, or the one that another worker committed before.

        ``on_rows`` hears of rows as they are captured, in another thread. Raises ``DataError`` for non-finite
        activations, unless they are to become void rows.
        """
        n_rows, found = len(self.space.rows_of(shard)), self._committed(shard)
        if found is not None and found.n_rows >= n_rows:
            return found
        with self.workshop.memory.lease(self._nbytes) as arena:
            return _Attempt(self, shard, found, arena, on_rows).make()

    def _of(self, points: Sequence[str]) -> list[ArraySpec]:
        return [self._arrays[point] for point in points]

    def _committed(self, shard: int) -> ShardRecord | None:
        try:
            record = read_record(self.store, shard)
        except NotFoundError:
            return None
        return record if record.dataset_id == self.header.spec.dataset_id else None


class _Attempt:
    """One attempt at one shard."""

    def __init__(
        self,
        builder: ShardBuilder,
        shard: int,
        found: ShardRecord | None,
        arena: npt.NDArray[np.uint8],
        on_rows: OnRows,
    ) -> None:
        self._builder, self._shard, self._found, self._arena = builder, shard, found, arena
        self._on_rows, self._started, self._timing = on_rows, _now(), Timing()
        self._n_landed = self._n_heard = 0
        self._spec, self._space = builder.header.spec, builder.space
        with builder.workshop.corpus:
            self._rows = ShardRows.of(builder.corpus, builder.index, self._spec, self._space, shard)
        self._batches = batches_of(self._rows, self._spec, builder.corpus)
        self._columns = {f"rows/{name}": column for name, column in self._rows.columns().items()}
        self._n_rows = len(self._space.rows_of(shard))
        self._statistics = Statistics(
            shard,
            self._space.rows_of(shard).start,
            self._columns["rows/role"] == ROLE_VOID,
            builder._arrays,
        )

    def make(self) -> ShardRecord:
        """Capture and store all hook points, then the row columns and statistics, then commit.

        The commit is looked for again before the first object is written: forward passes take long.
        """
        objects: dict[str, ObjectRecord] = {}
        waiting, stored = deque(self._builder.passes), list[tuple[str, ...]]()
        while waiting:
            points = waiting.popleft()
            memory = self._capture(points)
            # First, because it refuses non-finite values: nothing of a bad pass is stored.
            if self._measure(memory):
                # What is stored of other passes holds values where rows are void now.
                waiting.extend(stored)
                stored.clear()
            if not objects and (newer := self._clear_the_way()) is not None:
                return newer
            objects |= self._store(memory)
            stored.append(points)
        self._columns["rows/role"][self._statistics.void] = ROLE_VOID
        objects |= self._store(self._columns)
        stats = store_statistics(
            self._builder.store, self._shard, self._statistics.to_parquet(self._spec.point_names), self._timing
        )
        return self._commit(objects, stats)

    def _clear_the_way(self) -> ShardRecord | None:
        """Return the record that another attempt has committed meanwhile; without one un-commit the shorter shard."""
        now = self._builder._committed(self._shard)
        if now is not None and now.n_rows >= self._n_rows:
            # A late attempt must not take back a shard that its run may have reported as whole.
            return now
        self._found = now or self._found
        if self._found is not None:
            # A shard that has grown takes the keys of its objects: no reader may see them beside the old record.
            uncommit(self._builder.store, self._shard)
        return None

    def _capture(self, points: Sequence[str]) -> Memory:
        """Run all batches as far as the deepest of some hook points; return their rows, each in its place."""
        builder, shop = self._builder, self._builder.workshop
        # A row more than there are: whatever runs and is no row of the shard goes there.
        memory = carve(self._arena, builder._of(points), self._n_rows + 1)
        laid = ahead(lambda batch: LaidBatch.of(batch, self._rows), self._batches, shop.feeders)
        forward = builder._forwards[tuple(points)]
        landing: list[Future[None]] = []
        try:
            with shop.model:
                for batch in laid:
                    start = time.perf_counter()
                    # Nothing here keeps the tensors: on a GPU their memory is wanted for the next batch.
                    sent = shop.lander.send(batch.run(forward, builder.device), batch, memory, start, self._hear)
                    landing.append(sent)
                    self._timing.n_tokens += batch.n_run
                    # Sending has waited for the one before.
                    for landed in landing[:-1]:
                        landed.result()
                    del landing[:-1]
            # The model is free for the next shard while the last batch lands.
            for landed in landing:
                landed.result()
        finally:
            wait(landing)
        return {name: rows_RD[:-1] for name, rows_RD in memory.items()}

    def _hear(self, n_rows: int, forward_s: float) -> None:
        self._timing.forward_s += forward_s
        # Each pass is a part of every row, so that the rows of a shard are heard of once.
        self._n_landed += n_rows
        n_whole = min(self._n_rows, self._n_landed // len(self._builder.passes))
        self._on_rows(n_whole - self._n_heard, forward_s)
        self._n_heard = n_whole

    def _measure(self, memory: Memory) -> bool:
        start = time.perf_counter()
        found = self._statistics.measure(memory, self._builder.workshop, void_nonfinite=self._builder.void_nonfinite)
        self._timing.encode_s += time.perf_counter() - start
        return found

    def _store(self, memory: Mapping[str, npt.NDArray[Any]]) -> dict[str, ObjectRecord]:
        builder = self._builder
        return store_arrays(
            builder.store, self._shard, builder._of(list(memory)), memory, builder.workshop, self._timing
        )

    def _commit(self, objects: Mapping[str, ObjectRecord], stats: ObjectRecord) -> ShardRecord:
        record = ShardRecord(
            dataset_id=self._spec.dataset_id,
            shard=self._shard,
            revision=0 if self._found is None else self._found.revision + 1,
            first_row=self._space.rows_of(self._shard).start,
            n_rows=self._n_rows,
            n_void=int(self._statistics.void.sum()),
            objects={name: objects[name] for name in self._spec.arrays()},
            stats=stats,
            provenance=replace(
                self._builder.made_by,
                attempt=uuid.uuid4().hex,
                started=self._started,
                finished=_now(),
                **vars(self._timing),
            ),
        )
        commit(self._builder.store, record)
        return record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
