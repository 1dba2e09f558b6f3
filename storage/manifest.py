"""All committed records as Arrow columns: the only answer to "what is in this dataset".

Full groups of 1,024 commits are compacted into ``manifest/<group>.parquet``, of determined name and bytes, so that any
driver may write it. ``root.json``, written when a run is complete, lists them: such a dataset opens without listing.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actlake.storage.errors import CorruptObjectError, NotFoundError, UncommittedShardError
from actlake.storage.records import (
    GROUP_SHARDS,
    ObjectRecord,
    Provenance,
    ShardRecord,
    commit_folder,
    commit_key,
    read_record,
)
from actlake.storage.stores import Store

_OBJECT = pa.struct(
    [("array", pa.string()), ("nbytes", pa.int64()), ("crc32c", pa.uint32()), ("index_crc32c", pa.uint32())]
)

_REMEDY = "delete root.json and manifest/; 'actlake ingest' with the job file writes both again from the commits"

#: One row per committed shard, ascending.
SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("revision", pa.int32()),
        ("first_row", pa.int64()),
        ("n_rows", pa.int64()),
        ("n_void", pa.int64()),
        ("nbytes", pa.int64()),
        ("dataset_id", pa.string()),
        ("objects", pa.list_(_OBJECT)),
        ("stats_nbytes", pa.int64()),
        ("stats_crc32c", pa.uint32()),
        ("attempt", pa.string()),
        ("host", pa.string()),
        ("device", pa.string()),
        ("software", pa.string()),
        ("started", pa.string()),
        ("finished", pa.string()),
        ("n_tokens", pa.int64()),
        ("forward_s", pa.float64()),
        ("encode_s", pa.float64()),
        ("write_s", pa.float64()),
    ]
)


def group_key(group: int) -> str:
    """Return the key of a compacted group."""
    return f"manifest/{group:08d}.parquet"


class Manifest:
    """The committed shards at one moment, immutable."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @classmethod
    def of(cls, records: Iterable[ShardRecord]) -> Self:
        """Build from records in any order."""
        rows = [_to_row(record) for record in sorted(records, key=lambda record: record.shard)]
        return cls(pa.Table.from_pylist(rows, schema=SCHEMA))

    @classmethod
    def load(cls, store: Store, n_rows: int | None = None) -> Self:
        """Read the compacted groups and the other commits of a dataset, with ``n_rows`` planned where that is known."""
        root = read_root(store)
        if root is not None and n_rows is not None and root["n_rows"] != n_rows:
            # Left by a run that planned fewer rows and ended after another had planned more.
            root = None
        if root is not None:
            loose = (shard for shard in range(root["n_shards"]) if shard // GROUP_SHARDS not in root["groups"])
            try:
                return cls._gather(store, root["groups"], (read_record(store, shard) for shard in loose))
            except NotFoundError:
                pass  # A commit that the totals count is gone, as after a repair: what is there is the answer.
        return cls.load_listed(store)

    @classmethod
    def load_listed(cls, store: Store) -> Self:
        """Read what is there by listing it, whatever ``root.json`` says."""
        groups = _groups(store)
        return cls._gather(store, groups, _listed_records(store, set(groups)))

    @classmethod
    def _gather(cls, store: Store, groups: Iterable[int], records: Iterable[ShardRecord]) -> Self:
        tables = [_read_group(store, group) for group in groups]
        return cls(pa.concat_tables([*tables, Manifest.of(records).table]).sort_by("shard").combine_chunks())

    @cached_property
    def shards(self) -> list[int]:
        """Numbers of the committed shards, ascending."""
        return list(self.table["shard"].to_pylist())

    @cached_property
    def n_rows(self) -> int:
        """Committed rows, voids included."""
        return int(pc.sum(self.table["n_rows"]).as_py() or 0)

    @cached_property
    def nbytes(self) -> int:
        """Stored bytes of all arrays."""
        return int(pc.sum(self.table["nbytes"]).as_py() or 0)

    @cached_property
    def _place(self) -> dict[int, int]:
        return {shard: place for place, shard in enumerate(self.shards)}

    def record(self, shard: int) -> ShardRecord:
        """Return the record of one shard; raise ``UncommittedShardError`` where it has none."""
        place = self._place.get(shard)
        if place is None:
            raise UncommittedShardError(
                f"shard {shard} is not committed; 'actlake ingest' with the dataset's job file builds what is missing"
            )
        return _from_row(self.table.slice(place, 1).to_pylist()[0])

    def records(self) -> Iterator[ShardRecord]:
        """Yield every record, ascending."""
        for batch in self.table.to_batches(max_chunksize=256):
            yield from map(_from_row, batch.to_pylist())

    def n_rows_by_shard(self) -> dict[int, int]:
        """Return the committed number of rows of each shard, whatever dataset its record names."""
        return dict(zip(self.shards, self.table["n_rows"].to_pylist(), strict=True))

    def nbytes_by_array(self) -> dict[str, int]:
        """Return the stored bytes of each array."""
        objects = self.table["objects"].combine_chunks().flatten()
        flat = pa.table({"array": objects.field("array"), "nbytes": objects.field("nbytes")})
        summed = flat.group_by("array", use_threads=False).aggregate([("nbytes", "sum")])
        return dict(zip(summed["array"].to_pylist(), summed["nbytes_sum"].to_pylist(), strict=True))


def compact(store: Store, manifest: Manifest, n_shards: int, sizes: Mapping[int, int]) -> list[int]:
    """Write the groups that are full and not yet compacted; return all compacted groups.

    ``sizes`` has the planned rows of each shard. A short last shard may grow, so its group is not full.
    """
    present = _groups(store)
    full: list[int] = []
    for group in range(n_shards // GROUP_SHARDS):
        rows = manifest.table.filter(
            (pc.field("shard") >= group * GROUP_SHARDS) & (pc.field("shard") < (group + 1) * GROUP_SHARDS)
        )
        done = zip(rows["shard"].to_pylist(), rows["n_rows"].to_pylist(), strict=True)
        if rows.num_rows != GROUP_SHARDS or any(not n_rows == sizes[shard] == sizes[0] for shard, n_rows in done):
            continue
        if group not in present:
            sink = io.BytesIO()
            pq.write_table(rows.combine_chunks(), sink, compression="zstd")
            store.write(group_key(group), sink.getvalue())
        full.append(group)
    return full


def write_root(store: Store, *, dataset_id: str, n_rows: int, manifest: Manifest, groups: list[int]) -> None:
    """Write ``root.json``: the totals of a complete dataset and its compacted groups."""
    value = {
        "dataset_id": dataset_id,
        "complete": True,
        "n_rows": n_rows,
        "n_shards": len(manifest),
        "nbytes": manifest.nbytes,
        "groups": groups,
    }
    store.write("root.json", json.dumps(value, sort_keys=True, indent=1).encode())


def read_root(store: Store) -> dict[str, Any] | None:
    """Return the totals of a complete dataset, None for one in the making; raise ``CorruptObjectError`` if damaged."""
    try:
        value: dict[str, Any] = json.loads(store.read("root.json"))
        if missing := {"dataset_id", "n_rows", "n_shards", "nbytes", "groups"} - set(value):
            raise ValueError(f"fields missing: {', '.join(sorted(missing))}")
    except NotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CorruptObjectError(f"{store.url}/root.json is damaged ({error}); {_REMEDY}") from error
    return value


def uncommit(store: Store, shard: int) -> None:
    """Make a shard invisible again; what summarises it goes first, so that no reader sees the two disagree."""
    store.delete("root.json")
    store.delete(group_key(shard // GROUP_SHARDS))
    store.delete(commit_key(shard))


def _listed_records(store: Store, groups: set[int]) -> Iterator[ShardRecord]:
    for folder in _numbers(store, "commits", ""):
        for shard in _numbers(store, commit_folder(folder), ".json") if folder not in groups else ():
            try:
                yield read_record(store, shard)
            except NotFoundError:
                continue  # Un-committed since it was listed.


def _groups(store: Store) -> list[int]:
    return _numbers(store, "manifest", ".parquet")


def _numbers(store: Store, folder: str, suffix: str) -> list[int]:
    # Folders in buckets may hold what no one of us wrote: marker objects, .DS_Store.
    pattern = re.compile(r"([0-9]{8}|[0-9]{10})" + re.escape(suffix))
    return [int(match[1]) for name in store.names(folder) if (match := pattern.fullmatch(name))]


def _read_group(store: Store, group: int) -> pa.Table:
    key = group_key(group)
    data = store.read(key)
    try:
        # With a schema given, pyarrow would fill absent columns with nulls.
        table = pq.ParquetFile(pa.BufferReader(data)).read()
        if not table.schema.equals(SCHEMA):
            raise ValueError("other columns than a manifest's")
    except (ValueError, OSError) as error:
        raise CorruptObjectError(f"{store.url}/{key} is damaged ({error}); {_REMEDY}") from error
    # Fields of a file carry Parquet ids, which would get into the bytes of a group written from them.
    return table.cast(SCHEMA)


def _to_row(record: ShardRecord) -> dict[str, Any]:
    provenance = record.provenance
    objects = [
        {"array": name, "nbytes": o.nbytes, "crc32c": o.crc32c, "index_crc32c": o.index_crc32c}
        for name, o in sorted(record.objects.items())
    ]
    row = {name: getattr(record, name) for name in SCHEMA.names if hasattr(record, name)}
    row |= {name: getattr(provenance, name) for name in SCHEMA.names if hasattr(provenance, name)}
    return row | {
        "objects": objects,
        "stats_nbytes": record.stats.nbytes,
        "stats_crc32c": record.stats.crc32c,
        "software": json.dumps(dict(provenance.software), sort_keys=True),
    }


def _from_row(row: Mapping[str, Any]) -> ShardRecord:
    names = ("attempt", "host", "device", "started", "finished", "n_tokens", "forward_s", "encode_s", "write_s")
    return ShardRecord(
        dataset_id=row["dataset_id"],
        shard=row["shard"],
        revision=row["revision"],
        first_row=row["first_row"],
        n_rows=row["n_rows"],
        n_void=row["n_void"],
        objects={
            o["array"]: ObjectRecord(nbytes=o["nbytes"], crc32c=o["crc32c"], index_crc32c=o["index_crc32c"])
            for o in row["objects"]
        },
        stats=ObjectRecord(nbytes=row["stats_nbytes"], crc32c=row["stats_crc32c"]),
        provenance=Provenance(software=json.loads(row["software"]), **{name: row[name] for name in names}),
    )
