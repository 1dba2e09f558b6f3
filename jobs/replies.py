"""Replies on the workers: who generates a corpus's missing batches, in this process or on Ray's actors.

A batch is one object with a determined name, put when it is whole. So a run that was killed left just whole batches,
the next one generates the others, and a batch that two workers make is made no worse.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actlake.ingest.models import ModelRef
from actlake.ingest.replies import ReplyBatch, write_replies
from actlake.jobs.jobfile import Job
from actlake.jobs.work import ModelOrder, available_cpus, device_of, model_options, n_workers, open_model
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.stores import Store


@dataclass(frozen=True, kw_only=True)
class ReplyOrder(ModelOrder):
    """All that a worker needs to generate replies for a corpus, on any machine; pickles."""

    corpus: str
    spec: CorpusSpec


class ReplyWorker:
    """Generates batches of replies; the model is loaded once, at the first."""

    def __init__(self, order: ReplyOrder) -> None:
        self._order = order
        self._store = Store(order.corpus, order.storage_options)
        self._generate: Callable[[ReplyBatch], Any] | None = None

    def reply(self, batch: ReplyBatch) -> int:
        """Store a batch, unless it is there; return how many replies it has."""
        if not self._store.exists(batch.key):
            self._generate = self._generate or self._start()
            write_replies(self._store, batch, self._generate(batch), self._order.spec.metadata)
        return len(batch.wanted)

    def _start(self) -> Callable[[ReplyBatch], Any]:
        from actlake.ingest.chat_tokens import ChatTokeniser
        from actlake.ingest.generating import ReplyGenerator
        from actlake.ingest.models import load_tokenizer

        ref, model = open_model(self._order, head=True)
        tokenizer = load_tokenizer(ref)
        return ReplyGenerator(model, tokenizer, ChatTokeniser.of(tokenizer, self._order.spec).format)


def reply_order(job: Job, corpus: Store, spec: CorpusSpec, model: ModelRef) -> ReplyOrder:
    """Return what the job's workers need; what lies between hook points is not compiled for single tokens."""
    local = Path(model.name).expanduser().is_dir()
    return ReplyOrder(
        corpus=corpus.url,
        spec=spec,
        model=str(Path(model.path).resolve()) if local else model.name,
        revision=model.revision,
        fingerprint=model.fingerprint,
        dtype=job.capture.dtype,
        device=device_of(job),
        n_threads=job.run.threads or max(1, available_cpus() // n_workers(job)),
        n_gpus=job.run.gpus_per_worker,
        model_options=model_options(job) | {"compiled": False},
        storage_options=job.storage_options,
    )


def reply_locally(order: ReplyOrder, batches: Iterator[ReplyBatch]) -> Iterator[int]:
    """Generate batches in this process; yield how many replies each has."""
    return map(ReplyWorker(order).reply, batches)


def reply_on_ray(
    order: ReplyOrder, batches: Iterator[ReplyBatch], *, attempts: int, workers: int, address: str | None
) -> Iterator[int]:
    """Generate batches on actors, one call in flight for each; yield how many replies each has.

    A batch whose worker dies is made again by another, up to ``attempts`` times in all. Errors are raised as they were.
    """
    from actlake.jobs.engines import ray_cluster, ray_engine

    if order.device.startswith("cuda"):
        # Ray shows each actor its own GPUs alone, from the first.
        order = replace(order, device="cuda")
    with ray_cluster.cluster(address, n_cpus=workers * order.n_threads):
        yield from ray_engine.calls(
            ReplyWorker, order, "reply", batches, attempts=attempts, workers=workers, grows=address is not None
        )
