"""The commit record of one shard: written last, its existence makes the shard visible.

``content`` reproduces whoever builds the shard; ``provenance`` says who did, when and on what.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from actlake.storage.errors import CorruptObjectError
from actlake.storage.stores import Store

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


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Who built a shard, when and on what; not reproducible."""

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
        value = {"content": self.content, "revision": self.revision, "provenance": asdict(self.provenance)}
        return json.dumps(value, sort_keys=True, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read a stored record; raise ``CorruptObjectError`` naming ``where`` for anything else."""
        try:
            value = json.loads(data)
            content = value["content"]
            objects = {name: ObjectRecord(**item) for name, item in content.pop("objects").items()}
            stats = ObjectRecord(**content.pop("stats"))
            known = {item.name for item in fields(Provenance)}
            provenance = Provenance(**{k: v for k, v in value["provenance"].items() if k in known})
            revision = int(value["revision"])
            return cls(**content, revision=revision, objects=objects, stats=stats, provenance=provenance)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptObjectError(
                f"{where} is no commit record ({type(error).__name__}: {error}); "
                "delete it and root.json, then 'actlake ingest' builds the shard again"
            ) from error


def read_record(store: Store, shard: int) -> ShardRecord:
    """Read one commit record; raise ``NotFoundError`` where the shard is not committed."""
    key = commit_key(shard)
    record = ShardRecord.from_bytes(store.read(key), f"{store.url}/{key}")
    if record.shard != shard:
        raise CorruptObjectError(f"{store.url}/{key} is the record of shard {record.shard}")
    return record


def commit(store: Store, record: ShardRecord) -> None:
    """Make a shard visible: one plain PUT, the last one wins."""
    store.write(commit_key(record.shard), record.to_bytes())
