"""Where a stream comes from: a dataset, a filtered view of one, or datasets that align."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy.typing as npt

from actlake.shards.source import Source
from actlake.storage.moments import Moments


class Origin(Protocol):
    """What can be streamed. Picklable by URL and options."""

    @property
    def url(self) -> str:
        """Where it lies, for messages."""

    @property
    def hook_points(self) -> tuple[str, ...]:
        """The names that can be streamed."""

    def select(self, pattern: str) -> tuple[str, ...]:
        """Expand one pattern of hook points; raise ``UnknownNameError`` for one that selects nothing."""

    def source(self, points: Sequence[str]) -> Source:
        """Return the arrays of hook points, and the rows that are chosen."""

    def statistics(self, point: str) -> Moments:
        """Return the statistics of a hook point over all committed rows."""

    def moments(self, point: str, shards: Sequence[int]) -> Moments:
        """Return the statistics of a hook point over some shards."""

    def labels(self, field: str) -> Callable[[npt.NDArray[Any]], list[str | None]]:
        """Return what gives the value of a metadata field for sequence numbers.

        Raises ``UnknownNameError`` for a field that the corpus does not have.
        """

    def reopened(self) -> "Origin":
        """Return the same on the shards that are committed now."""

    @property
    def planned_shards(self) -> list[int]:
        """Rows of each shard that is planned, ascending."""
