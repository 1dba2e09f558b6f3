"""What one worker tokenises at a time: parts of the sources, each some files, or some row groups of a Parquet file.

A part is named by what it reads, in which version: one that is done is not read again, but where a file has changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import pyarrow.parquet as pq

from actlake.ingest.sources import file_version, open_source
from actlake.storage.corpus_spec import SourceFile
from actlake.storage.rowspace import content_hash

#: Stored bytes of a part: minutes of work, so that a killed worker loses little, and no more parts than needed.
PART_NBYTES = 128 * 2**20


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A file of a source in one version, or the row groups ``first:stop`` of a Parquet file."""

    file: SourceFile
    version: str
    groups: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Pieces that follow one another in the order of the sources; ``number`` is the part's place in that order."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """What the part is, whatever others there are: 16 hex digits."""
        return content_hash([asdict(piece) for piece in self.pieces])[:16]

    def to_json(self) -> dict[str, Any]:
        """Return the part as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` returned."""
        pieces = tuple(
            Piece(
                file=SourceFile(**piece["file"]),
                version=piece["version"],
                groups=None if piece["groups"] is None else (piece["groups"][0], piece["groups"][1]),
            )
            for piece in value["pieces"]
        )
        return cls(number=value["number"], pieces=pieces)


def plan_parts(files: Sequence[SourceFile], storage_options: Mapping[str, Any] | None) -> list[Part]:
    """Cut the files of the sources into parts, in their order."""
    parts: list[Part] = []
    pieces: list[Piece] = []
    nbytes = 0
    for file in files:
        for piece, n in _pieces(file, storage_options):
            if pieces and nbytes + n > PART_NBYTES:
                parts.append(Part(number=len(parts), pieces=tuple(pieces)))
                pieces, nbytes = [], 0
            pieces.append(piece)
            nbytes += n
    return [*parts, Part(number=len(parts), pieces=tuple(pieces))]


def _pieces(file: SourceFile, storage_options: Mapping[str, Any] | None) -> Iterator[tuple[Piece, int]]:
    version = file_version(file, storage_options=storage_options)
    if file.nbytes <= PART_NBYTES or not file.name.endswith(".parquet"):
        yield Piece(file=file, version=version), file.nbytes
        return
    with open_source(file, storage_options=storage_options) as stream:
        metadata = pq.read_metadata(stream)
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    first = nbytes = 0
    for group, size in enumerate(sizes):
        nbytes += size
        if group + 1 == len(sizes) or nbytes + sizes[group + 1] > PART_NBYTES:
            yield Piece(file=file, version=version, groups=(first, group + 1)), nbytes
            first, nbytes = group + 1, 0
