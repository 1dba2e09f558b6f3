"""The stages of a corpus build on Ray Data: parts, ranges of ids, buckets and files, each an item of a dataset.

Items are minutes of work, so blocks of one item cost nothing; a worker that dies has its item done again, which changes
nothing, for every object has a determined name and content.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from actlake.jobs.engines.ray_cluster import cluster
from actlake.jobs.work import available_cpus
from actlake.storage.errors import ActlakeError

# After the engine, which says what to install where Ray is absent.
import ray  # isort: skip

T = TypeVar("T")
R = TypeVar("R")

#: Bytes of sources that are worth starting Ray on this machine: about a minute of tokenising.
LEAST_NBYTES = 512 * 2**20


class RayData:
    """Runs the stages of a build on a pool of Ray Data actors, of the cluster at ``address`` or of this machine.

    A context: Ray starts at the first stage and ends with the block. ``workers`` None takes as many as there are CPUs,
    each of which has ``cpus``. Sources of fewer than ``least_nbytes`` are not worth it; a cluster's always are.
    """

    remote = True

    def __init__(
        self,
        *,
        address: str | None = None,
        workers: int | None = None,
        cpus: float = 1,
        least_nbytes: int = LEAST_NBYTES,
    ) -> None:
        self.least_nbytes = least_nbytes if address is None else 0
        self._address, self._workers, self._cpus = address, workers, cpus
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _start(self) -> int:
        """Connect, unless it is done; return how many workers there may be."""
        self._open.enter_context(cluster(self._address, n_cpus=available_cpus()))
        return self._workers or max(1, int(_resources().get("CPU", 1) / self._cpus))

    def run(self, make: Callable[[], Callable[[T], R]], items: Sequence[T]) -> Iterator[R]:
        """Yield the function's value for each item, in their order; the first error is raised as it was."""
        if len(items) <= 1:
            # Not worth a pool of actors: all that a stage of one item reads is stored.
            yield from map(make(), items)
            return
        workers = self._start()
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            fn_constructor_args=(make,),
            batch_size=1,
            batch_format="numpy",
            num_cpus=self._cpus,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(workers, len(rows))),
            runtime_env={"env_vars": {"RAYON_NUM_THREADS": str(max(1, int(self._cpus)))}},
        )
        yield from _in_order(dataset.iter_rows())


def _resources() -> dict[str, float]:
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


class _Worker:
    """The actor: makes its function once, and applies it to one item at a time."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._make = make
        self._work: Callable[[Any], Any] | None = None

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
        results = [pickle.dumps(self._result(pickle.loads(item))) for item in batch["item"]]
        return {"number": batch["number"], "result": np.array(results, dtype=object)}

    def _result(self, item: Any) -> Any:
        try:
            # Not in the constructor: Ray Data would try again for ever what its error says is wrong.
            self._work = self._work or self._make()
            return self._work(item)
        except ActlakeError as error:
            # As a value: Ray Data would wrap it in errors of its own.
            return error


def _in_order(rows: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """Yield results by their numbers; those that are early wait."""
    waiting: dict[int, bytes] = {}
    following = 0
    for row in rows:
        waiting[int(row["number"])] = row["result"]
        while following in waiting:
            result = pickle.loads(waiting.pop(following))
            if isinstance(result, ActlakeError):
                raise result
            yield result
            following += 1
