"""Build, store and stream activation datasets of language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actlake.jobs.catalog import catalog
    from actlake.shards.align import align
    from actlake.shards.dataset import ActivationDataset, open  # noqa: A004  (what users type)
    from actlake.storage.errors import ActlakeError
    from actlake.storage.hookpoints import HookPoint

__version__ = "0.1.0.dev0"
__all__ = ["ActivationDataset", "ActlakeError", "HookPoint", "__version__", "align", "catalog", "open"]

_PACKAGES = ("ingest", "jobs", "shards", "storage")

# Loaded at first use: numpy and pyarrow take half a second, which a mistyped command line should not cost.
_HOMES = {
    "ActivationDataset": "actlake.shards.dataset",
    "ActlakeError": "actlake.storage.errors",
    "HookPoint": "actlake.storage.hookpoints",
    "align": "actlake.shards.align",
    "catalog": "actlake.jobs.catalog",
    "open": "actlake.shards.dataset",
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"actlake.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'actlake' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
