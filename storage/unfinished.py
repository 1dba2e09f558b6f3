"""Files that have no name yet, so that a process which must end at once can remove what its threads are writing."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_paths: set[Path] = set()


@contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Count a file as unfinished for as long as the block lasts."""
    _paths.add(path)
    try:
        yield
    finally:
        _paths.discard(path)


def remove_unfinished() -> None:
    """Remove the unfinished files of this process; whoever writes one of them fails, so end the process then."""
    for path in tuple(_paths):
        with suppress(OSError):
            path.unlink(missing_ok=True)
