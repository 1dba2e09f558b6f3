"""What each name means in a dataset and in a corpus, by the tables "Objects" and "Corpus" of docs/format.md."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from actlake.storage.errors import BadInputError
from actlake.storage.hookpoints import HookPoint
from actlake.storage.listing import list_objects
from actlake.storage.records import GROUP_SHARDS
from actlake.storage.spec import ROW_COLUMNS
from actlake.storage.stores import Store

# --- What a key of a dataset means -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What lies under a key: ``kind``, and the array, shard or group that it is of.

    ``kind`` is ``spec``, ``root``, ``metadata`` (of Zarr), ``object``, ``statistics``, ``covariance``, ``commit``,
    ``group``, ``index``, ``aside`` (the record of a shard that is being redacted) or ``temporary``.
    """

    kind: str
    array: str = ""
    number: int = -1


_FIXED = {
    "spec.json": "spec",
    "root.json": "root",
    "arrays/zarr.json": "metadata",
    "arrays/rows/zarr.json": "metadata",
}
_POINT = r"(?P<array>layers\.(?:0|[1-9][0-9]{0,3})\.[a-z_]+)"
_COLUMN = r"(?P<array>rows/[a-z_]+)"
_NUMBER = r"(?P<number>0|[1-9][0-9]{0,18})"
_PATTERNS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("object", rf"arrays/{_POINT}/c/{_NUMBER}/0"),
        ("object", rf"arrays/{_COLUMN}/c/{_NUMBER}"),
        ("metadata", rf"arrays/{_POINT}/zarr\.json"),
        ("metadata", rf"arrays/{_COLUMN}/zarr\.json"),
        ("statistics", r"stats/(?P<number>[0-9]{10})\.parquet"),
        ("covariance", rf"stats/covariance/{_POINT}\.parquet"),
        ("commit", r"commits/(?P<group>[0-9]{8})/(?P<number>[0-9]{10})\.json"),
        ("group", r"manifest/(?P<number>[0-9]{8})\.parquet"),
        ("aside", r"redacting/(?P<number>[0-9]{10})\.json"),
        ("index", r"manifest/index-(?P<number>[0-9]{8})-[0-9]{5}\.parquet"),
    )
)


def place_of(key: str) -> Place | None:
    """Return what a key means by the table "Objects" of docs/format.md; None for a foreign one."""
    if is_temporary(key):
        return Place(kind="temporary")
    if key in _FIXED:
        return Place(kind=_FIXED[key])
    for kind, pattern in _PATTERNS:
        if (match := pattern.fullmatch(key)) is not None:
            return _place(kind, match.groupdict())
    return None


def _place(kind: str, found: Mapping[str, str | None]) -> Place | None:
    number, array = int(found.get("number") or -1), found.get("array") or ""
    if "group" in found and number // GROUP_SHARDS != int(found["group"] or -1):
        return None
    if array.startswith("rows/"):
        return Place(kind=kind, array=array, number=number) if array[5:] in ROW_COLUMNS else None
    try:
        return Place(kind=kind, array=str(HookPoint.parse(array)) if array else "", number=number)
    except BadInputError:
        return None  # No such stream.


def is_temporary(key: str) -> bool:
    """Say whether a key is that of a file that a writer had not finished; it is known by its name alone."""
    return key.rpartition("/")[2].startswith(".actlake-")


# --- And of a corpus -------------------------------------------------------------------------------------------------

_CORPUS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("header", r"corpus\.json"),
        ("cut", r"cuts/[0-9a-f]{16}-[0-9]{10}\.json"),
        ("file", r"sequences/(?:train|heldout)-[0-9]{10}-[0-9a-f]{8}\.parquet"),
        ("file", r"(?:vocab|quarantine)-[0-9a-f]{8}\.parquet"),
        ("quarantine", r"quarantine\.parquet"),
        ("file", r"replies/[0-9a-f]{32}\.parquet"),
        ("row index", r"rows/[0-9a-f]{16}/(?:train|heldout)\.parquet"),
        ("building", r"building/[0-9a-f]{16}/[a-z]+/[^/]+"),
    )
)


def corpus_kind(key: str) -> str | None:
    """Return what a key of a corpus means; None for a foreign one.

    ``header``, ``cut``, ``file`` (of those that the header lists), ``row index``, ``building`` or ``temporary``.
    """
    if is_temporary(key):
        return "temporary"
    return next((kind for kind, pattern in _CORPUS if pattern.fullmatch(key)), None)


# --- What lies at a URL ----------------------------------------------------------------------------------------------


def kind_of(store: Store) -> str | None:
    """Return ``dataset`` or ``corpus`` for what lies at a URL, whole or begun; None for anything else.

    What was begun, or removed in part, has no ``spec.json`` or ``corpus.json``; its other names tell it.
    """
    names = set(store.names())
    if "spec.json" in names:
        return "dataset"
    if "corpus.json" in names or ({"sequences", "building", "replies"} & names and _is_begun_corpus(store)):
        return "corpus"
    if "arrays" in names and any(_is_point(name) for name in store.names("arrays")):
        return "dataset"
    return None


def _is_begun_corpus(store: Store) -> bool:
    folders = ("sequences", "building", "replies")
    return any(corpus_kind(found.key) for folder in folders for found in list_objects(store, folder))


def _is_point(name: str) -> bool:
    try:
        HookPoint.parse(name)
    except BadInputError:
        return False
    return True
