"""What a worker does, in plain Python: open model and corpus once, then build the shards it is handed.

The engines (this process, or Ray) only decide where and when; see ``actlake.jobs.engines``.
"""

import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actlake.storage.errors import ModelAccessError
from actlake.storage.records import Provenance, ShardRecord
from actlake.storage.stores import Store

if TYPE_CHECKING:
    from actlake.ingest.build import ShardBuilder
    from actlake.ingest.capture import Capture
    from actlake.ingest.loading import LoadedModel
    from actlake.ingest.models import ModelRef
    from actlake.jobs.jobfile import Job

#: Shards that a worker has in the making at most: one runs through the model while the one before it is stored.
SHARDS_IN_FLIGHT = 2


@dataclass(frozen=True, kw_only=True)
class ModelOrder:
    """What a worker needs to have the model, on any machine; pickles."""

    model: str
    revision: str | None
    fingerprint: str
    dtype: str
    device: str
    n_threads: int
    n_gpus: int = 1
    model_options: Mapping[str, Any] = field(default_factory=dict)
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class WorkOrder(ModelOrder):
    """All that a worker needs to build shards; ``shard_memory`` are the bytes of one at most, None: all it wants."""

    dataset: str
    corpus: str
    points: tuple[str, ...]
    void_nonfinite: bool = False
    shard_memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One shard of one split to build."""

    split: str
    shard: int
    n_rows: int

    def __str__(self) -> str:
        return f"{self.split} shard {self.shard}"


def split_store(dataset: Store, split: str) -> Store:
    """Return where a split's dataset lies: the training split at the root, the held-out one below it."""
    return dataset if split == "train" else dataset.child("heldout")


def open_model(order: ModelOrder, *, head: bool = False) -> "tuple[ModelRef, LoadedModel]":
    """Load a worker's model; raise ``ModelAccessError`` where its files are not those that the job was planned with."""
    import torch

    from actlake.ingest.loading import load_model
    from actlake.ingest.models import resolve_model

    torch.set_num_threads(order.n_threads)
    ref = resolve_model(order.model, revision=order.revision)
    if ref.fingerprint != order.fingerprint:
        raise ModelAccessError(
            f"{order.model} has weights {ref.fingerprint[:12]}... on {socket.gethostname()}, the job was planned "
            f"with {order.fingerprint[:12]}...; give every machine the same files"
        )
    return ref, load_model(ref, dtype=order.dtype, device=order.device, head=head, **order.model_options)


class Worker:
    """Builds shards; the model is loaded once.

    Thread-safe. ``n_concurrent`` is how many shards it has in the making at most: while the batches of one run through
    the model, the one before it is encoded and stored.
    """

    n_concurrent = SHARDS_IN_FLIGHT

    def __init__(self, order: WorkOrder) -> None:
        from actlake.ingest.workshop import Workshop
        from actlake.storage.corpus import Corpus

        _, self._model = open_model(order)
        self._order = order
        self._made_by = Provenance(host=socket.gethostname(), device=order.device, software=self._model.describe())
        self._corpus = Corpus.open(Store(order.corpus, order.storage_options))
        self._workshop = Workshop(order.n_threads, n_shards=self.n_concurrent)
        self._forward = self._capture(order.points)
        self._builders: dict[str, ShardBuilder] = {}
        self._lock = threading.Lock()

    def build(self, task: Task, on_rows: Callable[[int, float], None] = lambda n_rows, forward_s: None) -> ShardRecord:
        """Build and commit one shard; ``on_rows`` hears of each batch: its rows, and the seconds of its forward pass.

        Up to ``n_concurrent`` threads may call this at once; any other waits for one of them.
        """
        import torch

        # OpenMP counts threads for each of ours anew, and their number decides the last bits.
        torch.set_num_threads(self._order.n_threads)
        with self._lock:
            if task.split not in self._builders:
                self._builders[task.split] = self._builder(task.split)
            builder = self._builders[task.split]
        return builder.build(task.shard, on_rows)

    def _builder(self, split: str) -> "ShardBuilder":
        from actlake.ingest.build import ShardBuilder

        order = self._order
        return ShardBuilder(
            store=split_store(Store(order.dataset, order.storage_options), split),
            corpus=self._corpus,
            forward=self._forward,
            device=order.device,
            made_by=self._made_by,
            n_threads=order.n_threads,
            void_nonfinite=order.void_nonfinite,
            shard_memory=order.shard_memory,
            narrow=self._capture,
            workshop=self._workshop,
        )

    def _capture(self, points: Sequence[str]) -> "Capture":
        from actlake.ingest.capture import Capture

        return Capture(self._model, points)


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of(job: "Job") -> str:
    """Return where the job's models run."""
    if job.run.device != "auto":
        return job.run.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def n_workers(job: "Job") -> int:
    """Return how many workers the job asks for, by default one for each GPU, or one."""
    if job.run.most_workers is not None:
        return job.run.most_workers
    if not device_of(job).startswith("cuda"):
        # One worker with all threads: more of them would only multiply the model and the shard memory.
        return 1
    import torch

    return max(1, torch.cuda.device_count() // job.run.gpus_per_worker)


def model_options(job: "Job") -> dict[str, Any]:
    """Return how the job wants its model loaded."""
    over_several = "auto" if job.run.gpus_per_worker > 1 else None
    return {
        "attn_implementation": job.run.attn_implementation,
        "compiled": job.run.compile,
        "device_map": job.run.device_map or over_several,
    }
