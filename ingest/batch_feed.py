"""From the rows of a shard to what a model is given: batches of their sequences, laid out one ahead of the model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from actlake.ingest.batching import Batch, plan_batches
from actlake.storage.corpus import Corpus
from actlake.storage.shard_rows import ShardRows
from actlake.storage.spec import DatasetSpec

# Shapes: B sequences of a batch, T tokens, D width, N rows of a batch that are rows of the shard.

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class ForwardPass(Protocol):
    """Runs the model: int64 [B, T] to ``{hook point: [B, T, D]}``; deterministic for one shape on one device.

    With ``position_ids``, int64 [B, T], each position 0 begins a sequence that sees no other one in its row.
    """

    def __call__(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, /
    ) -> Mapping[str, torch.Tensor]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class LaidBatch:
    """What a batch gives the model, in host memory, and where its rows are and go.

    ``tokens_BT`` and ``positions_BT`` are int64 (no positions: none are needed), ``source_N`` the places of the rows
    among the B x T tokens, ``target_N`` theirs in the shard. ``target_BT`` is that of each token that runs: those that
    are no rows of the shard go to the row behind its last, so that rows need not be gathered first. All are int64.
    """

    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor | None
    source_N: torch.Tensor
    target_N: torch.Tensor
    target_BT: torch.Tensor

    @property
    def n_run(self) -> int:
        """The token positions that go through the model, padding included."""
        return self.tokens_BT.numel()

    @classmethod
    def of(cls, batch: Batch, rows: ShardRows) -> "LaidBatch":
        """Lay out a batch, padded on the right with id 0."""
        tokens_BT, positions_BT = _tokens(batch, rows)
        source_N, target_N = gathered(batch, rows)
        target_BT = np.full(batch.n_run, sum(map(len, rows.places)), dtype=np.int64)
        target_BT[source_N] = target_N
        return cls(
            tokens_BT=torch.from_numpy(tokens_BT),
            # Without positions the model needs no mask, or one for all rows.
            positions_BT=torch.from_numpy(positions_BT) if batch.is_packed else None,
            source_N=torch.from_numpy(source_N),
            target_N=torch.from_numpy(target_N),
            target_BT=torch.from_numpy(target_BT),
        )

    def run(self, forward: ForwardPass, device: str) -> Mapping[str, torch.Tensor]:
        """Start the forward pass on a device; a GPU may still be at it when this returns."""
        tokens_BT = _sent(self.tokens_BT, device)
        if self.positions_BT is None:
            return forward(tokens_BT)
        return forward(tokens_BT, _sent(self.positions_BT, device))


def _sent(tensor: torch.Tensor, device: str) -> torch.Tensor:
    # Pinned memory is copied without waiting for what the GPU does.
    return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor.to(device)


def batches_of(rows: ShardRows, spec: DatasetSpec, corpus: Corpus) -> list[Batch]:
    """Return the batches that the sequences with rows in a shard run in; members are places in ``rows.sequences``."""
    owners = [number for number, places in enumerate(rows.places) if len(places)]
    lengths = [len(rows.sequences[number].tokens) for number in owners]
    batches = plan_batches(lengths, spec.batch_tokens, corpus.spec.context_length, spec.batching)
    return [replace(batch, rows=tuple(tuple(owners[i] for i in row) for row in batch.rows)) for batch in batches]


def ahead(prepare: Callable[[_In], _Out], items: Iterable[_In], threads: Executor) -> Iterator[_Out]:
    """Yield ``prepare`` of each item; while one is being used, the next is prepared in another thread."""
    waiting = iter(items)

    def begin() -> "Future[_Out] | None":
        for item in waiting:
            return threads.submit(prepare, item)
        return None

    coming = begin()
    while coming is not None:
        found, coming = coming.result(), begin()
        yield found


def run_batch(forward: ForwardPass, batch: Batch, rows: ShardRows, device: str) -> Mapping[str, torch.Tensor]:
    """Run one batch, padded on the right with id 0; return what ``forward`` does."""
    return LaidBatch.of(batch, rows).run(forward, device)


def gathered(batch: Batch, rows: ShardRows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return int64 [N] twice: where in a batch's B x T tokens its rows are, and where in the shard they are stored."""
    source = [b * batch.n_tokens + start + rows.positions[member] for b, start, member in _laid_out(batch, rows)]
    return np.concatenate(source), np.concatenate([rows.places[member] for member in batch.members])


def take(acts_BTD: torch.Tensor, source_N: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Return the rows [N, D] of a batch's activations in host memory; of bfloat16 their bits."""
    kept_ND = acts_BTD.reshape(-1, acts_BTD.shape[-1])[torch.from_numpy(source_N).to(acts_BTD.device)].cpu()
    return kept_ND.view(torch.uint16).numpy() if kept_ND.dtype == torch.bfloat16 else kept_ND.numpy()


def _tokens(batch: Batch, rows: ShardRows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    tokens_BT = np.zeros((len(batch.rows), batch.n_tokens), dtype=np.int64)
    positions_BT = np.zeros_like(tokens_BT)
    for b, start, member in _laid_out(batch, rows):
        tokens = rows.sequences[member].tokens
        # What was taken out of a redacted sequence runs as padding does; its rows are void.
        tokens_BT[b, start : start + len(tokens)] = np.maximum(tokens, 0)
        # Padding goes on with the last sequence of its row, which it follows and therefore cannot change.
        positions_BT[b, start:] = np.arange(batch.n_tokens - start)
    return tokens_BT, positions_BT


def _laid_out(batch: Batch, rows: ShardRows) -> Iterator[tuple[int, int, int]]:
    """Yield the row in the batch, the place of the first token in that row, and the number of each sequence."""
    for b, row in enumerate(batch.rows):
        start = 0
        for member in row:
            yield b, start, member
            start += len(rows.sequences[member].tokens)
