"""A stream's state as JSON: what it is of, and what is still to be delivered."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actlake.shards.course import Course, Position, Share, merge, split, trimmed
from actlake.shards.settings import StreamSettings
from actlake.shards.source import Source
from actlake.storage.errors import BadInputError
from actlake.storage.rowspace import content_hash

#: Raised by one with every change that gives another order or another meaning to a saved state.
STATE_VERSION = 2

_NO_STATE = "the state is no stream state; give what state_dict() returned"

#: More names than this are stood for by their hash: a state stays under 4 kB.
_MAX_NAMES = 8


def identity(source: Source, settings: StreamSettings, segments: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that decides the batches but rank and position, as JSON values."""
    points = list(settings.points)
    if len(points) > _MAX_NAMES:
        points = [f"{len(points)} hook points {content_hash(points)[:12]}"]
    return {
        "state_version": STATE_VERSION,
        "dataset_id": [reader.spec.dataset_id for reader in source.readers],
        "points": points,
        "filter": None if source.filter is None else source.filter.describe(),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "order": settings.order,
        "epochs": "endless" if settings.epochs is None else "counted",
        "rows": settings.rows,
        "normalize": settings.normalize,
        "drop_last": settings.drop_last,
        "follow": settings.wave_shards,
        **segments,
    }


def save(of: Mapping[str, Any], rank: Share, worker: Share, position: Position) -> dict[str, Any]:
    """Return a state."""
    return {
        "of": dict(of),
        "rank": [rank.index, rank.count],
        "worker": [worker.index, worker.count],
        "position": position.to_json(),
    }


def snapshot_of(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the snapshot that states were saved on; None for a stream that follows ingestion.

    Raises ``BadInputError`` for what is no state.
    """
    try:
        snapshot = found[0]["of"].get("snapshot")
        if snapshot is None:
            return None
        shards = [[int(first), int(count)] for first, count in snapshot["shards"]]
        return {"shards": shards, "n_rows": int(snapshot["n_rows"]), "crc32c": int(snapshot["crc32c"])}
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInputError(f"{_NO_STATE} ({type(error).__name__}: {error})") from error


def check(found: Sequence[Mapping[str, Any]], here: Mapping[str, Any]) -> None:
    """Raise ``BadInputError`` with what differs from ``here``, all or a part of what a stream is."""
    for state in found:
        there = state.get("of", {})
        names = [name for name in here if there.get(name) != here.get(name)]
        if names:
            lines = [f"{name}: the state has {there.get(name)!r}, this stream {here.get(name)!r}" for name in names]
            listed = "\n  ".join(lines)
            raise BadInputError(
                f"the state is not of this stream:\n  {listed}\n"
                "open the same dataset with the same settings (buffer_bytes decides units_per_window)"
            )


def load(
    found: Sequence[Mapping[str, Any]], rank: Share, course: Callable[[Share, Share], Course]
) -> tuple[Position, Share]:
    """Return what a rank has to deliver after states, and the loader process that it is of.

    ``course`` gives the course of a rank and a loader process. Raises ``BadInputError`` for states of other ranks.
    """
    try:
        states = {
            (tuple(state["rank"]), tuple(state["worker"])): Position.from_json(state["position"]) for state in found
        }
        shares = {key: tuple(Share(index=index, count=count) for index, count in key) for key in states}
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(f"{_NO_STATE} ({type(error).__name__}: {error})") from error
    if len(states) < len(found):
        raise BadInputError("two of the states are of one rank: give the state of every rank once")
    own = [key for key, (of_rank, _) in shares.items() if of_rank == rank]
    if len(own) == 1 and (len(found) == 1 or shares[own[0]][1].count == 1):
        return states[own[0]], shares[own[0]][1]
    _require_all(list(shares.values()), rank)
    merged = merge([(course(*shares[key]), position) for key, position in states.items()])
    if course(rank, Share()).bounded:
        merged = trimmed(merged, rank.count, course(rank, Share()).batch_size)
    return split(merged, rank), Share()


def _require_all(shares: Sequence[tuple[Share, ...]], here: Share) -> None:
    n_ranks = shares[0][0].count
    wanted = {
        (rank, worker)
        for rank in range(n_ranks)
        for worker in range(next((w.count for r, w in shares if r.index == rank), 1))
    }
    given = {(rank.index, worker.index) for rank, worker in shares}
    if given != wanted or any(rank.count != n_ranks for rank, _ in shares):
        names = ", ".join(f"{rank.index} of {rank.count}" for rank, _ in shares)
        raise BadInputError(
            f"this is rank {here.index} of {here.count}, and the states are of rank {names}: give the state of this "
            "rank, or a list with the states of all ranks to deal what is left anew"
        )
