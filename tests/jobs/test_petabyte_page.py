"""The numbers of docs/petabyte.md are those of the planner: whoever changes rates or layout changes the page."""

import tomllib
from pathlib import Path

import pytest
import test_docs

from actlake.jobs.jobfile import LayoutOptions, parse_job
from actlake.jobs.plan.estimate import Estimate
from actlake.jobs.plan.gather import plan_job
from actlake.jobs.plan.options import PlanOptions
from actlake.jobs.plan.rates import read_rates
from actlake.jobs.plan.release import Release, plan_release
from actlake.jobs.units import format_nbytes

PAGE = (Path(__file__).parents[2] / "docs/petabyte.md").read_text()
RATES = read_rates()


def release(layout: LayoutOptions) -> Release:
    options = PlanOptions(machine=next(iter(RATES.machines)), machines=32, spot=True)
    return plan_release(
        "gemma-scope-2",
        tokens_base=8_000_000_000,
        tokens_chat=3_000_000_000,
        dtype="float32",
        options=options,
        rates=RATES,
        layout=layout,
    )


@pytest.fixture(scope="module")
def default() -> Release:
    return release(LayoutOptions())


@pytest.fixture(scope="module")
def wide() -> Release:
    return release(LayoutOptions(shard_memory=128 << 30))


def of(found: Release, size: str) -> Estimate:
    """Return the plan of the base model of a size."""
    return next(
        plan for plan in found.plans if plan.job.model in (f"google/gemma-3-{size}", f"google/gemma-3-{size}-pt")
    )


def row(name: str, *values: str) -> str:
    return f"| {' | '.join([name, *values])} |"


def test_the_sizes(default: Release) -> None:
    assert f"**{default.nbytes / 1e15:.1f} PB** in float32" in PAGE
    assert f"**{default.stored / 1e15:.1f} PB** of it" in PAGE
    assert f"{default.nbytes / 2e15:.1f} PB" in PAGE
    assert f"({default.nbytes / default.stored:.2f}x less in all)" in PAGE
    large = sum(plan.sizes.nbytes for plan in default.plans if plan.job.model.split("-")[2] in ("12b", "27b"))
    assert f"{large / default.stored:.0%}".replace("%", " % of that") in PAGE
    assert f"27B base model ({format_nbytes(of(default, '27b-pt').sizes.nbytes)})" in PAGE


def test_the_table_of_both_settings(default: Release, wide: Release) -> None:
    both = (default, wide)

    def totals(value: str) -> list[float]:
        return [sum(value_of(plan, value) for plan in found.plans) for found in both]

    ends = [[of(found, size).spec.rows_per_shard for size in ("270m", "27b")] for found in both]
    assert row("rows of a shard, 270M to 27B", *(f"{small:,} to {large:,}" for small, large in ends)) in PAGE
    largest = [f"{of(found, '27b').sizes.largest_object / 1e6:.0f} MB" for found in both]
    assert row("largest object, 27B", *largest) in PAGE
    assert row("shards", *(f"{n:,}" for n in totals("sizes.n_shards"))) in PAGE
    assert row("objects", *(f"{n:,}" for n in totals("sizes.n_objects"))) in PAGE
    assert row("writes, class A", *(f"${n:,.0f}" for n in totals("cost.requests"))) in PAGE
    assert row("GPU-hours", *(f"{n:,.0f}" for n in totals("gpu_hours"))) in PAGE
    assert row("time on 32 machines", *(f"{n / 3600:.1f} h" for n in totals("stages.total"))) in PAGE


def value_of(value: object, path: str) -> float:
    for name in path.split("."):
        value = getattr(value, name)
    assert isinstance(value, int | float)
    return value


def test_the_costs_and_failures(wide: Release) -> None:
    month = sum(plan.cost.month for plan in wide.plans)
    compute = sum(plan.cost.compute for plan in wide.plans)
    hours = sum(plan.gpu_hours for plan in wide.plans)
    assert f"{hours:,.0f} GPU-hours, ${compute:,.0f} at spot prices" in PAGE
    assert f"storage ${month:,.0f} a month" in PAGE
    assert f"**${month / 1000:,.0f},000 a month**, computing it ${compute / 1000:.0f},000 once" in PAGE
    assert f"{sum(plan.n_failures for plan in wide.plans):.1f} interruptions" in PAGE
    largest = of(wide, "27b")
    assert f"{largest.sizes.n_shards:,} shards of the 27B in {largest.gpu_hours:,.0f} GPU-hours" in PAGE
    assert f"GPUs are idle for {largest.stages.idle:.0%}".replace("%", " %") in PAGE
    reads = [of(wide, size).verdict.one_by_one or 0 for size in ("270m", "1b", "4b", "12b", "27b")]
    first, *others = reads
    assert f"from {first:.0f} reads (270M), {others[0]:.1f} (1B), {others[1]:.1f} (4B), {others[2]:.1f} (12B)" in PAGE
    assert f"and {others[3]:.1f} (27B) on" in PAGE


def test_the_wave() -> None:
    (text,) = test_docs.blocks(PAGE, "toml")
    made = plan_job(parse_job(tomllib.loads(text)), rates=RATES, measured=None, offline=True)
    stored = f"{format_nbytes(made.sizes.nbytes)} in {made.sizes.n_objects:,} objects"
    assert f"| stored | {stored}, the largest {format_nbytes(made.sizes.largest_object)};" in PAGE
    assert f"| time | {made.stages.total / 60:.0f} minutes, {made.gpu_hours:.0f} GPU-hours |" in PAGE
    assert f"${made.cost.compute:,.0f} of computing, ${made.cost.month * 0.5:,.0f} for half a month" in PAGE
    verdict = made.verdict
    assert verdict.store
    assert f"cost ${verdict.stored_cost:,.0f} stored, ${verdict.recomputed_cost:,.0f} recomputed" in PAGE
    assert f"from {verdict.one_by_one:.1f} reads of each on" in PAGE
