"""From a checked job to the specs of its datasets: defaults of the layout, ids of excluded tokens, sizes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actlake.ingest.batching import choose_batching
from actlake.ingest.models import ModelRef, ModelShape
from actlake.ingest.presets import expand_points
from actlake.jobs.jobfile import Job, LayoutOptions
from actlake.storage.codecs import Codec
from actlake.storage.corpus import Corpus
from actlake.storage.errors import JobFileError, nearest
from actlake.storage.rowspace import KeepRule
from actlake.storage.spec import PADDED, ROW_COLUMNS, DatasetSpec, PointSpec

_CHUNK_NBYTES = 2 * 2**20
_MOST_ROWS_PER_SHARD = 262_144
_ITEMSIZE = {"bfloat16": 2, "float32": 4}
_ROW_COLUMN_NBYTES = sum(int(dtype.strip("uint")) // 8 for dtype in ROW_COLUMNS.values())


def plan_points(job: Job, shape: ModelShape) -> tuple[PointSpec, ...]:
    """Choose the job's hook points and their chunk sizes; a chunk is by default the power of two nearest 2 MiB."""
    widths = shape.widths()
    names = expand_points(job.hook_points, job.preset, shape)
    itemsize = _ITEMSIZE[job.capture.dtype]
    rows_per_shard = plan_rows_per_shard(job.layout, [widths[name] * itemsize for name in names])
    return tuple(
        PointSpec(
            name=name,
            width=widths[name],
            rows_per_chunk=job.layout.rows_per_chunk or min(rows_per_shard, default_chunk(widths[name] * itemsize)),
        )
        for name in names
    )


def require_context(job: Job, shape: ModelShape) -> None:
    """Raise ``JobFileError`` where the corpus's sequences may be longer than the model can read."""
    if job.corpus.context_length > shape.context_length:
        raise JobFileError(
            f"corpus.context_length = {job.corpus.context_length} is longer than {job.model}'s {shape.context_length}; "
            f"use {shape.context_length} or less"
        )


def default_chunk(nbytes_per_row: int) -> int:
    """Return the power of two of rows whose bytes are nearest 2 MiB."""
    return int(2 ** max(0, round(math.log2(_CHUNK_NBYTES / nbytes_per_row))))


def plan_rows_per_shard(layout: LayoutOptions, point_nbytes: Sequence[int]) -> int:
    """Return the rows of a shard: as given, else the largest power of two <= 262,144 that fits ``shard_memory``.

    ``point_nbytes`` are the bytes of a row at each hook point. More rows than fit are captured in passes. Raises
    ``JobFileError`` with the numbers where not even one hook point of a given size fits.
    """
    if layout.rows_per_shard is not None:
        widest = max(point_nbytes) + _ROW_COLUMN_NBYTES
        if layout.rows_per_shard > (fitting := layout.shard_memory // widest):
            raise JobFileError(
                f"layout.rows_per_shard = {layout.rows_per_shard:,} rows of the widest hook point, {widest:,} bytes "
                f"each with the row columns, want {layout.rows_per_shard * widest:,} bytes, shard_memory is "
                f"{layout.shard_memory:,}; use rows_per_shard = {_power_below(fitting):,}, or raise layout.shard_memory"
            )
        return layout.rows_per_shard
    row = sum(point_nbytes) + _ROW_COLUMN_NBYTES
    fitting = layout.shard_memory // row
    if fitting < 1:
        raise JobFileError(f"layout.shard_memory = {layout.shard_memory:,} bytes holds no row of {row:,} bytes")
    return min(_MOST_ROWS_PER_SHARD, _power_below(fitting))


def plan_spec(
    job: Job, *, model: ModelRef, shape: ModelShape, corpus_id: str, keep: KeepRule, split: str
) -> DatasetSpec:
    """Return the spec of one split of the job's dataset; ``batching = "auto"`` is left to ``plan_batching``."""
    points = plan_points(job, shape)
    itemsize = _ITEMSIZE[job.capture.dtype]
    rows_per_shard = plan_rows_per_shard(job.layout, [point.width * itemsize for point in points])
    return DatasetSpec(
        model=model.name,
        model_revision=model.revision,
        model_fingerprint=model.fingerprint,
        architecture=shape.architecture,
        corpus_id=corpus_id,
        split=split,
        keep=keep,
        hook_points=points,
        dtype=job.capture.dtype,
        seed=job.seed,
        order=job.layout.order,
        rows_per_shard=rows_per_shard,
        rows_per_block=job.layout.rows_per_block or rows_per_shard,
        batch_tokens=job.capture.batch_tokens,
        codec=Codec(name=job.layout.codec),
        batching=PADDED if job.capture.batching == "auto" else job.capture.batching,
    )


def plan_batching(job: Job, spec: DatasetSpec, corpus: Corpus, stored: DatasetSpec | None) -> str:
    """Return how the sequences of a job share batches: as it asks; "auto" stands for what is stored, if anything is.

    Else it stands for the faster one in the first shard that the corpus fills: ``max_rows`` has no say in a spec.
    """
    if job.capture.batching != "auto":
        return job.capture.batching
    if stored is not None:
        return stored.batching
    index = corpus.row_index("train", spec.keep)
    chosen = index.sequences_of(range(min(index.n_rows, spec.rows_per_shard)))
    sequences = corpus.sequences("train", chosen.start, chosen.stop)
    n_rows = np.diff(index.first_row[chosen.start : chosen.stop + 1]).tolist()
    lengths = [len(sequence.tokens) for sequence, n in zip(sequences, n_rows, strict=True) if n]
    return choose_batching(lengths, spec.batch_tokens, corpus.spec.context_length)


def plan_keep(job: Job, special_ids: Mapping[str, int | None], vocab_size: int) -> KeepRule:
    """Turn ``capture.exclude``, ``skip_first`` and ``keep`` into a keep rule.

    A special token that the model lacks excludes nothing.
    """
    ids: list[int] = []
    for item in job.capture.exclude:
        if isinstance(item, int):
            if not 0 <= item < vocab_size:
                raise JobFileError(f"capture.exclude: token id {item} is out of range; the ids are 0..{vocab_size - 1}")
            ids.append(item)
        elif item not in special_ids:
            raise JobFileError(
                f"capture.exclude: no special token {item!r}{nearest(item, special_ids)}, or give its id"
            )
        elif (token_id := special_ids[item]) is not None:
            ids.append(token_id)
    return KeepRule(exclude=tuple(ids), skip_first=job.capture.skip_first, roles=job.capture.roles)


def heldout_rows(n_rows: int, holdout: float) -> int:
    """Return how many held-out rows go with ``n_rows`` training rows: as many as the share of documents held out."""
    return math.ceil(n_rows * holdout / (1 - holdout))


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """Return the ids of the special tokens that a job file may name."""
    return {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
    }


def _power_below(value: int) -> int:
    return 1 << (value.bit_length() - 1) if value else 0
