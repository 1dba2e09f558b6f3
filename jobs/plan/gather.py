"""Finds out what a plan needs to know: the spec, the corpus or the sources, what is committed, the machine.

Reads configs, corpora and manifests alone: no weights are fetched or loaded, and nothing is written but the row index
of a corpus that lacks it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute as pc

from actlake.ingest.at_hand import tokenizer_at_hand
from actlake.ingest.models import ModelRef, ModelShape, model_shape
from actlake.jobs.jobfile import Job
from actlake.jobs.plan import workload as work
from actlake.jobs.plan.estimate import Estimate, Setting, estimate
from actlake.jobs.plan.machine import HERE, Machine, choose_machine
from actlake.jobs.plan.rates import Rates, read_rates
from actlake.jobs.plan.sources import measure_text, source_tokens
from actlake.jobs.plan.workload import Workload
from actlake.jobs.planning import plan_batching, plan_keep, plan_spec, require_context, special_ids
from actlake.storage.corpus import Corpus
from actlake.storage.errors import BadInputError, JobFileError, NotFoundError, SourceError
from actlake.storage.header import Header
from actlake.storage.manifest import Manifest
from actlake.storage.rowspace import KeepRule
from actlake.storage.spec import SPLITS, DatasetSpec
from actlake.storage.stores import Store, resolve_url


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a sample or an earlier run measured: ratios by hook point, tokens a second of one worker."""

    ratios: Mapping[str, float]
    tokens_per_s: float | None
    source: str


def plan_job(
    job: Job, *, rates: Rates | None = None, measured: Measured | None = None, offline: bool = False
) -> Estimate:
    """Plan a job from its file: with its corpus where that is built, with what is known where it is not.

    ``offline`` looks at no store and no source: the destination counts as empty, ``max_rows`` says how much there is.

    Raises what a job that cannot be done raises, and ``JobFileError`` where neither a corpus, nor sources, nor
    ``max_rows`` says how much there is.
    """
    rates = rates or read_rates()
    shape = model_shape(job.model, revision=job.revision)
    require_context(job, shape)
    store = Store(job.dataset, job.storage_options)
    spec = plan_spec(job, model=_unread(job), shape=shape, corpus_id="", keep=KeepRule(), split="train")
    header = None if offline else _header(store)
    tokenizer = None if offline else tokenizer_at_hand(job.model, job.revision)
    spec = replace(spec, keep=_keep(job, header, tokenizer, shape))
    corpus = _corpus(job, store, header, tokenizer)
    if corpus is not None:
        spec = replace(spec, batching=plan_batching(job, spec, corpus, None if header is None else header.spec))
    if offline:
        found = _from_limits(job, spec, rates, "offline")
    else:
        found = _from_sources(job, spec, tokenizer, rates) if corpus is None else work.of_corpus(job, spec, corpus)
    manifests = [] if offline else _manifests(store)
    return estimate(job, spec, shape, found, _setting(job, spec, store, rates, found, manifests, measured))


def plan_corpus(job: Job, spec: DatasetSpec, shape: ModelShape, corpus: Corpus) -> Estimate:
    """Plan a job whose corpus is open: what ``actlake ingest`` does before it writes."""
    rates, store = read_rates(), Store(job.dataset, job.storage_options)
    found = work.of_corpus(job, spec, corpus)
    return estimate(job, spec, shape, found, _setting(job, spec, store, rates, found, _manifests(store), None))


def _setting(
    job: Job,
    spec: DatasetSpec,
    store: Store,
    rates: Rates,
    found: Workload,
    manifests: Sequence[Manifest],
    measured: Measured | None,
) -> Setting:
    """Return what else a plan reckons with: machine, prices, ratios, and the rows that are committed."""
    machine = choose_machine(job.plan, rates, device=job.run.device)
    if measured is None and manifests and manifests[0].n_rows:
        measured = _committed(manifests[0], spec)
    ratios = {} if measured is None else {k: v for k, v in measured.ratios.items() if spec.codec.name != "none"}
    tokens_per_s, tokens_from = job.plan.tokens_per_s, "plan.tokens_per_s"
    if tokens_per_s is None and measured is not None and machine.name == HERE:
        tokens_per_s, tokens_from = measured.tokens_per_s, measured.source
    left = sum(found.n_rows.values()) - sum(manifest.n_rows for manifest in manifests)
    return Setting(
        machine=machine,
        store_name=rates.store(store.protocol)[0],
        rates=rates,
        ratios=ratios,
        ratios_from=rates.sources[f"ratios.{spec.dtype}"] if measured is None else measured.source,
        tokens_per_s=tokens_per_s,
        tokens_from=None if tokens_per_s is None else tokens_from,
        n_rows_left=max(0, left) if manifests else None,
        widened=_widened(spec, machine),
    )


def _unread(job: Job) -> ModelRef:
    """Return a model whose weights are not looked at."""
    return ModelRef(name=job.model, revision=job.revision, path="", fingerprint="")


def _header(store: Store) -> Header | None:
    try:
        return Header.read(store)
    except NotFoundError:
        return None


def _keep(job: Job, header: Header | None, tokenizer: Any, shape: ModelShape) -> KeepRule:
    if header is not None:
        return header.spec.keep
    # Without a tokenizer no ids are known; that BOS is no row is reckoned with all the same.
    return KeepRule() if tokenizer is None else plan_keep(job, special_ids(tokenizer), shape.vocab_size)


def corpus_of(job: Job, tokenizer: Any) -> Corpus | None:
    """Return the job's corpus where it is built, None where it is not."""
    store = Store(job.dataset, job.storage_options)
    return _corpus(job, store, _header(store), tokenizer)


def _corpus(job: Job, store: Store, header: Header | None, tokenizer: Any) -> Corpus | None:
    """Return the job's corpus where it is built and the rows in it can be counted."""
    if header is not None:
        place = resolve_url(header.corpus, store, [job.corpus.url] if job.corpus.url else [])
    elif tokenizer is None or (job.corpus.replies is not None and job.corpus.url is None):
        # Where replies lie, the fingerprint of the model's weights says, which are not read for a plan.
        return None
    elif job.corpus.url is not None:
        place = Store(job.corpus.url, job.storage_options)
    else:
        # The driver plans each run, so it imports this module.
        from actlake.jobs.corpus import UNKNOWN, corpus_spec

        place = resolve_url(f"../corpora/{corpus_spec(job, tokenizer, UNKNOWN).definition_id}", store)
    try:
        return Corpus.open(place)
    except NotFoundError:
        return None


def _from_sources(job: Job, spec: DatasetSpec, tokenizer: Any, rates: Rates) -> Workload:
    """Reckon from the sizes of the sources, or from ``max_rows`` where they cannot be listed."""
    try:
        listed = source_tokens(job, rates, measure_text(job, tokenizer))
    except (SourceError, BadInputError, OSError) as error:
        return _from_limits(job, spec, rates, f"the sources cannot be listed: {error}")
    return work.assumed(
        job, spec, n_text_tokens=listed.n_tokens, document_tokens=listed.document_tokens, known_from=listed.known_from
    )


def _from_limits(job: Job, spec: DatasetSpec, rates: Rates, reason: str) -> Workload:
    """Reckon from ``max_rows`` or ``corpus.max_tokens``; ``JobFileError`` where the job has neither."""
    if job.max_rows is None and job.corpus.max_tokens is None:
        raise JobFileError(f"how much there is cannot be told ({reason}); give max_rows, or make the sources readable")
    name = "max_rows" if job.max_rows is not None else "corpus.max_tokens"
    return work.assumed(
        job,
        spec,
        n_text_tokens=None,
        document_tokens=rates.tokens_per_document,
        known_from=f"{name} ({reason})",
    )


def _manifests(store: Store) -> list[Manifest]:
    return [manifest for split in SPLITS if (manifest := _manifest(store, split)) is not None]


def _manifest(store: Store, split: str) -> Manifest | None:
    place = store if split == "train" else store.child("heldout")
    header = _header(place)
    return None if header is None else Manifest.load(place, header.n_rows)


def _committed(manifest: Manifest, spec: DatasetSpec) -> Measured:
    """Return what the committed shards say of those to come."""
    stored, arrays = manifest.nbytes_by_array(), spec.arrays()
    made = manifest.columns("n_tokens", "forward_s")
    n_tokens, forward_s = (pc.sum(made[name]).as_py() or 0 for name in ("n_tokens", "forward_s"))
    return Measured(
        ratios={
            name: manifest.n_rows * a.nbytes_per_row / stored[name] for name, a in arrays.items() if stored.get(name)
        },
        tokens_per_s=n_tokens / forward_s if forward_s else None,
        source=f"{manifest.n_rows:,} committed rows",
    )


def _widened(spec: DatasetSpec, machine: Machine) -> bool:
    """Say whether workers hold linear layers as float32: on CPUs without bfloat16, of which this one is asked."""
    if machine.gpu is not None or spec.dtype != "bfloat16":
        return False
    try:
        from actlake.ingest import cpu_bf16
    except ImportError:
        return True
    return not cpu_bf16.has_fast_bf16()
