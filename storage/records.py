"""The commit record of one shard: written last, its existence makes the shard visible.

``content`` reproduces whoever builds the shard; ``provenance`` says who did, when and on what.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from actlake.storage.errors import BadInputError, CorruptObjectError, NotFoundError
from actlake.storage.rowspace import MAX_ROWS_PER_SHARD, MAX_SHARDS
from actlake.storage.sealed import check_seal, seal
from actlake.storage.stored_json import parse_object, require_fields
from actlake.storage.stores import Store

#: A record of 400 arrays has 50 kB.
_MAX_NBYTES = 16 << 20

#: Records that are read at once: on an object store each takes 20 to 50 ms.
_N_READERS = 16

#: Commits in one folder, and shards in one compacted manifest group.
GROUP_SHARDS = 1024


def commit_key(shard: int) -> str:
    """Return the key of a shard's commit record."""
    return f"{commit_folder(shard // GROUP_SHARDS)}/{shard:010d}.json"


def commit_folder(group: int) -> str:
    """Return the folder of a group's commit records."""
    return f"commits/{group:08d}"


def stats_key(shard: int) -> str:
    """Return the key of a shard's statistics."""
    return f"stats/{shard:010d}.parquet"


@dataclass(frozen=True, kw_only=True)
class ObjectRecord:
    """Size and checksums of one stored object; ``index_crc32c`` is 0 for an object without a shard index."""

    nbytes: int
    crc32c: int
    index_crc32c: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.nbytes < 2**63 or not 0 <= self.crc32c < 2**32 or not 0 <= self.index_crc32c < 2**32:
            raise BadInputError(f"{self} is no object's: sizes are of 63 bits, checksums of 32")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Who built a shard, when and on what; not reproducible. ``copied_from`` is the dataset it was copied from."""

    attempt: str = ""
    host: str = ""
    device: str = ""
    software: Mapping[str, str] = field(default_factory=dict)
    started: str = ""
    finished: str = ""
    n_tokens: int = 0
    forward_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    copied_from: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.n_tokens < 2**63:
            raise BadInputError(f"n_tokens = {self.n_tokens} is no number of tokens")

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; of a shard that was built in its place no word of copies."""
        value = asdict(self)
        if not self.copied_from:
            del value["copied_from"]
        return value


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One committed shard: its rows, its objects by array name, its statistics object."""

    dataset_id: str
    shard: int
    revision: int
    first_row: int
    n_rows: int
    n_void: int
    objects: Mapping[str, ObjectRecord]
    stats: ObjectRecord
    provenance: Provenance

    def __post_init__(self) -> None:
        first, n_rows, n_void = self.first_row, self.n_rows, self.n_void
        if not 0 <= self.shard < MAX_SHARDS or not 0 <= self.revision < 2**31:
            raise BadInputError(f"shard {self.shard} or revision {self.revision} is none that there can be")
        if not 0 <= first < 2**63 or not 0 <= n_rows <= MAX_ROWS_PER_SHARD or not 0 <= n_void < 2**63:
            raise BadInputError(f"shard {self.shard}: {n_rows} rows from {first} on, {n_void} void: that cannot be")
        if self.nbytes >= 2**63:
            raise BadInputError(f"shard {self.shard}: {self.nbytes:,} bytes are no shard's: sizes are of 63 bits")

    @property
    def nbytes(self) -> int:
        """Stored bytes of the shard's arrays."""
        return sum(item.nbytes for item in self.objects.values())

    @property
    def content(self) -> dict[str, Any]:
        """The reproducible part, as JSON values; how often a shard was rebuilt is history, so it stands apart."""
        value = asdict(self)
        del value["provenance"], value["revision"]
        return value

    def to_bytes(self) -> bytes:
        """Return the record as it is stored."""
        value = {"content": self.content, "revision": self.revision, "provenance": self.provenance.to_json()}
        return json.dumps(seal(value), sort_keys=True, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read a stored record; raise ``CorruptObjectError`` naming ``where`` for anything else."""
        try:
            value = parse_object(data)
            content = dict(require_fields(cls, value["content"], skip=["objects", "stats"]))
            objects = {name: _object(item) for name, item in content.pop("objects").items()}
            stats = _object(content.pop("stats"))
            known = {item.name for item in fields(Provenance)}
            about = require_fields(Provenance, value["provenance"])
            provenance = Provenance(**{name: about[name] for name in known & about.keys()})
            revision = require_fields(cls, {"revision": value["revision"]})["revision"]
            found = cls(**content, revision=revision, objects=objects, stats=stats, provenance=provenance)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptObjectError(
                f"{where} is no commit record ({type(error).__name__}: {error}); "
                "delete it and root.json, then 'actlake ingest' builds the shard again"
            ) from error
        check_seal(value, where)
        return found


def _object(value: Any) -> ObjectRecord:
    return ObjectRecord(**require_fields(ObjectRecord, value))


def read_record(store: Store, shard: int) -> ShardRecord:
    """Read one commit record; raise ``NotFoundError`` where the shard is not committed."""
    key = commit_key(shard)
    record = ShardRecord.from_bytes(store.read(key, _MAX_NBYTES), f"{store.url}/{key}")
    if record.shard != shard:
        raise CorruptObjectError(f"{store.url}/{key} is the record of shard {record.shard}")
    return record


def read_records(store: Store, shards: Sequence[int], *, skip_absent: bool = False) -> list[ShardRecord]:
    """Read commit records, some at once, in the order of ``shards``.

    ``skip_absent`` leaves out shards that are not committed; else they raise ``NotFoundError``.
    """

    def read(shard: int) -> ShardRecord | None:
        try:
            return read_record(store, shard)
        except NotFoundError:
            if skip_absent:
                return None
            raise

    if len(shards) < 2:
        found = map(read, shards)
        return [record for record in found if record is not None]
    with ThreadPoolExecutor(_N_READERS, thread_name_prefix="actlake-records") as pool:
        return [record for record in pool.map(read, shards) if record is not None]


def commit(store: Store, record: ShardRecord) -> None:
    """Make a shard visible: one plain PUT, the last one wins."""
    store.write(commit_key(record.shard), record.to_bytes())
