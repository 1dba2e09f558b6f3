"""The clients of remote stores: fsspec's, told about retries, deadlines and checksums as far as each can be told.

Every request here may be repeated: objects are written whole under a determined name, and read by ranges.
"""

import asyncio
import base64
import io
import os
import random
import re
from collections.abc import Awaitable, Callable, Mapping
from threading import BoundedSemaphore
from typing import Any, Protocol

import fsspec
from crc32c import crc32c
from fsspec.asyn import AsyncFileSystem, sync

from actlake.storage.errors import BadInputError, MissingExtraError, StoreError
from actlake.storage.limits import Limits

GOOGLE, AMAZON, AZURE = ("gs", "gcs"), ("s3", "s3a"), ("az", "abfs", "abfss")
_EXTRAS = dict.fromkeys(GOOGLE, "gcs") | dict.fromkeys(AMAZON, "s3") | dict.fromkeys(AZURE, "az") | {"hf": "ingest"}


#: Statuses that pass: too slow, too many, and what goes wrong inside a service.
_TRANSIENT = (408, 429, 500, 502, 503, 504)


class Reader(Protocol):
    """Reads objects by their whole path; thread-safe. Raises ``FileNotFoundError`` for what is not there."""

    def read(self, path: str) -> bytes | memoryview:
        """Return a whole object."""

    def read_range(self, path: str, start: int, stop: int) -> bytes | memoryview:
        """Return bytes ``start:stop``, fewer where the object ends before; ``start`` < 0 counts from the end."""


class FsspecClient:
    """Objects through one fsspec file system.

    Thread-safe. No call takes longer than the limits allow where the file system is an asynchronous one, as those of
    buckets are: then ``TimeoutError``. Else it raises what the file system does.
    """

    def __init__(self, protocol: str, options: Mapping[str, Any], limits: Limits) -> None:
        self.fs = open_file_system(protocol, options, limits)
        self._protocol, self._limits = protocol, limits
        # Stores of one place share fsspec's file system, and its connections.
        self.slots: BoundedSemaphore = vars(self.fs).setdefault("_actlake_slots", BoundedSemaphore(limits.max_requests))

    def read(self, path: str) -> bytes:
        return bytes(self.call("cat_file", path))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        if 0 <= start >= stop:
            # No range of HTTP is empty.
            self.nbytes(path)
            return b""
        if start < 0 and isinstance(self.fs, AsyncFileSystem):
            # Not every service has ranges from the end that are longer than the object.
            nbytes = self.nbytes(path)
            start, stop = max(0, nbytes + start), nbytes
            return self.read_range(path, start, stop) if stop > start else b""
        try:
            data = self.call("cat_file", path, start=start, end=None if start < 0 else stop)
        except Exception as error:
            if not _is_past_the_end(error):
                raise
            return b""
        return bytes(data)

    def write(self, path: str, data: bytes) -> None:
        """Store an object; the service compares it with a checksum of ours, or we compare its checksum with ours."""
        kwargs: dict[str, Any] = {}
        part = self._limits.part_nbytes
        if self._protocol in AMAZON:
            # Of parts, and of old clients' whole objects, botocore sends a CRC32 itself.
            kwargs = {"chunksize": part} | ({"ChecksumCRC32C": _encoded(data)} if len(data) < 2 * part else {})
        elif self._protocol in AZURE:
            kwargs = {"validate_content": True}
        elif self._protocol in GOOGLE:
            kwargs = {"chunksize": part}
        found = self.call("pipe_file", path, data, nbytes=len(data), **kwargs)
        if self._protocol in GOOGLE:
            stored = found if isinstance(found, Mapping) else self.call("info", path)
            if stored.get("crc32c", wanted := _encoded(data)) != wanted:
                raise StoreError(f"{path} arrived damaged: crc32c {stored['crc32c']} there, {wanted} here; try again")

    def nbytes(self, path: str) -> int:
        """Return the size of an object."""
        info = self.call("info", path)
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return int(info["size"])

    def exists(self, path: str) -> bool:
        """Say whether there is an object or a folder."""
        return bool(self.call("exists", path))

    def list(self, path: str) -> dict[str, bool]:
        """Return the names directly below a folder, each with whether it is a folder itself."""
        self.fs.invalidate_cache()
        listed = self.call("ls", path, detail=True)
        names = ((item["name"].rstrip("/"), item["type"] == "directory") for item in listed)
        # A service may list the folder itself, or an object of its name.
        return {name.rsplit("/", 1)[-1]: folder for name, folder in names if name.strip("/") != path.strip("/")}

    def delete(self, path: str) -> None:
        """Remove an object."""
        self.call("rm_file", path)

    def call(self, name: str, *args: Any, nbytes: int = 0, **kwargs: Any) -> Any:
        """Call a method of the file system, within the deadline of a call that carries so many bytes."""
        with self.slots:
            if not isinstance(self.fs, AsyncFileSystem):
                return getattr(self.fs, name)(*args, **kwargs)
            seconds = self._limits.deadline(nbytes)
            return sync(self.fs.loop, getattr(self.fs, f"_{name}"), *args, timeout=seconds, **kwargs)


def open_file_system(protocol: str, options: Mapping[str, Any], limits: Limits) -> fsspec.AbstractFileSystem:
    """Open fsspec's file system of a protocol.

    Raises ``MissingExtraError`` where its package is absent, ``BadInputError`` where there is none.
    """
    try:
        if protocol in GOOGLE:
            return _google(dict(options), limits)
        if protocol in AMAZON:
            return _amazon(dict(options), limits)
        if protocol in AZURE:
            return _azure(protocol, dict(options), limits)
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'actlake[{extra}]'" if extra else f"install the package for it ({error})"
        raise MissingExtraError(f"{protocol}:// needs a package that is absent; {remedy}") from error
    except ValueError as error:
        raise BadInputError(f"no file system for {protocol}://: {error}") from error


def _amazon(options: dict[str, Any], limits: Limits) -> fsspec.AbstractFileSystem:
    from botocore import exceptions

    def is_transient(error: Exception) -> bool:
        # s3fs itself tries broken connections again, and not those that could not be made.
        if isinstance(error, exceptions.SSLError):
            return False
        unconnected = isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError)
        return unconnected or _status(error) in _TRANSIENT

    config = {
        "connect_timeout": limits.connect_s,
        "read_timeout": limits.stall_s,
        "max_pool_connections": limits.max_requests,
        # fsspec shares a file system among calls with equal options, so these have to show in them.
        "user_agent_extra": f"actlake/{limits.attempts}/{limits.wait_s}",
        # Ours are around it: botocore's take half a second for the first, and leave 429 alone.
        "retries": {"mode": "standard", "total_max_attempts": 1},
    }
    config |= options.get("config_kwargs") or {}
    own = {"use_listings_cache": False} | options | {"config_kwargs": config}
    fs = fsspec.filesystem("s3", **own)
    fs._call_s3 = _retrying(type(fs)._call_s3.__get__(fs), limits, is_transient)
    return fs


def _azure(protocol: str, options: dict[str, Any], limits: Limits) -> fsspec.AbstractFileSystem:
    own = {
        "use_listings_cache": False,
        "connection_timeout": limits.connect_s,
        "read_timeout": limits.stall_s,
        # A keyword of its own: fsspec shares a file system among calls with equal options.
        "actlake_limits": repr(limits),
    }
    fs = fsspec.filesystem(protocol, **(own | options))
    # adlfs lets none of these through.
    config = fs.service_client._config
    config.max_single_put_size = config.max_block_size = limits.part_nbytes
    policy = config.retry_policy
    if "send" not in vars(policy):
        # Its own retries are three, after 15 seconds and more, and leave 429 alone.
        policy.total_retries = 0
        policy.send = _retrying(_whole(policy.send), limits, _is_transient_for_azure)
    return fs


def _whole(send: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """Return how Azure's client sends a request once: with the whole answer, or with an error that may pass."""
    from azure.core.exceptions import HttpResponseError

    async def once(request: Any) -> Any:
        data = request.http_request.data
        try:
            if isinstance(data, bytes):
                # As in ``_retrying``.
                request.http_request.data = io.BytesIO(data)
            found = await send(request)
        finally:
            request.http_request.data = data
        if found.http_response.status_code in _TRANSIENT:
            raise HttpResponseError(response=found.http_response)
        if not found.http_response.is_stream_consumed:
            # Else the caller reads it, who goes on three times.
            await found.http_response.load_body()
        return found

    return once


def _is_transient_for_azure(error: Exception) -> bool:
    from azure.core.exceptions import IncompleteReadError, ServiceRequestError, ServiceResponseError

    broken = ServiceRequestError, ServiceResponseError, IncompleteReadError
    return isinstance(error, broken) or _status(error) in _TRANSIENT


def _google(options: dict[str, Any], limits: Limits) -> fsspec.AbstractFileSystem:
    import aiohttp
    from gcsfs.retry import is_retriable

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_s, sock_read=limits.stall_s)
    # A keyword of its own: fsspec shares a file system among calls with equal options.
    options = {"use_listings_cache": False, "requests_timeout": timeout, "actlake_limits": repr(limits)} | options
    if "endpoint_url" in options or "STORAGE_EMULATOR_HOST" in os.environ:
        from gcsfs.core import GCSFileSystem

        # The other class asks each bucket's kind of Google's own service, for a minute where that is not there.
        fs = GCSFileSystem(**options)
    else:
        fs = fsspec.filesystem("gs", **options)
    # Its own retries cannot be set: the first waits for one to two seconds.
    fs._request = _retrying(type(fs)._request.__wrapped__.__get__(fs), limits, is_retriable)
    return fs


def _retrying(
    request: Callable[..., Awaitable[Any]], limits: Limits, is_transient: Callable[[Exception], bool]
) -> Callable[..., Awaitable[Any]]:
    """Return a client's request, tried as the limits say where it fails for a while or takes too long."""

    async def retry(*args: Any, **kwargs: Any) -> Any:
        # No time-out of aiohttp notices an upload that nobody takes, or a range that comes byte by byte. ``data`` is
        # gcsfs's name for a body, ``Body`` S3's; gcsfs's request ends with the answer's last byte, S3's with its head.
        data = kwargs.get("data", kwargs.get("Body"))
        nbytes = len(data) if isinstance(data, bytes | memoryview) else _range_nbytes(kwargs.get("headers"))
        seconds = None if nbytes is None else limits.attempt(nbytes)
        for attempt in range(limits.attempts):
            if "data" in kwargs and isinstance(data, bytes | memoryview):
                # aiohttp sends a file in pieces, and holds up all other requests while it sends bytes.
                kwargs["data"] = io.BytesIO(data)
            try:
                return await asyncio.wait_for(request(*args, **kwargs), seconds)
            except Exception as error:
                if attempt == limits.attempts - 1 or not (isinstance(error, TimeoutError) or is_transient(error)):
                    raise
            await asyncio.sleep(random.uniform(0, min(limits.wait_s * 2 ** (attempt + 1), 30)))
        raise AssertionError("there is at least one attempt")

    return retry


def _range_nbytes(headers: Mapping[str, str] | None) -> int | None:
    """Return the bytes of the range that a request's headers ask for; None without one, or to the end."""
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", (headers or {}).get("Range", ""))
    return None if found is None else int(found[2]) + 1 - int(found[1])


def _is_past_the_end(error: Exception) -> bool:
    """Say whether an error is a service's answer to a range that begins where the object ends (HTTP 416)."""
    return _status(error) == 416


def _status(error: Exception) -> int:
    """Return the HTTP status that an error of gcsfs, s3fs or Azure's client tells of; 0 for none."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, Mapping):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(getattr(error, "code", None) or getattr(error, "status_code", None))
    return int(code) if code.isdecimal() else 0


def _encoded(data: bytes) -> str:
    """Return a crc32c as the services write it: base64 of its bytes, the highest first."""
    return base64.b64encode(crc32c(data).to_bytes(4, "big")).decode()
