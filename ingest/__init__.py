"""Documents to rows in host memory: sources, tokens, models and what is captured of them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actlake.ingest.splicing import splice

__all__ = ["splice"]


def __getattr__(name: str) -> Any:
    # Loaded at first use: torch takes seconds.
    if name != "splice":
        raise AttributeError(f"module 'actlake.ingest' has no attribute {name!r}")
    value = globals()[name] = import_module("actlake.ingest.splicing").splice
    return value
