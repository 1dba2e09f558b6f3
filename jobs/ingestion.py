"""The ingestion driver: job to corpus, specs and array metadata, then the shards that are missing.

Run again after any interruption: what is committed stays, what is missing is built.
"""

import time
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from actlake.ingest.models import ModelRef
from actlake.jobs.compaction import Compactor
from actlake.jobs.engines import local
from actlake.jobs.engines.events import Event, ShardAbandoned, ShardCommitted
from actlake.jobs.failures import Failures
from actlake.jobs.jobfile import Job
from actlake.jobs.readiness import Listener, Plan, Ready, check_device, check_engine, make_ready
from actlake.jobs.slices import Slice
from actlake.jobs.work import WorkOrder, available_cpus, device_of, model_options, n_workers, split_store
from actlake.storage.corpus import Corpus
from actlake.storage.errors import ActlakeError, BadInputError, ShardFailedError
from actlake.storage.finish import finish
from actlake.storage.records import read_record
from actlake.storage.stores import Store


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What a run did."""

    dataset: str
    n_rows: int
    n_shards: int
    n_built: int
    nbytes: int
    raw_nbytes: int
    seconds: float
    #: Of all shards, whoever built them.
    n_committed: int


def ingest(
    job: Job,
    *,
    engine: str = "ray",
    address: str | None = None,
    listener: Listener | None = None,
    part: Slice | None = None,
) -> IngestReport:
    """Bring a dataset to what its job asks for; resumes what an earlier run left.

    With ``part`` only that slice of its shards is built, on the local engine: any number of processes may build slices
    of one dataset at any time, and whoever finds it whole writes its summaries.

    Raises ``BadInputError`` and its kin before anything is written where the job cannot be done, and
    ``ShardFailedError``, after finishing all other shards, where some could not be built.
    """
    with ExitStack() as stack:
        _check_slice(part, engine)
        check_engine(engine, address, stack)
        check_device(job, address)
        return _ingest(job, engine, address, _metered(job, engine, listener or Listener(), stack), part)


def _metered(job: Job, engine: str, hear: Listener, stack: ExitStack) -> Listener:
    """Return a listener that also sets Ray's metrics, for a run on Ray."""
    if engine != "ray":
        return hear
    from actlake.jobs.metrics import Metered

    return stack.enter_context(closing(Metered(hear, job)))


def _check_slice(part: Slice | None, engine: str) -> None:
    """Raise ``BadInputError`` for a slice on an engine whose driver hands out all shards."""
    if part is not None and engine != "local":
        raise BadInputError(
            f"--slice {part} is for processes without a driver, and the engine {engine!r} has one: add --engine local, "
            "or leave --slice out and give 'ray' more workers"
        )


def _ingest(job: Job, engine: str, address: str | None, hear: Listener, part: Slice | None) -> IngestReport:
    started = time.perf_counter()
    ready = make_ready(job, engine, address, hear, part=part)
    hear.planned(ready.plan)
    order = _work_order(job, ready.store, ready.corpus, ready.model, ready.plan)
    failed = _build_missing(job, ready, order, engine, address, hear)
    try:
        report = _finish(ready.store, ready.plan, failed, time.perf_counter() - started)
    except ActlakeError as error:
        if not failed:
            raise
        # Most often one cause, such as a full disk, and the shards are what has to be named.
        raise _failed(failed, ready, f"\nthe summaries were not written either: {error}") from error
    if failed:
        raise _failed(failed, ready)
    return report


def _failed(failed: Failures, ready: Ready, also: str = "") -> ShardFailedError:
    headers, corpus = ready.plan.headers, ready.corpus
    text = failed.text(headers, ready.plan.n_shards, corpus)
    return ShardFailedError(text + also, lambda: failed.described(headers, corpus))


def _work_order(job: Job, store: Store, corpus: Corpus, model: ModelRef, plan: Plan) -> WorkOrder:
    workers = n_workers(job)
    return WorkOrder(
        dataset=store.url,
        corpus=corpus.store.url,
        model=str(Path(model.path).resolve()) if Path(model.name).expanduser().is_dir() else model.name,
        revision=model.revision,
        fingerprint=model.fingerprint,
        points=plan.headers["train"].spec.point_names,
        dtype=job.capture.dtype,
        device=device_of(job),
        n_threads=job.run.threads or max(1, available_cpus() // workers),
        void_nonfinite=job.capture.void_nonfinite,
        shard_memory=job.layout.shard_memory,
        n_gpus=job.run.gpus_per_worker,
        model_options=model_options(job),
        storage_options=job.storage_options,
    )


def _build_missing(
    job: Job, ready: Ready, order: WorkOrder, engine: str, address: str | None, hear: Listener
) -> Failures:
    failed, missing = Failures(), ready.plan.missing
    if not missing:
        return failed
    most = min(n_workers(job), len(missing))
    events: Generator[Event, None, None]
    if engine == "local":
        if job.run.threads is None:
            # Never from how much is missing: the number of threads decides the last bits.
            n_here = local.n_workers_here(order, n_workers(job))
            order = replace(order, n_threads=max(1, available_cpus() // n_here))
        events = local.run(order, missing, attempts=job.run.attempts, workers=most)
    else:
        from actlake.jobs.engines import ray_cluster, ray_engine, ray_pool

        if job.run.threads is None and address is not None:
            order = replace(order, n_threads=ray_cluster.threads_each(order))
        options = ray_pool.PoolOptions.of(job.run, most)
        events = ray_engine.run(order, missing, options=options, address=address, note=hear.note)
    # Closed at once where something is raised here: workers must not outlive the run.
    with closing(events), Compactor(ready.store, ready.plan.headers, missing, hear.note) as compactor:
        for event in (_settled(event, ready) for event in events):
            compactor.event(event)
            hear.event(event)
            if isinstance(event, ShardAbandoned):
                failed.add(event)
    return failed


def _settled(event: Event, ready: Ready) -> Event:
    """Return an event; a shard that was given up is committed where its last worker died between commit and word."""
    if not isinstance(event, ShardAbandoned):
        return event
    task, header = event.task, ready.plan.headers[event.task.split]
    try:
        record = read_record(split_store(ready.store, task.split), task.shard)
    except ActlakeError:
        return event
    whole = record.dataset_id == header.spec.dataset_id and record.n_rows >= task.n_rows
    return ShardCommitted(task=task, record=record) if whole else event


def _finish(store: Store, plan: Plan, failed: Failures, seconds: float) -> IngestReport:
    nbytes = raw = n_committed = 0
    for split, header in plan.headers.items():
        place = split_store(store, split)
        manifest = finish(place, header)
        nbytes += manifest.nbytes
        n_committed += len(manifest)
        raw += manifest.n_rows * header.spec.nbytes_per_row
    return IngestReport(
        dataset=store.url,
        n_rows=plan.n_rows,
        n_shards=plan.n_shards,
        n_built=len(plan.missing) - len(failed),
        nbytes=nbytes,
        raw_nbytes=raw,
        seconds=seconds,
        n_committed=n_committed,
    )
