"""Row arithmetic: which rows a shard holds, which tokens are rows, and how rows are permuted inside a shuffle block.

Everything here is a pure function of the spec; ``docs/format.md`` is the normative text.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from actlake.storage.errors import BadInputError, nearest
from actlake.storage.stored_json import require_fields

#: Role codes of ``rows/role``: what kind of text a row's token is from.
ROLE_TEXT = 0
ROLE_VOID = 255

#: All roles by name. ``template`` is what a chat template adds: marks of turns, and BOS before a chat; ``reasoning`` is
#: what a model writes before its answer where that is marked.
ROLES = {"text": ROLE_TEXT, "user": 1, "model": 2, "system": 3, "template": 4, "reasoning": 5, "void": ROLE_VOID}

#: What a keep rule may be called instead of a list of roles.
ROLE_CHOICES = {
    "all": (),
    "model-turns": ("model", "reasoning"),
    "user-turns": ("user",),
    "no-template": ("text", "user", "model", "system", "reasoning"),
    "reasoning": ("reasoning",),
}

ORDERS = ("shuffled", "sequence")

#: Shards that a dataset has at most: twelve times those of the largest release that we know of.
MAX_SHARDS = 2**24

#: Rows of a shard at most: 256 times the largest default. A row column of as many is half a gigabyte.
MAX_ROWS_PER_SHARD = 2**26


def content_hash(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class KeepRule:
    """Which tokens become rows: all but the excluded ids and the first ``skip_first`` positions of a sequence.

    ``roles`` narrows them to tokens of these roles, by name; empty takes every role.
    """

    exclude: tuple[int, ...] = ()
    skip_first: int = 0
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.skip_first < 0:
            raise BadInputError(f"skip_first = {self.skip_first} is negative; use 0 to skip nothing")
        if self.skip_first >= 2**31:
            raise BadInputError(f"skip_first = {self.skip_first} is beyond any sequence; use 0 to skip nothing")
        if strange := [token for token in self.exclude if not 0 <= token < 2**31]:
            raise BadInputError(f"exclude: {strange[:3]} are no token ids; those are 0 to 2**31 - 1")
        kept = ROLES.keys() - {"void"}
        for role in self.roles:
            if role not in kept:
                raise BadInputError(f"keep: no role {role!r}{nearest(role, kept)}")
        object.__setattr__(self, "exclude", tuple(sorted(set(self.exclude))))
        object.__setattr__(self, "roles", tuple(sorted(set(self.roles), key=ROLES.__getitem__)))

    @property
    def keep_id(self) -> str:
        """Names the rule's row index below a corpus."""
        return content_hash(self.to_json())[:16]

    def to_json(self) -> dict[str, Any]:
        """Return the rule as JSON values; without roles no word of them, as in version 1."""
        value: dict[str, Any] = {"exclude": list(self.exclude), "skip_first": self.skip_first}
        return value | ({"roles": list(self.roles)} if self.roles else {})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` returned."""
        require_fields(cls, value)
        return cls(**{**value, "exclude": tuple(value["exclude"]), "roles": tuple(value.get("roles", ()))})

    def mask(
        self,
        tokens: npt.NDArray[np.int32],
        roles: npt.NDArray[np.uint8],
        positions: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.bool_]:
        """Return bool [T]: True where a token is a row; by default the tokens are those of one sequence."""
        keep = ~np.isin(tokens, np.array(self.exclude, dtype=np.int32))
        keep &= (np.arange(len(tokens)) if positions is None else positions) >= self.skip_first
        if self.roles:
            keep &= np.isin(roles, np.array([ROLES[role] for role in self.roles], dtype=np.uint8))
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

    def n_rows_by_shard(self) -> npt.NDArray[np.int64]:
        """Return int64 [n_shards]: the rows of each shard."""
        starts = np.arange(self.n_shards, dtype=np.int64) * self.rows_per_shard
        return np.minimum(self.n_rows - starts, self.rows_per_shard)

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
