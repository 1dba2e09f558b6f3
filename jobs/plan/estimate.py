"""The plan of one job: sizes, memory, time, money and verdicts, from its spec and workload alone."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from actlake.ingest.models import ModelShape
from actlake.ingest.passes import plan_passes
from actlake.ingest.shard_memory import uploads_of
from actlake.jobs.jobfile import Job
from actlake.jobs.plan.machine import Machine
from actlake.jobs.plan.memory import WorkerMemory, worker_memory
from actlake.jobs.plan.money import Cost, StoreOrRecompute, cost_of, store_or_recompute
from actlake.jobs.plan.rates import Rates, StoreRates
from actlake.jobs.plan.sizes import ROWS, Sizes, sizes_of
from actlake.jobs.plan.stages import Stages, stages_of, worker_rate
from actlake.jobs.plan.transformer import flops_per_token
from actlake.jobs.plan.workload import Workload
from actlake.jobs.work import SHARDS_IN_FLIGHT
from actlake.storage.errors import BadInputError
from actlake.storage.hookpoints import HookPoint
from actlake.storage.limits import split_options
from actlake.storage.records import GROUP_SHARDS
from actlake.storage.spec import DatasetSpec

#: The store whose objects are written in pieces.
LOCAL = "local"

#: Fewer rows a shard than this mix badly and make small objects: then passes are proposed.
FEW_ROWS = 32_768


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a plan reckons with besides the spec and the workload. ``ratios`` are measured ones by hook point.

    ``n_rows_left`` are the rows that are not committed yet, None for all; ``widened`` as in ``worker_memory``.
    """

    machine: Machine
    store_name: str
    rates: Rates
    ratios: Mapping[str, float]
    ratios_from: str
    tokens_per_s: float | None = None
    tokens_from: str | None = None
    n_rows_left: int | None = None
    widened: bool = False


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How often a shard's batches run: ``n`` times, which takes ``forward`` times the seconds of one whole pass.

    ``nbytes`` are those of the largest pass in the memory of a shard.
    """

    n: int
    forward: float
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """All that is known of a job before it runs; seconds and dollars are of what is left to build."""

    job: Job
    spec: DatasetSpec
    shape: ModelShape
    setting: Setting
    workload: Workload
    sizes: Sizes
    memory: WorkerMemory
    flops_per_token: float
    stages: Stages
    cost: Cost
    verdict: StoreOrRecompute

    @property
    def share_left(self) -> float:
        """The share of the rows that is still to be built."""
        left = self.setting.n_rows_left
        return 1.0 if left is None else left / max(1, self.sizes.total_rows)

    @property
    def gpu_hours(self) -> float:
        """Hours of all accelerators, busy or not."""
        return self.stages.total / 3600 * self.setting.machine.n_gpus * self.setting.machine.count

    @property
    def host_memory(self) -> int:
        """Bytes that the workers of one machine take together."""
        return self.memory.host * self.n_workers

    @property
    def n_workers(self) -> int:
        """Workers on one machine."""
        return workers_of(self.job, self.setting.machine)

    @property
    def read_seconds(self) -> float | None:
        """Seconds of one pass over everything at the store's default read quota; None where there is none."""
        per_s = self.setting.rates.stores[self.setting.store_name].read_gb_s
        return None if per_s is None else self.sizes.nbytes / (per_s * 1e9)

    @property
    def n_failures(self) -> float:
        """Interruptions of the accelerators that are to be expected; each loses at most one shard of its worker."""
        return self.gpu_hours * self.setting.rates.failures_per_gpu_hour

    @property
    def passes(self) -> Passes:
        """The passes in which shards of these sizes are captured."""
        return self.passes_at(self.spec.rows_per_shard)

    def passes_at(self, rows_per_shard: int) -> Passes:
        """Return the passes in which shards of so many rows would be captured."""
        return passes_of(self.job, self.spec, self.shape, self.workload, rows_per_shard)

    @property
    def proposed(self) -> Passes | None:
        """Passes that give shards of 32,768 rows where they are smaller; None where none are needed or possible.

        A dataset that is there keeps its layout, and one pass is what a shard has anyway.
        """
        if self.spec.rows_per_shard >= FEW_ROWS or self.job.layout.rows_per_shard is not None:
            return None
        if self.setting.n_rows_left is not None:
            return None
        try:
            found = self.passes_at(FEW_ROWS)
        except BadInputError:
            return None
        return found if found.n > 1 else None


def workers_of(job: Job, machine: Machine) -> int:
    """Return the workers on one machine: as asked for, else one for each GPU or group of GPUs, else one."""
    most = max(1, machine.n_gpus // job.run.gpus_per_worker)
    if job.run.most_workers is None:
        return most
    return min(job.run.most_workers, most) if machine.gpu is not None else job.run.most_workers


def passes_of(job: Job, spec: DatasetSpec, shape: ModelShape, workload: Workload, rows_per_shard: int) -> Passes:
    """Return the passes of shards of so many rows; ``BadInputError`` where a hook point does not fit even alone."""
    n_rows = min(rows_per_shard, max(workload.n_rows.values(), default=0))
    found = plan_passes(spec, n_rows, job.layout.shard_memory)
    whole = flops_per_token(shape, spec.point_names, workload.sequence_tokens)
    parts = [flops_per_token(shape, points, workload.sequence_tokens) for points in found]
    arrays = spec.arrays()
    columns = sum(array.nbytes_per_row for array in arrays.values() if array.width is None)
    widest = max(sum(arrays[name].nbytes_per_row for name in points) for points in found)
    return Passes(n=len(found), forward=sum(parts) / whole, nbytes=n_rows * (widest + columns))


def estimate(job: Job, spec: DatasetSpec, shape: ModelShape, workload: Workload, setting: Setting) -> Estimate:
    """Put a plan together; pure but for what is handed in."""
    machine, rates = setting.machine, setting.rates
    store = rates.stores[setting.store_name]
    sizes = sizes_of(spec, workload.n_rows, _ratios(spec, setting))
    flops = flops_per_token(shape, spec.point_names, workload.sequence_tokens)
    share = 1.0 if setting.n_rows_left is None else setting.n_rows_left / max(1, sizes.total_rows)
    mfu, n_workers = job.plan.mfu or rates.mfu, workers_of(job, machine)
    passes = passes_of(job, spec, shape, workload, spec.rows_per_shard)
    stages = stages_of(
        machine,
        store,
        rates,
        sizes=sizes,
        n_run=workload.n_run,
        flops_per_token=flops,
        tokens_per_s=setting.tokens_per_s,
        mfu=mfu,
        dtype=spec.dtype,
        codec=spec.codec.name,
        share=share,
        n_workers=n_workers,
        passes=passes.forward,
    )
    n_parts = _metadata_objects(spec, sizes) + (_parts(job, sizes, store) if store.bills_parts else 0)
    cost = cost_of(machine, store, sizes, seconds=stages.total, n_parts=n_parts)
    rate = setting.tokens_per_s or worker_rate(machine, rates, n_workers, flops, mfu, spec.dtype)
    # Worker seconds of one forward pass over the corpus, for all hook points and as far as each of them.
    whole = (workload.n_tokens + workload.n_padding) / rate
    parts = [flops_per_token(shape, (name,), workload.sequence_tokens) / flops for name in spec.point_names]
    worker_second = machine.hour / n_workers / 3600
    return Estimate(
        job=job,
        spec=spec,
        shape=shape,
        setting=setting,
        workload=workload,
        sizes=sizes,
        memory=worker_memory(
            spec,
            shape,
            shard_rows=min(spec.rows_per_shard, max(workload.n_rows.values(), default=0)),
            n_shards=min(SHARDS_IN_FLIGHT, sizes.n_shards),
            pass_nbytes=passes.nbytes,
            encoded=_encoded(job, sizes, machine.n_cpus // n_workers, remote=setting.store_name != LOCAL),
            context_length=job.corpus.context_length,
            on_gpu=machine.gpu is not None,
            widened=setting.widened,
            n_gpus=job.run.gpus_per_worker,
        ),
        flops_per_token=flops,
        stages=stages,
        cost=cost,
        verdict=store_or_recompute(
            cost,
            pass_cost=whole * worker_second,
            alone_cost=whole * sum(parts) * worker_second,
            pass_hours=whole / 3600,
            months=job.plan.months,
            reads=job.plan.reads,
        ),
    )


def _encoded(job: Job, sizes: Sizes, n_threads: int, *, remote: bool) -> int:
    """Return the bytes of the objects that a worker holds encoded; a remote store is given each in one piece."""
    largest = sorted(sizes.object_nbytes, reverse=True)[: uploads_of(job.run.threads or max(1, n_threads))]
    return sum(largest) * (2 if remote else 1)


def _ratios(spec: DatasetSpec, setting: Setting) -> Callable[[str], float]:
    def ratio(array: str) -> float:
        if array in setting.ratios:
            return setting.ratios[array]
        stream = ROWS if array.startswith(f"{ROWS}/") else HookPoint.parse(array).stream
        return setting.rates.ratio(stream, spec.dtype, spec.codec.name)

    return ratio


def _metadata_objects(spec: DatasetSpec, sizes: Sizes) -> int:
    """Return the writes beside shards: ``zarr.json`` files, ``spec.json``, ``root.json``, compacted groups."""
    n_splits = sum(1 for n in sizes.n_rows.values() if n)
    n_groups = sizes.n_shards // GROUP_SHARDS
    return n_splits * (len(spec.arrays()) + 4) + n_groups


def _parts(job: Job, sizes: Sizes, store: StoreRates) -> int:
    """Return the requests that uploads in parts take beside the one of each object: n parts, begin (on S3) and end."""
    if store.part_nbytes is None:
        # s3fs sends what is smaller than two parts in one request.
        part = split_options(job.storage_options)[0].part_nbytes
        whole, n_ends = 2 * part - 1, 2
    else:
        part, whole, n_ends = store.part_nbytes, store.whole_nbytes, 1
    n_parts = 0
    for array in sizes.arrays:
        nbytes = array.nbytes / max(1, array.n_objects)
        if nbytes > whole:
            n_parts += array.n_objects * (math.ceil(nbytes / part) + n_ends - 1)
    return n_parts


def changed(plan: Estimate, *, machine: Machine | None = None, spec: DatasetSpec | None = None) -> Estimate:
    """Return the same plan on another machine or with another spec; measured rates hold for neither and are dropped."""
    setting = plan.setting
    if machine is not None:
        setting = replace(setting, machine=machine, tokens_per_s=None, tokens_from=None)
    if spec is not None:
        setting = replace(setting, ratios={})
    return estimate(plan.job, spec or plan.spec, plan.shape, plan.workload, setting)


def to_json(plan: Estimate) -> dict[str, Any]:
    """Return the whole plan as JSON values."""
    machine, verdict = plan.setting.machine, plan.verdict
    return {
        "dataset": plan.job.dataset,
        "model": plan.job.model,
        "known_from": plan.workload.known_from,
        "n_rows": dict(plan.sizes.n_rows),
        "n_rows_left": plan.setting.n_rows_left,
        "rows_per_shard": plan.spec.rows_per_shard,
        "n_shards": plan.sizes.n_shards,
        "n_objects": plan.sizes.n_objects,
        "n_chunks": plan.sizes.n_chunks,
        "largest_object": plan.sizes.largest_object,
        "raw_nbytes": plan.sizes.raw_nbytes,
        "nbytes": plan.sizes.nbytes,
        "ratios_from": plan.setting.ratios_from,
        "tokens": {
            "rows_of": plan.workload.n_tokens,
            "straddling": plan.workload.n_straddling,
            "padding": plan.workload.n_padding,
            "run": plan.workload.n_run,
        },
        "arrays": [asdict(array) | {"ratio": array.ratio} for array in plan.sizes.arrays],
        "memory": plan.memory.parts() | {"host": plan.memory.host, "gpu": plan.memory.gpu, "workers": plan.n_workers},
        "machine": asdict(machine),
        "store": plan.setting.store_name,
        "flops_per_token": plan.flops_per_token,
        "tokens_per_s": plan.setting.tokens_per_s,
        "tokens_from": plan.setting.tokens_from,
        "seconds": plan.stages.alone() | {"total": plan.stages.total},
        "binding": plan.stages.binding,
        "idle": plan.stages.idle if machine.gpu else None,
        "gpu_hours": plan.gpu_hours,
        "failures": plan.n_failures,
        "read_seconds": plan.read_seconds,
        "passes": asdict(plan.passes),
        "proposed_passes": None if plan.proposed is None else asdict(plan.proposed) | {"rows_per_shard": FEW_ROWS},
        "cost": asdict(plan.cost) | {"total": plan.cost.total(plan.job.plan.months)},
        "store_or_recompute": asdict(verdict) | {"store": verdict.store, "sentence": verdict.sentence()},
    }
