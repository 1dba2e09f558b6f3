"""The corpus of a job: its spec, where it lies, and building it in this process or on Ray Data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.ingest.chats import GEMMA, chat_format
from actlake.ingest.corpus import build_corpus
from actlake.ingest.corpus_build import Engine, Local
from actlake.ingest.extras import needs
from actlake.ingest.models import ModelRef, load_tokenizer, resolve_model, tokenizer_fingerprint
from actlake.ingest.replies import ReplyBatch
from actlake.jobs.jobfile import Job, parse_job, read_table
from actlake.jobs.work import n_workers
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.errors import BadInputError, JobFileError, ModelAccessError
from actlake.storage.row_index import RowIndex
from actlake.storage.rowspace import KeepRule
from actlake.storage.stores import Store, resolve_url

ENGINES = ("ray", "local")

#: Row groups of a corpus that are counted by one item.
_GROUPS_PER_ITEM = 64


#: Stands for the model of a job's replies where it is not known, and does not matter.
UNKNOWN = "unknown"


class CorpusListener:
    """Hears how a corpus is built; this one keeps quiet."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def documents(self, n_documents: int, n_tokens: int) -> None:
        """So many documents and tokens of the corpus are done."""

    def replies(self, n_done: int, n_missing: int) -> None:
        """So many replies to prompts are generated, of all that were missing."""

    def sequences(self, n_written: int, n_sequences: int) -> None:
        """So many of the corpus's sequences are sorted and written."""


# --- What a job asks for ------------------------------------------------------------------------------------------


def corpus_spec(job: Job, tokenizer: Any, model: str) -> CorpusSpec:
    """Return the spec of the job's corpus; ``model`` is the fingerprint of who replies.

    Raises ``BadInputError`` for a chat template without roles.
    """
    chats = _chat_format(job, tokenizer) if _has_chats(job) else ""
    return _corpus_spec(job, tokenizer_fingerprint(tokenizer), chats, model)


def _has_chats(job: Job) -> bool:
    return job.corpus.messages_field is not None or job.corpus.replies is not None


def stored_corpus_spec(job: Job, corpus: Corpus) -> CorpusSpec:
    """Return what a job asks for, with what only a tokenizer tells taken from the corpus that is there."""
    model = corpus.spec.replies.model if corpus.spec.replies is not None else UNKNOWN
    return _corpus_spec(job, corpus.spec.tokenizer, corpus.spec.chat_format or GEMMA, model)


def _corpus_spec(job: Job, fingerprint: str, chats: str, model: str) -> CorpusSpec:
    return CorpusSpec(
        sources=job.corpus.sources,
        text_field=job.corpus.text_field,
        messages_field=job.corpus.messages_field,
        chat_format=chats if _has_chats(job) else None,
        reasoning=job.corpus.reasoning,
        id_field=job.corpus.id_field,
        metadata=job.corpus.metadata,
        filters=job.corpus.filters,
        max_document_tokens=job.corpus.max_document_tokens,
        context_length=job.corpus.context_length,
        stride=job.corpus.stride,
        prepend_bos=job.capture.prepend_bos,
        holdout=job.corpus.holdout,
        seed=job.seed,
        max_tokens=job.corpus.max_tokens,
        tokenizer=fingerprint,
        weights=job.corpus.weights,
        quotas=job.corpus.quotas,
        replies=None if job.corpus.replies is None else job.corpus.replies.rule(model, job.capture.dtype),
        split_by=job.corpus.split_by or _split_by(job),
    )


def _split_by(job: Job) -> str:
    # What one reply to a prompt teaches would else be held out in another one that begins with the same words.
    several = job.corpus.replies is not None and job.corpus.replies.n > 1
    return "prompt" if several else "document"


def _chat_format(job: Job, tokenizer: Any) -> str:
    with needs("ingest", "rendering chats"):
        return chat_format(tokenizer, job.corpus.chat_template, job.corpus.reasoning).name


def corpus_place(job: Job, spec: CorpusSpec) -> Store:
    """Return where the job's corpus lies: at its ``corpus.url``, else beside the dataset."""
    if job.corpus.url is not None:
        return Store(job.corpus.url, job.storage_options)
    return resolve_url(f"../corpora/{spec.definition_id}", Store(job.dataset, job.storage_options))


def read_corpus_job(path: Path, url: str | None) -> Job:
    """Read a job file of which only the corpus is wanted: dataset and hook points may be absent; ``url`` is where to.

    Raises ``JobFileError`` where no place is named, and for what is wrong with the file.
    """
    table = read_table(path)
    corpus = table.get("corpus")
    if url is not None and isinstance(corpus, Mapping):
        table["corpus"] = {**corpus, "url": url}
    placed = isinstance(corpus, Mapping) and table["corpus"].get("url") is not None
    if not placed and "dataset" not in table:
        raise JobFileError(f"{path} names no place: give --url, or corpus.url, or dataset for a place beside that")
    table.setdefault("dataset", "unused")
    if "hook_points" not in table and "preset" not in table:
        table["hook_points"] = ["layers.0.resid_post"]
    try:
        return parse_job(table)
    except BadInputError as error:
        raise JobFileError(f"{path}: {error}") from error


# --- Building -----------------------------------------------------------------------------------------------------


def open_corpus(
    job: Job,
    model: ModelRef,
    tokenizer: Any,
    hear: CorpusListener,
    *,
    engine: str = "local",
    address: str | None = None,
    append: bool = False,
) -> Corpus:
    """Build the job's corpus, or open the one that is there; raises as ``build_corpus``.

    On the engine ``"ray"`` large sources, and all where an ``address`` is given, are tokenised and sorted by Ray Data.
    """
    spec = corpus_spec(job, tokenizer, model.fingerprint)
    place = corpus_place(job, spec)
    with corpus_engine(engine, address) as chosen:
        corpus = build_corpus(
            place,
            spec,
            tokenizer,
            storage_options=dict(job.storage_options),
            progress=hear.documents,
            sequences=hear.sequences,
            on_bad=job.corpus.on_bad,
            append=append,
            engine=chosen,
            load=_loader(model, spec.tokenizer),
            reply=partial(_reply, job, place, spec, model, hear, engine, address),
        )
    if n_bad := len(corpus.quarantine()):
        hear.note(f"{n_bad:,} bad documents are set aside: 'actlake corpus show {corpus.store.url}' names some")
    return corpus


def _reply(
    job: Job,
    place: Store,
    spec: CorpusSpec,
    model: ModelRef,
    hear: CorpusListener,
    engine: str,
    address: str | None,
    batches: Iterator[ReplyBatch],
    n_missing: int,
) -> None:
    """Generate the replies that a corpus lacks."""
    from actlake.jobs.replies import reply_locally, reply_on_ray, reply_order

    hear.replies(0, n_missing)
    order, n_done = reply_order(job, place, spec, model), 0
    if engine == "local":
        done = reply_locally(order, batches)
    else:
        done = reply_on_ray(order, batches, attempts=job.run.attempts, workers=n_workers(job), address=address)
    for n in done:
        n_done += n
        hear.replies(n_done, n_missing)


def require_engine(engine: str, address: str | None) -> None:
    """Raise ``BadInputError`` for an engine that does not exist, or has no use for the address of a cluster."""
    if engine not in ENGINES:
        raise BadInputError(f"no engine {engine!r}; the engines are {', '.join(ENGINES)}")
    if address is not None and engine != "ray":
        raise BadInputError(
            f"--address {address} is a Ray cluster's, and the engine {engine!r} runs on this machine: give --engine "
            "ray, or leave --address out"
        )


@contextmanager
def corpus_engine(engine: str, address: str | None) -> Iterator[Engine]:
    """Yield where a corpus is built and its rows are counted; Ray starts at first need and ends with the block."""
    if engine == "local":
        yield Local()
        return
    from actlake.jobs.corpus_ray import RayData

    with RayData(address=address) as found:
        yield found


def _loader(model: ModelRef, fingerprint: str) -> Callable[[], Any]:
    local = Path(model.name).expanduser().is_dir()
    name = str(Path(model.path).resolve()) if local else model.name
    return partial(worker_tokenizer, name, model.revision, fingerprint)


def worker_tokenizer(name: str, revision: str | None, fingerprint: str) -> Any:
    """Return a model's tokenizer on a worker; raise ``ModelAccessError`` where it is another than the driver's."""
    tokenizer = load_tokenizer(resolve_model(name, revision=revision))
    if (found := tokenizer_fingerprint(tokenizer)) != fingerprint:
        raise ModelAccessError(
            f"{name} has the tokenizer {found[:12]}... on this worker, the driver has {fingerprint[:12]}...; give "
            "every machine the same files"
        )
    return tokenizer


# --- Row indexes --------------------------------------------------------------------------------------------------


def count_rows(corpus: Corpus, split: str, keep: KeepRule, engine: Engine) -> RowIndex:
    """Return a split's row index, counted by the engine where it is not stored; raises as reading the corpus does."""

    def run(function: Callable[[int], npt.NDArray[np.int64]], groups: Sequence[int]) -> Iterator[npt.NDArray[np.int64]]:
        items = [groups[at : at + _GROUPS_PER_ITEM] for at in range(0, len(groups), _GROUPS_PER_ITEM)]
        for counts in engine.run(_Counting(function), items):
            yield from counts

    return corpus.row_index(split, keep, run)


class _Counting:
    """Makes what counts the rows of some row groups."""

    def __init__(self, function: Callable[[int], npt.NDArray[np.int64]]) -> None:
        self._function = function

    def __call__(self) -> Callable[[Sequence[int]], list[npt.NDArray[np.int64]]]:
        return lambda groups: [self._function(group) for group in groups]
