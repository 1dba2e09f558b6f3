"""How many tokens a job runs for how many rows: from its corpus where there is one, else from what is known."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from actlake.ingest.batching import plan_batches
from actlake.jobs.jobfile import Job
from actlake.jobs.planning import heldout_rows
from actlake.storage.corpus import Corpus
from actlake.storage.row_index import RowIndex
from actlake.storage.spec import SPLITS, DatasetSpec

#: Shards whose batches are laid out to find the padding; of more, that many spread over the split.
_LAID_OUT = 4


@dataclass(frozen=True, kw_only=True)
class Workload:
    """``n_tokens`` are run for the rows, ``n_straddling`` of them a second time, and ``n_padding`` for the shape.

    A sequence whose rows lie in two shards is run for both. ``known_from`` says where the numbers come from.
    """

    n_rows: Mapping[str, int]
    n_tokens: int
    n_straddling: int
    n_padding: int
    sequence_tokens: float
    known_from: str

    @property
    def n_run(self) -> int:
        """All token positions that go through the model."""
        return self.n_tokens + self.n_straddling + self.n_padding

    def scaled(self, share: float) -> "Workload":
        """Return the work for a share of the rows."""
        return replace(
            self,
            n_rows={split: math.ceil(n * share) for split, n in self.n_rows.items()},
            n_tokens=round(self.n_tokens * share),
            n_straddling=round(self.n_straddling * share),
            n_padding=round(self.n_padding * share),
        )


def of_corpus(job: Job, spec: DatasetSpec, corpus: Corpus) -> Workload:
    """Count over a built corpus: rows exactly, padding from the batches of up to four shards of each split."""
    parts = [part for split in SPLITS if (part := _split(job, spec, corpus, split)).n_tokens]
    n_sequences = sum(part.n_tokens / part.sequence_tokens for part in parts)
    return Workload(
        n_rows={split: n for part in parts for split, n in part.n_rows.items()},
        n_tokens=sum(part.n_tokens for part in parts),
        n_straddling=sum(part.n_straddling for part in parts),
        n_padding=sum(part.n_padding for part in parts),
        sequence_tokens=sum(part.n_tokens for part in parts) / n_sequences if parts else 1.0,
        known_from=f"the corpus at {corpus.store.url}",
    )


def _split(job: Job, spec: DatasetSpec, corpus: Corpus, split: str) -> Workload:
    index, info = corpus.row_index(split, spec.keep), corpus.splits[split]
    n_rows = min(index.n_rows, wanted_rows(job, split, index.n_rows))
    if n_rows == 0:
        return Workload(
            n_rows={split: 0}, n_tokens=0, n_straddling=0, n_padding=0, sequence_tokens=1.0, known_from="corpus"
        )
    per_row = info.n_tokens / index.n_rows
    n_tokens, n_straddling = n_rows * per_row, straddling_rows(index, spec.rows_per_shard, n_rows) * per_row
    padding = _padding(spec, corpus, split, index, n_rows)
    return Workload(
        n_rows={split: n_rows},
        n_tokens=round(n_tokens),
        n_straddling=round(n_straddling),
        n_padding=round((n_tokens + n_straddling) * padding),
        sequence_tokens=info.n_tokens / info.n_sequences,
        known_from="corpus",
    )


def wanted_rows(job: Job, split: str, available: int) -> int:
    """Return the rows that a job asks for of a split that has so many."""
    if job.max_rows is None:
        return available
    return job.max_rows if split == "train" else heldout_rows(job.max_rows, job.corpus.holdout)


def straddling_rows(index: RowIndex, rows_per_shard: int, n_rows: int) -> int:
    """Return the rows of all sequences that lie across a boundary of two shards: those sequences run twice."""
    boundaries = np.arange(rows_per_shard, n_rows, rows_per_shard)
    first = np.asarray(index.first_row)
    owner = np.searchsorted(first, boundaries, side="right") - 1
    across = owner[first[owner] < boundaries]
    return int((first[across + 1] - first[across]).sum())


def _padding(spec: DatasetSpec, corpus: Corpus, split: str, index: RowIndex, n_rows: int) -> float:
    """Return padding positions for each token, over the batches of a few shards."""
    space = spec.row_space(n_rows)
    n_tokens = n_padded = 0
    for shard in sorted({round(i) for i in np.linspace(0, space.n_shards - 1, min(_LAID_OUT, space.n_shards))}):
        chosen = index.sequences_of(space.rows_of(shard))
        lengths = [len(one.tokens) for one in corpus.sequences(split, chosen.start, chosen.stop)]
        n_tokens += sum(lengths)
        n_padded += padded_tokens(lengths, spec, corpus.spec.context_length)
    return n_padded / n_tokens - 1


def padded_tokens(lengths: Sequence[int], spec: DatasetSpec, context_length: int) -> int:
    """Return the token positions of the batches that sequences of these lengths run in."""
    return sum(batch.n_run for batch in plan_batches(lengths, spec.batch_tokens, context_length, spec.batching))


def assumed(
    job: Job, spec: DatasetSpec, *, n_text_tokens: float | None, document_tokens: float, known_from: str
) -> Workload:
    """Reckon without a corpus: documents of one length, ``n_text_tokens`` in all (None: as many as ``max_rows`` wants).

    Every sequence but a document's last is full; a document ends somewhere in its last, so that it is half full.
    """
    n_bos = int(job.capture.prepend_bos)
    n_text = job.corpus.context_length - n_bos
    windows = max(1.0, document_tokens / n_text + 0.5) if document_tokens > n_text else 1.0
    text_of_sequence = document_tokens / windows
    sequence = text_of_sequence + n_bos
    rows_of_sequence = max(1.0, sequence - max(job.capture.skip_first, n_bos if "bos" in job.capture.exclude else 0))
    n_rows = {}
    for split, share in (("train", 1 - job.corpus.holdout), ("heldout", job.corpus.holdout)):
        available = _capped(job, split, n_text_tokens, share, sequence, text_of_sequence) * rows_of_sequence
        n_rows[split] = int(min(available, wanted_rows(job, split, int(min(available, 2**62)))))
    n_shards = {split: -(-n // spec.rows_per_shard) for split, n in n_rows.items()}
    n_tokens = sum(n_rows.values()) * sequence / rows_of_sequence
    n_across = sum(max(0, n - 1) for n in n_shards.values()) * (1 - 1 / rows_of_sequence)
    lengths = [round(sequence)] * max(1, spec.batch_tokens // round(sequence))
    padding = padded_tokens(lengths, spec, job.corpus.context_length) / sum(lengths) - 1
    return Workload(
        n_rows={split: n for split, n in n_rows.items() if n},
        n_tokens=round(n_tokens),
        n_straddling=round(n_across * sequence),
        n_padding=round((n_tokens + n_across * sequence) * padding),
        sequence_tokens=sequence,
        known_from=known_from,
    )


def _capped(
    job: Job, split: str, n_text_tokens: float | None, share: float, sequence: float, text_of_sequence: float
) -> float:
    """Return how many sequences a split has; ``max_tokens`` cuts the training split alone."""
    n_sequences = float("inf") if n_text_tokens is None else n_text_tokens * share / text_of_sequence
    if split == "train" and job.corpus.max_tokens is not None:
        n_sequences = min(n_sequences, job.corpus.max_tokens / sequence)
    return n_sequences
