"""What lies in a dataset beside its shards: metadata that is not what the spec says, and objects that are nobody's."""

import re
from collections.abc import Callable, Iterator

from actlake.shards.verify_shard import Problem
from actlake.storage.errors import NotFoundError
from actlake.storage.header import Header, zarr_metadata
from actlake.storage.records import GROUP_SHARDS
from actlake.storage.stores import Store

_NUMBER = re.compile(r"0|[1-9][0-9]*")
_INDEX = re.compile(r"index-[0-9]{8}-[0-9]{5}\.parquet")

#: Says whether a name may stand in a folder.
Allowed = Callable[[str], bool]


def layout_problems(store: Store) -> Iterator[Problem]:
    """Yield ``metadata`` and ``foreign`` problems: one small read and one or two listings an array.

    A name that begins with a dot is let be: desktops and tools leave such files, and no reader looks at them.
    """
    header = Header.read(store)  # Not what was opened: the plan may have grown since.
    yield from _metadata_problems(store, header)
    for folder, allowed in _folders(store, header):
        for name in store.names(folder):
            if not allowed(name) and not name.startswith("."):
                key = f"{folder}/{name}".lstrip("/")
                message = f"{store.url}/{key} is of no known name; no reader looks at it: delete it if it is not wanted"
                yield Problem(kind="foreign", shard=None, message=message)


def _metadata_problems(store: Store, header: Header) -> Iterator[Problem]:
    for key, expected in zarr_metadata(header).items():
        try:
            state = None if store.read(key) == expected else "is not what spec.json says"
        except NotFoundError:
            state = "is not there"
        if state is not None:
            message = f"{store.url}/{key} {state}; 'actlake verify --repair' or 'actlake ingest' writes it again"
            yield Problem(kind="metadata", shard=None, message=message)


def _folders(store: Store, header: Header) -> Iterator[tuple[str, Allowed]]:
    """Yield every folder of the layout (docs/format.md, "Objects") with what may stand in it."""
    spec, n_shards = header.spec, header.spec.row_space(header.n_rows).n_shards
    top = {"spec.json", "root.json", "arrays", "commits", "stats", "manifest"}
    yield "", (top | ({"heldout"} if spec.split == "train" else set())).__contains__
    yield "arrays", {"zarr.json", "rows", *spec.point_names}.__contains__
    columns = {name.partition("/")[2] for name in spec.arrays() if name.startswith("rows/")}
    yield "arrays/rows", {"zarr.json", *columns}.__contains__
    for name in spec.arrays():
        yield f"arrays/{name}", {"zarr.json", "c"}.__contains__
        yield f"arrays/{name}/c", lambda name: bool(_NUMBER.fullmatch(name)) and int(name) < n_shards
    groups = [f"{group:08d}" for group in range(-(-n_shards // GROUP_SHARDS))]
    yield "commits", groups.__contains__
    for folder in groups:
        yield f"commits/{folder}", _numbered(10, ".json", n_shards)
    shards = _numbered(10, ".parquet", n_shards)
    yield "stats", lambda name: name == "covariance" or shards(name)
    yield "stats/covariance", {f"{point}.parquet" for point in spec.point_names}.__contains__
    group = _numbered(8, ".parquet", len(groups))
    yield "manifest", lambda name: group(name) or _INDEX.fullmatch(name) is not None


def _numbered(n_digits: int, suffix: str, stop: int) -> Allowed:
    pattern = re.compile(rf"([0-9]{{{n_digits}}}){re.escape(suffix)}")
    return lambda name: (match := pattern.fullmatch(name)) is not None and int(match[1]) < stop
