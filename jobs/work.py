"""What a worker does, in plain Python: open model and corpus once, then build the shards it is handed.

The engines (this process, or Ray) only decide where and when; see ``actlake.jobs.engines``.
"""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actlake.storage.errors import ModelAccessError
from actlake.storage.records import Provenance, ShardRecord
from actlake.storage.stores import Store

if TYPE_CHECKING:
    from actlake.ingest.loading import LoadedModel
    from actlake.ingest.models import ModelRef
    from actlake.jobs.jobfile import Job


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
    """All that a worker needs to build shards."""

    dataset: str
    corpus: str
    points: tuple[str, ...]
    void_nonfinite: bool = False


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
    """Builds shards; the model is loaded once."""

    def __init__(self, order: WorkOrder) -> None:
        from actlake.ingest.build import ShardBuilder
        from actlake.ingest.capture import Capture
        from actlake.storage.corpus import Corpus

        _, model = open_model(order)
        self._forward = Capture(model, order.points)
        self._corpus = Corpus.open(Store(order.corpus, order.storage_options))
        self._dataset = Store(order.dataset, order.storage_options)
        self._device, self._n_threads, self._void_nonfinite = order.device, order.n_threads, order.void_nonfinite
        self._made_by = Provenance(host=socket.gethostname(), device=order.device, software=model.describe())
        self._builder_type = ShardBuilder
        self._builders: dict[str, ShardBuilder] = {}

    def build(self, task: Task, on_rows: Callable[[int], None] = lambda n_rows: None) -> ShardRecord:
        """Build and commit one shard."""
        if task.split not in self._builders:
            # One at a time: a builder holds the memory of a whole shard.
            self._builders = {
                task.split: self._builder_type(
                    store=split_store(self._dataset, task.split),
                    corpus=self._corpus,
                    forward=self._forward,
                    device=self._device,
                    made_by=self._made_by,
                    n_threads=self._n_threads,
                    void_nonfinite=self._void_nonfinite,
                )
            }
        return self._builders[task.split].build(task.shard, on_rows)


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
    if job.run.workers is not None:
        return job.run.workers
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
