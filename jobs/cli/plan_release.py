"""A whole release as ``actlake plan --release`` prints it."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from actlake.jobs.cli.app import OUT
from actlake.jobs.cli.options import print_table
from actlake.jobs.units import format_nbytes

if TYPE_CHECKING:
    from actlake.jobs.plan.estimate import Estimate
    from actlake.jobs.plan.release import Release


def show_release(found: "Release", as_json: bool) -> None:
    """Print a release by model and stream, its plans, and whether to store it."""
    if as_json:
        from actlake.jobs.plan.estimate import to_json

        value: dict[str, Any] = {
            "release": found.name,
            "dtype": found.dtype,
            "nbytes": found.nbytes,
            "stored": found.stored,
            "rows": [asdict(row) for row in found.rows],
            "plans": [_without_arrays(to_json(one)) for one in found.plans],
        }
        typer.echo(json.dumps(value, indent=1))
        return
    print_table(
        ("model", "stream", "hook points", "width", "tokens", found.dtype, "actlake"),
        [
            (
                row.model.rpartition("/")[2],
                row.stream,
                str(row.n_points),
                f"{row.width:,}",
                f"{row.n_tokens / 1e9:g}e9",
                format_nbytes(row.nbytes),
                format_nbytes(row.stored),
            )
            for row in found.rows
        ],
    )
    OUT.print(
        f"{found.name}: {format_nbytes(found.nbytes)} in {found.dtype}; actlake's defaults store "
        f"{format_nbytes(found.stored)} ({found.nbytes / found.stored:.2f}x less): bfloat16, which is what the models "
        f"compute, and a lossless codec at the ratios of {found.plans[0].setting.ratios_from}",
        style="bold",
    )
    _print_plans(found)


def _without_arrays(value: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name != "arrays"}


def _print_plans(found: "Release") -> None:
    from actlake.jobs.plan.stages import NAMES

    rows = [
        (
            made.job.model.rpartition("/")[2],
            f"{made.spec.rows_per_shard:,}",
            f"{made.sizes.n_shards:,}",
            f"{made.sizes.n_objects:,}",
            format_nbytes(made.sizes.largest_object),
            f"{made.gpu_hours:,.0f}",
            format_seconds(made.stages.total),
            NAMES[made.stages.binding],
            f"{made.stages.idle:.0%}",
            f"${made.cost.compute:,.0f}",
            f"${made.cost.month:,.0f}",
        )
        for made in found.plans
    ]
    names = (
        "model",
        "shard\nrows",
        "shards",
        "objects",
        "largest",
        "GPU-\nhours",
        "time",
        "limit",
        "GPU\nidle",
    )
    print_table((*names, "computing", "storage\na month"), rows)
    months = found.plans[0].job.plan.months
    machine = found.plans[0].setting.machine
    totals = [sum(values) for values in zip(*(_totals(made) for made in found.plans), strict=True)]
    shards, objects, gpu_hours, failures, seconds, compute, requests, month = totals
    OUT.print(
        f"in all: {shards:,.0f} shards, {objects:,.0f} objects, {gpu_hours:,.0f} GPU-hours with about {failures:,.1f} "
        f"interruptions, {format_seconds(seconds)} on {machine.count} x {machine.name}; computing ${compute:,.0f}, "
        f"writes ${requests:,.0f}, storage ${month:,.0f} a month; ${compute + requests + months * month:,.0f} with "
        f"{months:g} month(s) kept"
    )
    _print_verdicts(found)


def _print_verdicts(found: "Release") -> None:
    options = found.plans[0].job.plan
    OUT.print(
        f"store or recompute: {options.reads:g} read(s) of each hook point alone within {options.months:g} month(s); "
        "from how many reads storing is cheaper, where hook points are read one by one, and where one pass of the "
        "model could feed all readers at once"
    )
    rows = [
        (
            made.job.model.rpartition("/")[2],
            Text("store") if made.verdict.store else Text("DO NOT STORE", style="yellow"),
            f"${made.verdict.stored_cost:,.0f}",
            f"${made.verdict.recomputed_cost:,.0f}",
            "never" if made.verdict.one_by_one is None else f"{made.verdict.one_by_one:,.1f}",
            "never" if made.verdict.at_once is None else f"{made.verdict.at_once:,}",
        )
        for made in found.plans
    ]
    print_table(("model", "", "stored", "recomputed", "one by one", "all at once"), rows)


def _totals(made: "Estimate") -> tuple[float, ...]:
    cost = made.cost
    return (
        made.sizes.n_shards,
        made.sizes.n_objects,
        made.gpu_hours,
        made.n_failures,
        made.stages.total,
        cost.compute,
        cost.requests,
        cost.month,
    )


def format_seconds(seconds: float) -> str:
    """Return e.g. ``3.1 days``."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"
