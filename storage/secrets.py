"""Keeps credentials out of what people read."""

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

#: Options whose values are no secret, and would make messages useless where they are struck out.
_OPEN = {"endpoint_url", "project", "region_name", "account_name", "client", "profile", "anon", "default_location"}
#: Shorter values are no credentials, and parts of ordinary words.
_MIN_LENGTH = 6
#: Options that hold a credential however short it is.
_ALWAYS = {"key", "secret", "token", "password", "account_key", "sas_token", "connection_string"}


def redacted(text: str, options: Mapping[str, Any]) -> str:
    """Return a text in which every value of the storage options, but harmless ones, is struck out."""
    found = {form for value in _values(options) for form in (value, quote(value, safe="")) if len(value) >= _MIN_LENGTH}
    for value in sorted(found, key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def secret_names(options: Mapping[str, Any]) -> list[str]:
    """Return the options, by dotted names, that may be credentials: every text but the harmless ones."""
    return [name for name, value in _texts(options, "") if len(value) >= _MIN_LENGTH or _is_credential(name, value)]


def _is_credential(name: str, value: str) -> bool:
    return name.rpartition(".")[2] in _ALWAYS and value not in ("", "anon")


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from () if key in _OPEN else _texts(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, name)
    elif isinstance(value, str):
        yield name, value


def _values(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _values(value)
        elif isinstance(value, str) and name not in _OPEN:
            yield value
            # Connection strings and signatures are lists of parts.
            yield from (part.partition("=")[2] for part in value.replace("&", ";").split(";") if "=" in part)
