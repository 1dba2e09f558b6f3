"""What a dataset holds: the frozen ``DatasetSpec``; its hash is ``dataset_id``.

How many rows are wanted is not part of it (growth adds shards only), nor is where the corpus lies.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from actlake.storage.arrays import ArraySpec
from actlake.storage.codecs import Codec
from actlake.storage.errors import BadInputError, FormatVersionError, SpecMismatchError, nearest
from actlake.storage.hookpoints import HookPoint, expand
from actlake.storage.rowspace import MAX_ROWS_PER_SHARD, ORDERS, KeepRule, RowSpace, content_hash
from actlake.storage.stored_json import require_fields

#: Raised by one with every change that an older reader would misread; docs/format.md has the history. A dataset is
#: written with the lowest version that has all it uses.
FORMAT_VERSIONS = (1, 2)

#: What a reader holds in memory before it has seen a byte of a dataset that may be anyone's: a chunk for each thread,
#: a shard index for each array. 128 times the default chunk; 16 MiB of index.
_MAX_CHUNK_NBYTES = 256 << 20
_MAX_CHUNKS = 2**20
_MAX_WIDTH = 2**20

SPLITS = ("train", "heldout")
DTYPES = ("bfloat16", "float32")
#: How sequences share a batch: each in a row of its own, or several in one row, kept apart by a mask.
PADDED, PACKED = BATCHINGS = ("padded", "packed")

#: What it means that these hashes differ.
_MEANINGS = {
    "corpus_id": " (other documents, another tokenizer or other rules of [corpus])",
    "model_fingerprint": " (other weights or another config)",
}

#: Columns stored for every row, on the shard grid of the hook points.
ROW_COLUMNS = {"token_id": "int32", "position": "int32", "sequence": "int64", "role": "uint8"}


@dataclass(frozen=True, kw_only=True)
class PointSpec:
    """One stored hook point: its name, its width in channels and the rows of its chunks."""

    name: str
    width: int
    rows_per_chunk: int

    def __post_init__(self) -> None:
        HookPoint.parse(self.name)
        if self.width < 1 or self.rows_per_chunk < 1:
            raise BadInputError(f"{self.name}: width {self.width} and rows_per_chunk {self.rows_per_chunk} must be > 0")
        if self.width > _MAX_WIDTH:
            raise BadInputError(f"{self.name}: width {self.width} must be at most {_MAX_WIDTH}")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Everything that decides the bytes of a dataset's arrays."""

    model: str
    model_revision: str | None
    model_fingerprint: str
    architecture: str
    corpus_id: str
    split: str
    keep: KeepRule
    hook_points: tuple[PointSpec, ...]
    dtype: str
    seed: int
    order: str
    rows_per_shard: int
    rows_per_block: int
    batch_tokens: int
    codec: Codec
    batching: str = PADDED

    def __post_init__(self) -> None:
        for value, valid, what in (
            (self.split, SPLITS, "split"),
            (self.dtype, DTYPES, "dtype"),
            (self.order, ORDERS, "order"),
            (self.batching, BATCHINGS, "batching"),
        ):
            if value not in valid:
                raise BadInputError(f"{what} = {value!r} is not one of {', '.join(valid)}{nearest(value, valid)}")
        if not self.hook_points:
            raise BadInputError("a dataset needs at least one hook point, e.g. 'layers.9.resid_post'")
        if len(set(self.point_names)) != len(self.hook_points):
            repeated = sorted({name for name in self.point_names if self.point_names.count(name) > 1})
            raise BadInputError(f"hook points named more than once: {', '.join(repeated)}; name each once")
        if not 0 <= self.seed < 2**64:
            raise BadInputError(f"seed = {self.seed} does not fit 64 bits; use 0 or any positive number below 2**64")
        if self.batch_tokens < 1:
            raise BadInputError(f"batch_tokens = {self.batch_tokens} must be > 0; 4096 is the default")
        self._check_layout()

    def _check_layout(self) -> None:
        if self.rows_per_shard > MAX_ROWS_PER_SHARD:
            raise BadInputError(f"rows_per_shard = {self.rows_per_shard} must be at most {MAX_ROWS_PER_SHARD}")
        if self.rows_per_shard < 1 or self.rows_per_block < 1 or self.rows_per_shard % self.rows_per_block:
            raise BadInputError(
                f"shuffle block of {self.rows_per_block} rows does not divide rows_per_shard = {self.rows_per_shard}; "
                f"use e.g. {self.rows_per_shard} or {max(1, self.rows_per_shard // 2)}"
            )
        for point in self.hook_points:
            if self.rows_per_shard % point.rows_per_chunk:
                raise BadInputError(
                    f"rows_per_chunk = {point.rows_per_chunk} ({point.name}) does not divide "
                    f"rows_per_shard = {self.rows_per_shard}; powers of two always do, e.g. 1_024 and 16_384"
                )
        for array in self.arrays().values():
            nbytes = array.rows_per_chunk * array.nbytes_per_row
            if nbytes > _MAX_CHUNK_NBYTES or array.chunks_per_shard > _MAX_CHUNKS:
                raise BadInputError(
                    f"{array.name}: {array.chunks_per_shard} chunks of {nbytes} bytes a shard; at most {_MAX_CHUNKS} "
                    f"of {_MAX_CHUNK_NBYTES} are read: choose another rows_per_chunk (2 MiB is the default)"
                )

    # --- identity ---

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON values; ``from_json`` reads it back. Without ``batching`` where that is padded."""
        value = asdict(self) | {
            "keep": self.keep.to_json(),
            "hook_points": [asdict(point) for point in self.hook_points],
            "codec": self.codec.to_json(),
        }
        if self.batching == PADDED:
            del value["batching"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read a spec; raise ``FormatVersionError`` for fields that this version does not know or misses."""
        known = {field.name for field in fields(cls)}
        if set(value) | {"batching"} != known:
            strange = ", ".join(sorted((set(value) | {"batching"}) ^ known))
            raise FormatVersionError(f"the spec's fields differ from format {FORMAT_VERSIONS[-1]}: {strange}")
        require_fields(cls, value, skip=["keep", "hook_points", "codec"])
        keep = KeepRule.from_json(value["keep"])
        points = tuple(PointSpec(**require_fields(PointSpec, point)) for point in value["hook_points"])
        return cls(**{**value, "keep": keep, "hook_points": points, "codec": Codec.from_json(value["codec"])})

    @property
    def format_version(self) -> int:
        """The version of the format that such a dataset has: 2 where rows are chosen by role or batches packed."""
        return 2 if self.keep.roles or self.batching != PADDED else 1

    @property
    def dataset_id(self) -> str:
        """The sha256 of the spec's canonical JSON, with the format version."""
        return content_hash({"format_version": self.format_version, "spec": self.to_json()})

    @property
    def row_space_id(self) -> str:
        """Equal for datasets whose rows line up: across hook points and models."""
        return content_hash(self.row_space_fields)

    @property
    def row_space_fields(self) -> dict[str, Any]:
        """What decides which token has which row number, as JSON values."""
        names = ("corpus_id", "split", "keep", "seed", "order", "rows_per_shard", "rows_per_block")
        value = self.to_json()
        return {name: value[name] for name in names}

    def difference(self, other: "DatasetSpec") -> list[str]:
        """Return one line for each field that differs, ``name: here 1, there 2``."""
        mine, theirs = (_flat({"batching": PADDED} | spec.to_json()) for spec in (self, other))
        return [
            f"{name}: here {_shown(mine, name)}, there {_shown(theirs, name)}{_MEANINGS.get(name, '')}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]

    def require_equal(self, other: "DatasetSpec", url: str) -> None:
        """Raise ``SpecMismatchError`` with the differing fields where this spec, stored at ``url``, is another."""
        if lines := self.difference(other):
            listed = "\n  ".join(lines)
            raise SpecMismatchError(
                f"{url} holds a dataset with another spec (here: stored, there: this job):\n  {listed}\n"
                "choose another 'dataset' URL, or make the job agree with what is stored"
            )

    # --- derived ---

    @property
    def point_names(self) -> tuple[str, ...]:
        return tuple(point.name for point in self.hook_points)

    @property
    def nbytes_per_row(self) -> int:
        """Uncompressed bytes of one row of all hook points and row columns."""
        return sum(array.nbytes_per_row for array in self.arrays().values())

    def select(self, patterns: "str | list[str] | tuple[str, ...]") -> tuple[str, ...]:
        """Expand hook point patterns against what is stored."""
        return expand(patterns, self.point_names, self.architecture)

    def row_space(self, n_rows: int) -> RowSpace:
        """Return the row arithmetic for a number of rows."""
        return RowSpace(
            n_rows=n_rows,
            rows_per_shard=self.rows_per_shard,
            rows_per_block=self.rows_per_block,
            seed=self.seed,
            order=self.order,
        )

    def arrays(self) -> dict[str, ArraySpec]:
        """Return every stored array by name: the hook points, then ``rows/*``."""
        points = [
            ArraySpec(
                name=point.name,
                dtype=self.dtype,
                width=point.width,
                rows_per_shard=self.rows_per_shard,
                rows_per_chunk=point.rows_per_chunk,
                codec=self.codec,
            )
            for point in self.hook_points
        ]
        # Row columns in the largest chunk of any hook point: one chunk of a hook point needs one chunk of a column.
        rows_per_chunk = max(point.rows_per_chunk for point in self.hook_points)
        columns = [
            ArraySpec(
                name=f"rows/{column}",
                dtype=dtype,
                width=None,
                rows_per_shard=self.rows_per_shard,
                rows_per_chunk=rows_per_chunk,
                codec=self.codec,
            )
            for column, dtype in ROW_COLUMNS.items()
        ]
        return {array.name: array for array in points + columns}


def _shown(value: Mapping[str, Any], name: str) -> str:
    return repr(value[name]) if name in value else "absent"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if key == "hook_points":
            flat |= {f"hook_points.{p['name']}": f"{p['width']} wide, {p['rows_per_chunk']} rows a chunk" for p in item}
        elif isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat
