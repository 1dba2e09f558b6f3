"""``actlake ingest``, ``init`` and ``points``: making datasets."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from actlake.jobs.cli.app import ERRORS, OUT, app
from actlake.jobs.units import count_of, format_nbytes
from actlake.storage.errors import BadInputError, ShardFailedError

if TYPE_CHECKING:
    from actlake.ingest.models import ModelShape
    from actlake.jobs.ingestion import IngestReport
    from actlake.jobs.slices import Slice


@app.command()
def ingest(
    job: Annotated[Path, typer.Argument(help="Job file (TOML); 'actlake init MODEL' writes one.", show_default=False)],
    engine: Annotated[str, typer.Option(help="'ray', or 'local' for this process alone.")] = "ray",
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster ('auto' or host:port) instead of this machine.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--slice",
            metavar="NUMBER/COUNT",
            help="With --engine local: build this part of the shards, e.g. 3/8; several processes build one dataset.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report, or all failed shards, as JSON.")] = False,
) -> None:
    """Build what is missing of a job's dataset: corpus, then shards. Run it again after any interruption."""
    from actlake.jobs import ingestion
    from actlake.jobs.cli.listener import listening
    from actlake.jobs.jobfile import read_job
    from actlake.jobs.slices import Slice

    chosen = None if part is None else Slice.parse(part)
    checked = read_job(job)
    try:
        with listening(ERRORS if as_json else OUT, checked) as listener:
            report = ingestion.ingest(checked, engine=engine, address=address, listener=listener, part=chosen)
    except ShardFailedError as error:
        if as_json:
            typer.echo(json.dumps({"dataset": checked.dataset, "failed": error.failed()}, indent=1))
        raise
    if as_json:
        typer.echo(json.dumps(vars(report), indent=1))
        return
    if chosen is not None:
        OUT.print(_sliced(chosen, report))
        return
    if report.n_built == 0:
        OUT.print(f"nothing to build: all {report.n_shards} shards of {report.dataset} are committed")
        return
    ratio = report.raw_nbytes / report.nbytes
    OUT.print(
        f"built {count_of(report.n_built, 'shard')} in {report.seconds:.0f} s: {report.dataset} has "
        f"{report.n_rows:,} rows, {format_nbytes(report.nbytes)} stored ({ratio:.2f}x compressed)"
    )


def _sliced(part: "Slice", report: "IngestReport") -> str:
    built = f"built {count_of(report.n_built, 'shard')} of slice {part} in {report.seconds:.0f} s"
    if report.n_built == 0:
        built = f"nothing to build: no shard of slice {part} is missing"
    left = report.n_shards - report.n_committed
    whole = "it is whole" if left == 0 else f"{left} still missing, of other slices or failed"
    return f"{built}; {report.dataset} has {report.n_committed} of {report.n_shards} shards: {whole}"


@app.command()
def prepare(
    job: Annotated[Path, typer.Argument(help="Job file (TOML).", show_default=False)],
    engine: Annotated[str, typer.Option(help="What builds the corpus: 'local', or 'ray' for a large one.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster ('auto' or host:port) instead of this machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is ready as JSON.")] = False,
) -> None:
    """Do all of a job that needs a network: weights, corpus, row index, array metadata. No shard is built."""
    from actlake.jobs import preparing
    from actlake.jobs.cli.listener import listening
    from actlake.jobs.jobfile import read_job

    checked = read_job(job)
    with listening(ERRORS if as_json else OUT, checked) as listener:
        report = preparing.prepare(checked, engine=engine, address=address, listener=listener)
    command = preparing.compute_command(job)
    if as_json:
        typer.echo(json.dumps({**vars(report), "command": command}, indent=1))
        return
    OUT.print(f"model    {report.model}: {report.weights}")
    OUT.print(f"corpus   {report.corpus}: {report.n_tokens:,} tokens")
    OUT.print(
        f"dataset  {report.dataset}: {report.n_rows:,} rows in {count_of(report.n_shards, 'shard')}, "
        f"{report.n_missing} to build"
    )
    OUT.print("every compute node must see these three places; in a Slurm job array each task then runs")
    OUT.print(f"  {command}")


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="Hub id, local directory, or gemma-3-270m-gguf.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path("job.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented job file for a model."""
    from actlake.jobs.template import job_template

    if os.path.exists(output) and not force:
        raise BadInputError(f"{output} exists; choose another with --output, or replace it with --force")
    if not os.path.isdir(output.parent):
        raise BadInputError(f"cannot write {output}: there is no folder {output.parent}; make it, or use --output")
    text = job_template(model)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInputError(f"cannot write {output}: {error.strerror}; choose another with --output") from error
    OUT.print(f"wrote {output}; look it over, then: actlake ingest {output}")


@app.command()
def points(
    model: Annotated[str, typer.Argument(help="Hub id, local directory, or gemma-3-270m-gguf.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Commit or branch of a Hub model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show a model's hook points, their widths and bytes per token, and what other tools call them."""
    from actlake.ingest.models import model_shape
    from actlake.storage.foreign_names import foreign_names
    from actlake.storage.hookpoints import STREAMS

    shape = model_shape(model, revision=revision)
    widths = shape.widths()
    if as_json:
        points = _described(shape)
        typer.echo(json.dumps({"architecture": shape.architecture, "layers": shape.n_layers, "hook_points": points}))
        return
    table = Table("stream", "width", "bytes per token", "all layers", title=f"{model}, {shape.architecture}")
    table.add_column("also called", no_wrap=True)
    for stream in STREAMS:
        width = widths[f"layers.0.{stream}"]
        others = "\n".join(foreign_names(stream, shape.architecture)).replace("{L}", "L")
        table.add_row(stream, f"{width:,}", f"{2 * width:,}", format_nbytes(2 * width * shape.n_layers), others)
    OUT.print(table)
    OUT.print(
        f"a hook point is layers.L.<stream>, e.g. layers.{shape.n_layers // 2}.resid_post; L = 0..{shape.n_layers - 1}"
    )
    four = sum(
        2 * w for name, w in widths.items() if name.split(".")[2] in ("attn_z", "mlp_in", "mlp_out", "resid_post")
    )
    OUT.print(f"bfloat16, before compression; preset 'gemma-scope-2' stores {format_nbytes(four)} per token")


def _described(shape: "ModelShape") -> dict[str, dict[str, Any]]:
    """Return what there is to say of each hook point, as JSON values."""
    from actlake.ingest.hooks import architecture
    from actlake.storage.foreign_names import foreign_names
    from actlake.storage.hookpoints import HookPoint

    taps, found = architecture(shape.architecture).taps, {}
    for name, width in shape.widths().items():
        point = HookPoint.parse(name)
        others = [other.format(L=point.layer) for other in foreign_names(point.stream, shape.architecture)]
        tensor = str(taps[point.stream])
        found[name] = {"width": width, "nbytes_per_token": 2 * width, "tensor": tensor, "also_called": others}
    return found
