"""A few documents of the report, token by token, with the norm of each token's row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actlake.jobs.report.sample import F64, I64, affordable, row_norms
from actlake.shards.corpus_rows import CorpusRows
from actlake.shards.dataset import ActivationDataset
from actlake.storage.corpus_spec import TokenSequence
from actlake.storage.rowspace import ROLE_VOID

#: The rows of a document lie anywhere in its shuffle block, so that a norm costs the chunks of a whole block.
_BLOCK_NBYTES = 1 << 30

#: Hook points that can be chosen, documents, and tokens of all of them: about 1 MB of the page.
_MAX_POINTS, _MAX_DOCUMENTS, _MAX_TOKENS = 24, 10, 6_000


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One sequence of a document. ``rows[t]`` is the row id of token t, -1 where it is no row.

    ``norms[p][t]`` belongs to the p-th of the hook points, None where there is no row or a void one.
    """

    document: str
    source: str
    window: int
    sequence: int
    tokens: Sequence[int]
    roles: Sequence[int]
    rows: Sequence[int]
    norms: Sequence[Sequence[float | None]]
    labels: Mapping[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents in the order of the corpus, which is random, and the hook points whose norms they have."""

    points: Sequence[str] = ()
    documents: Sequence[Shown] = ()


def documents(ds: ActivationDataset, corpus: CorpusRows | None) -> Documents:
    """Read the first documents of the first committed shuffle block."""
    block = _first_block(ds)
    columns = {name: np.asarray(values).astype(np.int64) for name, values in ds.rows(block).items()}
    chosen = _choose(columns["sequence"])
    wanted = np.flatnonzero(np.isin(columns["sequence"], chosen))
    if not len(wanted):
        return Documents()
    points = affordable(ds, len(block), _BLOCK_NBYTES)
    if len(points) > _MAX_POINTS:
        points = tuple(points[i] for i in np.linspace(0, len(points) - 1, _MAX_POINTS).round().astype(int))
    norms = [row_norms(ds, point, block[wanted]) for point in points]
    picked = {name: values[wanted] for name, values in columns.items()} | {"row": block[wanted]}
    shown = [_shown(corpus, sequence, picked, norms) for sequence in chosen]
    return Documents(points=points, documents=shown)


def _first_block(ds: ActivationDataset) -> I64:
    table = ds.reader.manifest.columns("first_row", "n_rows").slice(0, 1)
    if not table.num_rows:
        return np.empty(0, dtype=np.int64)
    first, n_rows = table["first_row"][0].as_py(), table["n_rows"][0].as_py()
    return np.arange(first, first + min(n_rows, ds.spec.rows_per_block), dtype=np.int64)


def _choose(sequences: I64) -> list[int]:
    """Choose sequences, whole ones first: those at the ends of a block may go on in the next one."""
    found, counts = np.unique(sequences, return_counts=True)
    if len(found) > 2:
        found, counts = found[1:-1], counts[1:-1]
    n_fit = int(np.searchsorted(np.cumsum(counts), _MAX_TOKENS, side="right"))
    return [int(sequence) for sequence in found[: min(max(1, n_fit), _MAX_DOCUMENTS)]]


def _shown(corpus: CorpusRows | None, number: int, picked: Mapping[str, I64], norms: Sequence[F64]) -> Shown:
    own = np.flatnonzero(picked["sequence"] == number)
    positions = picked["position"][own]
    found = corpus.sequence(number) if corpus else _sequence(number, positions, picked["token_id"][own])
    rows, roles = np.full(len(found.tokens), -1), found.roles.astype(np.int64)
    rows[positions] = picked["row"][own]
    roles[positions] = picked["role"][own]
    cut = slice(0, _MAX_TOKENS)
    return Shown(
        document=found.document,
        source=found.source,
        window=found.window,
        sequence=number,
        tokens=found.tokens[cut].tolist(),
        roles=roles[cut].tolist(),
        rows=rows[cut].tolist(),
        norms=[_aligned(values[own], positions, roles)[cut] for values in norms],
        labels=dict(found.metadata),
    )


def _sequence(number: int, positions: I64, token_ids: I64) -> TokenSequence:
    """Return what the rows alone know of a sequence."""
    tokens = np.full(int(positions.max()) + 1, -1, dtype=np.int32)
    tokens[positions] = token_ids
    roles = np.zeros(len(tokens), dtype=np.uint8)
    return TokenSequence(
        index=number, tokens=tokens, roles=roles, document="", window=0, offset=0, source="", metadata={}
    )


def _aligned(norms: F64, positions: I64, roles: I64) -> list[float | None]:
    values: list[float | None] = [None] * len(roles)
    for position, norm in zip(positions.tolist(), norms.tolist(), strict=True):
        # Three digits: the page shows no more, and each of up to 24 x 6,000 costs bytes.
        values[position] = float(f"{norm:.3g}") if roles[position] != ROLE_VOID else None
    return values
