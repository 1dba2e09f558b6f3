"""Where a worker of the local engine lives: in this process, or in one of its own with its own GPUs."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from typing import Protocol

from actlake.jobs.engines.local_worker import Crew, Gone, Message
from actlake.jobs.work import Task, WorkOrder
from actlake.storage.errors import JobFileError

#: Seconds that a process has to remove what it has not finished.
_GRACE_S = 5.0

_SERVE = "import sys; from actlake.jobs.engines.local_worker import serve; serve(int(sys.argv[1]))"


class Handle(Protocol):
    """A worker that is given tasks; what it says goes to whoever made it."""

    def give(self, task: Task) -> None:
        """Have a task built."""

    def stop(self) -> None:
        """Have it end, whatever it does."""

    def close(self) -> None:
        """Wait until nothing of it is left that could be waited for."""


class Here:
    """A worker in threads of this process."""

    def __init__(self, order: WorkOrder, hear: Callable[["Handle", Message], None]) -> None:
        self._crew = Crew(order, lambda message: hear(self, message))

    def give(self, task: Task) -> None:
        """Have a task built."""
        self._crew.give(task)

    def stop(self) -> None:
        """Have its threads end."""
        self._crew.stop()

    def close(self) -> None:
        """Wait for its threads, where none is in the middle of something."""
        self._crew.join()


class Process:
    """A worker in a fresh interpreter with these changes of the environment.

    Not ``multiprocessing``'s: that runs the user's main module again, and leaves its children when it is killed.
    """

    def __init__(
        self, order: WorkOrder, hear: Callable[["Handle", Message], None], environment: Mapping[str, str]
    ) -> None:
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
            stdin=subprocess.DEVNULL,
            stdout=2,  # What is printed here is a command's result.
        )
        theirs.close()
        self._hear = hear
        self._send(order)
        self._listener = threading.Thread(target=self._listen, name="actlake-listen", daemon=True)
        self._listener.start()

    def give(self, task: Task) -> None:
        """Have a task built; where the process has ended, its ``Gone`` is on its way."""
        self._send(task)

    def stop(self) -> None:
        """Have the process end: it gives up its shards, and removes what it has not finished."""
        self._process.terminate()

    def close(self) -> None:
        """Wait for its end, not for ever."""
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join()
        self._pipe.close()

    def _send(self, what: WorkOrder | Task) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(what)

    def _listen(self) -> None:
        try:
            while True:
                self._hear(self, self._pipe.recv())
        except (EOFError, OSError):
            self._hear(self, Gone(status=self._process.wait()))


def visible_gpus() -> list[str]:
    """Return the GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    n_gpus, shown = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(n_gpus)] if shown is None else shown.split(",")
    return [name.strip() for name in names[:n_gpus]]


def gpu_groups(device: str, n_gpus: int) -> Sequence[str]:
    """Return what ``CUDA_VISIBLE_DEVICES`` is for each worker that this machine has room for.

    None for a CPU, and for one GPU that is named; raises ``JobFileError`` where a worker wants more than there are.
    """
    if device != "cuda":
        return []
    names = visible_gpus()
    if len(names) < n_gpus:
        raise JobFileError(
            f"run.gpus_per_worker = {n_gpus}, but this process sees {len(names)} GPUs: lower it, or ask for more"
        )
    return [",".join(names[at : at + n_gpus]) for at in range(0, len(names) - n_gpus + 1, n_gpus)]
