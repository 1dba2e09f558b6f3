"""Which of several builds at one place becomes the corpus: the one with most sequences, whoever ends last.

Objects are named by their contents, so that builds never replace each other's. ``corpus.json`` has one name, and of two
plain PUTs the last wins, be it of the smaller build. So each build first stores what it wants to put there as a **cut**
under a name of its own; it puts the largest cut there is into ``corpus.json``, then looks for a larger one again. That
one either is seen now, or its own build has yet to write ``corpus.json``.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from actlake.storage.corpus_files import reading
from actlake.storage.errors import NotFoundError
from actlake.storage.stores import Store

_CUT = re.compile(r"cuts/([0-9a-f]{16})-\d{10}\.json")


def cut_key(corpus_id: str, n_sequences: int) -> str:
    """Return the key of the cut with that many training sequences."""
    return f"cuts/{corpus_id[:16]}-{n_sequences:010d}.json"


def publish(store: Store, header: Mapping[str, Any]) -> Mapping[str, Any]:
    """Make a build visible whose objects are all stored, unless a larger one is there; drop what it replaces.

    ``header`` is the content of ``corpus.json``. Returns what holds now, that or the larger one's: reading it again
    might for a moment give what a smaller build that is overtaking has yet to put right. Only objects of smaller cuts
    are dropped, for others may be of a build that is not finished. Raises ``CorruptObjectError`` for a damaged cut.
    """
    key = cut_key(header["corpus_id"], header["splits"]["train"]["n_sequences"])
    data = json.dumps(header, indent=1).encode()
    store.write(key, data)
    key, data = _settle(store, key, data)
    largest = _parse(store, key, data)
    _drop_smaller(store, key, largest["files"])
    return largest


def _settle(store: Store, key: str, data: bytes) -> tuple[str, bytes]:
    """Put the largest cut into ``corpus.json``; return its key and content."""
    while True:
        key, data = _largest(store, key, data)
        if _read(store, "corpus.json") != data:
            store.write("corpus.json", data)
        if _largest(store, key, data)[0] == key:
            return key, data


def _largest(store: Store, key: str, data: bytes) -> tuple[str, bytes]:
    while (latest := max(_cuts(store, key), default=key)) > key:
        found = _read(store, latest)
        # A cut that is gone again gave way to a larger one: the next listing has it.
        if found is not None:
            key, data = latest, found
    return key, data


def _cuts(store: Store, key: str) -> list[str]:
    """Return the cuts of the same corpus as ``key``, smallest first."""
    matches = (_CUT.fullmatch(f"cuts/{name}") for name in store.names("cuts"))
    return [match[0] for match in matches if match is not None and key.startswith(f"cuts/{match[1]}-")]


def _drop_smaller(store: Store, largest: str, kept: Mapping[str, Any]) -> None:
    for key in _cuts(store, largest):
        data = _read(store, key) if key < largest else None
        if data is None:
            continue
        for name in _parse(store, key, data)["files"]:
            if name not in kept:
                store.delete(name)
        # The list of what to drop goes last: whoever comes after a crash finds it.
        store.delete(key)


def _parse(store: Store, key: str, data: bytes) -> Mapping[str, Any]:
    with reading(f"{store.url}/{key}", "delete it: a corpus is read without it"):
        header: Mapping[str, Any] = json.loads(data)
    return header


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except NotFoundError:
        return None
