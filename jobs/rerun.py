"""Random rows of a dataset, run through the model again and compared with what is stored.

The batches of a shard follow from the spec and the corpus. Where device, software and threads are those of the record's
provenance, the same batch gives the same bits, and any other value is damage. Elsewhere only rows that are far off are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.ingest.batch_feed import batches_of, gathered, run_batch, take
from actlake.ingest.capture import Capture
from actlake.ingest.loading import load_model
from actlake.ingest.models import resolve_model
from actlake.shards.dataset import ActivationDataset
from actlake.shards.verify_shard import Problem
from actlake.storage.corpus import Corpus
from actlake.storage.errors import BadInputError, ModelAccessError
from actlake.storage.records import ShardRecord
from actlake.storage.rowspace import ROLE_VOID
from actlake.storage.shard_rows import ShardRows
from actlake.storage.spec import DatasetSpec

#: Of the norm of a row; another device or batch shape moves rows of Gemma 3 270M by 0.2 to 3 % (docs/architecture.md).
_TOLERANCE = 0.1

I64 = npt.NDArray[np.int64]


class Rerun:
    """The model of a dataset, loaded to run rows of its splits again."""

    def __init__(self, spec: DatasetSpec, *, model: str | None = None, device: str = "cpu", threads: int = 1) -> None:
        """Load the model that a spec names, or the one at ``model``.

        Raises ``ModelAccessError`` where it is not there or has other weights than the spec's.
        """
        import torch

        torch.set_num_threads(threads)
        try:
            ref = resolve_model(model or spec.model, revision=None if model else spec.model_revision)
        except ModelAccessError as error:
            hint = "" if model else f"; where {spec.model!r} was a folder, name it with --model FOLDER"
            raise ModelAccessError(f"{error}{hint}") from error
        if ref.fingerprint != spec.model_fingerprint:
            raise ModelAccessError(
                f"{ref.name} has weights {ref.fingerprint[:12]}..., the dataset is of "
                f"{spec.model_fingerprint[:12]}...; name the model that made it with --model FOLDER"
            )
        self.device = device
        loaded = load_model(ref, dtype=spec.dtype, device=device)
        self.software = loaded.describe()
        self._forward = Capture(loaded, spec.point_names)

    def check(
        self,
        dataset: ActivationDataset,
        corpus: Corpus,
        n_rows: int,
        *,
        shards: Sequence[int] | None = None,
        seed: int = 0,
        on_rows: Callable[[int], None] = lambda n_rows: None,
    ) -> tuple[Problem, ...]:
        """Compare ``n_rows`` random rows of ``shards`` (all that are committed) with the model, at every hook point.

        ``on_rows`` hears of rows as they are done. Raises as reading the dataset and the corpus does.
        """
        if n_rows < 1:
            raise BadInputError(f"n_rows = {n_rows} compares nothing; use 1 or more, e.g. 100")
        index, problems = corpus.row_index(dataset.spec.split, dataset.spec.keep), list[Problem]()
        for record, wanted in _chosen(dataset, shards, n_rows, seed):
            space = dataset.spec.row_space(record.first_row + record.n_rows)
            rows = ShardRows.of(corpus, index, dataset.spec, space, record.shard)
            for batch in batches_of(rows, dataset.spec, corpus):
                source_N, target_N = gathered(batch, rows)
                if (mine := np.isin(target_N, wanted)).any():
                    acts = run_batch(self._forward, batch, rows, self.device)
                    places = target_N[mine]
                    again = {point: take(acts[point], source_N[mine]) for point in dataset.hook_points}
                    problems += self._differing(dataset, record, places, again)
                    on_rows(len(places))
        return tuple(problems)

    def _differing(
        self, dataset: ActivationDataset, record: ShardRecord, places: I64, again: Mapping[str, npt.NDArray[Any]]
    ) -> Iterator[Problem]:
        made = record.provenance
        same_machine = (made.device, dict(made.software)) == (self.device, self.software)
        kept = places[dataset["rows/role"][record.first_row + places] != ROLE_VOID]
        for point, found in again.items():
            stored = dataset[point][record.first_row + kept]
            computed = found[np.isin(places, kept)].view(stored.dtype)
            unequal = (stored.view(found.dtype) != computed.view(found.dtype)).any(axis=1)
            error = _relative_error(stored, computed)
            if len(bad := np.flatnonzero(unequal if same_machine else ~(error <= _TOLERANCE))):
                message = (
                    f"{dataset.url}: shard {record.shard}, {point}: {len(bad)} of {len(kept)} rows are not what the "
                    f"model gives, the first is row {record.first_row + kept[bad[0]]}: off by {error[bad[0]]:.2g} of "
                    f"its norm"
                )
                yield Problem(kind="rerun", shard=record.shard, array=point, message=message)


def _chosen(
    dataset: ActivationDataset, shards: Sequence[int] | None, n_rows: int, seed: int
) -> Iterator[tuple[ShardRecord, I64]]:
    """Yield records and the places in their shards, ascending, of rows drawn at random."""
    counts = dataset.reader.manifest.n_rows_by_shard()
    if shards is not None:
        counts = {shard: counts[shard] for shard in shards}
    ends = np.cumsum(list(counts.values()))
    if not len(ends):
        return
    drawn = np.sort(np.random.default_rng(seed).choice(ends[-1], size=min(n_rows, int(ends[-1])), replace=False))
    owner = np.searchsorted(ends, drawn, side="right")
    for place, shard in enumerate(counts):
        if (owner == place).any():
            yield dataset.reader.record(shard), drawn[owner == place] - (ends[place] - counts[shard])


def _relative_error(stored: npt.NDArray[Any], computed: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    expected = computed.astype(np.float64)
    off = np.linalg.norm(stored.astype(np.float64) - expected, axis=1)
    norm = np.linalg.norm(expected, axis=1)
    return np.asarray(np.divide(off, norm, out=np.where(off > 0, np.inf, 0.0), where=norm > 0))
