"""A plan in one paragraph: what ``actlake ingest`` prints before it writes."""

from actlake.jobs.plan.estimate import Estimate
from actlake.jobs.plan.stages import NAMES
from actlake.jobs.units import count_of, duration, format_nbytes


def paragraph(plan: Estimate) -> str:
    """Return the plan in a few sentences."""
    sizes, machine, memory = plan.sizes, plan.setting.machine, plan.memory
    left = plan.setting.n_rows_left
    todo = f", {left:,} of them still to build" if left is not None and left < sizes.total_rows else ""
    text = (
        f"plan: {sizes.total_rows:,} rows in {count_of(sizes.n_shards, 'shard')} and "
        f"{count_of(sizes.n_objects, 'object')}{todo}; {format_nbytes(sizes.raw_nbytes)} raw, about "
        f"{format_nbytes(sizes.nbytes)} stored. {plan.workload.n_run:,} tokens through "
        f"the model, {plan.workload.n_straddling:,} of them twice and {plan.workload.n_padding:,} padding: about "
        f"{duration(plan.stages.total)} on {machine.count} x {machine.name}, {NAMES[plan.stages.binding]} binds. "
        f"{plan.n_workers} worker(s) of {format_nbytes(memory.host)} memory"
    )
    if (cost := plan.cost.total(plan.job.plan.months)) > 0:
        text += f"; ${cost:,.2f} with {plan.job.plan.months:g} month(s) of storage"
    return text + "; 'actlake plan' has more"
