"""The stream: batches of rows from all over the dataset, in a seeded order, resumable at any batch.

``shards.order`` has the order; this module runs it: the next window is decoded while the batches of the current one
are consumed.
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from actlake.shards.batch import Memory, Slot, TokenBatch
from actlake.shards.dataset import open as open_dataset
from actlake.shards.objects import ShardReader
from actlake.shards.order import I64, Snapshot, deal, epoch_order, units_per_window, window_bounds
from actlake.shards.prefetch import Workers, thread_count
from actlake.shards.window import Dealer, Window
from actlake.storage.errors import BadInputError, UncommittedShardError
from actlake.storage.sizes import parse_nbytes

#: Raised by one with every change that gives another order or another meaning to a saved state.
STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What decides a stream's batches, together with the snapshot; ``epochs`` None is endless."""

    points: tuple[str, ...]
    batch_size: int = 4096
    seed: int = 0
    epochs: int | None = 1
    drop_last: bool = True
    buffer_bytes: int | str = "1GiB"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise BadInputError(f"batch_size = {self.batch_size} must be > 0; 4096 is the default")
        if self.epochs is not None and self.epochs < 1:
            raise BadInputError(f"epochs = {self.epochs} must be > 0; None streams without an end")
        if not 0 <= self.seed < 2**64:
            raise BadInputError(f"seed = {self.seed} must be in 0..2**64-1")
        parse_nbytes(self.buffer_bytes, "buffer_bytes")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    # One window to be read: its units, the rows to leave out at its start, and whether the epoch ends with it.
    epoch: int
    units: I64
    skip: int
    ends: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class _Open:
    # The batch that a window has begun and the next one goes on filling: no slot, or one with its rows.
    slots: list[Slot] = field(default_factory=list)
    n_rows: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Flight:
    # A window whose tasks have begun.
    job: _Job
    window: Window
    tasks: "list[Future[None]]"


class ActivationStream:
    """Batches of a dataset's committed rows, each row once an epoch, in an order that depends on the seed alone.

    Iterable any number of times: ``iter()`` goes on from the current state, and into the next epoch after an end. One
    iterator at a time: an older one raises ``BadInputError``. Errors in threads surface in the consumer. Pickles as
    URL, options, settings and state. Not thread-safe; a fork continues on its own.
    """

    def __init__(self, reader: ShardReader, settings: StreamSettings) -> None:
        self._reader, self.settings = reader, settings
        self._epoch, self._row, self._turn = 0, 0, 0
        self._use(_snapshot(reader))

    @property
    def hook_points(self) -> tuple[str, ...]:
        return self.settings.points

    def __len__(self) -> int:
        """Batches from the beginning of one iteration to its end, all epochs of it; raise ``TypeError`` if endless."""
        if self.settings.epochs is None:
            raise TypeError("an endless stream (epochs=None) has no length")
        n_rows, size = self._snapshot.n_kept, self.settings.batch_size
        return self.settings.epochs * (n_rows // size if self.settings.drop_last else -(-n_rows // size))

    def __iter__(self) -> Iterator[TokenBatch]:
        self._turn += 1
        return self._iterate(self._turn)

    def __repr__(self) -> str:
        shown = self.settings.points if len(self.settings.points) < 5 else (*self.settings.points[:3], "...")
        return (
            f"ActivationStream({self._reader.store.url!r}: {', '.join(shown)}; {self._snapshot.n_kept:_} rows, "
            f"batches of {self.settings.batch_size}, seed {self.settings.seed}; at epoch {self._epoch}, "
            f"row {self._row:_})"
        )

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return what has been delivered, as a small dict of JSON values."""
        return self._identity() | {"snapshot": self._snapshot.to_json(), "epoch": self._epoch, "row": self._row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place of a saved state: all later batches are those that followed it.

        A dataset that has grown since is read as it was. Raises ``BadInputError`` that says what differs where the
        state is of another dataset, snapshot or settings.
        """
        here = self._identity()
        lines = [
            f"{name}: the state has {state.get(name)!r}, this stream {value!r}"
            for name, value in here.items()
            if state.get(name) != value
        ]
        if lines:
            listed = "\n  ".join(lines)
            raise BadInputError(
                f"the state is not of this stream:\n  {listed}\n"
                "open the same dataset with the same settings (buffer_bytes decides units_per_window)"
            )
        try:
            epoch, row, snapshot = int(state["epoch"]), int(state["row"]), dict(state["snapshot"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadInputError(f"the state is no stream state ({type(error).__name__}: {error})") from error
        self._use(_snapshot(self._reader).restrict(snapshot))
        self._epoch, self._row, self._turn = epoch, row, self._turn + 1

    def _identity(self) -> dict[str, Any]:
        spec, settings = self._reader.spec, self.settings
        # A bit for each stored hook point: with their names a state of 248 of them would not stay under 4 kB.
        chosen = sum(1 << place for place, name in enumerate(spec.point_names) if name in settings.points)
        return {
            "state_version": STATE_VERSION,
            "dataset_id": spec.dataset_id,
            "points": f"{len(settings.points)} of {len(spec.point_names)}: {chosen:x}",
            "batch_size": settings.batch_size,
            "seed": settings.seed,
            "endless": settings.epochs is None,
            "drop_last": settings.drop_last,
            "units_per_window": self._per_window,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        store = self._reader.store
        return _restore, (store.url, store.options, asdict(self.settings), self.state_dict())

    # --- iteration ---

    def _use(self, snapshot: Snapshot) -> None:
        settings = self.settings
        if not len(snapshot.shard):
            raise UncommittedShardError(
                f"{self._reader.store.url} has no committed shard yet; 'actlake ingest' with its job file builds them"
            )
        if not snapshot.n_kept:
            raise BadInputError(f"{self._reader.store.url}: every committed row is void, so there is nothing to stream")
        if settings.drop_last and settings.epochs is not None and snapshot.n_kept < settings.batch_size:
            raise BadInputError(
                f"{snapshot.n_kept} rows make no batch of {settings.batch_size}; "
                "use a smaller batch_size, or drop_last=False"
            )
        self._snapshot, self._dealer = snapshot, Dealer(self._reader, settings.points, snapshot)
        self._per_window = units_per_window(
            parse_nbytes(settings.buffer_bytes),
            self._dealer.nbytes_per_row,
            self._dealer.rows_per_unit,
            settings.batch_size,
        )

    def _iterate(self, turn: int) -> Iterator[TokenBatch]:
        epochs = self.settings.epochs
        end = None if epochs is None else (self._epoch // epochs + 1) * epochs
        run, pid = self._run(end), os.getpid()
        while True:
            if turn != self._turn:
                raise BadInputError("this iterator was replaced by a later iter() or load_state_dict(); use that one")
            if pid != os.getpid():
                # The threads stayed with the parent.
                run, pid = self._run(end), os.getpid()
            try:
                batch, self._epoch, self._row = next(run)
            except StopIteration:
                break
            yield batch
            # Not held while the next one is waited for.
            del batch
        if end is not None:
            self._epoch, self._row = end, 0

    def _run(self, end: int | None) -> Iterator[tuple[TokenBatch, int, int]]:
        # Yields each batch with the epoch and row that come after it.
        epoch, row = self._epoch, self._row
        with Workers(thread_count(self._reader.store.local)) as workers, closing(Memory()) as memory:
            self._dealer.find_voids(workers)
            jobs = self._jobs(end)
            flight = self._begin(next(jobs, None), _Open(), memory, workers)
            while flight is not None:
                for task in flight.tasks:
                    task.result()
                if end is not None and flight.job.epoch != epoch:
                    epoch, row = flight.job.epoch, 0
                ready, rest = self._split(flight, endless=end is None)
                done = flight.window
                flight = self._begin(next(jobs, None), rest, memory, workers)
                self._dealer.finish(done)
                # Delivered batches must not stay in memory through their window.
                del done
                while ready:
                    batch = self._to_batch(*ready.popleft())
                    row += len(batch)
                    while end is None and row >= self._snapshot.n_kept:
                        epoch, row = epoch + 1, row - self._snapshot.n_kept
                    yield batch, epoch, row
                    del batch

    def _split(self, flight: _Flight, endless: bool) -> tuple[deque[tuple[Slot, int]], _Open]:
        # The slots to deliver, each with its rows, and the one that the next window goes on filling.
        size = self.settings.batch_size
        slots = flight.window.slots
        n_full, n_open = divmod(flight.window.filled + flight.window.plan.n_rows, size)
        ready = deque((slot, size) for slot in slots[:n_full])
        if not n_open:
            return ready, _Open()
        if endless or not flight.job.ends:
            return ready, _Open(slots=[slots[n_full]], n_rows=n_open)
        if not self.settings.drop_last:
            ready.append((slots[n_full], n_open))
        return ready, _Open()

    def _to_batch(self, slot: Slot, n_rows: int) -> TokenBatch:
        return slot.to_batch(self.settings.points, n_rows)

    def _jobs(self, end: int | None) -> Iterator[_Job]:
        # The windows from the current state on.
        epoch, row = self._epoch, self._row
        size, per_unit = self.settings.batch_size, self._dealer.rows_per_unit
        while end is None or epoch < end:
            order = epoch_order(self.settings.seed, epoch, self._dealer.unit_ids)
            n_before = 0
            for start, stop in window_bounds(len(order), self._per_window, size, per_unit):
                units = order[start:stop]
                n_rows = int(self._dealer.kept_U[units].sum())
                if row < n_before + n_rows:
                    skip = max(0, row - n_before)
                    yield _Job(epoch=epoch, units=units, skip=skip, ends=stop == len(order))
                n_before += n_rows
            epoch, row = epoch + 1, 0

    def _begin(self, job: _Job | None, rest: _Open, memory: Memory, workers: Workers) -> _Flight | None:
        if job is None:
            return None
        size, arrays = self.settings.batch_size, self._dealer.arrays
        plan = deal(self._dealer.kept_U[job.units], size, filled=rest.n_rows, skip=job.skip)
        n_new = -(-(rest.n_rows + plan.n_rows) // size) - len(rest.slots)
        slots = rest.slots + [Slot(arrays, size, memory) for _ in range(n_new)]
        window = self._dealer.begin(job.units, plan, slots, rest.n_rows)
        return _Flight(job=job, window=window, tasks=self._dealer.start(window, workers))


def _snapshot(reader: ShardReader) -> Snapshot:
    table = reader.manifest.table
    shard, n_rows, n_void = (table[name].to_numpy() for name in ("shard", "n_rows", "n_void"))
    return Snapshot(shard=shard, n_rows=n_rows, n_void=n_void)


def _restore(
    url: str, options: Mapping[str, Any], settings: Mapping[str, Any], state: Mapping[str, Any]
) -> ActivationStream:
    stream = ActivationStream(open_dataset(url, options).reader, StreamSettings(**settings))
    stream.load_state_dict(state)
    return stream
