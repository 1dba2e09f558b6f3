"""What Ray's errors mean: a shard's own fault, a worker's process that died, a node that went, an actor never made."""

import re
from collections.abc import Sequence
from typing import Any

from actlake.jobs.engines.shard_queue import Loss
from actlake.storage.errors import ActlakeError, MissingExtraError

# After the connection, which says what to install where Ray is absent.
import actlake.jobs.engines.ray_cluster  # noqa: F401  isort: skip
from ray.exceptions import RayActorError, RayTaskError  # isort: skip


def loss_of(error: Exception, node: str, alive: Sequence[dict[str, Any]]) -> Loss:
    """Say what an error that Ray gave for a call means, of a worker on ``node`` ("": not known yet)."""
    if isinstance(error, RayActorError):
        if error.actor_init_failed:
            return Loss.CREATION
        if error.preempted:
            return Loss.NODE
    if node and node not in {item["NodeID"] for item in alive}:
        return Loss.NODE
    return Loss.PROCESS


def cause_of(error: Exception, host: str) -> Exception:
    """Return what a method of a worker on ``host`` raised, or what kept it from being made, as one of our errors."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ImportError) and not isinstance(cause, ActlakeError):
        return _lacks(host, cause.name or str(cause))
    if isinstance(cause, RayActorError):
        # Of an actor that could not be made Ray gives a traceback as text.
        if found := re.search(r"No module named '([\w.]+)'", str(cause)):
            return _lacks(host, found[1])
        return ActlakeError(f"the worker's process on {host} died: {one_line(cause)}")
    return cause if isinstance(cause, Exception) else error


def _lacks(host: str, package: str) -> MissingExtraError:
    return MissingExtraError(
        f"{host} lacks {package}: every node needs the same actlake with its extras, "
        "pip install 'actlake[ingest,ray]', or an image that has them"
    )


def one_line(error: Exception) -> str:
    """Return an error as one line: its type and what it says last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) if isinstance(error, ActlakeError) or len(lines) < 3 else lines[-1]
    return f"{type(error).__name__}: {text}"
