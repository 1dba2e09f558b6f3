"""Which hook points of a shard are captured together: all of them, or, where memory does not hold them, in passes.

Each pass runs the shard's batches again, as far as the deepest of its hook points, and captures only those. The bytes
are the same: the shape of a batch decides the bits of an activation, not what else is taken from it.
"""

from actlake.storage.arrays import ArraySpec
from actlake.storage.errors import BadInputError
from actlake.storage.hookpoints import STREAMS, HookPoint
from actlake.storage.spec import ROW_COLUMNS, DatasetSpec


def plan_passes(spec: DatasetSpec, n_rows: int, shard_memory: int | None = None) -> tuple[tuple[str, ...], ...]:
    """Return the hook points of each pass over a shard of ``n_rows`` rows that may take ``shard_memory`` bytes.

    The deepest hook points come first and fill their pass, so that the last pass, which is the least full, is also
    the least deep. None stands for memory without a limit.

    Raises ``BadInputError`` where a hook point does not fit even alone.
    """
    arrays = spec.arrays()
    if shard_memory is None or n_rows * spec.nbytes_per_row <= shard_memory:
        return (spec.point_names,)
    room = shard_memory - n_rows * sum(arrays[f"rows/{column}"].nbytes_per_row for column in ROW_COLUMNS)
    passes: list[list[str]] = []
    left = 0
    for name in sorted(spec.point_names, key=_depth, reverse=True):
        nbytes = n_rows * arrays[name].nbytes_per_row
        if nbytes > room:
            raise BadInputError(_too_large(arrays[name], n_rows, nbytes, room, shard_memory))
        if nbytes > left:
            passes.append([])
            left = room
        passes[-1].append(name)
        left -= nbytes
    return tuple(tuple(name for name in spec.point_names if name in chosen) for chosen in passes)


def _depth(name: str) -> tuple[int, int]:
    point = HookPoint.parse(name)
    return point.layer, STREAMS.index(point.stream)


def _too_large(array: ArraySpec, n_rows: int, nbytes: int, room: int, shard_memory: int) -> str:
    fitting = max(0, room) // array.nbytes_per_row
    remedy = f"use layout.rows_per_shard = {1 << (fitting.bit_length() - 1):_}" if fitting else "use smaller shards"
    return (
        f"{array.name} alone takes {nbytes:,} bytes in a shard of {n_rows:,} rows, layout.shard_memory is "
        f"{shard_memory:,}; {remedy}, or raise layout.shard_memory"
    )
