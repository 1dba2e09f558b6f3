"""A checksum inside a JSON object, so that a flipped bit of it is found: member ``crc32c``.

It is the crc32c of the canonical JSON of the other members. An object without it, of an earlier actlake or of another
writer, is taken as it is.
"""

import json
from collections.abc import Mapping
from typing import Any

from crc32c import crc32c

from actlake.storage.errors import CorruptObjectError

MEMBER = "crc32c"


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its checksum, as the last member."""
    rest = _unsealed(value)
    return rest | {MEMBER: _checksum(rest)}


def check_seal(value: Any, where: str) -> dict[str, Any]:
    """Return a JSON object without its checksum; raise ``CorruptObjectError`` where that is another one's.

    Raises ``TypeError`` for a value that is no JSON object.
    """
    if not isinstance(value, dict):
        raise TypeError(f"a {type(value).__name__}, not an object")
    rest = _unsealed(value)
    if MEMBER in value and value[MEMBER] != (found := _checksum(rest)):
        raise CorruptObjectError(
            f"{where} is damaged: its member crc32c is {value[MEMBER]!r}, its content has {found}; restore the object, "
            "or remove that member if it was changed on purpose"
        )
    return rest


def _unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name != MEMBER}


def _checksum(value: Mapping[str, Any]) -> int:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # A damaged string may hold half of a surrogate pair.
    return int(crc32c(text.encode(errors="surrogatepass")))
