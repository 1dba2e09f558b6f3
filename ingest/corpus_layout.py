"""Which windows become sequences, and under which numbers: the mixture, quotas and the limit, applied in the order.

Buckets follow one another in the order, so what comes before a bucket is the sum of the buckets before it; only one in
which a quota or the limit is reached must be looked at.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actlake.ingest.corpus_spill import Extent, Place, Slice
from actlake.ingest.corpus_windows import mixed_in
from actlake.storage.corpus_spec import CorpusSpec

#: By the number of a source, its windows and their tokens.
Counts = Mapping[int, tuple[int, int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectOrder:
    """What selecting the windows of a bucket needs to know.

    ``dropped`` are the origins of documents set aside, ascending; ``shares`` the share of the documents that is kept,
    by source; ``quotas`` the most tokens, by source; ``max_tokens`` the limit of all. Both count BOS.
    """

    place: Place
    spec: CorpusSpec
    dropped: npt.NDArray[np.int64]
    shares: Mapping[int, float] = field(default_factory=dict)
    quotas: Mapping[int, int] = field(default_factory=dict)
    max_tokens: int | None = None

    @property
    def n_bos(self) -> int:
        """The tokens of a sequence that are no text."""
        return int(self.spec.prepend_bos)

    def limited(self, quotas: Mapping[int, int], max_tokens: int | None) -> "SelectOrder":
        """Return the same with the limits of one split."""
        return replace(self, quotas=quotas, max_tokens=max_tokens)

    @property
    def filters(self) -> bool:
        """Whether documents are left out, so that the counts of the runs are too high."""
        return bool(self.shares) or len(self.dropped) > 0


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Windows whose keys have the same upper bits, as they lie in the runs.

    ``start`` is the number of its first sequence, ``n`` how many it gives; ``used`` and ``before`` are the tokens of
    sequences before it, by source and in all, before the limit is applied.
    """

    extents: tuple[Extent, ...]
    start: int = 0
    n: int = 0
    used: Mapping[int, int] = field(default_factory=dict)
    before: int = 0


@dataclass(frozen=True, kw_only=True)
class SplitLayout:
    """All buckets of a split in their order; ``complete`` says that the limit cut nothing off."""

    buckets: tuple[Bucket, ...]
    n_sequences: int
    complete: bool


def read_bucket(bucket: Bucket, order: SelectOrder, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the windows of a bucket as they come, without those of documents that are left out."""
    table = pa.concat_tables([extent.read(order.place) for extent in bucket.extents])
    if columns is not None:
        table = table.select([*columns])
    if len(order.dropped):
        table = table.filter(pa.array(~np.isin(table["origin"].to_numpy(), order.dropped)))
    if order.shares:
        pairs = zip(table["document"].to_pylist(), table["source"].to_pylist(), strict=True)
        table = table.filter(pa.array([mixed_in(order.spec.seed, order.shares[i], name) for name, i in pairs]))
    return table


def count_bucket(bucket: Bucket, order: SelectOrder) -> dict[int, tuple[int, int]]:
    """Return the windows and tokens of each source in a bucket, without documents that are left out."""
    table = read_bucket(bucket, order, ["document", "origin", "source", "n_text"])
    n_tokens, source = table["n_text"].to_numpy() + order.n_bos, table["source"].to_numpy()
    return {int(i): (int((source == i).sum()), int(n_tokens[source == i].sum())) for i in np.unique(source)}


def select_windows(bucket: Bucket, order: SelectOrder) -> pa.Table:
    """Return the windows of a bucket that become sequences, in their order."""
    table = read_bucket(bucket, order).combine_chunks()
    ranks = table.select(["key", "document", "window"])
    table = table.take(pc.sort_indices(ranks, [(name, "ascending") for name in ranks.column_names]))
    n_tokens, source = table["n_text"].to_numpy() + order.n_bos, table["source"].to_numpy()
    kept = np.ones(len(table), dtype=bool)
    for number, quota in order.quotas.items():
        own = source == number
        kept[own] = _before(n_tokens[own], bucket.used.get(number, 0)) < quota
    if order.max_tokens is not None:
        kept[kept] = _before(n_tokens[kept], bucket.before) < order.max_tokens
    return table if kept.all() else table.filter(pa.array(kept))


def _before(n_tokens: npt.NDArray[np.int64], used: int) -> npt.NDArray[np.int64]:
    """Return the tokens before each window, those before the first of them being ``used``."""
    before: npt.NDArray[np.int64] = used + np.cumsum(n_tokens) - n_tokens
    return before


def gather_buckets(
    slices: Sequence[Slice], first: int, n_buckets: int, n_bos: int
) -> tuple[list[Bucket], list[Counts]]:
    """Return the buckets ``first`` to ``first + n_buckets`` that hold windows, and the counts of each."""
    by_number: dict[int, list[Slice]] = {}
    for item in slices:
        if first <= item.bucket < first + n_buckets:
            by_number.setdefault(item.bucket, []).append(item)
    buckets, counts = [], list[Counts]()
    for number in sorted(by_number):
        buckets.append(Bucket(extents=tuple(item.extent for item in by_number[number])))
        total: dict[int, tuple[int, int]] = {}
        for item in by_number[number]:
            for source, (n, n_text) in item.counts.items():
                had = total.get(source, (0, 0))
                total[source] = had[0] + n, had[1] + n_text + n * n_bos
        counts.append(total)
    return buckets, counts


def lay_out(
    buckets: Sequence[Bucket], counts: Sequence[Counts], order: SelectOrder, first_sequence: int
) -> SplitLayout:
    """Number the sequences of a split's buckets; ``counts`` are those of ``count_bucket``."""
    used: dict[int, int] = {}
    laid = []
    start, before, complete = first_sequence, 0, True
    for bucket, has in zip(buckets, counts, strict=True):
        placed = replace(bucket, start=start, used=dict(used), before=before)
        chosen = _within_quotas(placed, has, order)
        n, n_tokens = (sum(pair[i] for pair in chosen.values()) for i in (0, 1))
        kept = n
        if order.max_tokens is not None and before + n_tokens > order.max_tokens:
            kept = len(select_windows(placed, order)) if before < order.max_tokens else 0
            complete = complete and kept == n
        if kept:
            laid.append(replace(placed, n=kept))
        start += kept
        before += n_tokens
        for source, (_, tokens) in chosen.items():
            used[source] = used.get(source, 0) + tokens
    return SplitLayout(buckets=tuple(laid), n_sequences=start - first_sequence, complete=complete)


def _within_quotas(bucket: Bucket, has: Counts, order: SelectOrder) -> Counts:
    """Return the counts of the windows of a bucket that are within the quotas."""
    room = {source: order.quotas[source] - bucket.used.get(source, 0) for source in has if source in order.quotas}
    if all(left >= has[source][1] for source, left in room.items()):
        return has
    chosen = {source: pair for source, pair in has.items() if room.get(source, 1) > 0}
    if all(room.get(source, pair[1]) >= pair[1] for source, pair in chosen.items()):
        return chosen
    table = select_windows(bucket, replace(order, max_tokens=None))
    n_tokens, source = table["n_text"].to_numpy() + order.n_bos, table["source"].to_numpy()
    return {i: (int((source == i).sum()), int(n_tokens[source == i].sum())) for i in np.unique(source).tolist()}


def shares_of(weights: Mapping[str, float], sources: Sequence[str], n_tokens: Mapping[int, int]) -> dict[int, float]:
    """Return the share of each source's documents that gives the weights, by the number of the source; {} for none.

    Source s with weight w and T tokens: w / T over the largest such quotient, so that one source is kept whole.
    """
    if not weights:
        return {}
    wanted = {i: weights[source] / n_tokens[i] for i, source in enumerate(sources)}
    return {i: value / max(wanted.values()) for i, value in wanted.items()}


def quotas_of(spec: CorpusSpec, split: str) -> dict[int, int]:
    """Return the quotas of a split by the number of the source: of the held-out one as large as its share."""
    factor = 1.0 if split == "train" else spec.holdout / (1 - spec.holdout)
    return {spec.sources.index(source): int(-(-quota * factor // 1)) for source, quota in spec.quotas.items()}


def sequences_of(layout: SplitLayout, start: int, stop: int) -> Iterator[Bucket]:
    """Yield the buckets that give the sequences ``start:stop``."""
    for bucket in layout.buckets:
        if bucket.start < stop and bucket.start + bucket.n > start:
            yield bucket
