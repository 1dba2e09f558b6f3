"""Datasets of one row space read as one: the same rows at hook points of several models, or of several runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actlake.shards.dataset import ActivationDataset, Points, require_torch
from actlake.shards.point_view import RowKey
from actlake.shards.source import Source, rows_in_common
from actlake.storage.corpus_segments import require_one_corpus
from actlake.storage.errors import BadInputError, SpecMismatchError, UnknownNameError, nearest
from actlake.storage.moments import Moments

if TYPE_CHECKING:
    from actlake.shards.batch import TokenBatch
    from actlake.shards.lookup import RowContext, SequenceRows
    from actlake.shards.normalizer import Normalizer
    from actlake.shards.stream import ActivationStream
    from actlake.shards.view import View


def align(**datasets: ActivationDataset) -> "AlignedDatasets":
    """Read datasets with one ``row_space_id`` as one, each under its keyword: ``align(base=ds1, chat=ds2)``.

    Raises ``SpecMismatchError`` where their rows do not line up: which fields of the row space differ, and the first
    token that does; and where documents were appended to their corpora that are not the same.
    """
    if not datasets:
        raise BadInputError("align() needs datasets by name, e.g. align(base=ds1, chat=ds2)")
    (name, first), *others = datasets.items()
    for other_name, other in others:
        if other.spec.row_space_id != first.spec.row_space_id:
            raise SpecMismatchError(
                f"{name} and {other_name} do not line up ({name}: {first.url}, {other_name}: {other.url}):\n  "
                + "\n  ".join([*_differing_fields(name, first, other_name, other), _differing_token(first, other)])
            )
        require_one_corpus(first.header.chain, other.header.chain, name, other_name)
    return AlignedDatasets(datasets)


class AlignedDatasets:
    """Several datasets with the same rows; hook points are ``name:layers.9.resid_post``. Pickles as the datasets do."""

    def __init__(self, datasets: Mapping[str, ActivationDataset]) -> None:
        self.datasets = dict(datasets)

    @property
    def first(self) -> ActivationDataset:
        """The dataset whose row columns and corpus stand for all."""
        return next(iter(self.datasets.values()))

    @property
    def url(self) -> str:
        return " + ".join(f"{name}={dataset.url}" for name, dataset in self.datasets.items())

    @property
    def hook_points(self) -> tuple[str, ...]:
        return tuple(f"{name}:{point}" for name, dataset in self.datasets.items() for point in dataset.hook_points)

    @property
    def heldout(self) -> "AlignedDatasets":
        """The held-out splits, aligned."""
        return AlignedDatasets({name: dataset.heldout for name, dataset in self.datasets.items()})

    def __repr__(self) -> str:
        return "AlignedDatasets\n" + "\n".join(f"{name}: {dataset!r}" for name, dataset in self.datasets.items())

    def stream(self, points: Points, **options: Any) -> "ActivationStream":
        """Return a stream of rows that every dataset has committed; the options are those of a dataset's stream."""
        require_torch()
        from actlake.shards.streaming import stream_of

        return stream_of(self, points, options)

    def where(self, **conditions: Any) -> "View":
        """Return a view of the rows that fulfil conditions, as of one dataset; norms are of ``name:point``."""
        from actlake.shards.view import View

        return View(self, ()).where(**conditions)

    def normalizer(self, points: Points, kind: str) -> "Normalizer":
        """Return the normalizer of hook points, each by the statistics of its own dataset."""
        from actlake.shards.streaming import make_normalizer

        return make_normalizer(self, points, kind)

    def sample(self, points: str | Sequence[str], n: int, seed: int = 0) -> "TokenBatch":
        """Return a batch of ``n`` uniform rows that every dataset has and none has as void, without replacement."""
        require_torch()
        from actlake.shards.lookup import draw_rows

        return self.batch_of(points, draw_rows(self.source(self.hook_points), n, seed=seed))

    def batch_of(self, points: str | Sequence[str], rows: npt.NDArray[np.int64]) -> "TokenBatch":
        """Return a batch of these rows, int64 [B], in their order."""
        require_torch()
        from actlake.shards.batch import TokenBatch
        from actlake.shards.columns import BatchColumns

        tensors = {}
        for full in self._chosen(points):
            dataset, point = self._of(full)
            tensors[full] = dataset.tensor(point, rows)
        return TokenBatch(
            tensors, BatchColumns(lambda name: rows if name == "row" else self.first[f"rows/{name}"][rows])
        )

    def context(self, rows: RowKey, *, before: int = 20, after: int = 10) -> "list[RowContext]":
        """Return the text around rows, which is one for all datasets."""
        return self.first.context(rows, before=before, after=after)

    def sequence(self, number: int, points: str | Sequence[str] | None = None) -> "SequenceRows":
        """Return all rows of one sequence in order, at hook points of any of the datasets; void ones are left out."""
        require_torch()
        from actlake.shards.lookup import in_common

        own: dict[str, list[str]] = {}
        for full in self.hook_points if points is None else self._chosen(points):
            name, _, point = full.partition(":")
            own.setdefault(name, []).append(point)
        return in_common({name: self.datasets[name].sequence(number, chosen) for name, chosen in own.items()})

    def _chosen(self, points: str | Sequence[str]) -> tuple[str, ...]:
        patterns = [points] if isinstance(points, str) else points
        return tuple(dict.fromkeys(full for pattern in patterns for full in self.select(pattern)))

    # --- what a stream asks for ---

    def select(self, pattern: str) -> tuple[str, ...]:
        """Expand one pattern such as ``chat:layers.*.resid_post``; raise ``UnknownNameError`` for an unknown name."""
        name, colon, rest = pattern.partition(":")
        if not colon or name not in self.datasets:
            raise UnknownNameError(
                f"no hook point {pattern!r}: write name:point, the names are {', '.join(self.datasets)}"
                f"{nearest(name, self.datasets)}"
            )
        return tuple(f"{name}:{point}" for point in self.datasets[name].select(rest))

    def source(self, points: Sequence[str]) -> Source:
        """Return the arrays of hook points."""
        found = {}
        for full in points:
            dataset, point = self._of(full)
            found[full] = dataset.reader, dataset.reader.arrays[point]
        return Source(columns=self.first.reader, points=found)

    def statistics(self, point: str) -> Moments:
        """Return the statistics of ``name:point``, as its dataset does."""
        dataset, name = self._of(point)
        return dataset.statistics(name)

    def moments(self, point: str, shards: Sequence[int]) -> Moments:
        """Return the statistics of a hook point over some shards."""
        dataset, name = self._of(point)
        return dataset.moments(name, shards)

    def labels(self, field: str) -> Callable[[npt.NDArray[Any]], list[str | None]]:
        """Return what gives a metadata field for sequence numbers: that of the first dataset's corpus."""
        return self.first.labels(field)

    def reopened(self) -> "AlignedDatasets":
        """Return the same on the shards that are committed now."""
        return AlignedDatasets({name: dataset.reopened() for name, dataset in self.datasets.items()})

    @property
    def planned_shards(self) -> list[int]:
        """Rows of each shard that line up once all datasets are complete, ascending."""
        first, *others = (np.array(dataset.planned_shards, dtype=np.int64) for dataset in self.datasets.values())
        for other in others:
            n = min(len(first), len(other))
            first = rows_in_common(self.first.spec, first[:n], other[:n])
        n_rows: list[int] = first[first > 0].tolist()
        return n_rows

    def _of(self, full: str) -> tuple[ActivationDataset, str]:
        name, _, point = full.partition(":")
        return self.datasets[name], point


def _differing_fields(name: str, first: ActivationDataset, other_name: str, other: ActivationDataset) -> list[str]:
    mine, theirs = first.spec.row_space_fields, other.spec.row_space_fields
    return [
        f"{field}: {name} has {mine[field]!r}, {other_name} {theirs[field]!r}"
        for field in mine
        if mine[field] != theirs[field]
    ]


def _differing_token(first: ActivationDataset, other: ActivationDataset) -> str:
    n_rows = min(_leading_rows(first), _leading_rows(other))
    step = min(first.spec.rows_per_shard, other.spec.rows_per_shard)
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        mine, theirs = (dataset["rows/token_id"][start:stop] for dataset in (first, other))
        if (differs := np.flatnonzero(mine != theirs)).size:
            row = int(differs[0])
            return f"the first token that differs is that of row {start + row}: {mine[row]} and {theirs[row]}"
    return f"the tokens of the first {n_rows} rows are the same"


def _leading_rows(dataset: ActivationDataset) -> int:
    """Return how many rows from the first on are committed."""
    missing = dataset.missing_shards
    n_rows = missing[0] * dataset.spec.rows_per_shard if missing else dataset.n_rows
    return min(n_rows, dataset.n_rows)
