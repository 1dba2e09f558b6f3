"""Looking rows up: where in which text they are from, the rows of one sequence, and a random sample."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from actlake.shards.point_view import RowKey, row_numbers
from actlake.storage.corpus_files import REBUILD
from actlake.storage.corpus_spec import REDACTED, TokenSequence
from actlake.storage.errors import (
    BadInputError,
    CorruptObjectError,
    RowRangeError,
    UncommittedShardError,
    UnknownNameError,
    nearest,
)
from actlake.storage.redaction import piece_of
from actlake.storage.rowspace import ROLE_VOID, ROLES

if TYPE_CHECKING:
    from actlake.shards.dataset import ActivationDataset
    from actlake.shards.order import Snapshot
    from actlake.shards.source import Source

I64 = npt.NDArray[np.int64]

_ROLE_NAMES = {code: name for name, code in ROLES.items()}

#: Shows a token between its neighbours.
_LEFT, _RIGHT = "\u27e6", "\u27e7"


@dataclass(frozen=True, kw_only=True)
class RowContext:
    """One row's token among its neighbours, and where it is from; ``str`` is one line of it.

    ``tokens`` are the ids of the window, ``pieces`` their text; the row's own is at ``place``. ``window`` is the number
    of the piece of the document that was run as one sequence. ``metadata`` are the document's fields that the corpus
    keeps.
    """

    row: int
    sequence: int
    position: int
    role: str
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    place: int
    document: str
    window: int
    source: str
    metadata: Mapping[str, str | None]

    @property
    def token_id(self) -> int:
        return self.tokens[self.place]

    @property
    def token(self) -> str:
        """The text of the row's token."""
        return self.pieces[self.place]

    @property
    def before(self) -> str:
        """The text of the window before the token."""
        return "".join(self.pieces[: self.place])

    @property
    def after(self) -> str:
        """The text of the window after the token."""
        return "".join(self.pieces[self.place + 1 :])

    def __str__(self) -> str:
        text = f"{self.before}{_LEFT}{self.token}{_RIGHT}{self.after}".replace("\n", "\\n")
        role = "" if self.role == "text" else f", {self.role}"
        labels = "".join(f", {name}={value}" for name, value in self.metadata.items() if value is not None)
        return f"row {self.row}  {text}  ({self.document}, token {self.position} of window {self.window}{role}{labels})"


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceRows:
    """The rows of one sequence in corpus order, void ones left out: ``rows["layers.9.resid_post"]`` is [T, width].

    ``row`` (int64 [T]) are their numbers, ``token_id`` and ``position`` int32 [T], ``role`` uint8 [T]. Tokens that are
    no rows, such as BOS, leave gaps in ``position``.
    """

    sequence: int
    row: torch.Tensor
    token_id: torch.Tensor
    position: torch.Tensor
    role: torch.Tensor
    activations: Mapping[str, torch.Tensor]

    def __getitem__(self, point: str) -> torch.Tensor:
        try:
            return self.activations[point]
        except KeyError:
            raise UnknownNameError(f"no hook point {point!r} among these{nearest(point, self.activations)}") from None

    def __len__(self) -> int:
        return len(self.row)


def _piece(dataset: "ActivationDataset", pieces: Sequence[str], token: int) -> str:
    if not REDACTED <= token < len(pieces):
        raise CorruptObjectError(f"{dataset.url}: the vocabulary of its corpus ends before token {token}; {REBUILD}")
    return piece_of(pieces, token)


def context(dataset: "ActivationDataset", rows: RowKey, *, before: int = 20, after: int = 10) -> list[RowContext]:
    """Return the token windows and documents of rows, in the order asked for, without reading activations.

    Args:
        dataset: whose rows.
        rows: a row number, a slice or several numbers.
        before: tokens shown before each, fewer at the beginning of its sequence.
        after: tokens shown after it.

    Reads the row columns' chunks of these rows, and of the corpus the row groups (1,024 sequences) of theirs. Raises
    ``RowRangeError``, ``UncommittedShardError``; ``NotFoundError`` where the corpus is gone; ``CorruptObjectError``
    where it has other tokens than the rows.
    """
    if before < 0 or after < 0:
        raise BadInputError(f"before = {before} and after = {after} must not be negative; 0 shows no neighbours")
    numbers = row_numbers(rows, dataset.n_rows_planned, dataset.url).reshape(-1)
    columns = {name: column.tolist() for name, column in dataset.rows(numbers).items()}
    pieces = dataset.corpus.pieces()
    found: dict[int, RowContext] = {}
    # By sequence, so that each row group of the corpus is read once.
    for i in sorted(range(len(numbers)), key=lambda i: columns["sequence"][i]):
        token, position, role = (columns[name][i] for name in ("token_id", "position", "role"))
        sequence = dataset.corpus.sequence(columns["sequence"][i])
        _require_token(dataset.url, int(numbers[i]), token, position, sequence)
        start = max(0, position - before)
        tokens = tuple(sequence.tokens[start : position + after + 1].tolist())
        found[i] = RowContext(
            row=int(numbers[i]),
            sequence=sequence.index,
            position=position,
            role=_ROLE_NAMES.get(role, str(role)),
            tokens=tokens,
            pieces=tuple(_piece(dataset, pieces, token) for token in tokens),
            place=position - start,
            document=sequence.document,
            window=sequence.window,
            source=sequence.source,
            metadata=sequence.metadata,
        )
    return [found[i] for i in range(len(numbers))]


def _require_token(url: str, row: int, token: int, position: int, sequence: TokenSequence) -> None:
    there = int(sequence.tokens[position]) if position < len(sequence.tokens) else None
    if there != token and not (there == REDACTED and token == 0):
        raise CorruptObjectError(
            f"{url}: row {row} is of token {token}, but the corpus has {there} at place {position} of sequence "
            f"{sequence.index}; 'actlake verify' says which of the two is damaged"
        )


# --- one sequence ---


def sequence(dataset: "ActivationDataset", number: int, points: str | Sequence[str] | None = None) -> SequenceRows:
    """Return all rows of one sequence of the split in corpus order; ``points`` None takes every hook point.

    Works without the corpus. Sequences rise with the shards: their shard is found by bisection (a chunk of
    ``rows/sequence`` each step), its column is read whole, and then the chunks that hold the rows: as many as the
    sequence has rows, where a shuffle block spreads them over more chunks than that.

    Raises ``RowRangeError`` for a sequence without rows, ``UncommittedShardError`` where some may be in a shard that is
    not committed.
    """
    chosen = dataset.hook_points if points is None else dataset.spec.select(_patterns(points))
    rows = _rows_of_sequence(dataset, number)
    columns = dataset.rows(rows)
    kept = np.flatnonzero(columns["role"] != ROLE_VOID)
    # Positions rise along a sequence.
    kept = kept[np.argsort(columns["position"][kept], kind="stable")]
    return SequenceRows(
        sequence=number,
        row=torch.from_numpy(rows[kept]),
        **{name: torch.from_numpy(columns[name][kept]) for name in ("token_id", "position", "role")},
        activations={point: dataset.tensor(point, rows[kept]) for point in chosen},
    )


def in_common(parts: Mapping[str, SequenceRows]) -> SequenceRows:
    """Return one sequence of datasets that align: the rows that all have, at ``name:point`` of each."""
    first, *others = parts.values()
    rows = first.row.numpy()
    for other in others:
        rows = rows[np.isin(rows, other.row.numpy())]
    kept = {name: torch.from_numpy(np.isin(part.row.numpy(), rows)) for name, part in parts.items()}
    mine = next(iter(kept.values()))
    return SequenceRows(
        sequence=first.sequence,
        row=first.row[mine],
        token_id=first.token_id[mine],
        position=first.position[mine],
        role=first.role[mine],
        activations={
            f"{name}:{point}": values[kept[name]]
            for name, part in parts.items()
            for point, values in part.activations.items()
        },
    )


def _patterns(points: str | Sequence[str]) -> str | list[str]:
    return points if isinstance(points, str) else list(points)


def _rows_of_sequence(dataset: "ActivationDataset", number: int) -> I64:
    """Return the rows of a sequence, int64 [T], ascending."""
    shards, per_shard = dataset.reader.manifest.shards, dataset.spec.rows_per_shard
    after = bisect_left(shards, number, key=lambda shard: _first_sequence(dataset, shard))
    # The shard before may end with it, and the sequence may begin in none or in shard 0.
    first, stop = (shards[after - 1] if after else 0), None
    parts = [np.empty(0, dtype=np.int64)]
    for shard in shards[max(0, after - 1) :]:
        n_rows = dataset.reader.record(shard).n_rows
        stored = dataset["rows/sequence"][shard * per_shard : shard * per_shard + n_rows]
        parts.append(shard * per_shard + np.flatnonzero(stored == number))
        if stored.max() > number:
            stop = shard
            break
    _require_whole(dataset, number, first, stop)
    rows = np.concatenate(parts)
    if not len(rows):
        raise RowRangeError(f"{dataset.url}: no row is of sequence {number}; ds['rows/sequence'] has those with rows")
    return rows


def _first_sequence(dataset: "ActivationDataset", shard: int) -> int:
    """Return the sequence of a shard's first row in corpus order."""
    spec, n_rows = dataset.spec, dataset.reader.record(shard).n_rows
    start = shard * spec.rows_per_shard
    # A block is permuted as long as it was when it was written.
    block = spec.row_space(start + min(spec.rows_per_block, n_rows))
    return int(dataset["rows/sequence"][start + int(block.places(shard)[0])])


def _require_whole(dataset: "ActivationDataset", number: int, first: int, stop: int | None) -> None:
    """Raise ``UncommittedShardError`` where a shard from ``first`` to before ``stop`` lacks rows."""
    space = dataset.spec.row_space(dataset.n_rows_planned)
    committed = dataset.reader.manifest.n_rows_by_shard()
    for shard in range(first, space.n_shards if stop is None else stop):
        if committed.get(shard, 0) < len(space.rows_of(shard)):
            raise UncommittedShardError(
                f"{dataset.url}: rows of sequence {number} may be in shard {shard}, which is not committed whole; "
                "'actlake ingest' with the dataset's job file builds what is missing"
            )


# --- a sample ---


def draw_rows(source: "Source", n: int, *, seed: int = 0) -> I64:
    """Return the numbers of n rows drawn uniformly, without replacement, from those committed everywhere, void nowhere.

    int64 [n], exactly uniform over all of them, in random order: also the first rows of a sample are one. The same rows
    for the same seed and committed shards.

    Each row costs the chunk that it is in (about 2 MiB a hook point), and a chunk is read once: small samples of large
    datasets read n chunks, those of n >> chunks the whole hook point. Where a mix of a few hundred chunks will do, a
    batch of ``stream`` costs less. For shards with void rows, their roles are read too.
    """
    snapshot = source.snapshot()
    n_kept = snapshot.n_rows - snapshot.n_void
    if len(source.readers) > 1:
        # A row may be void in several of them.
        for i in np.flatnonzero(snapshot.n_void).tolist():
            n_kept[i] = len(_kept_rows(source, snapshot, i))
    total = int(n_kept.sum())
    if not 0 < n <= total:
        raise BadInputError(f"n = {n} rows cannot be drawn from {total}; use 1..{total}")
    drawn = _draw(np.random.default_rng(seed), n, total)
    edges = np.concatenate([[0], np.cumsum(n_kept)])
    place = np.searchsorted(edges, drawn, side="right") - 1
    rows: I64 = snapshot.shard[place] * source.spec.rows_per_shard + drawn - edges[place]
    for i in np.unique(place).tolist():
        if snapshot.n_void[i]:
            of_shard = place == i
            rows[of_shard] = _kept_rows(source, snapshot, i)[drawn[of_shard] - edges[i]]
    return rows


def _kept_rows(source: "Source", snapshot: "Snapshot", index: int) -> I64:
    shard, n_rows = int(snapshot.shard[index]), int(snapshot.n_rows[index])
    return shard * source.spec.rows_per_shard + np.flatnonzero(~source.voids(shard, n_rows))


def _draw(random: np.random.Generator, n: int, total: int) -> I64:
    """Return n distinct numbers below ``total``, int64 [n]: a uniform draw, in random order.

    The first n distinct of independent draws are one. More than half of all are the others of such a draw, shuffled.
    """
    if 2 * n > total:
        left_out = _draw(random, total - n, total) if n < total else np.empty(0, dtype=np.int64)
        return random.permutation(np.setdiff1d(np.arange(total), left_out))
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < n:
        drawn = np.concatenate([drawn, random.integers(0, total, size=n)])
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return drawn[:n]
