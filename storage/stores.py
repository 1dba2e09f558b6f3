"""A folder on any file system: the one module of actlake that opens them.

Objects are written whole and never changed in place. On a local disk that is a temporary name, fsync and rename; an
object store's PUT has the same effect. Keys are relative POSIX paths that cannot leave the folder.
"""

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Self

import fsspec
from fsspec.utils import stringify_path

from actlake.storage.errors import BadInputError, MissingExtraError, NotFoundError

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "hf": "ingest"}
_TEMPORARY = ".actlake-"


class Store:
    """Whole-object reads and writes below one URL.

    Thread-safe. Pickles as URL and options; the file system opens lazily in each process, and again after a fork.
    """

    def __init__(self, url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        text = str(stringify_path(url))
        if not text:
            raise BadInputError("the URL is empty; give a folder, e.g. data/demo or gs://bucket/demo")
        self.options = dict(storage_options or {})
        self.protocol, path = fsspec.core.split_protocol(text)
        self.protocol = self.protocol or "file"
        self.local = self.protocol in ("file", "local")
        self.root = os.path.abspath(os.path.expanduser(path)) if self.local else path.rstrip("/")
        self.url = self.root if self.local else f"{self.protocol}://{self.root}"
        self._fs: fsspec.AbstractFileSystem | None = None
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fs": None}

    def __repr__(self) -> str:
        # Options may hold credentials: never shown.
        return f"Store({self.url!r})"

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The fsspec file system, opened at first use in this process."""
        if self._fs is None or self._pid != os.getpid():
            try:
                self._fs = fsspec.filesystem(self.protocol, **self.options)
            except ImportError as error:
                extra = _EXTRAS.get(self.protocol)
                remedy = f"pip install 'actlake[{extra}]'" if extra else f"install the package for it ({error})"
                raise MissingExtraError(f"{self.protocol}:// needs a package that is absent; {remedy}") from error
            except ValueError as error:
                raise BadInputError(f"no file system for {self.url!r}: {error}") from error
            self._pid = os.getpid()
        return self._fs

    def path(self, key: str) -> str:
        """Return the file system's own path of ``key``; raise ``BadInputError`` for a key that leaves the folder."""
        parts = [part for part in key.split("/") if part not in ("", ".")]
        if key.startswith("/") or ".." in parts or "\\" in key or "\0" in key:
            raise BadInputError(f"key {key!r} leaves its folder")
        return "/".join([self.root, *parts])

    def child(self, key: str) -> Self:
        """Return the store of a folder below this one."""
        path = self.path(key)
        return type(self)(path if self.local else f"{self.protocol}://{path}", self.options)

    def read(self, key: str) -> bytes:
        """Return a whole object; raise ``NotFoundError`` where there is none."""
        with self._named(key):
            if self.local:
                return Path(self.path(key)).read_bytes()
            return bytes(self.fs.cat_file(self.path(key)))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes ``start:stop`` of an object, fewer where it ends before; ``start`` < 0 counts from the end."""
        with self._named(key):
            if not self.local:
                return bytes(self.fs.cat_file(self.path(key), start=start, end=None if start < 0 else stop))
            with open(self.path(key), "rb", buffering=0) as file:
                offset = start if start >= 0 else max(0, os.fstat(file.fileno()).st_size + start)
                length = stop - start if start >= 0 else -start
                return os.pread(file.fileno(), length, offset)

    def read_into(self, key: str, start: int, *into: memoryview) -> int:
        """Fill buffers, one after another, with an object's bytes from ``start`` on; return how many bytes came.

        A buffer that is used again saves the kernel handing out fresh memory for every read: up to 1 CPU second per GB.
        """
        if not self.local:
            data = memoryview(self.read_range(key, start, start + sum(view.nbytes for view in into)))
            place = 0
            for view in into:
                part = data[place : place + view.nbytes]
                view[: part.nbytes] = part
                place += part.nbytes
            return place
        with self._named(key):
            handle = os.open(self.path(key), os.O_RDONLY)
            try:
                return os.preadv(handle, into, start)
            finally:
                os.close(handle)

    def write(self, key: str, *parts: bytes | memoryview) -> None:
        """Store the parts as one object, replacing any other under that key; it appears whole or not at all.

        Raises ``BadInputError`` where nothing may be written there.
        """
        path = self.path(key)
        try:
            if self.local:
                _write_file(Path(path), parts)
            else:
                self.fs.pipe_file(path, b"".join(parts))
        except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
            why = error.strerror or error
            raise BadInputError(f"cannot write {self.url}/{key}: {why}; choose a place that may be written") from error

    def exists(self, key: str) -> bool:
        """Say whether there is an object or folder under ``key``."""
        if self.local:
            return os.path.exists(self.path(key))
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(key)))

    def nbytes(self, key: str) -> int:
        """Return the size of an object; raise ``NotFoundError`` where there is none."""
        with self._named(key):
            return os.stat(self.path(key)).st_size if self.local else int(self.fs.size(self.path(key)))

    def names(self, key: str = "") -> list[str]:
        """Return the sorted names directly under a folder, less unfinished temporary files; [] where it is absent."""
        return sorted(self._listing(key))

    def folders(self, key: str = "") -> list[str]:
        """Return those of ``names`` that are folders themselves."""
        return sorted(name for name, is_folder in self._listing(key).items() if is_folder)

    def _listing(self, key: str) -> dict[str, bool]:
        path = self.path(key)
        try:
            if self.local:
                with os.scandir(path) as entries:
                    found = {entry.name: entry.is_dir() for entry in entries}
            else:
                self.fs.invalidate_cache()
                listed = self.fs.ls(path, detail=True)
                found = {i["name"].rstrip("/").rsplit("/", 1)[-1]: i["type"] == "directory" for i in listed}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {name: is_folder for name, is_folder in found.items() if not name.startswith(_TEMPORARY)}

    def delete(self, key: str) -> None:
        """Remove one object; nothing happens where there is none."""
        try:
            os.unlink(self.path(key)) if self.local else self.fs.rm_file(self.path(key))
        except (FileNotFoundError, NotADirectoryError):
            return

    @contextmanager
    def _named(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            # A folder is no object, and what lies below an object is not there.
            raise NotFoundError(f"nothing stored at {self.url}/{key}") from error
        except PermissionError as error:
            raise BadInputError(f"cannot read {self.url}/{key}: {error.strerror or error}") from error


def relative_url(target: Store, base: Store) -> str:
    """Return ``target`` as a path relative to ``base`` where both are on one file system, else its URL."""
    if target.protocol != base.protocol:
        return target.url
    relative = os.path.relpath(f"/{target.root.lstrip('/')}", f"/{base.root.lstrip('/')}")
    depth = PurePosixPath(relative).parts.count("..")
    # A sibling of the dataset seen from its held-out split is two folders up.
    return relative if depth <= 2 else target.url


def resolve_url(url: str, base: Store) -> Store:
    """Open what ``relative_url`` returned."""
    protocol, _ = fsspec.core.split_protocol(url)
    if protocol is not None or os.path.isabs(url):
        return Store(url, base.options)
    root = os.path.normpath(f"/{base.root.lstrip('/')}/{url}")
    return Store(root if base.local else f"{base.protocol}://{root.lstrip('/')}", base.options)


def _write_file(target: Path, parts: Iterable[bytes | memoryview]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    # The rename itself must survive a power cut.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
