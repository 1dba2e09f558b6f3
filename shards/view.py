"""A dataset less the rows that nobody asked for: ``ds.where(...)``, with the dataset's own interface."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from actlake.shards.align import AlignedDatasets
from actlake.shards.dataset import ActivationDataset, Points, require_torch
from actlake.shards.prefetch import Workers, thread_count
from actlake.shards.select import RowFilter, where
from actlake.shards.source import Source
from actlake.storage.moments import Moments

if TYPE_CHECKING:
    from actlake.shards.normalizer import Normalizer
    from actlake.shards.stream import ActivationStream


@dataclass(frozen=True)
class AllOf:
    """The rows that every filter chooses."""

    filters: tuple[RowFilter, ...]

    def mask(self, shard: int, start: int, n_rows: int) -> npt.NDArray[np.bool_]:
        """Return bool [n_rows]: which of a shard's stored rows are chosen."""
        mask = self.filters[0].mask(shard, start, n_rows)
        for other in self.filters[1:]:
            mask &= other.mask(shard, start, n_rows)
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
        for point, limits in (conditions.pop("norm", None) or {}).items():
            (full,) = self.origin.select(point)
            name, colon, own = full.partition(":")
            norms.setdefault(name if colon else "", {})[own if colon else full] = limits
        first = next(iter(self._datasets))
        if conditions:
            norms.setdefault(first, {})
        added = [
            (name, where(self._datasets[name], norm=points or None, **(conditions if name == first else {})))
            for name, points in norms.items() or [(first, {})]
        ]
        return View(self.origin, (*self._filters, *added))

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
        """Rows that are chosen; reads what the conditions ask about."""
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
        from actlake.shards.streaming import make_stream

        return make_stream(self, points, **options)

    def normalizer(self, points: Points, kind: str) -> "Normalizer":
        """Return the dataset's normalizer: statistics are of all rows, chosen or not."""
        return self.origin.normalizer(points, kind)

    # --- what a stream asks for ---

    @property
    def _all(self) -> AllOf:
        return AllOf(tuple(each for _, each in self._filters))

    def _rows_by_shard(self) -> list[npt.NDArray[np.int64]]:
        first = next(iter(self._datasets.values()))
        shards, rows_per_shard = first.reader.manifest.n_rows_by_shard(), first.spec.rows_per_shard

        def chosen(shard: int) -> npt.NDArray[np.int64]:
            return shard * rows_per_shard + np.flatnonzero(self._all.mask(shard, 0, shards[shard]))

        with Workers(thread_count(first.store.local)) as workers:
            return list(workers.map(chosen, sorted(shards)))

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
