"""Which sequences run together, and in which shape: a pure function of the shard, so that every attempt runs the same.

On one device type and software the bits of an activation depend on the shape of its batch, not on the batch-mates.
Sequences are run longest first, so that those of one batch are of about one length; the batch is padded on the right,
where causal attention makes padding harmless, to a multiple of 64 tokens or to the corpus' context length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Part of the format: another multiple gives other batch shapes and so other bits.
PAD_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The places (in the given list) of the sequences that run together, padded to ``n_tokens`` each."""

    members: tuple[int, ...]
    n_tokens: int


def plan_batches(lengths: Sequence[int], batch_tokens: int, context_length: int) -> list[Batch]:
    """Cut sequences of these lengths into batches of at most ``batch_tokens`` padded tokens (at least one sequence).

    No sequence is padded beyond ``context_length``, which the model may not exceed.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    batches: list[Batch] = []
    while order:
        n_tokens = min(context_length, -(-lengths[order[0]] // PAD_MULTIPLE) * PAD_MULTIPLE)
        n_members = max(1, batch_tokens // n_tokens)
        batches.append(Batch(members=tuple(order[:n_members]), n_tokens=n_tokens))
        del order[:n_members]
    return batches
