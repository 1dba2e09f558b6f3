"""``actlake ls``, ``show``, ``head`` and ``diff``: looking at datasets."""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from actlake.jobs.cli.app import OUT, app
from actlake.jobs.cli.options import AsJson, Dataset, Options, open_dataset, parse_options, print_table
from actlake.jobs.units import format_nbytes
from actlake.storage.errors import NotFoundError

if TYPE_CHECKING:
    from actlake.jobs.catalog import Entry


@app.command()
def ls(
    url: Annotated[str, typer.Argument(help="Path or fsspec URL to look below.", show_default=False)],
    as_json: AsJson = False,
    options: Options = None,
) -> None:
    """List the datasets and corpora below a URL."""
    from actlake.jobs.catalog import DEPTH, explain, find
    from actlake.storage.stores import Store

    store = Store(url, parse_options(options))
    entries = list(find(store))
    if as_json:
        typer.echo(json.dumps([entry.to_json() for entry in entries], indent=1))
        return
    if not entries:
        found = explain(store)
        raise NotFoundError(
            f"no dataset and no corpus at {url} or {DEPTH} folders below" + (f": {found}" if found else "")
        )
    names = ("kind", "url", "model", "rows", "layers\nx streams", "stored", "complete", "age")
    print_table(names, map(_cells, entries))


def _cells(entry: "Entry") -> list[str | Text]:
    if entry.note:
        return [entry.kind, entry.url, Text(entry.note, style="red")]
    if entry.kind == "corpus":
        return [entry.kind, entry.url, "", f"{entry.n_rows:,} tokens", "", format_nbytes(entry.nbytes), "", ""]
    return [
        entry.kind,
        entry.url,
        entry.model,
        f"{entry.n_rows:,}",
        format_grid(entry.n_layers, len(entry.streams), entry.n_hook_points),
        format_nbytes(entry.nbytes),
        format_share(entry.share) if entry.complete else Text(format_share(entry.share), style="yellow"),
        format_age(entry.updated),
    ]


def format_grid(n_layers: int, n_streams: int, n_points: int) -> str:
    """Return ``18 x 3``, with the number of hook points where the grid has holes: ``18 x 3 (21)``."""
    holes = "" if n_layers * n_streams == n_points else f" ({n_points})"
    return f"{n_layers} x {n_streams}{holes}"


def format_layers(layers: list[int]) -> str:
    """Return ascending layers with ranges: ``0-3, 7``."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    stops = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in zip(starts, stops, strict=True))


def format_share(share: float) -> str:
    """Return a share in percent, rounded down: 100 % is complete."""
    return "100%" if share >= 1 else f"{int(share * 1000) / 10:.1f}%"


def format_age(moment: datetime | None, now: datetime | None = None) -> str:
    """Return how long ago a moment was, in its largest unit."""
    if moment is None:
        return ""
    seconds = max(0.0, ((now or datetime.now(UTC)) - moment).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


@app.command()
def show(dataset: Dataset, as_json: AsJson = False, options: Options = None) -> None:
    """Show what a dataset holds: spec, rows, bytes, ratios and norms, who made it, and what it cost so far."""
    from actlake.jobs.summary import summarise

    summary = summarise(open_dataset(dataset, options))
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    print_summary(summary)


def print_summary(summary: dict[str, Any]) -> None:
    """Print what ``summarise`` returned."""
    spec = summary["spec"]
    state: tuple[str, str] = ("complete", "green")
    if not summary["complete"]:
        share = format_share(min(0.999, summary["n_rows"] / summary["n_rows_planned"]))
        missing = f"{summary['n_shards_missing']:,} shards missing"
        state = (f"INCOMPLETE: {share} of {summary['n_rows_planned']:,} rows planned, {missing}", "yellow")
    _print_coloured((summary["url"], "bold"), f"  {spec['split']}, ", state)
    void = f", {summary['n_void']:,} of them void" if summary["n_void"] else ""
    OUT.print(
        f"  {summary['n_rows']:,} rows in {summary['n_shards']:,} shards of {spec['rows_per_shard']:,}{void}; "
        f"{spec['dtype']}, {spec['order']} order, codec {spec['codec']['name']}"
    )
    OUT.print(f"  {spec['model']} ({spec['architecture']}), weights {spec['model_fingerprint'][:12]}")
    OUT.print(
        f"  dataset {summary['dataset_id'][:12]}, row space {summary['row_space_id'][:12]}, "
        f"corpus {spec['corpus_id'][:12]} at {summary['corpus']}"
    )
    ratio = f", {summary['raw_nbytes'] / summary['nbytes']:.2f}x compressed" if summary["nbytes"] else ""
    OUT.print(f"  {format_nbytes(summary['nbytes'])} stored{ratio}")
    _print_provenance(summary["provenance"])
    _print_streams(summary["streams"])
    _print_points(summary["hook_points"])


def _print_provenance(made: dict[str, Any]) -> None:
    if not made["hosts"]:
        return
    software = sorted({f"{name} {version}" for one in made["software"] for name, version in one.items()})
    hosts = ", ".join(made["hosts"][:4]) + (f" and {len(made['hosts']) - 4} more" if made["hosts"][4:] else "")
    OUT.print(f"  made on {', '.join(made['devices'])} ({hosts}) with {', '.join(software)}")
    rate = f", {made['n_tokens'] / made['worker_s']:,.0f} tokens/s a worker" if made["worker_s"] else ""
    OUT.print(
        f"  cost so far: {made['worker_s'] / 3600:.2f} worker hours for {made['n_tokens']:,} padded tokens{rate}; "
        f"forward {made['forward_s']:.0f} s, encode {made['encode_s']:.0f} s, write {made['write_s']:.0f} s; "
        f"{made['first_started'][:16]} to {made['last_finished'][:16]}"
    )


def _print_streams(streams: dict[str, dict[str, Any]]) -> None:
    rows = (
        (name, format_layers(one["layers"]) or "row columns", format_nbytes(one["nbytes"]), _ratio(one["ratio"]))
        for name, one in streams.items()
    )
    print_table(("stream", "layers", "stored", "ratio"), rows)


def _print_points(points: dict[str, dict[str, Any]]) -> None:
    rows = (
        (
            name,
            f"{point['width']:,}",
            f"{point['rows_per_chunk']:,}",
            format_nbytes(point["nbytes"]),
            _ratio(point["ratio"]),
            _number(point["norm_mean"], ",.1f"),
            _number(point["norm_median"], ",.1f"),
            _number(point["unit_scale"], ".4g"),
        )
        for name, point in points.items()
    )
    names = ("hook point", "width", "chunk\nrows", "stored", "ratio", "mean\nnorm", "median\nnorm", "unit\nscale")
    print_table(names, rows)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


@app.command()
def head(
    dataset: Dataset,
    n: Annotated[int, typer.Option("-n", help="How many rows.", min=1)] = 10,
    start: Annotated[int, typer.Option(help="The first row.", min=0)] = 0,
    point: Annotated[str | None, typer.Option(help="The hook point of the norm; default: the first.")] = None,
    as_json: AsJson = False,
    options: Options = None,
) -> None:
    """Show rows with their token, its context, document, labels, role and norm."""
    from actlake.jobs.summary import head_rows

    rows = head_rows(open_dataset(dataset, options), start, n, point)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    labels = list(rows[0]["metadata"]) if rows else []
    names = ("row", "document", "position", "context", "token", "role", *labels, "norm")
    print_table(names, (_head_cells(row, labels) for row in rows))


def _head_cells(row: dict[str, Any], labels: list[str]) -> tuple[str, ...]:
    return (
        str(row["row"]),
        row["document"],
        str(row["position"]),
        repr(row["context"])[1:-1],
        repr(row["token"]),
        row["role"],
        *(row["metadata"][label] or "" for label in labels),
        f"{row['norm']:,.1f}",
    )


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Path or fsspec URL of a dataset.", show_default=False)],
    b: Annotated[str, typer.Argument(help="Another one.", show_default=False)],
    as_json: AsJson = False,
    options: Options = None,
) -> None:
    """Compare two datasets: specs, coverage, and whether their rows line up."""
    from actlake.jobs import summary

    found = summary.diff(open_dataset(a, options), open_dataset(b, options))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    _print_diff(found)


def _print_diff(found: dict[str, Any]) -> None:
    sides = found["a"], found["b"]
    rows = (
        ("url", *(side["url"] for side in sides)),
        ("dataset_id", *(side["dataset_id"][:12] for side in sides)),
        ("row_space_id", *(side["row_space_id"][:12] for side in sides)),
        ("rows", *(f"{side['n_rows']:,} of {side['n_rows_planned']:,}" for side in sides)),
        ("shards", *(f"{side['n_shards']:,}" for side in sides)),
        ("stored", *(format_nbytes(side["nbytes"]) for side in sides)),
        ("complete", *("yes" if side["complete"] else "no" for side in sides)),
    )
    print_table(("", "here", "there"), rows)
    if found["same_dataset_id"]:
        OUT.print("the specs are the same")
    else:
        OUT.print("the specs differ (here, there):")
        for line in found["spec"]:
            OUT.print(f"  {line}")
    shards, points = found["shards"], found["hook_points"]
    OUT.print(f"shards: {shards['both']:,} in both, {shards['only_a']:,} only here, {shards['only_b']:,} only there")
    n_both, n_here, n_there = (len(points[name]) for name in ("both", "only_a", "only_b"))
    OUT.print(f"hook points: {n_both} in both, {n_here} only here, {n_there} only there")
    if found["aligned"]:
        _print_coloured(("the rows line up", "green"), ": actlake.align reads the two as one")
        return
    _print_coloured(("the rows do not line up", "yellow"), "; what decides about rows differs (here, there):")
    for line in found["alignment"]:
        OUT.print(f"  {line}")


def _print_coloured(*parts: str | tuple[str, str]) -> None:
    OUT.print(Text.assemble(*parts))
