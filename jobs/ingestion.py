"""The ingestion driver: job to corpus, specs and array metadata, then the shards that are missing.

Run again after any interruption: what is committed stays, what is missing is built.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.compute as pc

from actlake.ingest.extras import needs
from actlake.ingest.models import (
    ModelRef,
    ModelShape,
    load_tokenizer,
    model_shape,
    resolve_model,
)
from actlake.jobs.corpus import (
    CorpusListener,
    corpus_engine,
    count_rows,
    open_corpus,
    require_engine,
    stored_corpus_spec,
)
from actlake.jobs.engines import local
from actlake.jobs.engines.events import Event, ShardAbandoned
from actlake.jobs.jobfile import Job
from actlake.jobs.plan.budget import check
from actlake.jobs.plan.gather import plan_corpus
from actlake.jobs.plan.machine import HERE
from actlake.jobs.plan.summary import paragraph
from actlake.jobs.planning import heldout_rows, plan_batching, plan_keep, plan_spec, special_ids
from actlake.jobs.work import (
    Task,
    WorkOrder,
    available_cpus,
    device_of,
    model_options,
    n_workers,
    split_store,
)
from actlake.storage.corpus import Corpus
from actlake.storage.errors import BadInputError, JobFileError, NotFoundError, ShardFailedError, SpecMismatchError
from actlake.storage.finish import finish
from actlake.storage.header import Header, prepare
from actlake.storage.manifest import Manifest
from actlake.storage.rowspace import KeepRule
from actlake.storage.spec import SPLITS, DatasetSpec
from actlake.storage.stores import Store, relative_url, resolve_url

#: Tokens of a corpus whose rows Ray counts: minutes of reading for one process.
COUNT_TOKENS = 2_000_000_000

#: Protocols whose first folder is a bucket.
_BUCKETS = ("gs", "gcs", "s3", "s3a", "az", "abfs")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run has to do: all shards of both splits, and those still missing."""

    headers: dict[str, Header]
    missing: tuple[Task, ...]

    @property
    def n_rows(self) -> int:
        return sum(header.n_rows for header in self.headers.values())

    @property
    def n_shards(self) -> int:
        return sum(header.spec.row_space(header.n_rows).n_shards for header in self.headers.values())

    @property
    def n_missing_rows(self) -> int:
        return sum(task.n_rows for task in self.missing)


class Listener(CorpusListener):
    """Hears how a run goes; this one keeps quiet."""

    def planned(self, plan: Plan) -> None:
        """The shards are about to be built."""

    def event(self, event: Event) -> None:
        """An engine's report."""


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


def ingest(
    job: Job, *, engine: str = "ray", address: str | None = None, listener: Listener | None = None
) -> IngestReport:
    """Bring a dataset to what its job asks for; resumes what an earlier run left.

    Raises ``BadInputError`` and its kin before anything is written where the job cannot be done, and
    ``ShardFailedError``, after finishing all other shards, where some could not be built.
    """
    with ExitStack() as stack:
        _check_engine(job, engine, address, stack)
        return _ingest(job, engine, address, listener or Listener())


def _ingest(job: Job, engine: str, address: str | None, hear: Listener) -> IngestReport:
    started = time.perf_counter()
    store = Store(job.dataset, job.storage_options)
    store.require_writable()
    if store.protocol in _BUCKETS and "/" not in store.root.strip("/"):
        raise JobFileError(f"dataset = {job.dataset!r} is a whole bucket; name a folder in it, e.g. '{store.url}/demo'")
    shape = model_shape(job.model, revision=job.revision)
    _check_context(job, shape)
    _check_destination(store, job, shape)
    model = resolve_model(job.model, revision=job.revision, notify=hear.note)
    tokenizer = load_tokenizer(model)
    keep = plan_keep(job, special_ids(tokenizer), shape.vocab_size)
    corpus = open_corpus(job, model, tokenizer, hear, engine=engine, address=address)
    _count_rows(corpus, keep, engine, address)
    specs = _specs(job, store, model, shape, corpus, keep)
    _check_estimate(job, specs["train"], shape, corpus, address, hear)
    plan = _prepare(job, store, corpus, specs, hear)
    hear.planned(plan)
    failed = _build_missing(job, plan, _work_order(job, store, corpus, model, plan), engine, address, hear)
    report = _finish(store, plan, failed, time.perf_counter() - started)
    if failed:
        raise ShardFailedError(_failures(failed, plan))
    return report


def _check_engine(job: Job, engine: str, address: str | None, stack: ExitStack) -> None:
    """Find out what is not installed, not there or not reachable before anything is written."""
    require_engine(engine)
    if engine == "ray":
        from actlake.jobs.engines import ray_engine

        # On this machine Ray starts later, once there is something to build.
        stack.enter_context(nullcontext() if address is None else ray_engine.cluster(address, n_cpus=0))
    with needs("ingest", "building a dataset"):
        import torch
    if address is None and device_of(job).startswith("cuda") and not torch.cuda.is_available():
        raise JobFileError(f"run.device = {job.run.device!r}, but torch finds no GPU here; use 'auto' or 'cpu'")


def _check_context(job: Job, shape: ModelShape) -> None:
    if job.corpus.context_length > shape.context_length:
        raise JobFileError(
            f"corpus.context_length = {job.corpus.context_length} is longer than {job.model}'s {shape.context_length}; "
            f"use {shape.context_length} or less"
        )


def _check_destination(store: Store, job: Job, shape: ModelShape) -> None:
    """Refuse another spec at the URL before any work is done; ids that need work are compared in ``prepare``."""
    unknown = ModelRef(name=stored_name(job.model), revision=None, path="", fingerprint="")
    # Raises for unknown hook points, and for sizes that do not fit or do not divide.
    wanted = plan_spec(job, model=unknown, shape=shape, corpus_id="", keep=KeepRule(), split="train")
    try:
        header = Header.read(store)
    except NotFoundError:
        return
    stored = header.spec
    known = {name: getattr(stored, name) for name in ("model_revision", "model_fingerprint", "corpus_id", "keep")}
    if job.capture.batching == "auto":
        known["batching"] = stored.batching
    stored.require_equal(replace(wanted, **known), store.url)
    try:
        corpus = Corpus.open(resolve_url(header.corpus, store, [job.corpus.url] if job.corpus.url else []))
    except NotFoundError:
        # Removed, so it is built anew; ``prepare`` refuses it unless it is the same.
        return
    if lines := corpus.spec.differences(stored_corpus_spec(job, corpus), places=False):
        raise SpecMismatchError(
            f"{store.url} was made from another corpus:\n  " + "\n  ".join(lines) + "\nchoose another 'dataset' URL"
        )


def _count_rows(corpus: Corpus, keep: KeepRule, engine: str, address: str | None) -> None:
    """Make the row indexes of a large corpus on the engine; those of a small one are made when they are asked for."""
    if engine == "local" or sum(info.n_tokens for info in corpus.splits.values()) < COUNT_TOKENS:
        return
    with corpus_engine(engine, address) as chosen:
        for split in SPLITS:
            count_rows(corpus, split, keep, chosen)


def stored_name(model: str) -> str:
    """Return the model's name as a spec keeps it: a local directory by its last part, for no path enters a hash."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _specs(
    job: Job, store: Store, model: ModelRef, shape: ModelShape, corpus: Corpus, keep: KeepRule
) -> dict[str, DatasetSpec]:
    named = replace(model, name=stored_name(model.name))
    spec = plan_spec(job, model=named, shape=shape, corpus_id=corpus.corpus_id, keep=keep, split="train")
    try:
        stored = Header.read(store).spec
    except NotFoundError:
        stored = None
    batching = plan_batching(job, spec, corpus, stored)
    return {split: replace(spec, split=split, batching=batching) for split in SPLITS}


def _check_estimate(
    job: Job, spec: DatasetSpec, shape: ModelShape, corpus: Corpus, address: str | None, hear: Listener
) -> None:
    """Say what the run takes; raise ``JobFileError`` where that does not fit the budget or this machine's memory."""
    if corpus.row_index("train", spec.keep).n_rows == 0:
        return  # ``_prepare`` says why.
    found = plan_corpus(job, spec, shape, corpus)
    # Workers elsewhere are known by ``[plan]`` alone.
    check(found, memory=address is None or job.plan.machine != HERE)
    if found.setting.n_rows_left != 0:
        hear.note(paragraph(found))


def _prepare(job: Job, store: Store, corpus: Corpus, specs: dict[str, DatasetSpec], hear: Listener) -> Plan:
    headers: dict[str, Header] = {}
    for split, spec in specs.items():
        available = corpus.row_index(split, spec.keep).n_rows
        wanted = available if job.max_rows is None else job.max_rows
        if split == "heldout" and job.max_rows is not None:
            wanted = heldout_rows(job.max_rows, job.corpus.holdout)
        if split == "train" and available == 0:
            raise BadInputError(_nothing_kept(corpus, spec.keep))
        if split == "train" and wanted > available:
            hear.note(f"the corpus has {available:,} rows, max_rows asks for {wanted:,}: building all of it")
        if min(wanted, available) == 0:
            hear.note(f"no held-out rows: none of the documents falls into holdout = {job.corpus.holdout}")
            continue
        place = split_store(store, split)
        header = Header(
            spec=spec,
            n_rows=min(wanted, available),
            corpus=relative_url(corpus.store, place),
            segments=corpus.chain if len(corpus.chain) > 1 else (),
        )
        headers[split] = prepare(place, header)
    missing = tuple(task for split, header in headers.items() for task in _missing(store, split, header))
    return Plan(headers=headers, missing=missing)


def _nothing_kept(corpus: Corpus, keep: KeepRule) -> str:
    counts = ", ".join(f"{n:,} of {role}" for role, n in corpus.tokens_by_role("train").items())
    wanted = f"capture.keep asks for {', '.join(keep.roles)}; " if keep.roles else ""
    return (
        f"the keep rule keeps no token of the corpus: {wanted}its tokens are {counts}; check capture.keep, exclude and "
        "skip_first"
    )


def _missing(store: Store, split: str, header: Header) -> Iterator[Task]:
    table = Manifest.load(split_store(store, split), header.n_rows).table
    own = table.filter(pc.field("dataset_id") == header.spec.dataset_id)
    committed = dict(zip(own["shard"].to_pylist(), own["n_rows"].to_pylist(), strict=True))
    space = header.spec.row_space(header.n_rows)
    for shard in range(space.n_shards):
        if committed.get(shard, 0) < (n_rows := len(space.rows_of(shard))):
            yield Task(split=split, shard=shard, n_rows=n_rows)


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
        n_gpus=job.run.gpus_per_worker,
        model_options=model_options(job),
        storage_options=job.storage_options,
    )


def _build_missing(
    job: Job, plan: Plan, order: WorkOrder, engine: str, address: str | None, hear: Listener
) -> list[ShardAbandoned]:
    if not plan.missing:
        return []
    if engine == "local":
        events = local.run(order, plan.missing, attempts=job.run.attempts)
    else:
        from actlake.jobs.engines import ray_engine

        workers = min(n_workers(job), len(plan.missing))
        events = ray_engine.run(order, plan.missing, attempts=job.run.attempts, workers=workers, address=address)
    failed = []
    for event in events:
        hear.event(event)
        if isinstance(event, ShardAbandoned):
            failed.append(event)
    return failed


def _finish(store: Store, plan: Plan, failed: list[ShardAbandoned], seconds: float) -> IngestReport:
    nbytes = raw = 0
    for split, header in plan.headers.items():
        place = split_store(store, split)
        manifest = finish(place, header)
        nbytes += manifest.nbytes
        raw += manifest.n_rows * header.spec.nbytes_per_row
    return IngestReport(
        dataset=store.url,
        n_rows=plan.n_rows,
        n_shards=plan.n_shards,
        n_built=len(plan.missing) - len(failed),
        nbytes=nbytes,
        raw_nbytes=raw,
        seconds=seconds,
    )


def _failures(failed: list[ShardAbandoned], plan: Plan) -> str:
    lines = [f"{len(failed)} of {plan.n_shards} shards could not be built; the others are committed."]
    for item in failed[:20]:
        space = plan.headers[item.task.split].spec.row_space(plan.headers[item.task.split].n_rows)
        rows = space.rows_of(item.task.shard)
        lines.append(
            f"  {item.task}, rows {rows.start:,}..{rows.stop - 1:,}: {type(item.error).__name__}: {item.error}"
        )
    lines.append("fix the cause and run 'actlake ingest' again: it builds just what is missing")
    return "\n".join(lines)
