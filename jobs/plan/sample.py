"""Measures what a table can only guess: some rows of the job's own text through its own model and codec.

Nothing is written; the packaged model is converted, and a Hub model fetched, where that has not happened yet.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.ingest.models import ModelRef, load_tokenizer, model_shape, resolve_model
from actlake.ingest.tokenising import token_ids
from actlake.jobs.jobfile import Job
from actlake.jobs.plan.gather import Measured, corpus_of
from actlake.jobs.plan.sources import first_documents, text_of
from actlake.jobs.planning import plan_keep, plan_spec, special_ids
from actlake.jobs.work import available_cpus
from actlake.storage.arrays import encode_shard
from actlake.storage.corpus_spec import TokenSequence
from actlake.storage.errors import BadInputError
from actlake.storage.rowspace import ROLE_TEXT, KeepRule, block_places
from actlake.storage.shard_rows import ShardRows
from actlake.storage.spec import DatasetSpec, PointSpec

#: Characters of text that surely give a token.
_CHARACTERS_A_TOKEN = 8


def measure_sample(job: Job, n_rows: int) -> Measured:
    """Run at least ``n_rows`` rows, if there are so many; return ratios by array and tokens a second of one worker.

    The rows are encoded in permuted order, as they are stored. Raises ``BadInputError`` where no token is a row, and
    what loading the model and reading the sources raise.
    """
    import torch

    from actlake.ingest.capture import Capture
    from actlake.ingest.loading import load_model

    ref = resolve_model(job.model, revision=job.revision)
    tokenizer = load_tokenizer(ref)
    spec = _spec(job, tokenizer, n_rows)
    rows = _rows(_sequences(job, tokenizer, n_rows), spec.keep, n_rows, spec.seed)
    if not sum(map(len, rows.places)):
        raise BadInputError("the sample keeps no token; check capture.keep, exclude and skip_first")
    torch.set_num_threads(job.run.threads or available_cpus())
    device = job.run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(ref, dtype=job.capture.dtype, device=device)
    memory, n_tokens, seconds = _run(Capture(model, spec.point_names), rows, spec, job.corpus.context_length, device)
    return Measured(
        ratios=_ratios(spec, memory, rows),
        tokens_per_s=n_tokens / seconds,
        source=f"a sample of {sum(map(len, rows.places)):,} rows on this machine",
    )


def _spec(job: Job, tokenizer: Any, n_rows: int) -> DatasetSpec:
    """Return the job's spec with chunks no larger than the sample."""
    shape = model_shape(job.model, revision=job.revision)
    keep = replace(plan_keep(job, special_ids(tokenizer), shape.vocab_size), roles=())
    ref = ModelRef(name=job.model, revision=job.revision, path="", fingerprint="")
    spec = plan_spec(job, model=ref, shape=shape, corpus_id="", keep=keep, split="train")
    most = 1 << (n_rows.bit_length() - 1)
    points = tuple(
        PointSpec(name=point.name, width=point.width, rows_per_chunk=min(point.rows_per_chunk, most))
        for point in spec.hook_points
    )
    return replace(spec, hook_points=points)


def _sequences(job: Job, tokenizer: Any, n_rows: int) -> Iterator[TokenSequence]:
    """Yield the first sequences of the corpus; of the sources' first documents where there is none yet."""
    corpus = corpus_of(job, tokenizer)
    if corpus is not None:
        n_sequences = corpus.splits["train"].n_sequences
        for start in range(0, n_sequences, corpus.sequences_per_group):
            yield from corpus.sequences("train", start, min(start + corpus.sequences_per_group, n_sequences))
        return
    bos = [tokenizer.bos_token_id] if job.capture.prepend_bos and tokenizer.bos_token_id is not None else []
    n_text = job.corpus.context_length - len(bos)
    for document in first_documents(job, tokenizer, n_rows * _CHARACTERS_A_TOKEN):
        ids = token_ids([text_of(document)], tokenizer)[0]
        for offset in range(0, len(ids), n_text):
            tokens = np.array([*bos, *ids[offset : offset + n_text]], dtype=np.int32)
            yield _sequence(document.id, document.source, offset // n_text, offset, tokens)


def _sequence(document: str, source: str, window: int, offset: int, tokens: npt.NDArray[np.int32]) -> TokenSequence:
    return TokenSequence(
        index=0,
        tokens=tokens,
        roles=np.full(len(tokens), ROLE_TEXT, dtype=np.uint8),
        document=document,
        window=window,
        offset=offset,
        source=source,
        metadata={},
    )


def _rows(sequences: Iterator[TokenSequence], keep: KeepRule, n_rows: int, seed: int) -> ShardRows:
    """Return the rows of the first sequences that have so many, at permuted places."""
    chosen: list[TokenSequence] = []
    positions: list[npt.NDArray[np.int64]] = []
    while sum(map(len, positions)) < n_rows and (sequence := next(sequences, None)) is not None:
        chosen.append(sequence)
        positions.append(np.flatnonzero(keep.mask(sequence.tokens, sequence.roles)))
    ends = np.cumsum([len(one) for one in positions])
    places = block_places(seed, 0, int(ends[-1]) if len(ends) else 0)
    return ShardRows(
        sequences=tuple(chosen), positions=tuple(positions), places=tuple(np.split(places, ends[:-1]) if chosen else ())
    )


def _run(
    forward: Any, rows: ShardRows, spec: DatasetSpec, context_length: int, device: str
) -> tuple[dict[str, npt.NDArray[Any]], int, float]:
    """Run all batches; return the rows of each hook point in their places, and the tokens and seconds of the forward.

    The first batch is run twice and timed once: it warms up kernels and memory.
    """
    from actlake.ingest.batch_feed import gathered, run_batch, take
    from actlake.ingest.batching import plan_batches

    n_rows = sum(map(len, rows.places))
    memory: dict[str, npt.NDArray[Any]] = {}
    lengths = [len(sequence.tokens) for sequence in rows.sequences]
    batches = plan_batches(lengths, spec.batch_tokens, context_length, spec.batching)
    run_batch(forward, batches[0], rows, device)
    started = time.perf_counter()
    for batch in batches:
        acts = run_batch(forward, batch, rows, device)
        source_N, target_N = gathered(batch, rows)
        for point in spec.hook_points:
            taken = take(acts[point.name], source_N)
            memory.setdefault(point.name, np.zeros((n_rows, point.width), dtype=taken.dtype))[target_N] = taken
    return memory, sum(batch.n_run for batch in batches), time.perf_counter() - started


def _ratios(spec: DatasetSpec, memory: dict[str, npt.NDArray[Any]], rows: ShardRows) -> dict[str, float]:
    """Return uncompressed over stored bytes of each array, over whole chunks where there is one."""
    columns: dict[str, npt.NDArray[Any]] = {f"rows/{name}": column for name, column in rows.columns().items()}
    found = {}
    for array in spec.arrays().values():
        values = (memory | columns)[array.name]
        whole = values[: max(1, len(values) // array.rows_per_chunk) * array.rows_per_chunk].view(array.numpy_dtype)
        parts: Sequence[bytes] = encode_shard(array, whole).parts[:-1]
        found[array.name] = whole.nbytes / sum(map(len, parts))
    return found
