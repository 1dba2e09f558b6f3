"""Whole sequences in order, padded: the adapter for sequence models."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actlake.shards.adapters import Adapter, BatchStream, State
from actlake.shards.batch import TokenBatch
from actlake.storage.errors import BadInputError

# Shapes: S sequences, T tokens of the longest of them, D channels.


@dataclass(eq=False)
class _Run:
    # Consecutive rows of one sequence in one batch, where the batch began, and how many of its rows came before.
    state: Mapping[str, Any]
    skip: int
    sequence: int
    rows: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.rows["mask"])


class Sequences(Adapter[dict[str, Tensor]]):
    """Whole sequences in order, padded: hook point to [S, T, D], for sequence models (OpenMOSS' Lorsa).

    Beside the hook points: ``tokens`` and ``position`` (int64 [S, T]), ``mask`` (bool [S, T], false where padded),
    ``sequence`` and ``lengths`` (int64 [S]). Padding is zeros at the end; rows that are not stored, such as BOS, leave
    gaps in ``position`` only. Takes a stream of ``order="sequence", drop_last=False``. The last batch of an iteration
    may be short; a sequence that the stream splits, between two ranks or two epochs, comes as two.

    Args:
        stream: its ``batch_size`` only says how many rows are read at a time.
        n_sequences: sequences in a batch.
        n_tokens: the T of every batch; by default that of the longest sequence in each.
    """

    def __init__(self, stream: BatchStream, *, n_sequences: int = 16, n_tokens: int | None = None) -> None:
        super().__init__(stream)
        if stream.settings.order != "sequence" or stream.settings.drop_last:
            raise BadInputError(
                f"sequences() takes a stream of order='sequence' and drop_last=False, not of "
                f"{stream.settings.order!r} and {stream.settings.drop_last}"
            )
        if n_sequences < 1 or (n_tokens is not None and n_tokens < 1):
            raise BadInputError(f"n_sequences = {n_sequences} and n_tokens = {n_tokens} must be > 0")
        self.n_sequences, self.n_tokens = n_sequences, n_tokens
        self._begun: Mapping[str, Any] | None = None
        self._skip = 0

    def __len__(self) -> int:
        raise TypeError("how many batches of sequences there are is known when they have been read")

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's state at the batch in which the next sequence begins, and its rows before that."""
        return {"stream": self._begun or self.stream.state_dict(), "skip": self._skip}

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """Go to a saved state of this rank; raise ``BadInputError`` for anything else."""
        if not isinstance(state, Mapping) or set(state) != {"stream", "skip"}:
            raise BadInputError(f"the state is not one that sequences() saved: {str(state)[:80]}; restore that")
        super().load_state_dict(state["stream"])
        self._begun, self._skip = None, int(state["skip"])

    def convert(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return a batch's rows as its runs slice them."""
        device = next(iter(batch.activations.values())).device
        columns = {"tokens": batch.token_id.to(device, torch.int64), "position": batch.position.to(device, torch.int64)}
        mask = torch.ones(len(batch), dtype=torch.bool, device=device)
        return {**batch.activations, **columns, "mask": mask}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._running = None
        if self._begun is not None:
            # The stream has delivered rows that this adapter has not.
            self.stream.load_state_dict(self._begun)
        return self._batches()

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        sequences: list[list[_Run]] = []
        for run in self._runs():
            if sequences and sequences[-1][-1].sequence == run.sequence:
                sequences[-1].append(run)
                continue
            if len(sequences) == self.n_sequences:
                padded = self._padded(sequences)
                self._begun, self._skip = run.state, run.skip
                yield padded
                sequences = []
            sequences.append([run])
        if sequences:
            padded = self._padded(sequences)
            self._begun, self._skip = None, 0
            yield padded

    def _runs(self) -> Iterator[_Run]:
        skip, state = self._skip, self.stream.state_dict()
        for batch in self.stream:
            rows = self.convert(batch)
            numbers, counts = torch.unique_consecutive(batch.sequence[skip:], return_counts=True)
            for sequence, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                part = {name: tensor[skip : skip + count] for name, tensor in rows.items()}
                yield _Run(state=state, skip=skip, sequence=sequence, rows=part)
                skip += count
            skip, state = 0, self.stream.state_dict()

    def _padded(self, sequences: list[list[_Run]]) -> dict[str, Tensor]:
        lengths = [sum(map(len, runs)) for runs in sequences]
        n_tokens = self.n_tokens or max(lengths)
        if max(lengths) > n_tokens:
            long = sequences[lengths.index(max(lengths))][0].sequence
            raise BadInputError(f"sequence {long} has {max(lengths)} rows, more than n_tokens = {n_tokens}; raise it")
        found: dict[str, Tensor] = {}
        for name, like in sequences[0][0].rows.items():
            out = like.new_zeros(len(sequences), n_tokens, *like.shape[1:])
            for place, runs in enumerate(sequences):
                torch.cat([run.rows[name] for run in runs], out=out[place, : lengths[place]])
            found[name] = out
        found["sequence"] = torch.tensor([runs[0].sequence for runs in sequences])
        found["lengths"] = torch.tensor(lengths)
        return found
