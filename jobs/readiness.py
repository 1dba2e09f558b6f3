"""What comes before the first shard: corpus, row indexes, specs and array metadata, and the shards that are missing."""

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from actlake.ingest.extras import needs
from actlake.ingest.models import ModelRef, ModelShape, load_tokenizer, model_shape, resolve_model
from actlake.jobs.corpus import (
    CorpusListener,
    corpus_engine,
    count_rows,
    open_corpus,
    require_engine,
    stored_corpus_spec,
)
from actlake.jobs.engines.events import Event
from actlake.jobs.jobfile import Job
from actlake.jobs.missing import MissingShards
from actlake.jobs.plan.budget import check
from actlake.jobs.plan.gather import plan_corpus
from actlake.jobs.plan.machine import HERE
from actlake.jobs.plan.summary import paragraph
from actlake.jobs.planning import heldout_rows, plan_batching, plan_keep, plan_spec, require_context, special_ids
from actlake.jobs.slices import Slice
from actlake.jobs.work import device_of, split_store
from actlake.storage.corpus import Corpus
from actlake.storage.errors import BadInputError, JobFileError, NotFoundError, SpecMismatchError
from actlake.storage.header import Header, prepare
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
    missing: MissingShards
    #: The part of the missing shards that this run builds; None: all of them.
    part: Slice | None = None

    @property
    def n_rows(self) -> int:
        return sum(header.n_rows for header in self.headers.values())

    @property
    def n_shards(self) -> int:
        return sum(header.spec.row_space(header.n_rows).n_shards for header in self.headers.values())

    @property
    def n_missing_rows(self) -> int:
        return self.missing.n_rows


class Listener(CorpusListener):
    """Hears how a run goes; this one keeps quiet."""

    def planned(self, plan: Plan) -> None:
        """The shards are about to be built."""

    def event(self, event: Event) -> None:
        """An engine's report."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A dataset whose shards may be built, and what they are built from."""

    store: Store
    corpus: Corpus
    model: ModelRef
    plan: Plan


def make_ready(
    job: Job,
    engine: str,
    address: str | None,
    hear: Listener,
    *,
    part: Slice | None = None,
    here: bool = True,
) -> Ready:
    """Do what comes before the first shard: weights, corpus, row indexes, specs and array metadata.

    ``here`` says that the workers run on this machine, unless an ``address`` says that they do not.
    """
    store = Store(job.dataset, job.storage_options)
    store.require_writable()
    if store.protocol in _BUCKETS and "/" not in store.root.strip("/"):
        raise JobFileError(f"dataset = {job.dataset!r} is a whole bucket; name a folder in it, e.g. '{store.url}/demo'")
    shape = model_shape(job.model, revision=job.revision)
    require_context(job, shape)
    _check_destination(store, job, shape)
    model = resolve_model(job.model, revision=job.revision, notify=hear.note)
    tokenizer = load_tokenizer(model)
    keep = plan_keep(job, special_ids(tokenizer), shape.vocab_size)
    corpus = open_corpus(job, model, tokenizer, hear, engine=engine, address=address)
    _count_rows(corpus, keep, engine, address)
    specs = _specs(job, store, model, shape, corpus, keep)
    _check_estimate(job, specs["train"], shape, corpus, hear, here=here and address is None, told=here and part is None)
    plan = _prepare(job, store, corpus, specs, hear)
    if part is not None:
        plan = replace(plan, missing=plan.missing.slice(part.number, part.count), part=part)
    return Ready(store=store, corpus=corpus, model=model, plan=plan)


def check_engine(engine: str, address: str | None, stack: ExitStack) -> None:
    """Find out what is not installed, not there or not reachable before anything is written."""
    require_engine(engine, address)
    if engine == "ray":
        from actlake.jobs.engines import ray_cluster

        # On this machine Ray starts later, once there is something to build.
        stack.enter_context(nullcontext() if address is None else ray_cluster.cluster(address, n_cpus=0))
    with needs("ingest", "building a dataset"):
        import torch  # noqa: F401 - asked for before the work starts


def check_device(job: Job, address: str | None) -> None:
    """Raise ``JobFileError`` where this machine lacks the device that the job wants.

    With an ``address``, which must be connected to, where 'auto' would leave the GPUs of that cluster idle.
    """
    if address is not None:
        _check_cluster_device(job)
    else:
        _check_device_here(job)


def _check_device_here(job: Job) -> None:
    import torch

    device, n_gpus = device_of(job), torch.cuda.device_count()
    if not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise JobFileError(f"run.device = {job.run.device!r}, but torch finds no GPU here; use 'auto' or 'cpu'")
    wanted = max(int(device.partition(":")[2] or 0) + 1, job.run.gpus_per_worker)
    if wanted > n_gpus:
        raise JobFileError(
            f"run.device = {job.run.device!r} with run.gpus_per_worker = {job.run.gpus_per_worker} wants {wanted} "
            f"GPUs, torch finds {n_gpus} here; ask for more, or lower it"
        )


def _check_cluster_device(job: Job) -> None:
    from actlake.jobs.engines import ray_cluster

    n_gpus = sum(node["Resources"].get("GPU", 0) for node in ray_cluster.nodes())
    if job.run.device == "auto" and n_gpus and device_of(job) == "cpu":
        raise JobFileError(
            "run.device = 'auto' is what the driver's machine has, and that has no GPU, while the cluster has "
            f"{n_gpus:g}: say 'cuda', with run.workers, or 'cpu'"
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
    job: Job, spec: DatasetSpec, shape: ModelShape, corpus: Corpus, hear: Listener, *, here: bool, told: bool
) -> None:
    """Say what the run takes, if it is to be told; raise ``JobFileError`` where that does not fit budget or memory."""
    if corpus.row_index("train", spec.keep).n_rows == 0:
        return  # ``_prepare`` says why.
    found = plan_corpus(job, spec, shape, corpus)
    # Workers elsewhere are known by ``[plan]`` alone.
    check(found, memory=here or job.plan.machine != HERE)
    if told and found.setting.n_rows_left != 0:
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
    return Plan(headers=headers, missing=MissingShards.find(store, headers))


def _nothing_kept(corpus: Corpus, keep: KeepRule) -> str:
    counts = ", ".join(f"{n:,} of {role}" for role, n in corpus.tokens_by_role("train").items())
    wanted = f"capture.keep asks for {', '.join(keep.roles)}; " if keep.roles else ""
    return (
        f"the keep rule keeps no token of the corpus: {wanted}its tokens are {counts}; check capture.keep, exclude and "
        "skip_first"
    )
