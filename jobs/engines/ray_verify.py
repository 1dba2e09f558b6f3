"""Checks a dataset's shards on a Ray cluster: some shards a task, one CPU each, a bounded number of tasks in flight."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from actlake.jobs.engines.ray_cluster import cluster
from actlake.shards.dataset import ActivationDataset
from actlake.shards.verify import VerifyReport, completed, open_damaged, verify
from actlake.storage.corpus import Corpus
from actlake.storage.stores import Store

#: A task opens the dataset, which costs as much as a few shards.
_SHARDS_PER_TASK = 64


def verify_on_ray(
    dataset: ActivationDataset,
    *,
    address: str | None,
    deep: bool = True,
    sample: float = 1.0,
    corpus: Corpus | None = None,
    on_progress: Callable[[int], None] = lambda nbytes: None,
) -> VerifyReport:
    """Return what ``actlake.shards.verify.verify`` does; the tasks run at ``address``, None for this machine."""
    import ray

    where = None if corpus is None else (corpus.store.url, corpus.store.options)
    place = (dataset.store.url, dataset.store.options)
    reports: list[VerifyReport] = []
    with cluster(address, n_cpus=1):
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        n_cpus = max(1, int(resources.get("CPU", 1)))
        task: Any = ray.remote(_check).options(num_cpus=1)
        waiting, in_flight = _parts(dataset.reader.manifest.shards, n_cpus), set[Any]()
        while True:
            while len(in_flight) < 2 * n_cpus and (part := next(waiting, None)) is not None:
                in_flight.add(task.remote(*place, where, part, deep, sample))
            if not in_flight:
                return completed(dataset, reports, deep)
            (done,), _ = ray.wait(list(in_flight), num_returns=1)
            in_flight.remove(done)
            reports.append(ray.get(done))
            on_progress(reports[-1].nbytes)


def _parts(shards: Sequence[int], n_cpus: int) -> Iterator[Sequence[int]]:
    size = max(1, min(_SHARDS_PER_TASK, len(shards) // (4 * n_cpus)))
    return (shards[start : start + size] for start in range(0, len(shards), size))


def _check(
    url: str,
    options: Mapping[str, Any],
    corpus: tuple[str, Mapping[str, Any]] | None,
    shards: Sequence[int],
    deep: bool,
    sample: float,
) -> VerifyReport:
    dataset, _ = open_damaged(url, options)
    opened = None if corpus is None else Corpus.open(Store(*corpus))
    return verify(dataset, deep=deep, sample=sample, corpus=opened, shards=shards, n_threads=1)
