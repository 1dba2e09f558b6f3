"""Every error that actlake raises on purpose, grouped by what a handler would do about it.

``ActlakeError`` is the root; the command line turns one into a message and exit code 2 (1 for ``ShardFailedError``).
Every message names the thing and says what to do next.
"""

import difflib
import errno
from collections.abc import Callable, Iterable
from typing import Any


class ActlakeError(Exception):
    """Base of everything that actlake raises on purpose."""


# --- The request cannot be carried out as written: change the input -----------------------------------------------


class BadInputError(ActlakeError, ValueError):
    """The input is wrong: the message repeats it and names the remedy."""


class UnknownNameError(BadInputError, KeyError):
    """A key, hook point, stream or preset that does not exist."""

    def __str__(self) -> str:
        # KeyError would show the repr of the message.
        return str(self.args[0])


class RowRangeError(BadInputError, IndexError):
    """A row number outside of the dataset."""


class JobFileError(BadInputError):
    """A job file that cannot be used."""


class SourceError(BadInputError):
    """A corpus source that is absent, unreadable, empty or malformed."""


class ModelAccessError(BadInputError):
    """A model that is absent, gated or of an unknown architecture."""


class SpecMismatchError(BadInputError):
    """Another spec lives at this URL, or two datasets that should agree do not."""


class MissingExtraError(ActlakeError, ImportError):
    """An optional package is not installed; the message says which ``pip install`` brings it."""


class NotFoundError(ActlakeError, FileNotFoundError):
    """No dataset, corpus or object at that place."""


# --- The stored bytes are not what the records promise: verify, repair, ingest again ------------------------------


class DataError(ActlakeError):
    """Stored data that cannot be trusted or is not there."""


class UncommittedShardError(DataError, IndexError):
    """A read touched rows of a shard that has no commit record."""


class MissingObjectError(DataError):
    """A committed shard lacks one of its objects."""


class CorruptObjectError(DataError):
    """A checksum, a size or a structure does not match."""


class MixedShardError(CorruptObjectError):
    """An object belongs to another attempt than the shard's commit record."""


class FormatVersionError(DataError):
    """The dataset or corpus was written by a newer format than this actlake reads."""


# --- Work that was tried and failed: fix the cause, run again -----------------------------------------------------


class StoreError(ActlakeError, OSError):
    """A store that did not answer in time, or answered with an error, however often it was asked."""

    def __init__(self, message: str) -> None:
        # With a number, as errors of a disk and a network have: it says nothing about the data.
        super().__init__(errno.EIO, message)

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreError, (self.args[1],)


class WorkerLostError(ActlakeError):
    """A worker's process or its node ended while it built a shard."""


class ShardFailedError(ActlakeError):
    """One or more shards could not be built; the others were finished. ``failed()`` describes each as JSON values."""

    def __init__(self, text: str, failed: Callable[[], list[dict[str, Any]]] = list) -> None:
        super().__init__(text)
        self.failed = failed


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest valid name, else the list of valid ones (at most 12)."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; valid names: {shown}"
