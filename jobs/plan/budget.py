"""Refuses what cannot fit, with the numbers and the nearest setting that does."""

from actlake.jobs.plan.estimate import Estimate
from actlake.jobs.plan.machine import HERE
from actlake.jobs.work import SHARDS_IN_FLIGHT
from actlake.storage.errors import JobFileError


def check(plan: Estimate, *, memory: bool = True) -> None:
    """Raise ``JobFileError`` where a plan exceeds ``[budget]``, the machine's memory or its GPUs'.

    ``memory`` False leaves the machine out: it is another one than the plan knows of.
    """
    problems = [*_over_budget(plan), *(_over_memory(plan) if memory else [])]
    if problems:
        raise JobFileError("the job does not fit:\n  " + "\n  ".join(problems))


def _over_budget(plan: Estimate) -> list[str]:
    budget, found = plan.job.budget, []
    if budget.max_bytes is not None and plan.sizes.nbytes > budget.max_bytes:
        found.append(
            f"it would store {plan.sizes.nbytes:,} bytes, budget.max_bytes is {budget.max_bytes:,}; "
            f"{_fewer_rows(plan, budget.max_bytes / plan.sizes.nbytes)}, or raise budget.max_bytes"
        )
    months = plan.job.plan.months
    cost = plan.cost.total(months)
    if budget.max_cost is not None and cost > budget.max_cost:
        found.append(
            f"it would cost ${cost:,.2f} (computing ${plan.cost.compute:,.2f}, requests ${plan.cost.requests:,.2f}, "
            f"{months:g} month(s) of storage ${plan.cost.month * months:,.2f}), budget.max_cost is "
            f"${budget.max_cost:,.2f}; {_fewer_rows(plan, budget.max_cost / cost)}, or raise budget.max_cost"
        )
    return found


def _fewer_rows(plan: Estimate, share: float) -> str:
    """Name the most rows that a share of the size or cost buys, in whole shards where that is at least one."""
    n_rows = int(plan.sizes.n_rows.get("train", 0) * share)
    whole = n_rows // plan.spec.rows_per_shard * plan.spec.rows_per_shard
    if whole:
        return f"max_rows = {whole:_} fits"
    # Of a part of a shard, what does not grow with the rows is more.
    if (fewer := int(n_rows * 0.9)) < 1:
        return "no row fits: take fewer hook points"
    return f"max_rows = {fewer:_} fits"


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
    if plan.passes.n > 1 and (fitting := left // n_shards >> 20) > 0:
        return f"layout.shard_memory = '{fitting}MiB' fits, with more passes"
    n_rows = left // (n_shards * plan.spec.nbytes_per_row)
    if n_rows >= 1:
        held = ""
        if n_shards > 1 and memory.shard // n_shards <= left:
            held = f"that is room for one shard, a worker has {n_shards} in the making: "
        return f"{held}layout.rows_per_shard = {1 << (n_rows.bit_length() - 1):_} fits"
    if (fewer := machine.memory // memory.host) >= 1:
        return f"run.workers = {fewer} fits"
    return "take a machine with more memory, a smaller model or fewer hook points"


def _fitting_gpus(plan: Estimate) -> str:
    fitting = [name for name, gpu in plan.setting.rates.gpus.items() if gpu.memory_gb * 1e9 >= plan.memory.gpu]
    return f" ({', '.join(fitting)})" if fitting else ""
