"""All documents of a build by ascending id: their digest, and those whose id another document has already.

Documents lie in runs, sorted by id. A range of ids is read from every run at a time, so that no more is in memory.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actlake.ingest.corpus_spill import PRESENT, Block, Place
from actlake.ingest.corpus_windows import mixed_in
from actlake.ingest.documents import BadDocument
from actlake.storage.errors import SourceError

#: Blocks that begin in one range of ids: about 260,000 documents.
_BLOCKS_PER_RANGE = 256


@dataclass(frozen=True, kw_only=True)
class IdRange:
    """The ids from ``start`` to before ``stop`` (UTF-8; None: no end), and the blocks that may hold some."""

    start: bytes
    stop: bytes | None
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Twins:
    """Documents whose id an earlier one has: their origins, and why they cannot be used."""

    origins: tuple[int, ...] = ()
    bad: tuple[BadDocument, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MergeOrder:
    """What merging needs to know; ``shares`` is the share of the documents of a source that is kept, by its number."""

    place: Place
    sources: tuple[str, ...]
    seed: int
    shares: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Merged:
    """The digest of the documents that are kept, how many these are, and which were set aside."""

    digest: str
    n_documents: int
    dropped: npt.NDArray[np.int64]
    bad: tuple[BadDocument, ...]


def plan_ranges(blocks: Sequence[Block]) -> list[IdRange]:
    """Cut the ids into ranges that each some blocks begin in."""
    starts = sorted({block.first.encode() for block in blocks})[::_BLOCKS_PER_RANGE]
    stops = [*starts[1:], None]
    return [
        IdRange(
            start=start,
            stop=stop,
            blocks=tuple(
                block
                for block in blocks
                if block.last.encode() >= start and (stop is None or block.first.encode() < stop)
            ),
        )
        for start, stop in zip(starts, stops, strict=True)
    ]


def merge_range(ids: IdRange, order: MergeOrder) -> tuple[bytes, int, Twins]:
    """Return the digest's entries of a range end to end, the number of their documents, and the twins among them."""
    table = pa.concat_tables([block.extent.read(order.place) for block in ids.blocks])
    names = table["document"].cast(pa.binary())
    inside = pc.greater_equal(names, ids.start)
    if ids.stop is not None:
        inside = pc.and_(inside, pc.less(names, ids.stop))
    table = table.filter(inside).sort_by([("document", "ascending"), ("origin", "ascending")]).combine_chunks()
    new = table["origin"].to_numpy() != PRESENT
    twin = np.zeros(len(table), dtype=bool)
    name = table["document"]
    twin[1:] = pc.equal(name.slice(1), name.slice(0, len(table) - 1)).to_numpy()
    twin &= new
    kept = new & ~twin & _mixed(table, order)
    entries = table["entry"].combine_chunks().filter(pa.array(kept))
    return b"".join(entries.to_pylist()), int(kept.sum()), _twins(table, twin, order)


def _mixed(table: pa.Table, order: MergeOrder) -> Any:
    if not order.shares:
        return True
    pairs = zip(table["document"].to_pylist(), table["source"].to_pylist(), strict=True)
    return np.array([mixed_in(order.seed, order.shares[source], name) for name, source in pairs], dtype=bool)


def _twins(table: pa.Table, twin: npt.NDArray[np.bool_], order: MergeOrder) -> Twins:
    bad, first = [], 0
    rows = table.select(["document", "origin", "source", "place"])
    for i in np.flatnonzero(twin).tolist():
        first = i - 1 if not twin[i - 1] else first
        one, other = rows.slice(i, 1).to_pylist()[0], rows.slice(first, 1).to_pylist()[0]
        where = (
            "the corpus holds it already"
            if other["origin"] == PRESENT
            else f"{other['place']} of {order.sources[other['source']]!r} has it too"
        )
        reason = (
            f"two documents have the id {one['document']!r}: {where}; give each its own id field, or name files of "
            "different folders by one pattern such as 'data/**/*.txt'"
        )
        source = order.sources[one["source"]]
        bad.append(BadDocument(document=one["document"], source=source, place=one["place"], reason=reason))
    return Twins(origins=tuple(table["origin"].to_numpy()[twin].tolist()), bad=tuple(bad))


def merge(results: Iterator[tuple[bytes, int, Twins]], on_bad: str) -> Merged:
    """Fold the ranges, in their order; raise ``SourceError`` for twins unless they are to be set aside."""
    digest, n_documents = hashlib.sha256(), 0
    origins, bad = list[int](), list[BadDocument]()
    for entries, n, twins in results:
        if twins.bad and on_bad == "raise":
            raise twins.bad[0].error()
        digest.update(entries)
        n_documents += n
        origins += twins.origins
        bad += twins.bad
    if n_documents == 0:
        raise SourceError("no document is left; add some, or raise the weights of those that are there")
    return Merged(
        digest=digest.hexdigest(), n_documents=n_documents, dropped=np.array(sorted(origins), np.int64), bad=tuple(bad)
    )
