"""Row arithmetic: which rows a shard holds, which tokens are rows, and how rows are permuted inside a shuffle block.

Everything here is a pure function of the spec; ``docs/format.md`` is the normative text.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.storage.errors import BadInputError

#: Role codes of ``rows/role``: what kind of text a row's token is from.
ROLE_TEXT = 0
ROLE_VOID = 255

#: All roles by name. ``template`` is what a chat template adds: marks of turns, and BOS before a chat; ``reasoning`` is
#: what a model writes before its answer where that is marked.
ROLES = {"text": ROLE_TEXT, "user": 1, "model": 2, "system": 3, "template": 4, "reasoning": 5, "void": ROLE_VOID}

ORDERS = ("shuffled", "sequence")


def content_hash(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class KeepRule:
    """Which tokens become rows: all but the excluded ids and the first ``skip_first`` positions of a sequence."""

    exclude: tuple[int, ...] = ()
    skip_first: int = 0

    def __post_init__(self) -> None:
        if self.skip_first < 0:
            raise BadInputError(f"skip_first = {self.skip_first} is negative; use 0 to skip nothing")
        object.__setattr__(self, "exclude", tuple(sorted(set(self.exclude))))

    @property
    def keep_id(self) -> str:
        """Names the rule's row index below a corpus."""
        return content_hash(asdict(self))[:16]

    def mask(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Return bool [T]: True where the token of one sequence is a row."""
        keep = ~np.isin(tokens, np.array(self.exclude, dtype=np.int32))
        keep[: self.skip_first] = False
        return keep


@dataclass(frozen=True, kw_only=True)
class RowSpace:
    """The dense rows ``0..n_rows`` cut into shards; a shard holds whole shuffle blocks."""

    n_rows: int
    rows_per_shard: int
    rows_per_block: int
    seed: int
    order: str

    @property
    def n_shards(self) -> int:
        return -(-self.n_rows // self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        """Return the rows of one shard; only the last may be short."""
        if not 0 <= shard < self.n_shards:
            raise BadInputError(f"shard {shard} is out of range; the shards are 0..{self.n_shards - 1}")
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.n_rows))

    def places(self, shard: int) -> npt.NDArray[np.int64]:
        """Return int64 [n]: for the shard's n rows in corpus order, the place of each inside the shard.

        The token that comes i-th in the corpus, counted from the shard's first, is stored at index ``places[i]``.
        """
        rows = self.rows_of(shard)
        if self.order == "sequence":
            return np.arange(len(rows), dtype=np.int64)
        places = np.empty(len(rows), dtype=np.int64)
        for start in range(0, len(rows), self.rows_per_block):
            stop = min(start + self.rows_per_block, len(rows))
            block = (rows.start + start) // self.rows_per_block
            places[start:stop] = start + block_places(self.seed, block, stop - start)
        return places


def block_places(seed: int, block: int, n: int) -> npt.NDArray[np.int64]:
    """Return the permutation of one shuffle block, int64 [n]: where its i-th row in corpus order is stored.

    Row i gets the key ``mix(mix(mix(seed) ^ block) ^ i)``, with ``mix`` the splitmix64 step; the stored order is the
    stable ascending order of the keys (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    """
    keys = mix64(mix64(mix64(np.uint64(seed)) ^ np.uint64(block)) ^ np.arange(n, dtype=np.uint64))
    places = np.empty(n, dtype=np.int64)
    places[np.argsort(keys, kind="stable")] = np.arange(n)
    return places


def mix64(x: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Return one splitmix64 step of each uint64: a fixed, portable hash."""
    with np.errstate(over="ignore"):
        z = np.asarray(x, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))
