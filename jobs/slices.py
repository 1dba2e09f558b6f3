"""Slices: the part of a dataset's shards that one process builds where no driver hands them out."""

import re
from dataclasses import dataclass
from typing import Self

from actlake.storage.errors import BadInputError

_REMEDY = "give e.g. --slice $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT, or number the slices 1/8 to 8/8"


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The shards ``k`` of each split with ``k % count == number % count``.

    So numbers may count from 0 or from 1: of 8 slices, 0/8 is 8/8.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise BadInputError(f"--slice {self}: a dataset has at least one slice; {_REMEDY}")
        if not 0 <= self.number <= self.count:
            raise BadInputError(
                f"--slice {self}: there is no slice {self.number} of {self.count}; an array of {self.count} tasks is "
                f"numbered 0-{self.count - 1} or 1-{self.count}, without gaps"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``NUMBER/COUNT``; raise ``BadInputError`` for anything else."""
        number, slash, count = text.partition("/")
        if slash and not (number.strip() and count.strip()):
            raise BadInputError(
                f"--slice {text!r} lacks a number: an environment variable in it is empty, as those of Slurm are "
                f"outside of a job array; {_REMEDY}"
            )
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*/\s*[0-9]{1,9}\s*", text):
            raise BadInputError(f"--slice {text!r} is not NUMBER/COUNT; {_REMEDY}")
        return cls(number=int(number), count=int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
