"""``actlake plan``: what a job, or a whole release, takes before the first byte is written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from actlake.jobs.cli.app import OUT, app
from actlake.jobs.cli.options import AsJson, print_table
from actlake.jobs.cli.plan_release import format_seconds, show_release
from actlake.jobs.units import count_of, format_nbytes
from actlake.storage.errors import BadInputError

if TYPE_CHECKING:
    # The planner reads models' configs and corpora: most of the start of a command that needs neither.
    from actlake.jobs.plan.estimate import Estimate
    from actlake.jobs.plan.rates import Rates

_BAR = 30

#: Options that say something of a job alone, and of a release alone, these with the key that says it of a job.
_OF_JOBS = ("sample", "offline", "by_layer")
_OF_RELEASES = {"tokens_base": "max_rows", "tokens_chat": "max_rows", "dtype": "capture.dtype"}


@app.command()
def plan(
    context: typer.Context,
    job: Annotated[Path | None, typer.Argument(help="Job file (TOML).", show_default=False)] = None,
    release: Annotated[str | None, typer.Option(help="A whole release instead of a job: gemma-scope-2.")] = None,
    tokens_base: Annotated[float, typer.Option(help="Of --release: tokens of each base model.")] = 8e9,
    tokens_chat: Annotated[float, typer.Option(help="Of --release: tokens of each chat model.")] = 3e9,
    dtype: Annotated[str, typer.Option(help="Of --release: the dtype that it was stored in.")] = "float32",
    machine: Annotated[str | None, typer.Option(help="'here', or a machine of the rates.")] = None,
    machines: Annotated[int | None, typer.Option(help="How many of them.")] = None,
    spot: Annotated[bool, typer.Option("--spot", help="At spot prices.")] = False,
    mfu: Annotated[float | None, typer.Option(help="Share of the GPU's peak that the forward pass reaches.")] = None,
    tokens_per_s: Annotated[float | None, typer.Option(help="Measured, of one worker; replaces --mfu.")] = None,
    nic: Annotated[str | None, typer.Option(help="Bytes a second of a machine to the store, e.g. 25GB.")] = None,
    months: Annotated[float | None, typer.Option(help="How long the dataset is kept.")] = None,
    reads: Annotated[float | None, typer.Option(help="How often each hook point is read in that time.")] = None,
    sample: Annotated[
        int, typer.Option(metavar="N", min=0, help="Run N rows through the real model: measured ratios and speed.")
    ] = 0,
    shard_memory: Annotated[
        str | None, typer.Option(help="layout.shard_memory, the host memory of a worker's shard, e.g. 256GiB.")
    ] = None,
    rates: Annotated[Path | None, typer.Option(help="Another file of rates and prices.")] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Look at no store and no source: max_rows says how much there is.")
    ] = False,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="List every hook point, not only the streams.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a job takes: rows, bytes, objects, memory, hours, money, the binding limit, and whether to store at all.

    Exit code 2 where it does not fit the machine's memory or its [budget].
    """
    from actlake.jobs.plan.rates import read_rates
    from actlake.storage.sizes import parse_nbytes

    given = {
        "machine": machine,
        "machines": machines,
        "spot": spot or None,
        "mfu": mfu,
        "tokens_per_s": tokens_per_s,
        "nic": None if nic is None else parse_nbytes(nic, "--nic"),
        "months": months,
        "reads": reads,
    }
    layout = {} if shard_memory is None else {"shard_memory": parse_nbytes(shard_memory, "--shard-memory")}
    asked = Asked(
        rates=read_rates(rates),
        options={name: value for name, value in given.items() if value is not None},
        layout=layout,
        as_json=as_json,
    )
    if release is not None and job is not None:
        raise BadInputError(f"{job} or --release {release}: a plan is of a job or of a release; leave one of them out")
    _check_options(context, job, release)
    if release is not None:
        _plan_release(asked, release, round(tokens_base), round(tokens_chat), dtype)
    elif job is not None:
        _plan_job(asked, job, sample=sample, offline=offline, by_layer=by_layer)
    else:
        raise BadInputError("give a job file, or --release gemma-scope-2")


def _check_options(context: typer.Context, job: Path | None, release: str | None) -> None:
    """Raise ``BadInputError`` for an option that what is planned takes no notice of."""
    given = {name for name in context.params if _is_given(context, name)}
    if release is not None:
        for name in _OF_JOBS:
            if name in given:
                raise BadInputError(
                    f"{_option(name)} is for a job: leave it out, or give a job file in place of --release {release}"
                )
    elif job is not None:
        for name, key in _OF_RELEASES.items():
            if name in given:
                raise BadInputError(f"{_option(name)} is for --release: leave it out; {key} in {job} says it of a job")
        if given.issuperset(("sample", "offline")):
            raise BadInputError("--sample reads the job's sources, --offline looks at none: leave one of them out")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says for a job and for a release alike: keys of ``[plan]`` and ``[layout]``."""

    rates: "Rates"
    options: Mapping[str, Any]
    layout: Mapping[str, Any]
    as_json: bool


def _plan_release(asked: Asked, name: str, tokens_base: int, tokens_chat: int, dtype: str) -> None:
    from actlake.jobs.jobfile import LayoutOptions
    from actlake.jobs.plan.options import PlanOptions
    from actlake.jobs.plan.release import check_release, plan_release

    found = plan_release(
        name,
        tokens_base=tokens_base,
        tokens_chat=tokens_chat,
        dtype=dtype,
        options=PlanOptions(**{"machine": next(iter(asked.rates.machines)), **asked.options}),
        rates=asked.rates,
        layout=LayoutOptions(**asked.layout),
    )
    show_release(found, asked.as_json)
    check_release(found)


def _plan_job(asked: Asked, path: Path, *, sample: int, offline: bool, by_layer: bool) -> None:
    from actlake.jobs.jobfile import read_job
    from actlake.jobs.plan.budget import check
    from actlake.jobs.plan.changes import advice
    from actlake.jobs.plan.estimate import to_json
    from actlake.jobs.plan.gather import plan_job

    job = read_job(path)
    job = replace(job, plan=replace(job.plan, **asked.options), layout=replace(job.layout, **asked.layout))
    measured = None
    if sample:
        from actlake.jobs.plan.sample import measure_sample

        measured = measure_sample(job, sample)
    made = plan_job(job, rates=asked.rates, measured=measured, offline=offline)
    if asked.as_json:
        typer.echo(json.dumps(to_json(made) | {"advice": advice(made)}, indent=1))
    else:
        _show(made, by_layer)
    check(made)


def _show(made: "Estimate", by_layer: bool) -> None:
    from actlake.jobs.plan.changes import advice
    from actlake.jobs.plan.estimate import FEW_ROWS

    sizes, work, setting = made.sizes, made.workload, made.setting
    OUT.print(f"{made.job.model} into {made.job.dataset}", style="bold")
    rows = ", ".join(f"{n:,} {split}" for split, n in sizes.n_rows.items())
    OUT.print(f"  rows       {rows}; from {work.known_from}")
    if setting.n_rows_left is not None:
        OUT.print(f"  to build   {setting.n_rows_left:,} rows; hours and computing below are theirs")
    OUT.print(
        f"  objects    {sizes.n_objects:,} in {count_of(sizes.n_shards, 'shard')} of {made.spec.rows_per_shard:,} "
        f"rows, the largest {format_nbytes(sizes.largest_object)}; {sizes.n_chunks:,} chunks"
    )
    OUT.print(
        f"  tokens     {work.n_run:,} through the model: {work.n_tokens:,} for the rows, {work.n_padding:,} of padding "
        f"({work.n_padding / max(1, work.n_run):.1%}), {work.n_straddling:,} run twice, for sequences that lie in two "
        f"shards ({work.n_straddling / max(1, work.n_run):.1%})"
    )
    if made.passes.n > 1:
        OUT.print(
            f"  passes     {made.passes.n} over each shard, each for a part of its hook points, all of which "
            f"layout.shard_memory does not hold: {made.passes.forward:.1f}x the forward time"
        )
    OUT.print(
        f"  bytes      {format_nbytes(sizes.raw_nbytes)} raw, {format_nbytes(sizes.nbytes)} stored; ratios from "
        f"{setting.ratios_from}"
    )
    _print_sizes(made, by_layer)
    _print_machine(made)
    _print_stages(made)
    _print_cost(made)
    OUT.print(Text.assemble(("store or recompute: ", "bold"), made.verdict.sentence()))
    OUT.print(Text.assemble(("cheapest change: ", "bold"), advice(made)))
    if (proposed := made.proposed) is not None:
        OUT.print(
            f"passes: shards of {made.spec.rows_per_shard:,} rows are small; layout.rows_per_shard = {FEW_ROWS} makes "
            f"larger ones in {proposed.n} passes, each over a part of the hook points, for {proposed.forward:.1f}x the "
            "forward time and the same layout.shard_memory"
        )


def _print_sizes(made: "Estimate", by_layer: bool) -> None:
    if by_layer:
        rows = [
            (
                a.name,
                f"{a.width:,}",
                f"{a.n_objects:,}",
                *map(format_nbytes, (a.raw_nbytes, a.nbytes)),
                f"{a.ratio:.2f}x",
            )
            for a in made.sizes.arrays
        ]
        print_table(("array", "width", "objects", "raw", "stored", "ratio"), rows)
        return
    print_table(
        ("stream", "hook points", "raw", "stored", "ratio"),
        [
            (
                name if name != "rows" else "row columns",
                f"{n:,}",
                format_nbytes(raw),
                format_nbytes(stored),
                f"{raw / stored:.2f}x",
            )
            for name, (n, raw, stored) in made.sizes.by_stream().items()
            if stored
        ],
    )


def _print_machine(made: "Estimate") -> None:
    machine, memory = made.setting.machine, made.memory
    gpu = "no GPU" if machine.gpu is None else f"{machine.n_gpus} x {', '.join(machine.gpu.names)}"
    nic = "NIC not known" if machine.nic is None else f"NIC {format_nbytes(machine.nic)}/s"
    price = f"${machine.hour:,.2f}/h{' spot' if machine.spot else ''}" if machine.hour else "no price"
    OUT.print(
        f"  machine    {machine.count} x {machine.name}: {gpu}, {machine.n_cpus} CPUs, "
        f"{machine.memory / 2**30:,.0f} GiB, {nic}, {price}"
    )
    parts = ", ".join(f"{name} {format_nbytes(value)}" for name, value in memory.parts().items())
    OUT.print(f"  memory     {made.n_workers} worker(s) of {format_nbytes(memory.host)}: {parts}")
    if machine.gpu is not None:
        OUT.print(f"             and {format_nbytes(memory.gpu)} of {machine.gpu.memory_gb:g} GB on the GPU")


def _print_stages(made: "Estimate") -> None:
    from actlake.jobs.plan.stages import NAMES
    from actlake.jobs.work import SHARDS_IN_FLIGHT

    stages, machine = made.stages, made.setting.machine
    seconds = stages.alone()
    longest = max(seconds.values()) or 1.0
    bars = [
        (
            NAMES[name],
            format_seconds(value),
            Text("█" * round(_BAR * value / longest), style="yellow" if value == longest else ""),
        )
        for name, value in seconds.items()
    ]
    print_table(("limit", "alone", ""), bars)
    speed = made.setting.tokens_from or (
        f"{made.job.plan.mfu or made.setting.rates.mfu:.0%} of the peak" if machine.gpu else "the rates of a CPU core"
    )
    OUT.print(
        f"  time       {format_seconds(stages.total)}: {_overlap(made)}. Binding: {NAMES[stages.binding]}. Forward at "
        f"{speed}, {made.flops_per_token / 1e9:,.2f} Gflop a token"
    )
    if machine.gpu is not None:
        OUT.print(
            f"  GPUs       {made.gpu_hours:,.1f} GPU-hours, idle {stages.idle:.0%} of them; about "
            f"{made.n_failures:,.1f} interruptions, each of {SHARDS_IN_FLIGHT} shards at most"
        )


def _overlap(made: "Estimate") -> str:
    if made.stages.on_gpu:
        return "the stages overlap, so that of the slowest"
    return "the stages overlap, but forward and encode share the cores: theirs together, or that of the slowest"


def _print_cost(made: "Estimate") -> None:
    cost, months = made.cost, made.job.plan.months
    OUT.print(
        f"  cost       ${cost.total(months):,.2f}: computing ${cost.compute:,.2f}, {cost.n_class_a:,} writes (class A) "
        f"${cost.requests:,.2f}, storage ${cost.month:,.2f} a month for {months:g}; a pass over everything is at most "
        f"{cost.n_class_b:,} reads (class B), ${cost.read:,.2f} in the region and ${cost.egress:,.2f} more out of it"
    )
    if made.read_seconds is not None:
        OUT.print(
            f"  reading    {format_seconds(made.read_seconds)} a pass at the store's default quota, "
            f"{format_nbytes(made.sizes.nbytes / made.read_seconds)}/s for all readers of a project in a region"
        )
