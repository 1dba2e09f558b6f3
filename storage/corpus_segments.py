"""Segments of a corpus: documents that were appended after others, with an order of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from actlake.storage.corpus_spec import SourceFile, SplitInfo
from actlake.storage.errors import SpecMismatchError
from actlake.storage.rowspace import content_hash
from actlake.storage.spec import SPLITS
from actlake.storage.stored_json import require_fields


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Documents that came at one time; ``splits`` are the sizes of its own sequences.

    ``segment_id`` of the first is the ``corpus_id``, that of another follows from the one before and its documents.
    """

    segment_id: str
    sources: tuple[str, ...]
    source_files: tuple[SourceFile, ...]
    splits: Mapping[str, SplitInfo]

    def to_json(self) -> dict[str, Any]:
        """Return the segment as JSON values."""
        return {
            "segment_id": self.segment_id,
            "splits": {name: info.to_json() for name, info in self.splits.items()},
            "sources": list(self.sources),
            "source_files": [asdict(file) for file in self.source_files],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` returned."""
        return cls(
            segment_id=require_fields(cls, value, skip=["source_files", "splits"])["segment_id"],
            sources=tuple(value["sources"]),
            source_files=tuple(SourceFile(**require_fields(SourceFile, file)) for file in value["source_files"]),
            splits={name: SplitInfo(**require_fields(SplitInfo, value["splits"][name])) for name in SPLITS},
        )


def segment_id(previous: str, rules: Mapping[str, Any], digest: str) -> str:
    """Return the identity of a segment after the one called ``previous``, of documents with that digest."""
    return content_hash({"previous": previous, "rules": rules, "documents": digest})


def require_one_corpus(one: Sequence[str], other: Sequence[str], name: str, other_name: str) -> None:
    """Raise ``SpecMismatchError`` for chains of segments of which neither continues the other: their rows differ."""
    if (at := conflict(one, other)) is not None:
        raise SpecMismatchError(
            f"{name} and {other_name} continue one corpus with other documents: segment {at} is {one[at][:12]}... and "
            f"{other[at][:12]}...; choose datasets, or another URL, of one corpus"
        )


def conflict(one: Sequence[str], other: Sequence[str]) -> int | None:
    """Return the number of the first segment in which two chains differ, None where one continues the other."""
    return next((i for i, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs), None)
