"""Everything that lies below a URL, with size and age, and the uploads that were never completed.

Readers ask a store for the names they know; removing and collecting garbage must see all others as well.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from actlake.storage.clients import AMAZON, GOOGLE
from actlake.storage.errors import NotFoundError
from actlake.storage.stores import Store

#: Names in one answer of a service: as many as all of them give.
_PAGE = 1000

#: Folders that are listed one by one where a client has no pages; what lies deeper, an array's objects, comes at once.
_DEPTH = 3

#: What a listing may carry, for its deadline: a service gives 1,000 names an answer, so a million take minutes.
_LISTING_NBYTES = 4 << 30

#: What a client says of one object.
_Info = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """One stored object; ``modified`` is when, in seconds since 1970, None where the store does not tell."""

    key: str
    nbytes: int
    modified: float | None


def found_at(store: Store) -> str:
    """Say what lies directly at a URL, for an error about what does not: at most 8 names, or "nothing"."""
    names = store.names()
    return ", ".join([*names[:8], *(["..."] if names[8:] else [])]) or "nothing"


def list_objects(store: Store, key: str = "") -> Iterator[Listed]:
    """Yield every object below a folder, temporary files of writers too.

    Memory is that of 1,000 objects on ``gs://`` and ``s3://``, of a folder's names on a local disk, else of the objects
    of one array. On a local disk symbolic links are objects, never followed.
    """
    if store.local:
        return _scan(store, key)
    if store.protocol in (*GOOGLE, *AMAZON):
        return _paged(store, key, _google_page if store.protocol in GOOGLE else _amazon_page)
    return _walk(store, key, _DEPTH)


def _paged(store: Store, key: str, page: Callable[..., tuple[list[_Info], str | None]]) -> Iterator[Listed]:
    bucket, _, folder = (store.path(key).strip("/") + "/").partition("/")
    token: str | None = ""
    while token is not None:
        found, token = page(store, key, bucket, folder, token)
        for info in found:
            name = info["name"].removeprefix(folder)
            # Markers of folders are objects whose names end with a slash.
            if name and not name.endswith("/"):
                yield Listed(key=f"{key}/{name}".strip("/"), nbytes=int(info["size"]), modified=_modified(info))


def _google_page(store: Store, key: str, bucket: str, folder: str, token: str) -> tuple[list[_Info], str | None]:
    wanted: dict[str, Any] = {"prefix": folder, "maxResults": _PAGE, "fields": "items(name,size,updated),nextPageToken"}
    more: dict[str, Any] = {"pageToken": token} if token else {}
    found = store.call(key, "call", "GET", "b/{}/o", bucket, json_out=True, **wanted, **more)
    return found.get("items", []), found.get("nextPageToken")


def _amazon_page(store: Store, key: str, bucket: str, folder: str, token: str) -> tuple[list[_Info], str | None]:
    more: dict[str, Any] = {"ContinuationToken": token} if token else {}
    found = store.call(key, "call_s3", "list_objects_v2", Bucket=bucket, Prefix=folder, MaxKeys=_PAGE, **more)
    infos: list[_Info] = [{"name": item["Key"], "size": item["Size"], **item} for item in found.get("Contents", ())]
    return infos, found.get("NextContinuationToken")


def _walk(store: Store, key: str, depth: int) -> Iterator[Listed]:
    folder = store.path(key).strip("/") + "/"
    for info in _children(store, key, recursive=depth == 0):
        # A service may list the folder itself, or a marker of its name.
        name = str(info["name"]).lstrip("/").removeprefix(folder)
        below = f"{key}/{name}".strip("/")
        if info["type"] == "directory" and below != key:
            yield from _walk(store, below, depth - 1)
        elif name and not name.endswith("/"):
            yield Listed(key=below, nbytes=int(info["size"] or 0), modified=_modified(info))


def _children(store: Store, key: str, *, recursive: bool) -> Iterable[_Info]:
    store.fs.invalidate_cache()
    path = store.path(key)
    try:
        if recursive:
            found: Mapping[str, _Info] = store.call(key, "find", path, detail=True, nbytes=_LISTING_NBYTES)
            return found.values()
        listed: list[_Info] = store.call(key, "ls", path, detail=True, nbytes=_LISTING_NBYTES)
        return listed
    except NotFoundError:
        return []


def is_linked(store: Store, key: str) -> bool:
    """Say whether a symbolic link leads to a key: what lies there may be another dataset's, or anything."""
    parts = key.split("/") if store.local else []
    return any(os.path.islink(store.path("/".join(parts[:n]))) for n in range(1, len(parts)))


def _scan(store: Store, key: str) -> Iterator[Listed]:
    if is_linked(store, f"{key}/"):
        return
    try:
        entries = os.scandir(store.path(key))
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            below = f"{key}/{entry.name}".lstrip("/")
            if entry.is_dir(follow_symlinks=False):
                yield from _scan(store, below)
                continue
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # Gone since it was listed: a writer named its temporary file.
            yield Listed(key=below, nbytes=found.st_size, modified=found.st_mtime)


def _modified(info: _Info) -> float | None:
    """Return when an object was stored, as the file systems of fsspec tell it, each in its own way."""
    for field in ("updated", "LastModified", "last_modified", "mtime", "created"):
        value = info.get(field)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None


def delete_empty_folders(store: Store) -> None:
    """Remove the folders below a store that hold nothing, and its own; object stores have none."""
    if store.local:
        for folder, _, _ in os.walk(store.root, topdown=False):
            try:
                os.rmdir(folder)
            except OSError:
                continue  # Not empty, or gone.


def delete_empty_parents(store: Store, key: str) -> None:
    """Remove the folders that led to an object which is gone, up to the first that holds something else."""
    folder = os.path.dirname(store.path(key))
    while store.local and len(folder) > len(store.root):
        try:
            os.rmdir(folder)
        except OSError:
            return
        folder = os.path.dirname(folder)


# --- Uploads that were never completed -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """A multipart upload that was begun; its parts are stored, and billed, until it is completed or aborted."""

    key: str
    upload_id: str
    modified: float | None


def list_uploads(store: Store) -> Iterator[Upload]:
    """Yield the incomplete multipart uploads below a URL; none where the store's client cannot list them."""
    if store.local or not hasattr(store.fs, "_call_s3"):
        return
    bucket, _, folder = store.root.partition("/")
    more: dict[str, Any] = {}
    while True:
        found = store.call("", "call_s3", "list_multipart_uploads", Bucket=bucket, Prefix=f"{folder}/", **more)
        for item in found.get("Uploads", ()):
            key = item["Key"].removeprefix(f"{folder}/")
            yield Upload(key=key, upload_id=item["UploadId"], modified=item["Initiated"].timestamp())
        if not found.get("IsTruncated"):
            return
        more = {"KeyMarker": found["NextKeyMarker"], "UploadIdMarker": found["NextUploadIdMarker"]}


def abort_upload(store: Store, upload: Upload) -> None:
    """Drop the parts of an upload that ``list_uploads`` found."""
    bucket, _, folder = store.root.partition("/")
    names: dict[str, Any] = {"Bucket": bucket, "Key": f"{folder}/{upload.key}", "UploadId": upload.upload_id}
    store.call(upload.key, "call_s3", "abort_multipart_upload", **names)


def modified_at(store: Store, key: str) -> float | None:
    """Return when an object was stored, in seconds since 1970; None where there is none, or the store does not tell."""
    try:
        if store.local:
            return os.stat(store.path(key), follow_symlinks=False).st_mtime
        store.fs.invalidate_cache()
        return _modified(store.call(key, "info", store.path(key)))
    except FileNotFoundError:
        return None
