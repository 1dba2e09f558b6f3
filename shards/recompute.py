"""Statistics from the stored rows, for shards whose statistics an earlier actlake stored without norms."""

from collections.abc import Callable

import numpy as np

from actlake.shards.dataset import ActivationDataset
from actlake.shards.prefetch import Workers, thread_count
from actlake.storage.moments import Moments, fold, of_shard
from actlake.storage.rowspace import ROLE_VOID


def statistics_from_rows(
    dataset: ActivationDataset, point: str, *, on_rows: Callable[[int], None] = lambda n_rows: None
) -> Moments:
    """Return what ``dataset.statistics`` does, of the committed rows themselves; a shard's rows are held at once.

    ``n_nonfinite`` counts no rows that became void. ``on_rows`` hears of rows as they are done.
    """
    view, counts = dataset[point], dataset.reader.manifest.n_rows_by_shard()

    def of(shard: int) -> Moments:
        first = shard * dataset.spec.rows_per_shard
        rows = slice(first, first + counts[shard])
        kept = np.flatnonzero(dataset["rows/role"][rows] != ROLE_VOID)
        values = view[rows]
        return of_shard(values if len(kept) == len(values) else values[kept], numbers=first + kept)

    parts = {}
    with Workers(thread_count(dataset.store.local)) as workers:
        for shard, moments in zip(counts, workers.map(of, counts), strict=True):
            parts[shard] = moments
            on_rows(counts[shard])
    return fold(parts, view.shape[1])
