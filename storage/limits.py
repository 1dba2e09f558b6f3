"""How a store is spoken to: which client, how long a call may take, how often it is tried, how much at once.

The keys are part of ``storage_options``, beside those of the protocol's own client, which never sees these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from actlake.storage.errors import BadInputError, nearest

CLIENTS = ("fsspec", "obstore")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Settings of one store; every one is a key of ``storage_options``.

    ``client`` reads objects: fsspec's, or obstore, which takes less processor time. A connection may take
    ``connect_s`` seconds to open and ``stall_s`` without a byte; a request is tried ``attempts`` times, after waits
    that double from ``wait_s`` and are drawn at random (full jitter); the whole call ends after ``deadline_s`` seconds,
    and one more for every ``bytes_per_s`` that it carries. ``max_requests`` calls are under way at once in a process.
    Objects above ``part_nbytes`` are uploaded in parts of that size. Chunks at most ``gap_nbytes`` apart are read by
    one request of at most ``range_nbytes``: larger ones cost fsspec's clients up to three times more time a byte.
    """

    client: str = "fsspec"
    attempts: int = 8
    wait_s: float = 0.1
    connect_s: float = 10.0
    stall_s: float = 30.0
    deadline_s: float = 300.0
    bytes_per_s: float = 1e6
    max_requests: int = 64
    part_nbytes: int = 32 << 20
    range_nbytes: int = 8 << 20
    gap_nbytes: int = 64 << 10

    def __post_init__(self) -> None:
        if self.client not in CLIENTS:
            raise BadInputError(f"storage option client = {self.client!r}{nearest(str(self.client), CLIENTS)}")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "client":
                continue
            least = 0 if item.name == "gap_nbytes" else 5 << 20 if item.name == "part_nbytes" else 1e-9
            whole = isinstance(item.default, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value < least:
                raise BadInputError(
                    f"storage option {item.name} = {value!r} must be a {'whole ' if whole else ''}number "
                    f"{'of at least ' + str(least) if least >= 1 or not least else 'above 0'}; "
                    f"{item.default} is the default"
                )

    def deadline(self, nbytes: int = 0) -> float:
        """Return the seconds that a call which carries so many bytes may take, all its attempts together."""
        return self.deadline_s + nbytes / self.bytes_per_s

    def attempt(self, nbytes: int = 0) -> float:
        """Return the seconds that one request which carries so many bytes may take."""
        return self.stall_s + nbytes / self.bytes_per_s


def split_options(options: Mapping[str, Any]) -> tuple[Limits, dict[str, Any]]:
    """Return our part of storage options, and what is the protocol's client's.

    Raises ``BadInputError`` for a value that cannot be.
    """
    names = {item.name for item in fields(Limits)}
    own = {name: value for name, value in options.items() if name in names}
    return Limits(**own), {name: value for name, value in options.items() if name not in names}
