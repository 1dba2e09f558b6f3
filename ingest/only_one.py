"""One process of a machine at a time: what several workers of a node would otherwise fetch or convert at once."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def only_one(folder: Path, name: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock of that name in a folder for as long as the block lasts; ``waiting`` is called before a wait.

    The lock goes with the process that holds it, however that ends. Where a folder cannot be locked, as on some shared
    disks, the block runs without: what it does must be right then, too, only done more than once.
    """
    with ExitStack() as open_files:
        # No folder, no rights, no locks on this file system.
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / hashlib.sha256(name.encode()).hexdigest()[:16], os.O_RDWR | os.O_CREAT)
            open_files.callback(os.close, handle)
            _lock(handle, waiting)
        yield


def _lock(handle: int, waiting: Callable[[], None]) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(handle, fcntl.LOCK_EX)
