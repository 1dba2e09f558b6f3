"""Stops a process of a run where a test wants it to be stopped; the product's code knows nothing of it.

A folder is all that a test and the processes of a run share. A file ``<point>.armed`` arms a point; the process that
comes to it first takes it, leaves ``<point>.<pid>`` instead, and waits there until it is killed or there is a file
``<point>.go``. Every object is noted in ``writes`` before it is written. Where there is a file ``salt``, activations
differ with every forward pass, as if no two passes rounded alike.
"""

import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import re
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

BEFORE_ENCODE, BETWEEN_OBJECTS, BEFORE_COMMIT, AFTER_COMMIT = POINTS = (
    "before-encode",
    "between-objects",
    "before-commit",
    "after-commit",
)

#: Seconds that a process waits at a point before it ends itself: the test that would have let it go is gone.
_PATIENCE_S = 300.0

_ARRAY = re.compile(r"arrays/.+/c/(\d+)(/0)?")
_OBJECT = re.compile(r"(arrays/.+/c|stats|commits)/.*")


def plant(folder: Path) -> None:
    """Put the points of this process into the modules that have been imported, and into others as they are."""
    patches: dict[str, Callable[[ModuleType], None]] = {
        "actlake.storage.stores": lambda module: _plant_store(module, folder),
        "actlake.storage.arrays": lambda module: _plant_encoder(module, folder),
        "actlake.ingest.capture": lambda module: _salt(module, folder),
    }
    for name in patches.keys() & sys.modules.keys():
        patches.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, _Finder(patches))


def reach(folder: Path, point: str) -> None:
    """Wait at a point, if it is armed and no other process was here before."""
    try:
        os.rename(folder / f"{point}.armed", folder / f"{point}.{os.getpid()}")
    except FileNotFoundError:
        return
    deadline = time.monotonic() + _PATIENCE_S
    while not (folder / f"{point}.go").exists():
        if time.monotonic() > deadline or not folder.exists():
            os._exit(9)
        time.sleep(0.005)


class _Finder(importlib.abc.MetaPathFinder):
    """Patches modules once they have been imported."""

    def __init__(self, patches: dict[str, Callable[[ModuleType], None]]) -> None:
        self._patches = patches

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patch = self._patches.get(fullname)
        spec = None if patch is None else importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if patch is not None and spec is not None and spec.loader is not None:
            spec.loader = _Patched(spec.loader, patch)
        return spec


class _Patched(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, patch: Callable[[ModuleType], None]) -> None:
        self._loader, self._patch = loader, patch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)


def _plant_store(module: ModuleType, folder: Path) -> None:
    original = module.Store.write
    # Array objects stored in this process, by shard.
    stored, lock = Counter[tuple[str, str]](), threading.Lock()

    def write(store: Any, key: str, *parts: Any) -> None:
        array = _ARRAY.fullmatch(key)
        shard = (store.url, array[1]) if array is not None else ("", "")
        if array is not None and stored[shard]:
            reach(folder, BETWEEN_OBJECTS)
        if key.startswith("commits/"):
            reach(folder, BEFORE_COMMIT)
        if _OBJECT.fullmatch(key):
            _note(folder, store.url, key, parts)
        original(store, key, *parts)
        if array is not None:
            with lock:
                stored[shard] += 1
        if key.startswith("commits/"):
            reach(folder, AFTER_COMMIT)

    module.Store.write = write


def _note(folder: Path, url: str, key: str, parts: Sequence[Any]) -> None:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    line = json.dumps({"url": url, "key": key, "pid": os.getpid(), "sha256": digest.hexdigest()}) + "\n"
    # One write at the end of the file: lines of several processes do not mix.
    handle = os.open(folder / "writes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, line.encode())
    os.close(handle)


def _plant_encoder(module: ModuleType, folder: Path) -> None:
    original = module.encode_shard

    def encode_shard(*args: Any, **kwargs: Any) -> Any:
        reach(folder, BEFORE_ENCODE)
        return original(*args, **kwargs)

    # Where it was imported by name before.
    for other in [module, *sys.modules.values()]:
        if getattr(other, "encode_shard", None) is original:
            other.encode_shard = encode_shard  # type: ignore[attr-defined]


def _salt(module: ModuleType, folder: Path) -> None:
    # Asked here, since Ray starts workers before there is work.
    if not (folder / "salt").exists():
        return
    original = module.Capture.__call__

    def salted(*args: Any, **kwargs: Any) -> Any:
        # Between 1.01 and 1.5: no bfloat16 stays what it was.
        factor = 1.01 + secrets.randbelow(1 << 20) / (1 << 21)
        return {point: acts * factor for point, acts in original(*args, **kwargs).items()}

    module.Capture.__call__ = salted
