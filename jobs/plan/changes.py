"""What would make a job cheaper: every single change that the rates and the spec allow, tried."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from actlake.jobs.plan.estimate import Estimate, changed
from actlake.jobs.plan.machine import HERE, choose_machine
from actlake.jobs.plan.stages import NAMES
from actlake.jobs.units import duration
from actlake.storage.codecs import Codec


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change and what it saves of dollars (of making and ``plan.months`` of storage) and of hours."""

    text: str
    saved: float
    hours_saved: float


def cheapest_change(plan: Estimate) -> Change | None:
    """Return the change that saves most: dollars where there are prices, else hours; None below a cent or a second."""
    months = plan.job.plan.months
    priced = plan.cost.total(months) > 0
    found = [
        Change(
            text=text,
            saved=plan.cost.total(months) - other.cost.total(months),
            hours_saved=(plan.stages.total - other.stages.total) / 3600,
        )
        for text, other in _candidates(plan)
    ]
    best = max(found, key=lambda change: change.saved if priced else change.hours_saved, default=None)
    if best is None or (best.saved < 0.01 if priced else best.hours_saved < 1 / 3600):
        return None
    return best


def _candidates(plan: Estimate) -> Iterator[tuple[str, Estimate]]:
    job, spec, machine, rates = plan.job, plan.spec, plan.setting.machine, plan.setting.rates
    if spec.dtype == "float32":
        yield "capture.dtype = 'bfloat16'", changed(plan, spec=replace(spec, dtype="bfloat16"))
    other = Codec(name="none" if spec.codec.name == "blosc" else "blosc")
    yield f"layout.codec = '{other.name}'", changed(plan, spec=replace(spec, codec=other))
    if machine.name == HERE:
        return
    for name in rates.machines:
        for spot in (False, True):
            if (name, spot) != (machine.name, machine.spot):
                options = replace(job.plan, machine=name, spot=spot)
                chosen = choose_machine(options, rates)
                yield f"plan.machine = '{name}'{', spot' if spot else ''}", changed(plan, machine=chosen)


def advice(plan: Estimate) -> str:
    """Say in a sentence what to change, and what the binding limit itself asks for."""
    accelerators = "CPUs" if plan.setting.machine.gpu is None else "GPUs"
    limit = {
        "forward": f"more or faster {accelerators}, or fewer layers below the deepest hook point",
        "host": "GPUs with a faster link, or fewer hook points",
        "encode": "more CPU cores a GPU, or codec 'none'",
        "nic": "more machines (the same bill in less time), or fewer hook points",
        "store": "larger shards: fewer objects",
    }[plan.stages.binding]
    best = cheapest_change(plan)
    if best is None:
        return f"nothing that the rates know of is cheaper; the limit is {NAMES[plan.stages.binding]}: {limit}"
    saved = f"saves ${best.saved:,.2f}" if best.saved > 0 else f"takes {duration(best.hours_saved * 3600)} less"
    return f"{best.text} {saved}; the limit is {NAMES[plan.stages.binding]}: {limit}"
