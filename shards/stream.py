"""The stream: batches of rows from all over a dataset, in a seeded order, resumable at any batch.

``shards.order`` has the order of rows, ``shards.course`` who delivers which; this module runs them: the next windows
are decoded while the batches of the current one are consumed.
"""

import os
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from actlake.shards import adapters
from actlake.shards import state as states
from actlake.shards.ahead import begun_ahead
from actlake.shards.batch import TokenBatch, to_tensor
from actlake.shards.counters import Counters
from actlake.shards.course import Course, Position, Share, split
from actlake.shards.dealing import can_deal
from actlake.shards.flights import Delivery, Dispatcher
from actlake.shards.follow import Waves
from actlake.shards.memory import Memory
from actlake.shards.normalizer import Normalizer
from actlake.shards.order import units_per_window
from actlake.shards.origin import Origin
from actlake.shards.prefetch import Workers, thread_count
from actlake.shards.segments import Epochs, InSequence, Segments
from actlake.shards.sequences import Sequences
from actlake.shards.settings import StreamSettings
from actlake.shards.source import Source
from actlake.shards.window import Dealer
from actlake.storage.errors import BadInputError, UncommittedShardError


class ActivationStream(IterableDataset[TokenBatch]):
    """Batches of a dataset's committed rows, each row once an epoch, in an order that depends on the seed alone.

    Iterable any number of times: ``iter()`` goes on from the current state, and into the next epoch after an end. One
    iterator at a time: an older one raises ``BadInputError``. Errors in threads surface in the consumer. Pickles as
    URL, options, settings and state. Not thread-safe; a fork continues on its own. In a process of a ``DataLoader`` it
    delivers that process's part of the rank's batches.
    """

    def __init__(self, origin: Origin, settings: StreamSettings) -> None:
        self._origin, self.settings = origin, settings
        self._source = origin.source(settings.points)
        self._reached, self._worker, self._turn = (Position(), 0), Share(), 0
        self._counters = Counters()
        self._segments = self._segments_of(self._source, None)
        self._labels = {field: origin.labels(field) for field in settings.columns}
        self._check_rows()

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Inputs and targets, each once."""
        return self.settings.points

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.settings.inputs

    @property
    def targets(self) -> tuple[str, ...]:
        return self.settings.targets

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each hook point."""
        return {name: array.width or 1 for name, array in self._source.arrays.items()}

    def __len__(self) -> int:
        """Batches of this rank from the beginning of one iteration to its end.

        Raises ``TypeError`` where that is not known: for an endless, a filtered or a followed stream.
        """
        settings = self.settings
        for unknown, why in (
            (settings.endless, "an endless stream (epochs=None)"),
            (self._source.filter is not None, "a filtered stream"),
            (settings.follow, "a stream that follows ingestion"),
        ):
            if unknown:
                raise TypeError(f"{why} has no length")
        course = self._course(settings.share, Share())
        found = (position for position in course.walk(Position()) if position is not None)
        return sum(len(position.pieces[0]) for position in found)

    def __iter__(self) -> Iterator[TokenBatch]:
        self._turn += 1
        return self._iterate(self._turn)

    def __repr__(self) -> str:
        points = self.settings.points
        shown = points if len(points) < 5 else (*points[:3], "...")
        rank = f", rank {self.settings.rank} of {self.settings.world_size}" if self.settings.world_size > 1 else ""
        return (
            f"ActivationStream({self._origin.url!r}: {', '.join(shown)}; batches of {self.settings.batch_size}, "
            f"seed {self.settings.seed}{rank}; {self._counters.n_batches:_} delivered)"
        )

    def _repr_html_(self) -> str:
        from actlake.shards.repr_html import stream_html

        return stream_html(self)

    def stats(self) -> dict[str, Any]:
        """Return what was delivered since the stream was made, and where the time went.

        Rows, batches, uncompressed bytes and GB/s; ``wait_s``, the seconds in which the consumer waited; ``decode_s``
        (read, checked, decoded) and ``gather_s``, summed over threads, both in the first where chunks are dealt by
        ``compiled`` code; rows left out at the ends of epochs, over all ranks (``n_dropped_rows``); what damage cost,
        where ``on_damage="skip"``.
        """
        compiled = any(can_deal(array) for array in self._source.arrays.values())
        return self._counters.to_json() | {"n_dropped_rows": self._position.dropped, "compiled": compiled}

    @cached_property
    def normalizer(self) -> Normalizer | None:
        """What ``normalize`` applies to every batch: by the statistics of the snapshot that is streamed."""
        if self.settings.normalize is None:
            return None
        shards = self._segments.scale_shards()
        origin = self._segments.origin if isinstance(self._segments, Waves) else self._origin
        moments = {name: origin.moments(name, shards) for name in self.settings.points}
        return Normalizer.of(moments, self.settings.normalize, self.settings.inputs, self.settings.targets)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        if self.settings.dtype is not None:
            return self.settings.dtype
        stored: torch.dtype = getattr(torch, self._source.spec.dtype)
        return stored if self.settings.normalize is None else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the tensors go."""
        return torch.device(self.settings.device)

    # --- the same batches, as each trainer calls them ---

    def tensors(self) -> adapters.Tensors:
        """Batches as one tensor [B, D], of a stream of one hook point."""
        return adapters.Tensors(self)

    def dicts(self) -> adapters.Dicts:
        """Batches as hook point to [B, D]."""
        return adapters.Dicts(self)

    def pairs(self) -> adapters.Pairs:
        """Batches as [B, 2, D]: one input and one target of a transcoder."""
        return adapters.Pairs(self)

    def stack(self) -> adapters.Stack:
        """Batches as [B, N, D]: every hook point, for a crosscoder."""
        return adapters.Stack(self)

    def layers(self, *, renumber: bool = False) -> adapters.Layers:
        """Batches as (inputs, targets), each layer to [B, D], with what crosslayer-coding reads of a store."""
        return adapters.Layers(self, renumber=renumber)

    def clt_stack(self) -> adapters.CltStack:
        """Batches as [B, 2, L, D]: inputs and targets of every layer, for a cross-layer transcoder."""
        return adapters.CltStack(self)

    def openmoss(self) -> adapters.OpenMoss:
        """Batches as hook point to [B, D], with ``tokens`` and ``mask``."""
        return adapters.OpenMoss(self)

    def sequences(self, *, n_sequences: int = 16, n_tokens: int | None = None) -> Sequences:
        """Batches as whole sequences in order, hook point to [S, T, D] padded; of a stream of order="sequence".

        Nothing is left out: where this stream drops its last rows, the sequences come from one that does not.
        """
        settings = self.settings
        whole = ActivationStream(self._origin, replace(settings, drop_last=False)) if settings.drop_last else self
        return Sequences(whole, n_sequences=n_sequences, n_tokens=n_tokens)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank has delivered, as a small dict of JSON values."""
        identity = states.identity(self._source, self.settings, self._segments.describe())
        return states.save(identity, self.settings.share, self._worker, self._position)

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go to the place of a saved state: all later batches are those that followed it.

        Give a list with the states of all ranks, saved after the same step, to go on with another number of ranks: what
        is left is dealt to them anew. A dataset that has grown since is read as it was. Raises ``BadInputError`` that
        says what differs where the state is of another dataset, snapshot, rank or settings.
        """
        found = [state] if isinstance(state, Mapping) else list(state)
        snapshot, source = states.snapshot_of(found), self._source
        if source.filter is not None:
            source = replace(source, filter=source.filter.restored(found[0]["of"].get("filter")))
        # Another dataset or setting is named before a snapshot that it does not have.
        states.check(found, states.identity(source, self.settings, {}))
        segments = self._segments_of(source, snapshot)
        states.check(found, states.identity(source, self.settings, segments.describe()))
        self._segments, self._source = segments, source
        self.__dict__.pop("normalizer", None)
        position, worker = states.load(found, self.settings.share, self._course)
        self._position, self._worker, self._turn = position, worker, self._turn + 1

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._origin, self.settings, self.state_dict())

    # --- iteration ---

    @property
    def _position(self) -> Position:
        # Reckoned where it is asked for: for every batch it would take a tenth of the consumer's time.
        start, n_delivered = self._reached
        return start.delivered(n_delivered) if n_delivered else start

    @_position.setter
    def _position(self, position: Position) -> None:
        self._reached = position, 0

    def _segments_of(self, source: Source, snapshot: Mapping[str, Any] | None) -> Segments:
        # Of the stream's dataset as it is now, or as it was when a state was saved.
        settings = self.settings
        if settings.follow:
            return Waves(self._origin, settings, self._counters)
        now = source.snapshot()
        chosen = now if snapshot is None else now.restrict(snapshot)
        if not len(chosen.shard):
            raise UncommittedShardError(
                f"{self._origin.url} has no committed shard yet; 'actlake ingest' with its job file builds them"
            )
        dealer = Dealer(source, chosen, self._counters, skip_damaged=settings.on_damage == "skip")
        nbytes = settings.buffer_nbytes
        if settings.order == "sequence":
            return InSequence(dealer, settings.batch_size, nbytes)
        per_window = units_per_window(nbytes, source.nbytes_per_row, dealer.rows_per_unit, settings.batch_size)
        return Epochs(dealer, settings.seed, settings.batch_size, per_window)

    def _check_rows(self) -> None:
        # What can be known before anything but a filter's columns is read.
        settings = self.settings
        if settings.follow:
            return
        n_rows = self._segments.rows_of(0) or 0
        if not n_rows:
            why = "the filter leaves no row" if self._source.filter is not None else "every committed row is void"
            raise BadInputError(f"{self._origin.url}: {why}, so there is nothing to stream")
        group = settings.batch_size * settings.world_size
        if settings.rows is not None and settings.rows > n_rows:
            warnings.warn(
                f"rows = {settings.rows} is more than the {n_rows} rows of {self._origin.url}: rows repeat",
                UserWarning,
                stacklevel=4,
            )
        if settings.drop_last and settings.rows is None and settings.epochs is not None and n_rows < group:
            raise BadInputError(
                f"{n_rows} rows make no batch of {settings.batch_size} on each of {settings.world_size} ranks; "
                "use a smaller batch_size, or drop_last=False"
            )

    def _course(self, rank: Share, worker: Share) -> Course:
        settings, segments = self.settings, self._segments
        waves = segments.n_waves if isinstance(segments, Waves) else None
        return Course(
            rows_of=segments.rows_of,
            batch_size=settings.batch_size,
            n_segments=waves if settings.rows is None and waves is not None else self._n_epochs,
            carry=settings.endless or settings.rows is not None or waves is not None,
            drop_last=settings.drop_last,
            budget=settings.rows,
            rank=rank,
            worker=worker,
        )

    @property
    def _n_epochs(self) -> int | None:
        return None if self.settings.rows is not None else self.settings.epochs

    def _iterate(self, turn: int) -> Iterator[TokenBatch]:
        run, pid = self._run(), os.getpid()
        while True:
            if turn != self._turn:
                raise BadInputError("this iterator was replaced by a later iter() or load_state_dict(); use that one")
            if pid != os.getpid():
                # The threads stayed with the parent.
                run, pid = self._run(), os.getpid()
            begun = time.perf_counter()
            try:
                batch, reached = next(run)
            except StopIteration:
                break
            finally:
                self._counters.wall_s += time.perf_counter() - begun
            self._reached = reached
            yield batch
            # Not held while the next one is waited for.
            del batch
        course, position = self._begin()
        self._position = course.finished(position)

    def _begin(self) -> tuple[Course, Position]:
        # This process's course, and where it is on it.
        info = get_worker_info()
        here = Share() if info is None else Share(index=info.id, count=info.num_workers)
        if self._worker == Share() and here != Share():
            self._position, self._worker = split(self._position, here), here
        if self._worker != here:
            raise BadInputError(
                f"the state is of loader process {self._worker.index} of {self._worker.count}, and this is "
                f"{here.index} of {here.count}; use as many num_workers as it was saved with"
            )
        return self._course(self.settings.share, here), self._position

    def _run(self) -> Iterator[tuple[TokenBatch, tuple[Position, int]]]:
        # Yields each batch with what is reached by it: a position, and the batches of it that are delivered.
        settings = self.settings
        course, position = self._begin()
        n_threads = settings.read_ahead or thread_count(self._source.local)
        with Workers(n_threads) as workers, closing(Memory(self._source.arrays, settings.batch_size)) as memory:
            flights = Dispatcher(self._segments, course, memory, workers).flights(position)
            for flight in begun_ahead(flights, n_threads, self._counters):
                with self._counters.waiting():
                    for task in flight.tasks:
                        task.result()
                deliveries = deque(flight.deliveries)
                # Delivered batches must not stay in memory through their window.
                del flight
                while deliveries:
                    reached = deliveries[0].reached
                    batch = self._to_batch(deliveries.popleft(), memory)
                    if len(batch):
                        yield batch, reached
                    del batch

    def _to_batch(self, delivery: Delivery, memory: Memory) -> TokenBatch:
        settings, keep = self.settings, delivery.undamaged()
        if delivery.n_rows == settings.batch_size and keep is None:
            rows = memory.lend(delivery.slot)
        else:
            chosen = slice(delivery.n_rows) if keep is None else np.flatnonzero(keep)
            rows = {name: delivery.slot.rows(name)[chosen].copy() for name in self._source.arrays}
            memory.give_back(delivery.slot)
        tensors = {name: self._placed(name, to_tensor(found)) for name, found in rows.items()}
        n_rows = len(next(iter(rows.values())))
        self._counters.deliver(n_rows, delivery.n_rows, self._source.nbytes_per_row)
        return TokenBatch(tensors, delivery.columns(keep), self._labels)

    def _placed(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        settings = self.settings
        if settings.pin_memory and torch.accelerator.is_available():
            rows = rows.pin_memory()
        if settings.device != "cpu":
            rows = rows.to(settings.device, non_blocking=settings.pin_memory)
        if self.normalizer is not None:
            rows = self.normalizer.apply(rows, name)
        return rows if settings.dtype is None else rows.to(settings.dtype)


def _restore(origin: Origin, settings: StreamSettings, state: Mapping[str, Any]) -> ActivationStream:
    stream = ActivationStream(origin, settings)
    stream.load_state_dict(state)
    return stream
