"""Connecting to Ray: the cluster at an address, or one on this machine for as long as a run lasts; and its room."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from actlake.jobs.engines.ray_address import check_cluster, explain
from actlake.jobs.work import ModelOrder
from actlake.storage.errors import BadInputError, MissingExtraError

try:
    import ray
except ImportError as error:
    raise MissingExtraError(
        "Ray is not installed; pip install 'actlake[ray]', or use --engine local for this process alone"
    ) from error


@contextmanager
def cluster(address: str | None, n_cpus: int) -> Iterator[None]:
    """Connect to the cluster at ``address``, or run Ray on this machine for as long as the block lasts."""
    if address is not None:
        check_cluster(address)
    if ray.is_initialized():
        yield
        return
    # Nothing leaves this machine unless the user has said otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {"address": "local", "num_cpus": n_cpus, "include_dashboard": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:  # Ray raises plain ones, too.
        raise explain(address, error) from error
    if threading.current_thread() is threading.main_thread():
        # Ray's own ends the process with exit code 15, whatever was there before.
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


def wanted_by(order: ModelOrder, resources: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return what a worker asks of a node, by Ray's names."""
    gpus = {"GPU": float(n_gpus(order))} if n_gpus(order) else {}
    return {"CPU": float(order.n_threads)} | gpus | dict(resources or {})


def n_gpus(order: ModelOrder) -> int:
    """Return how many GPUs a worker has to itself."""
    return order.n_gpus if order.device.startswith("cuda") else 0


def threads_each(order: ModelOrder) -> int:
    """Return the CPUs for each worker of a node whose GPUs are all used; without such nodes those of the order.

    The order was made by the CPUs of the driver's machine, which say nothing of the nodes.
    """
    there = [node["Resources"] for node in nodes()]
    wanted = n_gpus(order)
    shares = [int(has["CPU"] * wanted // has["GPU"]) for has in there if wanted and has.get("GPU", 0) >= wanted]
    return max(1, min(shares)) if shares else order.n_threads


def nodes() -> list[dict[str, Any]]:
    """Return the nodes of the cluster that are alive, as Ray describes them."""
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in found if node["Alive"]]


def room(wanted: Mapping[str, float]) -> int:
    """Return for how many workers the nodes that are there have room."""
    there = [node["Resources"] for node in nodes()]
    return sum(min(int(has.get(name, 0) // n) for name, n in wanted.items() if n > 0) for has in there)


def no_room(wanted: Mapping[str, float]) -> str:
    """Say what a worker wants, and what the nodes that are there have."""
    there = [node["Resources"] for node in nodes()]
    most = {name: max((has.get(name, 0) for has in there), default=0) for name in (*wanted, "GPU")}
    others = {name: n for name, n in wanted.items() if name not in ("CPU", "GPU")}
    custom = "".join(f", {n:g} {name}" for name, n in others.items())
    has = "".join(f", {most[name]:g} {name}" for name in others)
    return (
        f"a worker wants {wanted['CPU']:.0f} CPUs and {wanted.get('GPU', 0):.0f} GPUs{custom}; the largest of "
        f"{len(there)} Ray nodes has {most['CPU']:.0f} and {most['GPU']:.0f}{has}"
    )


def require_room(wanted: Mapping[str, float]) -> None:
    """Raise ``BadInputError`` where no node has room for a worker: it would wait for ever."""
    if room(wanted) < 1:
        raise BadInputError(f"{no_room(wanted)}: lower run.threads, or change run.device")
