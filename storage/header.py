"""The metadata objects of a dataset, made once by the driver before any worker: ``spec.json`` and the Zarr metadata."""

import json
from dataclasses import dataclass
from typing import Any

from actlake.storage.corpus_segments import require_one_corpus
from actlake.storage.errors import BadInputError, CorruptObjectError, FormatVersionError, NotFoundError
from actlake.storage.listing import found_at
from actlake.storage.rowspace import MAX_SHARDS
from actlake.storage.sealed import check_seal, seal
from actlake.storage.spec import FORMAT_VERSIONS, DatasetSpec
from actlake.storage.stored_json import parse_object, require_fields
from actlake.storage.stores import Store

#: ``spec.json`` of 400 hook points has 40 kB.
_MAX_NBYTES = 16 << 20

_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}


@dataclass(frozen=True, kw_only=True)
class Header:
    """The contents of ``spec.json``: the spec, the planned rows, and where the corpus lies (relative, or a URL).

    ``segments`` are the ids of the corpus's segments when the rows were planned; empty where there was only one.
    """

    spec: DatasetSpec
    n_rows: int
    corpus: str
    segments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.n_rows < 0 or self.spec.row_space(self.n_rows).n_shards > MAX_SHARDS:
            raise BadInputError(
                f"{self.n_rows} rows in shards of {self.spec.rows_per_shard} are not 0 to {MAX_SHARDS} shards; "
                "raise layout.rows_per_shard"
            )

    @property
    def chain(self) -> tuple[str, ...]:
        """The ids of the corpus's segments, of which the first is the corpus's own."""
        return self.segments or (self.spec.corpus_id,)

    def to_bytes(self) -> bytes:
        """Return ``spec.json``."""
        value = {
            "format": "actlake dataset",
            "format_version": self.spec.format_version,
            "dataset_id": self.spec.dataset_id,
            "row_space_id": self.spec.row_space_id,
            "n_rows": self.n_rows,
            "corpus": self.corpus,
            "spec": self.spec.to_json(),
        }
        if self.segments:
            value["segments"] = list(self.segments)
        return _json(seal(value))

    @classmethod
    def read(cls, store: Store) -> "Header":
        """Read a dataset's header.

        Raises ``NotFoundError`` where there is no dataset, ``FormatVersionError`` for a newer format,
        ``CorruptObjectError`` for a damaged ``spec.json``.
        """
        try:
            data = store.read("spec.json", _MAX_NBYTES)
        except NotFoundError as error:
            raise NotFoundError(
                f"no dataset at {store.url} (found there: {found_at(store)}); 'actlake ls' lists datasets"
            ) from error
        where = f"{store.url}/spec.json"
        try:
            value = parse_object(data)
            version, dataset_id = value["format_version"], value["dataset_id"]
            if value["format"] != "actlake dataset":
                raise CorruptObjectError(f"{where} describes an {value['format']!r}, not a dataset")
            if version not in FORMAT_VERSIONS:
                known = ", ".join(map(str, FORMAT_VERSIONS))
                raise FormatVersionError(
                    f"{where} has format version {version}; this actlake reads {known}: pip install -U actlake"
                )
            require_fields(cls, value, skip=["spec"])
            if not isinstance(dataset_id, str):
                raise TypeError(f"dataset_id = {dataset_id!r:.80} is no text")
            header = cls(
                spec=DatasetSpec.from_json(value["spec"]),
                n_rows=value["n_rows"],
                corpus=value["corpus"],
                segments=tuple(value.get("segments", ())),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptObjectError(f"{where} is damaged ({type(error).__name__}: {error})") from error
        if header.spec.dataset_id != dataset_id:
            raise CorruptObjectError(f"{where}: the spec does not hash to dataset_id {dataset_id[:12]}...")
        check_seal(value, where)
        return header


def prepare(store: Store, header: Header) -> Header:
    """Create a dataset's metadata, or check that the same spec is there and plan more rows; return what now holds.

    Raises ``SpecMismatchError`` with the differing fields, and then writes nothing. Fewer rows than planned before
    change no plan. Zarr metadata that are lost, damaged or of a growth that broke off are written again.
    """
    try:
        stored = Header.read(store)
    except NotFoundError:
        stored = None
    if stored is not None:
        stored.spec.require_equal(header.spec, store.url)
        require_one_corpus(stored.chain, header.chain, store.url, f"the corpus at {header.corpus}")
        if stored.n_rows >= header.n_rows:
            return _restored(store, stored)
        # The totals of the smaller dataset must not outlive it.
        store.delete("root.json")
    for key, data in zarr_metadata(header).items():
        store.write(key, data)
    store.write("spec.json", header.to_bytes())
    return header


def zarr_metadata(header: Header) -> dict[str, bytes]:
    """Return every ``zarr.json`` by key: the arrays first, the groups that lead to them last."""
    arrays = {f"arrays/{a.name}/zarr.json": _json(a.zarr_json(header.n_rows)) for a in header.spec.arrays().values()}
    return arrays | {"arrays/rows/zarr.json": _json(_GROUP), "arrays/zarr.json": _json(_GROUP)}


def _restored(store: Store, stored: Header) -> Header:
    """Write again what differs from the stored header: one read for each array and group."""
    expected = zarr_metadata(stored)
    differing = [key for key, data in expected.items() if _found(store, key) != data]
    # A growth by another driver may have ended since the header was read; its shapes are then the right ones.
    if differing and (now := Header.read(store)).n_rows != stored.n_rows:
        return _restored(store, now)
    for key in differing:
        store.write(key, expected[key])
    return stored


def _found(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except NotFoundError:
        return None


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()
