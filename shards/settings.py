"""What a stream was asked for, checked."""

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actlake.shards.course import Share
from actlake.storage.errors import BadInputError, nearest
from actlake.storage.sizes import parse_nbytes

if TYPE_CHECKING:
    import torch

ORDERS = ("shuffled", "sequence")
NORMALISATIONS = ("unit", "sqrt_d", "standardize")
ON_DAMAGE = ("raise", "skip")

_NUMBERS = ("batch_size", "seed", "epochs", "rows", "rank", "world_size", "read_ahead")

#: Shards of a wave where ``follow`` is True: every batch mixes rows of so many shuffle blocks or more.
WAVE_SHARDS = 8


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Everything but the dataset that decides a stream's batches, and where they go; ``ds.stream`` has the meanings."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ()
    batch_size: int = 4096
    seed: int = 0
    epochs: int | None = 1
    rows: int | None = None
    drop_last: bool = True
    rank: int = 0
    world_size: int = 1
    order: str = "shuffled"
    dtype: "torch.dtype | None" = None
    device: Any = "cpu"
    pin_memory: bool = False
    normalize: str | None = None
    columns: tuple[str, ...] = ()
    buffer_bytes: int | str = "1GiB"
    read_ahead: int | None = None
    follow: bool | int = False
    on_damage: str = "raise"

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole_number(value, name))
        if self.batch_size < 1:
            raise BadInputError(f"batch_size = {self.batch_size} must be > 0; 4096 is the default")
        if self.epochs is not None and self.epochs < 1:
            raise BadInputError(f"epochs = {self.epochs} must be > 0; None streams without an end")
        if not 0 <= self.seed < 2**64:
            raise BadInputError(f"seed = {self.seed} must be in 0..2**64-1")
        for name, valid in (("order", ORDERS), ("normalize", NORMALISATIONS), ("on_damage", ON_DAMAGE)):
            value = getattr(self, name)
            if value not in valid and not (name == "normalize" and value is None):
                raise BadInputError(f"{name} = {value!r} is not one of {', '.join(valid)}{nearest(str(value), valid)}")
        _check_rank(self.rank, self.world_size)
        if self.read_ahead is not None and self.read_ahead < 1:
            raise BadInputError(f"read_ahead = {self.read_ahead} must be > 0; None reads with a thread for each core")
        if self.buffer_bytes != 0:
            parse_nbytes(self.buffer_bytes, "buffer_bytes")
        self._check_rows()
        self._check_follow()

    def _check_rows(self) -> None:
        group = self.batch_size * self.world_size
        if self.rows is not None and self.rows < (group if self.drop_last else 1):
            raise BadInputError(
                f"rows = {self.rows} makes no batch of {self.batch_size} on each of {self.world_size} ranks; "
                f"use at least {group}, or drop_last=False"
            )

    def _check_follow(self) -> None:
        if self.follow and (self.epochs != 1 or self.rows is not None or self.order != "shuffled"):
            raise BadInputError(
                "follow=True reads each row once, in waves: leave epochs, rows and order at their defaults, and stream "
                "the complete dataset for more"
            )

    @property
    def points(self) -> tuple[str, ...]:
        """Inputs and targets, each once."""
        return tuple(dict.fromkeys((*self.inputs, *self.targets)))

    @property
    def buffer_nbytes(self) -> int:
        """``buffer_bytes`` as a number; 0 for as little as goes."""
        return 0 if self.buffer_bytes == 0 else parse_nbytes(self.buffer_bytes)

    @property
    def share(self) -> Share:
        """The rank's share of the batches."""
        return Share(index=self.rank, count=self.world_size)

    @property
    def endless(self) -> bool:
        return self.epochs is None and self.rows is None

    @property
    def wave_shards(self) -> int:
        """Consecutive shards that are shuffled among themselves where ingestion is followed."""
        return WAVE_SHARDS if self.follow is True else int(self.follow)


def this_rank(rank: int | None, world_size: int | None, same_batch: bool) -> tuple[int, int]:
    """Return rank and world size: those given, else those of ``torch.distributed`` where it runs, else 0 of 1.

    With ``same_batch`` all ranks are rank 0 of 1, and get the same rows. Raises ``BadInputError`` for one without the
    other.
    """
    if (rank is None) != (world_size is None):
        raise BadInputError(f"rank = {rank} and world_size = {world_size}: give both, or neither")
    if rank is None or world_size is None:
        from torch import distributed

        ready = distributed.is_available() and distributed.is_initialized()
        rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if ready else (0, 1)
    rank, world_size = whole_number(rank, "rank"), whole_number(world_size, "world_size")
    _check_rank(rank, world_size)
    return (0, 1) if same_batch else (rank, world_size)


def _check_rank(rank: int, world_size: int) -> None:
    if world_size < 1:
        raise BadInputError(f"world_size = {world_size} must be > 0; one process is rank 0 of 1")
    if not 0 <= rank < world_size:
        raise BadInputError(
            f"rank = {rank} is not in 0..{world_size - 1} (world_size = {world_size}); ranks count from 0"
        )


def whole_number(value: Any, name: str) -> int:
    """Return an integer of any kind, NumPy's too, as Python's; raise ``BadInputError`` for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise BadInputError(f"{name} = {value!r} is no whole number") from None
