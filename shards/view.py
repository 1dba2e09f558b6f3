"""A dataset less the rows that nobody asked for: ``ds.where(...)``, with the dataset's own interface."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from actlake.shards.align import AlignedDatasets
from actlake.shards.dataset import ActivationDataset, Points, require_torch
from actlake.shards.point_view import RowKey
from actlake.shards.prefetch import Workers, thread_count
from actlake.shards.select import RowFilter, where
from actlake.shards.source import Source
from actlake.storage.errors import BadInputError
from actlake.storage.moments import Moments

if TYPE_CHECKING:
    from actlake.shards.batch import TokenBatch
    from actlake.shards.lookup import RowContext, SequenceRows
    from actlake.shards.normalizer import Normalizer
    from actlake.shards.stream import ActivationStream


@dataclass(frozen=True)
class AllOf:
    """The rows that every filter chooses."""

    filters: tuple[RowFilter, ...]

    def mask(self, shard: int, start: int, n_rows: int) -> npt.NDArray[np.bool_]:
        """Return bool [n_rows]: which of a shard's stored rows are chosen."""
        mask = np.ones(n_rows, dtype=np.bool_)
        for each in self.filters:
            mask &= each.mask(shard, start, n_rows)
        return mask

    def describe(self) -> list[dict[str, Any]]:
        """Return the filters as JSON values."""
        return [each.describe() for each in self.filters]

    def restored(self, description: Any) -> Self:
        """Return these filters as they were when a state was saved; raise ``BadInputError`` for others."""
        described = description if isinstance(description, list) and len(description) == len(self.filters) else [{}]
        return replace(self, filters=tuple(f.restored(d) for f, d in zip(self.filters, described, strict=False)))


class View:
    """The rows of a dataset, or of aligned ones, that fulfil some conditions. Batches stay full. Pickles.

    Making a stream reads what the conditions ask about once for all rows: a few row columns, 17 bytes a row, and for a
    norm the activations of that hook point.
    """

    def __init__(self, origin: ActivationDataset | AlignedDatasets, filters: Sequence[tuple[str, RowFilter]]) -> None:
        self.origin, self._filters = origin, tuple(filters)

    def where(self, **conditions: Any) -> "View":
        """Return the view of the rows that fulfil these conditions as well."""
        norms: dict[str, dict[str, Any]] = {}
        limits_of = conditions.pop("norm", None) or {}
        if not isinstance(limits_of, Mapping):
            raise BadInputError(f"norm = {limits_of!r}: write the hook point, {{'layers.9.resid_post': (None, 10.0)}}")
        for pattern, limits in limits_of.items():
            for full in self.origin.select(pattern):
                name, own = self._own(full)
                norms.setdefault(name, {})[own] = limits
        first = next(iter(self._datasets))
        if conditions:
            norms.setdefault(first, {})
        added = [
            (name, where(self._datasets[name], norm=points or None, **(conditions if name == first else {})))
            for name, points in norms.items() or [(first, {})]
        ]
        return View(self.origin, (*self._filters, *added))

    def _own(self, full: str) -> tuple[str, str]:
        # A hook point's dataset, "" where there is but one, and what it is called there.
        name, colon, own = full.partition(":")
        return (name, own) if colon else ("", full)

    @property
    def _datasets(self) -> Mapping[str, ActivationDataset]:
        return self.origin.datasets if isinstance(self.origin, AlignedDatasets) else {"": self.origin}

    @property
    def url(self) -> str:
        return self.origin.url

    @property
    def hook_points(self) -> tuple[str, ...]:
        return self.origin.hook_points

    @cached_property
    def n_rows(self) -> int:
        """Rows that are chosen, of aligned datasets those that all have; reads what the conditions ask about."""
        return sum(map(len, self._rows_by_shard()))

    @property
    def row_numbers(self) -> npt.NDArray[np.int64]:
        """The chosen rows, int64, ascending; ``ds[point][view.row_numbers]`` are their activations."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self._rows_by_shard()])

    def __repr__(self) -> str:
        return f"View of {self.url!r} where {self._all.describe()}"

    def stream(self, points: Points, **options: Any) -> "ActivationStream":
        """Return a stream of the chosen rows; the options are those of the dataset's stream."""
        require_torch()
        from actlake.shards.streaming import stream_of

        return stream_of(self, points, options)

    def sample(self, points: str | Sequence[str], n: int, seed: int = 0) -> "TokenBatch":
        """Return a batch of ``n`` of the chosen rows, uniform and without replacement, as of a dataset."""
        rows = self.row_numbers
        if not 0 < n <= len(rows):
            raise BadInputError(
                f"n = {n} rows cannot be drawn from the {len(rows)} that are chosen; use 1..{len(rows)}"
            )
        return self.origin.batch_of(points, np.random.default_rng(seed).choice(rows, n, replace=False))

    def context(self, rows: RowKey, *, before: int = 20, after: int = 10) -> "list[RowContext]":
        """Return the text around rows, chosen or not; row numbers are those of the dataset (``batch.row``)."""
        return self.origin.context(rows, before=before, after=after)

    def sequence(self, number: int, points: str | Sequence[str] | None = None) -> "SequenceRows":
        """Return all rows of one sequence in order, chosen or not."""
        return self.origin.sequence(number, points)

    def normalizer(self, points: Points, kind: str) -> "Normalizer":
        """Return the dataset's normalizer: statistics are of all rows, chosen or not."""
        return self.origin.normalizer(points, kind)

    # --- what a stream asks for ---

    @property
    def _all(self) -> AllOf:
        return AllOf(tuple(each for _, each in self._filters))

    def _rows_by_shard(self) -> list[npt.NDArray[np.int64]]:
        # As a stream has them: rows that every dataset has, void in none.
        source = self.source(self.hook_points)
        snapshot, rows_per_shard = source.snapshot(), source.spec.rows_per_shard
        n_rows = dict(zip(snapshot.shard.tolist(), snapshot.n_rows.tolist(), strict=True))
        with_voids = set(snapshot.shard[snapshot.n_void > 0].tolist())

        def chosen(shard: int) -> npt.NDArray[np.int64]:
            mask = self._all.mask(shard, 0, n_rows[shard])
            if shard in with_voids:
                mask &= ~source.voids(shard, n_rows[shard])
            return shard * rows_per_shard + np.flatnonzero(mask)

        with Workers(thread_count(source.local)) as workers:
            return list(workers.map(chosen, sorted(n_rows)))

    def select(self, pattern: str) -> tuple[str, ...]:
        """Expand one pattern of hook points."""
        return self.origin.select(pattern)

    def source(self, points: Sequence[str]) -> Source:
        """Return the arrays of hook points, and the filter."""
        return replace(self.origin.source(points), filter=self._all)

    def statistics(self, point: str) -> Moments:
        """Return the statistics of a hook point over all rows, chosen or not."""
        return self.origin.statistics(point)

    def moments(self, point: str, shards: Sequence[int]) -> Moments:
        """Return the statistics of a hook point over all rows of some shards."""
        return self.origin.moments(point, shards)

    def labels(self, field: str) -> Callable[[npt.NDArray[Any]], list[str | None]]:
        """Return what gives a metadata field for sequence numbers."""
        return self.origin.labels(field)

    def reopened(self) -> "View":
        """Return the same on the shards that are committed now."""
        view = View(self.origin.reopened(), ())
        moved = [(name, replace(each, dataset=view._datasets[name])) for name, each in self._filters]
        return View(view.origin, moved)

    @property
    def planned_shards(self) -> list[int]:
        """Rows of each shard that is planned, ascending."""
        return self.origin.planned_shards
