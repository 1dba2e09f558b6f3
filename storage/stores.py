"""A folder on any file system: the one module of actlake that opens them.

Objects are written whole and never changed in place. On a local disk that is a temporary name, fsync and rename; an
object store's PUT has the same effect. Keys are relative POSIX paths that cannot leave the folder.
"""

import errno
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Self

import fsspec
from fsspec.utils import stringify_path

from actlake.storage.clients import FsspecClient, Reader
from actlake.storage.errors import ActlakeError, BadInputError, CorruptObjectError, NotFoundError, StoreError
from actlake.storage.limits import split_options
from actlake.storage.ranges import merge
from actlake.storage.secrets import redacted
from actlake.storage.unfinished import unfinished
from actlake.storage.web_client import HTTP, WebClient

_TEMPORARY = ".actlake-"

#: A disk, or what may be written to it, has come to its end.
_FULL = (errno.ENOSPC, errno.EDQUOT)

#: Where nothing can be written to, and why.
_READ_ONLY = {
    "hf": "the Hub takes every file as a commit, 100,000 files and 128 commits an hour at most",
} | dict.fromkeys(HTTP, "HTTP servers take no objects")


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
        # The file systems of HTTP take whole URLs for paths, those of buckets what follows the protocol.
        self._base = self.url if self.protocol in HTTP else self.root
        self.limits, self._client_options = split_options(self.options)
        # The process that opened them, and the clients.
        self._opened: tuple[int, tuple[FsspecClient, Reader]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def __repr__(self) -> str:
        # Options may hold credentials: never shown.
        return f"Store({self.url!r})"

    def _clients(self) -> tuple[FsspecClient, Reader]:
        """Return the client, and what reads objects; both are opened at first use in this process."""
        if self._opened is None or self._opened[0] != os.getpid():
            with self._answering(""):
                client_of = WebClient if self.protocol in HTTP else FsspecClient
                client = client_of(self.protocol, self._client_options, self.limits)
                self._opened = os.getpid(), (client, self._reader(client))
        return self._opened[1]

    def _reader(self, client: FsspecClient) -> Reader:
        if self.local or self.limits.client == "fsspec":
            return client
        from actlake.storage.obstore_client import open_reader

        return open_reader(self.protocol, self.root, self._client_options, self.limits, client.slots) or client

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The fsspec file system, opened at first use in this process."""
        return self._clients()[0].fs

    def require_writable(self) -> None:
        """Raise ``BadInputError``, with the reason, where no dataset can be written."""
        if why := _READ_ONLY.get(self.protocol):
            raise BadInputError(
                f"{self.url} cannot be written to: {why}; write to a folder or a bucket (gs://, s3://, az://), and "
                "copy the finished dataset from there"
            )

    def path(self, key: str) -> str:
        """Return the file system's own path of ``key``; raise ``BadInputError`` for a key that leaves the folder."""
        parts = [part for part in key.split("/") if part not in ("", ".")]
        if key.startswith("/") or ".." in parts or "\\" in key or "\0" in key:
            raise BadInputError(f"key {key!r} leaves its folder")
        return "/".join([self._base, *parts])

    def child(self, key: str) -> Self:
        """Return the store of a folder below this one."""
        path = self.path(key)
        return type(self)(path if self.local or "://" in path else f"{self.protocol}://{path}", self.options)

    def read(self, key: str, most: int | None = None) -> bytes:
        """Return a whole object; raise ``NotFoundError`` where there is none.

        Of more than ``most`` bytes little more is read: ``CorruptObjectError``.
        """
        path = self.path(key)
        with self._answering(key):
            if most is None:
                return Path(path).read_bytes() if self.local else bytes(self._clients()[1].read(path))
            if not self.local:
                data = bytes(self._clients()[1].read_range(path, 0, most + 1))
            elif os.stat(path).st_size <= most:
                return Path(path).read_bytes()
            if self.local or len(data) > most:
                raise CorruptObjectError(f"{self.url}/{key} has more than {most} bytes: no such object is as large")
            return data

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes ``start:stop`` of an object, fewer where it ends before; ``start`` < 0 counts from the end."""
        path = self.path(key)
        with self._answering(key):
            if not self.local:
                return bytes(self._clients()[1].read_range(path, start, stop))
            with open(path, "rb", buffering=0) as file:
                offset = start if start >= 0 else max(0, os.fstat(file.fileno()).st_size + start)
                length = stop - start if start >= 0 else -start
                return os.pread(file.fileno(), length, offset)

    def read_ranges(self, key: str, spans: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return the bytes of ascending spans ``(start, stop)`` of an object, each shorter where it ends before.

        Spans that lie at most ``limits.gap_nbytes`` apart come by one request of at most ``limits.range_nbytes``.
        """
        found: list[memoryview] = []
        for start, stop, members in merge(spans, self.limits.gap_nbytes, self.limits.range_nbytes):
            with self._answering(key):
                data = memoryview(self._clients()[1].read_range(self.path(key), start, stop))
            found += [data[low - start : high - start] for low, high in members]
        return found

    def read_into(self, key: str, start: int, *into: memoryview) -> int:
        """Fill buffers, one after another, with an object's bytes from ``start`` on; return how many bytes came.

        A buffer that is used again saves the kernel handing out fresh memory for every read: up to 1 CPU second per GB.
        """
        if not self.local:
            data = self.read_ranges(key, [(start, start + sum(view.nbytes for view in into))])[0]
            place = 0
            for view in into:
                part = data[place : place + view.nbytes]
                view[: part.nbytes] = part
                place += part.nbytes
            return place
        with self._answering(key):
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
        self.require_writable()
        with self._answering(key, "write"):
            if self.local:
                _write_file(Path(path), parts)
            else:
                self._clients()[0].write(path, b"".join(parts))

    def exists(self, key: str) -> bool:
        """Say whether there is an object or folder under ``key``."""
        path = self.path(key)
        with self._answering(key):
            return os.path.exists(path) if self.local else self._clients()[0].exists(path)

    def nbytes(self, key: str) -> int:
        """Return the size of an object; raise ``NotFoundError`` where there is none."""
        path = self.path(key)
        with self._answering(key):
            return os.stat(path).st_size if self.local else self._clients()[0].nbytes(path)

    def names(self, key: str = "") -> list[str]:
        """Return the sorted names directly under a folder, less unfinished temporary files; [] where it is absent."""
        return sorted(self._listing(key))

    def folders(self, key: str = "") -> list[str]:
        """Return those of ``names`` that are folders themselves."""
        return sorted(name for name, is_folder in self._listing(key).items() if is_folder)

    def _listing(self, key: str) -> dict[str, bool]:
        path = self.path(key)
        try:
            with self._answering(key):
                if self.local:
                    with os.scandir(path) as entries:
                        found = {entry.name: entry.is_dir() for entry in entries}
                else:
                    found = self._clients()[0].list(path)
        except NotFoundError:
            return {}
        return {name: is_folder for name, is_folder in found.items() if not name.startswith(_TEMPORARY)}

    def delete(self, key: str) -> None:
        """Remove one object; nothing happens where there is none."""
        path = self.path(key)
        self.require_writable()
        try:
            with self._answering(key, "delete"):
                os.unlink(path) if self.local else self._clients()[0].delete(path)
        except NotFoundError:
            return

    def call(self, key: str, method: str, *args: Any, nbytes: int = 0, **kwargs: Any) -> Any:
        """Call a method of a remote file system that has no name here, within the deadline for so many bytes.

        ``key`` is what errors name.
        """
        with self._answering(key, method):
            return self._clients()[0].call(method, *args, nbytes=nbytes, **kwargs)

    @contextmanager
    def _answering(self, key: str, verb: str = "read") -> Iterator[None]:
        """Turn what clients raise into our errors, which show no credential."""
        where = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except ActlakeError:
            raise
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            if verb != "write":
                # A folder is no object, and what lies below an object is not there.
                raise NotFoundError(f"nothing stored at {where}") from error
            raise self._refused(verb, where, error) from error
        except (FileExistsError, PermissionError) as error:
            raise self._refused(verb, where, error) from None
        except OSError as error:
            if (told := self._told(verb, where, error)) is None:
                raise
            raise told from None
        except Exception as error:
            if self.local:
                raise
            # Each client has errors of its own, of a dozen packages; all of them mean that the store did not answer.
            raise self._failed(verb, where, error) from None

    def _told(self, verb: str, where: str, error: OSError) -> ActlakeError | None:
        """Return what an operating system's error means, None for one of a local disk that speaks for itself."""
        if error.errno in _FULL:
            return StoreError(
                f"cannot {verb} {where}: {error.strerror}; free some space there, then run it again: finished shards "
                "are kept"
            )
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return self._refused(verb, where, error)
        return None if self.local else self._failed(verb, where, error)

    def _refused(self, verb: str, where: str, error: OSError) -> BadInputError:
        why = redacted(str(error.strerror or error), self.options)
        remedy = "choose a place that may be written" if verb == "write" else "look at the rights there"
        return BadInputError(f"cannot {verb} {where}: {why}; {remedy}")

    def _failed(self, verb: str, where: str, error: Exception) -> StoreError:
        if isinstance(error, TimeoutError):
            why = f"no end after {self.limits.deadline_s:g} s and more for what it carries (storage option deadline_s)"
        else:
            why = redacted(f"{type(error).__name__}: {error}".splitlines()[0], self.options)
        return StoreError(f"cannot {verb} {where}: {why}; run it again, finished shards are kept")


def relative_url(target: Store, base: Store) -> str:
    """Return ``target`` as a path relative to ``base`` where both are on one file system, else its URL."""
    if target.protocol != base.protocol:
        return target.url
    relative = os.path.relpath(f"/{target.root.lstrip('/')}", f"/{base.root.lstrip('/')}")
    depth = PurePosixPath(relative).parts.count("..")
    # A sibling of the dataset seen from its held-out split is two folders up.
    return relative if depth <= 2 else target.url


def resolve_url(url: str, base: Store, trusted: Iterable[str] = ()) -> Store:
    """Open what ``relative_url`` returned.

    A stored reference may be anyone's, and is read with our rights: it leads no further than the bucket of ``base``,
    or this machine's disks, and else only below the URLs in ``trusted`` or in ``$ACTLAKE_CORPUS_ROOTS`` (separated by
    commas). Raises ``BadInputError`` for another.
    """
    protocol, path = fsspec.core.split_protocol(url)
    if "\0" in url or (protocol is not None and ".." in path.split("/")):
        raise BadInputError(f"{base.url} refers to {url!r}, which is no place")
    if protocol is not None or os.path.isabs(url):
        found = Store(url, base.options)
    else:
        root = os.path.normpath(f"/{base.root.lstrip('/')}/{url}")
        found = Store(root if base.local else f"{base.protocol}://{root.lstrip('/')}", base.options)
    if _place(found) == _place(base):
        return found
    roots = [*trusted, *filter(None, os.environ.get("ACTLAKE_CORPUS_ROOTS", "").split(","))]
    if any(f"{found.url}/".startswith(f"{Store(root.strip()).url}/") for root in roots):
        return found
    raise BadInputError(
        f"{base.url} refers to {found.url}, which is another place: what is stored there would be read with your "
        f"rights. Where that is meant, say ACTLAKE_CORPUS_ROOTS={found.url}"
    )


def _place(store: Store) -> tuple[str, ...]:
    """Return what one owner has: this machine's disks, a bucket, a repository of the Hub."""
    protocol = {"gcs": "gs", "s3a": "s3", "abfs": "az", "local": "file"}.get(store.protocol, store.protocol)
    if store.local or protocol == "memory":
        return (protocol,)
    return (protocol, *store.root.lstrip("/").split("/")[: 3 if protocol == "hf" else 1])


def _write_file(target: Path, parts: Iterable[bytes | memoryview]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    try:
        with unfinished(temporary) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
            file.close()
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
