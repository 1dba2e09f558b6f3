"""``actlake stats``: what the rows of a dataset are like, hook point by hook point."""

import json
import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from actlake.jobs.cli.app import ERRORS, OUT, app
from actlake.jobs.cli.options import AsJson, Dataset, Options, open_dataset
from actlake.jobs.cli.progress import bars

if TYPE_CHECKING:
    # numpy and pyarrow would take most of the start of a command that needs neither.
    from actlake.shards.covariance import Covariance
    from actlake.shards.dataset import ActivationDataset
    from actlake.storage.moments import Moments

#: Share of the energy from which a channel is shown as an outlier.
_OUTLIER = 0.01


@app.command()
def stats(
    dataset: Dataset,
    point: Annotated[list[str] | None, typer.Option(help="Hook points or patterns; default: all.")] = None,
    from_rows: Annotated[
        bool, typer.Option("--from-rows", help="Compute them from the rows, not from what was stored with the shards.")
    ] = False,
    covariance: Annotated[
        list[str] | None, typer.Option(help="Hook points or patterns whose covariance to compute and store.")
    ] = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Rows of the covariance's sample.")] = 100_000,
    seed: Annotated[int, typer.Option(help="Which rows.", min=0)] = 0,
    options: Options = [],  # noqa: B006 - never changed
    as_json: AsJson = False,
) -> None:
    """Show norms, scales and outliers of each hook point, and compute covariances."""
    ds = open_dataset(dataset, options)
    value: dict[str, Any] = {
        "url": ds.url,
        "split": ds.spec.split,
        "hook_points": {name: describe(found) for name, found in _statistics(ds, point, from_rows).items()},
        "covariance": _covariances(ds, covariance, rows, seed) if covariance else {},
    }
    if as_json:
        typer.echo(json.dumps(value, indent=1))
        return
    OUT.print(_table(value["hook_points"]))
    if any(found["median_norm"] is None and found["count"] for found in value["hook_points"].values()):
        ERRORS.print("stored without norms by an earlier actlake; --from-rows computes medians and outlier rows")
    for name, found in value["covariance"].items():
        rank = found["effective_rank"]
        OUT.print(
            f"{name}: covariance of {found['n_rows']:,} rows, effective rank "
            f"{'undefined' if rank is None else f'{rank:.1f}'} of {found['width']:,}: {ds.url}/{found['key']}"
        )


def describe(moments: "Moments") -> dict[str, Any]:
    """Return statistics as JSON values; None for what is not known, or not defined for no rows."""
    histogram, outliers = moments.norm_histogram, moments.outlier_rows
    edges, counts = histogram.coarse() if histogram is not None else ((), ())
    return {
        "width": len(moments.mean),
        "count": moments.count,
        "n_nonfinite": moments.n_nonfinite,
        "norm_mean": moments.norm_mean,
        "norm_rms": moments.mean_squared_norm**0.5,
        "median_norm": None if histogram is None else _number(moments.median_norm),
        "unit_scale": _number(moments.unit_scale),
        "sqrt_d_scale": _number(moments.sqrt_d_scale),
        "outlier_channels": [item._asdict() for item in moments.outlier_channels(_OUTLIER)],
        "outlier_rows": None if outliers is None else [item._asdict() for item in outliers],
        "norm_histogram": None if histogram is None else {"edges": list(edges), "counts": [int(n) for n in counts]},
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _statistics(ds: "ActivationDataset", points: list[str] | None, from_rows: bool) -> dict[str, "Moments"]:
    chosen = ds.spec.select(points) if points else ds.hook_points
    if not from_rows:
        return {name: ds.statistics(name) for name in chosen}
    from actlake.shards.recompute import statistics_from_rows

    with bars(ERRORS) as progress:
        task = progress.add_task("rows", total=len(chosen) * ds.n_rows, detail="")
        return {name: statistics_from_rows(ds, name, on_rows=partial(progress.advance, task)) for name in chosen}


def _covariances(ds: "ActivationDataset", points: list[str], n_rows: int, seed: int) -> dict[str, dict[str, Any]]:
    from actlake.shards.covariance import compute_covariance, write_covariance

    chosen = ds.spec.select(points)
    found = {}
    with bars(ERRORS) as progress:
        task = progress.add_task("covariance", total=len(chosen) * min(n_rows, ds.n_rows), detail="")
        for name in chosen:
            computed = compute_covariance(ds, name, n_rows=n_rows, seed=seed, on_rows=partial(progress.advance, task))
            found[name] = _describe_covariance(computed) | {"key": write_covariance(ds, name, computed)}
    return found


def _describe_covariance(found: "Covariance") -> dict[str, Any]:
    return {
        "width": len(found.mean),
        "n_rows": found.n_rows,
        "seed": found.seed,
        "effective_rank": _number(found.effective_rank),
    }


def _table(points: dict[str, dict[str, Any]]) -> Table:
    names = ("hook point", "rows", "mean norm", "median", "largest", "unit scale", "sqrt(d) scale", "most energy in")
    # Folded, not cut, where the output is narrow.
    table = Table(*(Column(name, overflow="fold") for name in names))
    for name, found in points.items():
        largest = f"{found['outlier_rows'][0]['norm']:,.1f}" if found["outlier_rows"] else ""
        channels = ", ".join(f"{item['channel']}: {item['share']:.1%}" for item in found["outlier_channels"][:3])
        table.add_row(
            name,
            f"{found['count']:,}",
            f"{found['norm_mean']:,.1f}",
            _shown(found["median_norm"], ",.1f"),
            largest,
            _shown(found["unit_scale"], ".3e"),
            _shown(found["sqrt_d_scale"], ".3e"),
            channels,
        )
    return table


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
