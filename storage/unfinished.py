"""Files that have no name yet, so that a process which must end at once can remove what its threads are writing."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

_paths: set[Path] = set()
# Re-entrant: a signal may find the thread that must leave inside it.
_creating = threading.RLock()


@contextmanager
def unfinished(path: Path) -> Iterator[FileIO]:
    """Create a file, open for writing without a buffer; it counts as unfinished for as long as the block lasts."""
    with _creating:
        _paths.add(path)
        try:
            file = open(path, "wb", buffering=0)  # noqa: SIM115
        except BaseException:
            _paths.discard(path)
            raise
    try:
        with file:
            yield file
    finally:
        _paths.discard(path)


def remove_unfinished() -> None:
    """Remove the unfinished files of this process, for good: whoever begins or writes one is stuck, or fails.

    End the process then. A file system that does not answer is not waited for longer than 5 seconds.
    """
    _creating.acquire(timeout=5)  # Never released: no thread may begin another one.
    for path in tuple(_paths):
        with suppress(OSError):
            path.unlink(missing_ok=True)
