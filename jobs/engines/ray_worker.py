"""The actor of the Ray engine, and what can be wrong where it runs."""

import socket
import threading
from dataclasses import dataclass

import actlake
from actlake.jobs.work import Task, Worker, WorkOrder
from actlake.storage.errors import BadInputError
from actlake.storage.records import ShardRecord


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an actor runs: Ray's id of the node, its name, and its actlake."""

    node: str
    host: str
    version: str


class RayWorker:
    """Builds shards, some at once, and answers ``status`` meanwhile."""

    def __init__(self, order: WorkOrder) -> None:
        # Nothing here fails: an error of a method reaches the driver as it is, one of a constructor as text.
        self._order = order
        self._worker: Worker | None = None
        self._counting = threading.Lock()
        self._n_rows, self._forward_s = 0, 0.0

    def place(self) -> Place:
        """Say where this is: the first call, which is answered once the cluster has room for the actor."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return Place(node=node, host=socket.gethostname(), version=actlake.__version__)

    def start(self) -> int:
        """Load the model and open the corpus; return how many shards it builds at once."""
        if self._order.device.startswith("cuda"):
            _require_gpu()
        self._worker = Worker(self._order)
        return self._worker.n_concurrent

    def build(self, task: Task) -> ShardRecord:
        """Build and commit one shard."""
        assert self._worker is not None
        return self._worker.build(task, self._count)

    def status(self) -> tuple[int, float]:
        """Return the rows captured since the actor started, and the seconds of forward passes that they took."""
        return self._n_rows, self._forward_s

    def _count(self, n_rows: int, forward_s: float) -> None:
        with self._counting:
            self._n_rows += n_rows
            self._forward_s += forward_s


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise BadInputError(
            f"Ray gives workers a GPU on {socket.gethostname()}, but torch finds none there; its image needs the CUDA "
            "build of torch and the driver, or set run.device = 'cpu'"
        )
