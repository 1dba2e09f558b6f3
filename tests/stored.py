"""Whole datasets as the tests of copying, removing and collecting look at them: made, compared, and cut short."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from formula_dataset import Made, make_spec

from actlake.storage.finish import finish
from actlake.storage.header import Header, prepare
from actlake.storage.listing import list_objects
from actlake.storage.records import commit_key
from actlake.storage.stores import Store


def make_whole(url: str, n_rows: int = 200, *, voids: frozenset[int] = frozenset(), **changes: Any) -> Made:
    """A finished dataset of formulas in shards of 64 rows, the last one short, and its held-out split of one shard."""
    spec = make_spec(**({"rows_per_shard": 64, "rows_per_block": 32} | changes))
    made = Made(url, n_rows, spec=spec, voids=voids).build_all()
    prepare(made.store.child("heldout"), Header(spec=replace(spec, split="heldout"), n_rows=40, corpus="../../corpus"))
    heldout = Made(f"{url}/heldout", 40, spec=replace(spec, split="heldout")).build_all()
    for split in (made, heldout):
        finish(split.store, Header.read(split.store))
    return made


def keys(store: Store) -> set[str]:
    """The keys of everything that lies there."""
    return {found.key for found in list_objects(store)}


def contents(store: Store) -> dict[str, Any]:
    """Every object by its key; of commit records what reproduces; less what summarises them."""
    found: dict[str, Any] = {}
    for key in sorted(keys(store)):
        if "manifest/" in key or key.endswith("root.json"):
            continue
        data = store.read(key)
        found[key] = json.loads(data)["content"] if "commits/" in key else data
    return found


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, method: str, after: int) -> Iterator[list[str]]:
    """Let a method of every store raise from call ``after`` on, as a machine that dies; yield the keys of the calls."""
    calls: list[str] = []
    lock, original = threading.Lock(), getattr(Store, method)

    def dying(store: Store, key: str, *args: Any) -> Any:
        with lock:
            if len(calls) >= after:
                raise OSError(5, f"{method} number {after} fails on purpose")
            calls.append(key)
        return original(store, key, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Store, method, dying)
        yield calls


def is_committed(store: Store, shard: int) -> bool:
    """Whether a shard has its record."""
    return store.exists(commit_key(shard))
