"""``actlake ls``, ``show``, ``head`` and ``verify``: looking at datasets."""

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID
from rich.table import Column, Table
from rich.text import Text

import actlake
from actlake.jobs.cli.app import ERRORS, OUT, app
from actlake.jobs.cli.progress import bars, format_nbytes
from actlake.storage.errors import NotFoundError

if TYPE_CHECKING:
    # numpy and pyarrow would take most of the start of a command that needs neither.
    from actlake.shards.dataset import ActivationDataset

Dataset = Annotated[str, typer.Argument(help="Path or fsspec URL of a dataset.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.command()
def ls(
    url: Annotated[str, typer.Argument(help="Path or fsspec URL to look below.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """List the datasets and corpora below a URL."""
    from actlake.jobs.catalog import DEPTH, find
    from actlake.storage.stores import Store

    entries = list(find(Store(url)))
    if as_json:
        typer.echo(json.dumps([vars(entry) | {"complete": entry.complete} for entry in entries], indent=1))
        return
    if not entries:
        raise NotFoundError(f"no dataset and no corpus at {url} or {DEPTH} folders below")
    # Folded, not cut: a URL is there to be copied.
    url_column = Column("url", overflow="fold", ratio=1)
    table = Table("kind", url_column, "model", "rows", "hook points", "stored", "complete")
    for entry in entries:
        if entry.note:
            table.add_row(entry.kind, entry.url, Text(entry.note, style="red"))
            continue
        rows = f"{entry.n_rows:,}" + (" tokens" if entry.kind == "corpus" else "")
        points = str(entry.n_hook_points or "")
        table.add_row(
            entry.kind,
            entry.url,
            entry.model,
            rows,
            points,
            format_nbytes(entry.nbytes) if entry.nbytes else "",
            f"{entry.complete:.0%}" if entry.kind != "corpus" else "",
        )
    OUT.print(table)


@app.command()
def show(dataset: Dataset, as_json: AsJson = False) -> None:
    """Show what a dataset holds: its spec, its rows, its bytes and ratio for each hook point."""
    summary = summarise(actlake.open(dataset))
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    print_summary(summary)


def summarise(ds: "ActivationDataset") -> dict[str, Any]:
    """Return what ``show`` prints, as JSON values."""
    stored = dict.fromkeys(ds.spec.arrays(), 0) | ds.reader.manifest.nbytes_by_array()
    arrays = ds.spec.arrays()
    points = {}
    for point in ds.spec.hook_points:
        raw = ds.n_rows * arrays[point.name].nbytes_per_row
        moments = ds.statistics(point.name)
        points[point.name] = {
            "width": point.width,
            "rows_per_chunk": point.rows_per_chunk,
            "nbytes": stored[point.name],
            "ratio": raw / stored[point.name] if stored[point.name] else None,
            "norm_mean": moments.norm_mean,
        }
    return {
        "url": ds.url,
        "complete": ds.complete,
        "n_rows": ds.n_rows,
        "n_rows_planned": ds.n_rows_planned,
        "n_shards": ds.manifest.num_rows,
        "missing_shards": ds.missing_shards[:100],
        "nbytes": sum(stored.values()),
        "raw_nbytes": ds.n_rows * ds.spec.nbytes_per_row,
        "dataset_id": ds.spec.dataset_id,
        "row_space_id": ds.spec.row_space_id,
        "spec": ds.spec.to_json(),
        "hook_points": points,
        "provenance": _provenance(ds),
    }


def _provenance(ds: "ActivationDataset") -> dict[str, Any]:
    table = ds.manifest
    return {
        "hosts": sorted(set(table["host"].to_pylist())),
        "devices": sorted(set(table["device"].to_pylist())),
        "software": [json.loads(text) for text in sorted(set(table["software"].to_pylist()))],
        "n_tokens": sum(table["n_tokens"].to_pylist()),
        **{name: round(sum(table[name].to_pylist()), 3) for name in ("forward_s", "encode_s", "write_s")},
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Print what ``summarise`` returned."""
    spec, made = summary["spec"], summary["provenance"]
    state = "complete" if summary["complete"] else f"INCOMPLETE: {summary['n_rows_planned']:,} rows planned"
    _print_coloured((summary["url"], "bold"), f"  {spec['split']}, {state}")
    OUT.print(
        f"  {summary['n_rows']:,} rows in {summary['n_shards']} shards of {spec['rows_per_shard']:,}; {spec['dtype']}"
    )
    OUT.print(f"  {spec['model']} ({spec['architecture']}), weights {spec['model_fingerprint'][:12]}")
    OUT.print(f"  dataset {summary['dataset_id'][:12]}, row space {summary['row_space_id'][:12]}")
    ratio = f", {summary['raw_nbytes'] / summary['nbytes']:.2f}x compressed" if summary["nbytes"] else ""
    OUT.print(f"  {format_nbytes(summary['nbytes'])} stored{ratio}")
    OUT.print(
        f"  made on {', '.join(made['devices'])}: {made['n_tokens']:,} padded tokens; "
        f"forward {made['forward_s']:.0f} s, encode {made['encode_s']:.0f} s, write {made['write_s']:.0f} s"
    )
    table = Table("hook point", "width", "chunk rows", "stored", "ratio", "mean norm")
    for name, point in summary["hook_points"].items():
        shown = f"{point['ratio']:.2f}x" if point["ratio"] else ""
        table.add_row(
            name,
            f"{point['width']:,}",
            f"{point['rows_per_chunk']:,}",
            format_nbytes(point["nbytes"]),
            shown,
            f"{point['norm_mean']:,.1f}",
        )
    OUT.print(table)


@app.command()
def head(
    dataset: Dataset,
    n: Annotated[int, typer.Option("-n", help="How many rows.", min=1)] = 10,
    start: Annotated[int, typer.Option(help="The first row.", min=0)] = 0,
    point: Annotated[str | None, typer.Option(help="The hook point of the norm; default: the first.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show rows with their token, its context, document, role and norm."""
    rows = head_rows(actlake.open(dataset), start, n, point)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("row", "document", "position", "context", "token", "role", "norm")
    for row in rows:
        table.add_row(
            str(row["row"]),
            row["document"],
            str(row["position"]),
            repr(row["context"])[1:-1],
            repr(row["token"]),
            str(row["role"]),
            f"{row['norm']:,.1f}",
        )
    OUT.print(table)


def head_rows(ds: "ActivationDataset", start: int, n: int, point: str | None) -> list[dict[str, Any]]:
    """Return ``n`` rows from ``start`` on, with their text."""
    import numpy as np

    from actlake.ingest.corpus import Corpus
    from actlake.storage.stores import resolve_url

    chosen = ds.spec.select(point)[0] if point else ds.hook_points[0]
    stop = min(start + n, ds.n_rows_planned)
    columns = ds.rows(slice(start, stop))
    norms = np.linalg.norm(ds[chosen][start:stop].astype(np.float64), axis=1)
    corpus = Corpus.open(resolve_url(ds.header.corpus, ds.store))
    pieces = corpus.pieces()
    found = []
    for i in range(stop - start):
        sequence = corpus.sequences(ds.spec.split, int(columns["sequence"][i]), int(columns["sequence"][i]) + 1)[0]
        position = int(columns["position"][i])
        before = sequence.tokens[max(0, position - 8) : position]
        found.append(
            {
                "row": start + i,
                "token_id": int(columns["token_id"][i]),
                "token": pieces[int(columns["token_id"][i])],
                "context": "".join(pieces[token] for token in before),
                "position": position,
                "sequence": sequence.index,
                "document": sequence.document,
                "role": int(columns["role"][i]),
                "norm": float(norms[i]),
                "point": chosen,
            }
        )
    return found


@app.command()
def verify(
    dataset: Dataset,
    repair: Annotated[
        bool, typer.Option("--repair", help="Un-commit bad shards; the next ingest rebuilds them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every object, chunk, row count and statistic of a dataset and its held-out split.

    Exit code 2 where anything is damaged.
    """
    reports = verify_splits(dataset, repair=repair, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(reports, indent=1))
    if any(report["problems"] for report in reports):
        raise typer.Exit(2)


def verify_splits(dataset: str, *, repair: bool = False, quiet: bool = False) -> list[dict[str, Any]]:
    """Verify a dataset and its held-out split with a progress bar; print a verdict for each unless ``quiet``."""
    from dataclasses import asdict

    from actlake.shards import verify as checks

    ds = actlake.open(dataset)
    reports = []
    for part in (ds, ds.heldout) if ds.store.exists("heldout/spec.json") else (ds,):
        with bars(ERRORS) as progress:
            task = progress.add_task("verify", total=part.reader.manifest.nbytes, detail=part.spec.split)
            report = checks.verify(part, on_progress=partial(_advance, progress, task))
        reports.append({"url": part.url, "split": part.spec.split, **asdict(report)})
        if not quiet:
            _print_verdict(reports[-1])
        if repair and report.problems:
            for shard in checks.repair(part, report):
                ERRORS.print(f"un-committed shard {shard}; 'actlake ingest' rebuilds it")
    _verify_corpus(ds, quiet)
    return reports


def _verify_corpus(ds: "ActivationDataset", quiet: bool) -> None:
    # Raises for damage; a dataset is read without its corpus, so that one may be gone.
    from actlake.ingest.corpus import Corpus
    from actlake.storage.stores import resolve_url

    try:
        n_files = Corpus.open(resolve_url(ds.header.corpus, ds.store)).verify()
        verdict = f"verify: the corpus is whole: {n_files} files"
    except NotFoundError as error:
        verdict = f"verify: the corpus was not checked: {error}"
    if not quiet:
        OUT.print(verdict)


def _advance(progress: Progress, task: TaskID, nbytes: int) -> None:
    progress.update(task, advance=nbytes)


def _print_verdict(report: dict[str, Any]) -> None:
    for problem in report["problems"]:
        ERRORS.print(f"{problem['kind']}: {problem['message']}", style="red")
    checked = (
        f"{report['n_shards']} shards, {report['n_objects']:,} objects, {report['n_chunks']:,} chunks, "
        f"{report['n_rows']:,} rows, {format_nbytes(report['nbytes'])}"
    )
    if report["problems"]:
        _print_coloured(
            "verify: ", (f"{len(report['problems'])} problems", "red"), f" in {report['split']}: {checked} checked"
        )
    elif report["missing_shards"]:
        n_missing = len(report["missing_shards"])
        _print_coloured(
            f"verify: {report['split']} is ", ("incomplete", "yellow"), f": {n_missing} shards missing; {checked} whole"
        )
    else:
        _print_coloured(f"verify: {report['split']} is ", ("whole", "green"), f": {checked}")


def _print_coloured(*parts: str | tuple[str, str]) -> None:
    OUT.print(Text.assemble(*parts))
