"""``actlake report``: a page that shows a dataset."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actlake.jobs.cli.app import OUT, app
from actlake.jobs.cli.options import Dataset, Options, open_dataset
from actlake.jobs.units import format_nbytes
from actlake.storage.errors import BadInputError

if TYPE_CHECKING:
    from actlake.shards.dataset import ActivationDataset


@app.command()
def report(
    dataset: Dataset,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the page.")] = Path("report.html"),
    rows: Annotated[
        int, typer.Option(help="Rows to sample for tokens, positions and documents; 0 reads no rows.", min=0)
    ] = 16_384,
    watch: Annotated[
        float | None,
        typer.Option(help="Write it again every so many seconds, until the dataset is complete.", min=1.0),
    ] = None,
    options: Options = [],  # noqa: B006 - typer reads it
) -> None:
    """Write a page about a dataset: coverage, norms, outlier channels, bytes, the run, tokens, documents, spec.

    One file that needs no network; data in it is never run.
    """
    if not output.parent.is_dir():
        raise BadInputError(f"cannot write {output}: there is no folder {output.parent}; make it, or use --output")
    ds = open_dataset(dataset, options)
    while True:
        complete = _write(ds, output, rows, watch)
        if watch is None or complete:
            return
        ds = _changed(ds, watch)


def _write(ds: "ActivationDataset", output: Path, n_rows: int, watch: float | None) -> bool:
    from actlake.jobs.report.collect import collect
    from actlake.jobs.report.page import render
    from actlake.storage.stores import Store

    contents = collect(ds, n_rows=n_rows, watch_s=watch or 0.0)
    page = render(contents)
    # A whole file under a temporary name, then a rename: a browser that reloads never sees half a page.
    Store(output.absolute().parent).write(output.name, page)
    state = "complete" if contents.complete else "incomplete"
    OUT.print(f"wrote {output}, {format_nbytes(len(page))}: {ds.n_rows:,} of {ds.n_rows_planned:,} rows, {state}")
    return contents.complete


def _changed(before: "ActivationDataset", seconds: float) -> "ActivationDataset":
    """Wait until a dataset has other commits than it had, and return it as it is then."""
    while True:
        time.sleep(seconds)
        now = before.reopened()
        if _state(now) != _state(before):
            return now


def _state(ds: "ActivationDataset") -> list[object]:
    return [
        (part.n_rows_planned, part.reader.manifest.columns("shard", "attempt"))
        for part in ([ds, ds.heldout] if ds.store.exists("heldout/spec.json") else [ds])
    ]
