"""How datasets and streams show themselves in a notebook."""

from typing import TYPE_CHECKING

from actlake.storage.html import bar_html, table_html

if TYPE_CHECKING:
    from actlake.shards.dataset import ActivationDataset
    from actlake.shards.stream import ActivationStream

#: Hook points shown before the rest is counted.
_SHOWN = 8


def dataset_html(ds: "ActivationDataset") -> str:
    """Return what a dataset is, how much of it is there, and its hook points."""
    manifest, spec = ds.reader.manifest, ds.spec
    missing = manifest.missing(spec.row_space(ds.n_rows_planned))
    ratio = f", {spec.nbytes_per_row * ds.n_rows / manifest.nbytes:.2f}x compressed" if manifest.nbytes else ""
    rows = {
        "model": f"{spec.model} ({spec.architecture})",
        "split": f"{spec.split}, {spec.dtype}, {spec.order} order",
        "rows": f"{ds.n_rows:,} of {ds.n_rows_planned:,} in {len(manifest):,} shards",
        "hook points": _names(ds.hook_points),
        "stored": f"{manifest.nbytes / 1e9:,.3f} GB{ratio}",
        "dataset, row space": f"{spec.dataset_id[:12]}, {spec.row_space_id[:12]}",
    }
    state = f"incomplete: {len(missing):,} shards missing" if missing else "complete"
    # Rounded, nearly all of the rows would look like all of them.
    share = min(ds.n_rows / ds.n_rows_planned, 0.99) if missing else 1.0
    return table_html(f"ActivationDataset {ds.url}", rows) + bar_html(share, state)


def stream_html(stream: "ActivationStream") -> str:
    """Return what a stream delivers, and what it has delivered."""
    settings, stats = stream.settings, stream.stats()
    rows = {
        "hook points": _names(stream.hook_points),
        "batches of": f"{settings.batch_size:,} rows",
        "seed": str(settings.seed),
        "epochs": "no end" if settings.epochs is None else str(settings.epochs),
        "rank": f"{settings.rank} of {settings.world_size}",
        "delivered": ", ".join(f"{name} {_number(value)}" for name, value in stats.items() if value),
    }
    return table_html("ActivationStream", rows)


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else ""
    return f"{len(names)}: {', '.join(names[:_SHOWN])}{more}"


def _number(value: object) -> str:
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
