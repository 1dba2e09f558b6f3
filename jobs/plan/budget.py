"""Refuses what cannot fit, with the numbers and the nearest setting that does."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from actlake.jobs.plan.estimate import Estimate, estimate
from actlake.jobs.plan.machine import HERE
from actlake.jobs.work import SHARDS_IN_FLIGHT
from actlake.storage.errors import BadInputError, JobFileError


def check(plan: Estimate, *, memory: bool = True) -> None:
    """Raise ``JobFileError`` where a plan exceeds ``[budget]``, the machine's memory or its GPUs'.

    ``memory`` False leaves the machine out: it is another one than the plan knows of.
    """
    problems = [*_over_budget(plan), *(_over_memory(plan) if memory else [])]
    if problems:
        raise JobFileError("the job does not fit:\n  " + "\n  ".join(problems))


def _over_budget(plan: Estimate) -> list[str]:
    found = []
    most, most_cost = plan.job.budget.max_bytes, plan.job.budget.max_cost
    if most is not None and plan.sizes.nbytes > most:
        fewer = _fewer_rows(plan, lambda other: other.sizes.nbytes <= most)
        found.append(
            f"it would store {plan.sizes.nbytes:,} bytes, budget.max_bytes is {most:,}; {fewer}, or raise "
            "budget.max_bytes"
        )
    months = plan.job.plan.months
    cost = plan.cost.total(months)
    if most_cost is not None and cost > most_cost:
        fewer = _fewer_rows(plan, lambda other: other.cost.total(months) <= most_cost)
        found.append(
            f"it would cost ${cost:,.2f} (computing ${plan.cost.compute:,.2f}, requests ${plan.cost.requests:,.2f}, "
            f"{months:g} month(s) of storage ${plan.cost.month * months:,.2f}), budget.max_cost is "
            f"${most_cost:,.2f}; {fewer}, or raise budget.max_cost"
        )
    return found


def _fewer_rows(plan: Estimate, fits: Callable[[Estimate], bool]) -> str:
    """Name the most rows that fit, in whole shards where that is at least one.

    Plans of fewer rows are made until it is found: neither sizes nor costs grow in proportion.
    """
    n_rows, per_shard = plan.sizes.n_rows.get("train", 0), plan.spec.rows_per_shard
    whole = n_rows > per_shard and fits(_of_rows(plan, per_shard))
    step = per_shard if whole else 1
    low, high = 0, -(-n_rows // step)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(_of_rows(plan, middle * step)):
            low = middle
        else:
            high = middle
    # Of a part of a shard, what does not grow with the rows is more.
    fewer = low * step if whole else int(low * 0.9)
    return f"max_rows = {fewer:_} fits" if fewer else "no row fits: take fewer hook points"


def _of_rows(plan: Estimate, n_rows: int) -> Estimate:
    """Return the plan of the same job with fewer rows."""
    share = n_rows / plan.sizes.n_rows["train"]
    left = plan.setting.n_rows_left
    setting = replace(plan.setting, n_rows_left=None if left is None else round(left * share))
    return estimate(plan.job, plan.spec, plan.shape, plan.workload.scaled(share), setting)


def _over_memory(plan: Estimate) -> list[str]:
    machine, memory, found = plan.setting.machine, plan.memory, []
    where = "this machine" if machine.name == HERE else machine.name
    if plan.host_memory > machine.memory:
        parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in memory.parts().items())
        found.append(
            f"{plan.n_workers} worker(s) would take {plan.host_memory / 2**30:.1f} GiB ({parts} GiB each), {where} has "
            f"{machine.memory / 2**30:.1f} GiB; {_smaller_shard(plan)}"
        )
    if machine.gpu is not None and memory.gpu > machine.gpu.memory_gb * 1e9:
        found.append(
            f"a worker would take {memory.gpu / 1e9:.1f} GB of its GPU, which has {machine.gpu.memory_gb:g} GB; lower "
            f"capture.batch_tokens, or take a larger GPU{_fitting_gpus(plan)}"
        )
    return found


def _smaller_shard(plan: Estimate) -> str:
    """Name the largest shards that fit, of a power of two of rows; else the number of workers."""
    memory, machine = plan.memory, plan.setting.machine
    n_shards = min(SHARDS_IN_FLIGHT, plan.sizes.n_shards)
    left = machine.memory // plan.n_workers - (memory.host - memory.shard)
    if plan.passes.n > 1 and (fitting := left // n_shards >> 20) > 0 and _fits_in_passes(plan, fitting << 20):
        return f"layout.shard_memory = '{fitting}MiB' fits, with more passes"
    for other in _smaller(plan):
        if other.host_memory <= machine.memory:
            held = ""
            if n_shards > 1 and memory.shard // n_shards <= left:
                held = f"that is room for one shard, a worker has {n_shards} in the making: "
            return f"{held}layout.rows_per_shard = {other.spec.rows_per_shard:_} fits"
    if (fewer := machine.memory // memory.host) >= 1:
        return f"run.workers = {fewer} fits"
    return "take a machine with more memory, a smaller model or fewer hook points"


def _fits_in_passes(plan: Estimate, shard_memory: int) -> bool:
    job = replace(plan.job, layout=replace(plan.job.layout, shard_memory=shard_memory))
    try:
        other = estimate(job, plan.spec, plan.shape, plan.workload, plan.setting)
    except BadInputError:
        return False  # Not even one hook point has room.
    return other.host_memory <= plan.setting.machine.memory


def _smaller(plan: Estimate) -> Iterator[Estimate]:
    """Yield the plan with shards of fewer and fewer rows, powers of two."""
    n_rows = 1 << (plan.spec.rows_per_shard - 1).bit_length()
    while (n_rows := n_rows // 2) >= 1:
        spec = replace(
            plan.spec,
            rows_per_shard=n_rows,
            rows_per_block=math.gcd(plan.spec.rows_per_block, n_rows),
            hook_points=tuple(
                replace(point, rows_per_chunk=math.gcd(point.rows_per_chunk, n_rows)) for point in plan.spec.hook_points
            ),
        )
        yield estimate(plan.job, spec, plan.shape, plan.workload, plan.setting)


def _fitting_gpus(plan: Estimate) -> str:
    fitting = [name for name, gpu in plan.setting.rates.gpus.items() if gpu.memory_gb * 1e9 >= plan.memory.gpu]
    return f" ({', '.join(fitting)})" if fitting else ""
