"""Reads objects with obstore (Rust): the fast path, for half of the processor time and without Python's lock.

Its options are made of those that fsspec's clients take, so that one set of storage options serves both.
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

from actlake.storage.errors import BadInputError, MissingExtraError
from actlake.storage.limits import Limits

#: The process whose threads obstore's runtime has; None before its first use.
_owner: int | None = None


class ObstoreReader:
    """Objects of one bucket, by their whole path ``bucket/key``; thread-safe. A call holds one of ``slots``."""

    def __init__(self, store: Any, bucket: str, slots: AbstractContextManager[Any]) -> None:
        import obstore

        self._obstore, self._store, self._skip, self._slots = obstore, store, len(bucket) + 1, slots

    def read(self, path: str) -> memoryview:
        with self._slots:
            return memoryview(self._obstore.get(self._store, path[self._skip :]).bytes())

    def read_range(self, path: str, start: int, stop: int) -> memoryview:
        with self._slots:
            return self._read_range(path[self._skip :], start, stop)

    def _read_range(self, key: str, start: int, stop: int) -> memoryview:
        if start < 0:
            nbytes = self._obstore.head(self._store, key)["size"]
            start, stop = max(0, nbytes + start), nbytes
        try:
            if start >= stop:
                self._obstore.head(self._store, key)
                return memoryview(b"")
            return memoryview(self._obstore.get_range(self._store, key, start=start, end=stop))
        except FileNotFoundError:
            raise
        except Exception:
            # A range that begins past the end is no error here.
            if self._obstore.head(self._store, key)["size"] > start:
                raise
            return memoryview(b"")


def open_reader(
    protocol: str, root: str, options: Mapping[str, Any], limits: Limits, slots: AbstractContextManager[Any]
) -> ObstoreReader | None:
    """Return the reader of a bucket, whose calls hold ``slots``.

    None in a fork of a process that used obstore, whose threads it lacks.

    Raises ``MissingExtraError`` without obstore, ``BadInputError`` for a protocol or an option that it does not know.
    """
    global _owner
    if protocol not in _MAKERS:
        raise BadInputError(
            f"client = 'obstore' reads {', '.join(f'{name}://' for name in _MAKERS)}, not {protocol}://; leave it out"
        )
    try:
        import obstore.store as stores
    except ImportError as error:
        raise MissingExtraError("client = 'obstore' needs its package; pip install 'actlake[fast]'") from error
    if _owner not in (None, os.getpid()):
        return None
    _owner = os.getpid()
    bucket = root.partition("/")[0]
    common = {
        "client_options": {
            "connect_timeout": timedelta(seconds=limits.connect_s),
            "read_timeout": timedelta(seconds=limits.stall_s),
            "timeout": timedelta(seconds=limits.deadline(limits.range_nbytes)),
        },
        "retry_config": {
            "max_retries": limits.attempts - 1,
            "retry_timeout": timedelta(seconds=limits.deadline()),
            "backoff": {"init_backoff": timedelta(seconds=limits.wait_s), "max_backoff": timedelta(seconds=30)},
        },
    }
    return ObstoreReader(_MAKERS[protocol](stores, bucket, _Options(options), common), bucket, slots)


class _Options(dict[str, Any]):
    """Options of fsspec's client that are taken out one by one."""

    def finish(self) -> None:
        # What only directs writing and listing, or fsspec itself.
        known = {"consistency", "default_location", "project", "access", "use_listings_cache", "skip_instance_cache"}
        known |= {"default_block_size", "max_concurrency", "s3_additional_kwargs", "use_ssl", "block_size"}
        if unknown := sorted(set(self) - known):
            raise BadInputError(
                f"client = 'obstore' does not know the storage options {', '.join(unknown)}; give the credentials in "
                "the environment, or leave 'client' out"
            )


def _plain_http(endpoint: str | None, common: dict[str, Any]) -> dict[str, Any]:
    if endpoint is not None and endpoint.startswith("http://"):
        common["client_options"]["allow_http"] = True
    return common


def _google(stores: Any, bucket: str, options: _Options, common: dict[str, Any]) -> Any:
    config: dict[str, Any] = {}
    endpoint = options.pop("endpoint_url", None) or os.environ.get("STORAGE_EMULATOR_HOST")
    if endpoint is not None:
        config["base_url"] = endpoint
    match options.pop("token", None):
        case None | "google_default" | "cloud":
            pass
        case "anon":
            config["skip_signature"] = True
        case str() as path:
            config["service_account"] = path
        case Mapping() as key:
            config["service_account_key"] = json.dumps(dict(key))
        case _:
            raise BadInputError("client = 'obstore' takes a token as 'anon', a path or a service account's key")
    options.finish()
    return stores.GCSStore(bucket, config=config, **_plain_http(endpoint, common))


def _amazon(stores: Any, bucket: str, options: _Options, common: dict[str, Any]) -> Any:
    client = _Options(options.pop("client_kwargs", None) or {})
    endpoint = options.pop("endpoint_url", None) or client.pop("endpoint_url", None)
    given = {
        "access_key_id": options.pop("key", None) or client.pop("aws_access_key_id", None),
        "secret_access_key": options.pop("secret", None) or client.pop("aws_secret_access_key", None),
        "token": options.pop("token", None) or client.pop("aws_session_token", None),
        "endpoint": endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        "region": client.pop("region_name", None) or os.environ.get("AWS_REGION"),
        "skip_signature": options.pop("anon", None) or None,
        "request_payer": options.pop("requester_pays", None) or None,
    }
    client.finish()
    options.finish()
    config = {name: value for name, value in given.items() if value is not None}
    if "endpoint" not in config and "region" not in config:
        config["region"] = os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return stores.S3Store(bucket, config=config, **_plain_http(config.get("endpoint"), common))


_MAKERS: dict[str, Callable[[Any, str, _Options, dict[str, Any]], Any]] = {
    "gs": _google,
    "gcs": _google,
    "s3": _amazon,
    "s3a": _amazon,
}
