"""A dataset as Arrow tables: what ``actlake query`` asks with SQL, also for notebooks.

``shards`` has a row for each planned shard, committed or not; ``objects`` one for each stored object; ``sequences`` one
for each sequence that owns rows, with its document, labels and rows by role; ``stats`` one for each hook point;
``quarantine`` one for each document that the corpus set aside.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actlake.shards.dataset import ActivationDataset
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_files import QUARANTINE, flat
from actlake.storage.errors import NotFoundError, SpecMismatchError
from actlake.storage.hookpoints import HookPoint
from actlake.storage.manifest import SCHEMA
from actlake.storage.moments import Moments
from actlake.storage.rowspace import ROLE_VOID, ROLES, KeepRule
from actlake.storage.stores import resolve_url

I64 = npt.NDArray[np.int64]

_ROLES = {f"n_{name}": code for name, code in ROLES.items() if code != ROLE_VOID}

_SHARD_FIELDS = [field for field in SCHEMA if field.name not in ("shard", "objects")]
_SHARDS = pa.schema([("shard", pa.int64()), ("committed", pa.bool_()), ("n_rows_planned", pa.int64()), *_SHARD_FIELDS])
_OBJECTS = pa.schema(
    [
        ("shard", pa.int64()),
        ("name", pa.string()),
        ("layer", pa.int32()),
        ("stream", pa.string()),
        ("nbytes", pa.int64()),
        ("raw_nbytes", pa.int64()),
        ("crc32c", pa.uint32()),
        ("index_crc32c", pa.uint32()),
    ]
)
# Not "window", "offset" and, above, "array": SQL has them for itself.
_SEQUENCES = pa.schema(
    [
        ("sequence", pa.int64()),
        ("document", pa.string()),
        ("document_window", pa.int32()),
        ("document_offset", pa.int32()),
        ("source", pa.string()),
        ("n_tokens", pa.int64()),
        ("first_row", pa.int64()),
        ("n_rows", pa.int64()),
        ("n_committed", pa.int64()),
        *((name, pa.int64()) for name in _ROLES),
    ]
)
_STATS = pa.schema(
    [
        ("hook_point", pa.string()),
        ("layer", pa.int32()),
        ("stream", pa.string()),
        ("width", pa.int64()),
        ("n_rows", pa.int64()),
        ("n_nonfinite", pa.int64()),
        ("norm_mean", pa.float64()),
        ("norm_median", pa.float64()),
        ("mean_squared_norm", pa.float64()),
        ("unit_scale", pa.float64()),
        ("sqrt_d_scale", pa.float64()),
        ("top_channel", pa.int64()),
        ("top_channel_share", pa.float64()),
        ("nbytes", pa.int64()),
        ("ratio", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class LakeTable:
    """One table: its columns, how many rows it has at most, and its rows, piece by piece when they are asked for."""

    schema: pa.Schema
    n_rows_most: int
    pieces: Callable[[], Iterator[pa.Table]]

    def read(self) -> pa.Table:
        """Return the whole table."""
        return pa.concat_tables([self.schema.empty_table(), *self.pieces()])


def tables(ds: ActivationDataset) -> dict[str, LakeTable]:
    """Return the tables of a dataset by name; nothing is read yet but the header of its corpus.

    Pieces raise ``NotFoundError`` where the corpus is needed and gone, ``DataError`` for damage.
    """
    n_shards = ds.spec.row_space(ds.n_rows_planned).n_shards
    corpus = _corpus(ds)
    n_sequences = corpus.splits[ds.spec.split].n_sequences if corpus else 0
    metadata = corpus.spec.metadata if corpus else ()
    fields = _SEQUENCES
    for name in metadata:
        fields = fields.append(pa.field(name, pa.string()))
    kept = _quarantined(corpus)
    return {
        "shards": LakeTable(schema=_SHARDS, n_rows_most=n_shards, pieces=lambda: iter([shards(ds)])),
        "objects": LakeTable(schema=_OBJECTS, n_rows_most=n_shards * len(ds.spec.arrays()), pieces=lambda: objects(ds)),
        "sequences": LakeTable(schema=fields, n_rows_most=n_sequences, pieces=lambda: sequences(ds)),
        "stats": LakeTable(schema=_STATS, n_rows_most=len(ds.hook_points), pieces=lambda: iter([stats(ds)])),
        "quarantine": LakeTable(schema=kept.schema, n_rows_most=len(kept), pieces=lambda: iter([kept])),
    }


def shards(ds: ActivationDataset) -> pa.Table:
    """Return a row for each planned shard, with nulls where it is not committed."""
    space, known = ds.spec.row_space(ds.n_rows_planned), ds.reader.manifest.columns("shard", *_names(_SHARD_FIELDS))
    place = np.full(space.n_shards, -1, dtype=np.int64)
    # A smaller plan than the one that was built leaves shards behind it.
    there = known["shard"].to_numpy()[: np.searchsorted(known["shard"].to_numpy(), space.n_shards)]
    place[there] = np.arange(len(there))
    found = known.drop_columns("shard").take(pa.array(place, mask=place < 0))
    numbers = np.arange(space.n_shards)
    planned = np.minimum(space.n_rows - numbers * space.rows_per_shard, space.rows_per_shard)
    head = {"shard": numbers, "committed": place >= 0, "n_rows_planned": planned}
    columns = [pa.array(column) for column in head.values()] + found.columns
    return pa.table(columns, names=[*head, *found.column_names]).cast(_SHARDS)


def objects(ds: ActivationDataset) -> Iterator[pa.Table]:
    """Yield a row for each stored object of the committed shards, a table for each 1,024 of them."""
    arrays = ds.spec.arrays()
    names = [*arrays]
    points = [_point(name) for name in names]
    for table in ds.reader.manifest.tables():
        lists = table["objects"].combine_chunks()
        flat_objects = lists.flatten()
        row = np.repeat(np.arange(len(table)), np.diff(lists.offsets.to_numpy()))
        code = pc.index_in(flat_objects.field("array"), pa.array(names))
        per_row = pa.array([array.nbytes_per_row for array in arrays.values()]).take(code)
        columns = {
            "shard": table["shard"].combine_chunks().take(pa.array(row)),
            "name": flat_objects.field("array"),
            "layer": pa.array([point.layer if point else None for point in points], pa.int32()).take(code),
            "stream": pa.array([point.stream if point else None for point in points], pa.string()).take(code),
            "nbytes": flat_objects.field("nbytes"),
            "raw_nbytes": pc.multiply(per_row, table["n_rows"].combine_chunks().take(pa.array(row))),
            "crc32c": flat_objects.field("crc32c"),
            "index_crc32c": flat_objects.field("index_crc32c"),
        }
        yield pa.table(columns, schema=_OBJECTS)


def sequences(ds: ActivationDataset) -> Iterator[pa.Table]:
    """Yield the sequences that own planned rows, a table for each row group of the corpus.

    ``n_rows`` counts planned rows, ``n_committed`` those that are committed, ``n_<role>`` planned rows by role.
    """
    corpus = Corpus.open(resolve_url(ds.header.corpus, ds.store))
    if corpus.corpus_id != ds.spec.corpus_id:
        raise SpecMismatchError(
            f"{ds.url} was made from corpus {ds.spec.corpus_id[:12]}..., but at {corpus.store.url} lies "
            f"{corpus.corpus_id[:12]}...; put the right one there"
        )
    committed, texts = _committed_before(ds), ("document", "source", *corpus.spec.metadata)
    row, sequence = 0, 0
    for group in range(corpus.n_groups(ds.spec.split)):
        if row >= ds.n_rows_planned:
            break
        stored = corpus.columns(ds.spec.split, group, [*texts, "window", "offset", "tokens", "roles"])
        counts = _count_by_role(stored, ds.spec.keep, ds.n_rows_planned - row)
        n_rows = counts["n_rows"]
        first = row + np.concatenate([np.zeros(1, np.int64), np.cumsum(n_rows)])
        columns = {
            "sequence": np.arange(sequence, sequence + len(stored)),
            "document_window": stored["window"].cast(pa.int32()),
            "document_offset": stored["offset"].cast(pa.int32()),
            **{name: stored[name].cast(pa.string()) for name in texts},
            **counts,
            "first_row": first[:-1],
            "n_committed": committed(first[1:]) - committed(first[:-1]),
        }
        schema = _SEQUENCES
        for name in corpus.spec.metadata:
            schema = schema.append(pa.field(name, pa.string()))
        yield pa.table({name: columns[name] for name in schema.names}, schema=schema).filter(pa.array(n_rows > 0))
        row, sequence = int(first[-1]), sequence + len(stored)


def stats(ds: ActivationDataset) -> pa.Table:
    """Return the statistics of each hook point; reads those of every committed shard."""
    return pa.Table.from_pylist([_statistics(ds, name) for name in ds.hook_points], schema=_STATS)


# --- helpers -------------------------------------------------------------------------------------------------------


def _names(fields: list[pa.Field]) -> list[str]:
    return [field.name for field in fields]


def _point(array: str) -> HookPoint | None:
    return None if array.startswith("rows/") else HookPoint.parse(array)


def _corpus(ds: ActivationDataset) -> Corpus | None:
    try:
        return Corpus.open(resolve_url(ds.header.corpus, ds.store))
    except NotFoundError:
        # Named where its rows are asked for.
        return None


def _quarantined(corpus: Corpus | None) -> pa.Table:
    return QUARANTINE.empty_table() if corpus is None else corpus.quarantine()


def _committed_before(ds: ActivationDataset) -> Callable[[I64], I64]:
    """Return what counts the committed rows before row numbers."""
    size, table = ds.spec.rows_per_shard, ds.reader.manifest.columns("shard", "n_rows")
    shard, n_rows = table["shard"].to_numpy(), table["n_rows"].to_numpy()
    by_shard = np.zeros(max(int(shard.max(initial=0)) + 1, -(-ds.n_rows_planned // size)) + 1, dtype=np.int64)
    by_shard[shard] = n_rows
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(by_shard)])

    def count(rows: I64) -> I64:
        number, inside = np.divmod(rows, size)
        found: I64 = before[number] + np.minimum(inside, by_shard[number])
        return found

    return count


def _count_by_role(stored: pa.Table, keep: KeepRule, n_most: int) -> dict[str, I64]:
    """Return tokens, rows and rows by role of each sequence, int64 [n]; only the first ``n_most`` rows count."""
    tokens, offsets = flat(stored["tokens"])
    roles, _ = flat(stored["roles"])
    position = np.arange(len(tokens)) - np.repeat(offsets[:-1], np.diff(offsets))
    kept = keep.mask(tokens, roles, position)
    kept &= np.cumsum(kept) <= n_most

    def count(chosen: npt.NDArray[np.bool_]) -> I64:
        running = np.concatenate([np.zeros(1, np.int64), np.cumsum(chosen, dtype=np.int64)])
        found: I64 = np.diff(running[offsets])
        return found

    by_role = {name: count(kept & (roles == code)) for name, code in _ROLES.items()}
    return {"n_tokens": np.diff(offsets).astype(np.int64), "n_rows": count(kept), **by_role}


def _statistics(ds: ActivationDataset, name: str) -> dict[str, object]:
    moments, point = ds.statistics(name), HookPoint.parse(name)
    stored = ds.reader.manifest.nbytes_by_array().get(name, 0)
    channels = moments.outlier_channels(0.0)[:1] if moments.count else ()
    return {
        "hook_point": name,
        "layer": point.layer,
        "stream": point.stream,
        "width": len(moments.mean),
        "n_rows": moments.count,
        "n_nonfinite": moments.n_nonfinite,
        "norm_mean": moments.norm_mean,
        "norm_median": _median(moments),
        "mean_squared_norm": moments.mean_squared_norm,
        "unit_scale": moments.unit_scale,
        "sqrt_d_scale": moments.sqrt_d_scale,
        "top_channel": channels[0].channel if channels else None,
        "top_channel_share": channels[0].share if channels else None,
        "nbytes": stored,
        "ratio": ds.n_rows * ds.spec.arrays()[name].nbytes_per_row / stored if stored else None,
    }


def _median(moments: Moments) -> float | None:
    return None if moments.norm_histogram is None else moments.median_norm
